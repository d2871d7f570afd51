"""Responses requests in the words of Chat Completions, where both mean the same to vLLM.

vLLM makes the same chat messages of a Responses request and renders them with the same template;
only its answers differ in what they tell of the tokens. What is known to mean the same is listed
here; ``translate`` returns ``None`` for everything else, and the request goes to the engine as it is.
Learnt from vLLM 0.31 (``entrypoints/openai/responses``) and compared with it by tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .base import Json
from .responses_tools import NOT_A_REQUEST, Different, Tools, echoed_tools, flat_name, need, tools_of

LOGPROBS = "message.output_text.logprobs"

# Fields that vLLM's Responses API reads but that do not shape the answer, or not at all.
_ECHOED = ("metadata", "user", "max_tool_calls", "service_tier")
_IGNORED = frozenset(
    ("store", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "client_metadata",
     "stream_options")
)  # fmt: skip
_INCLUDES = frozenset(
    ("code_interpreter_call.outputs", "computer_call_output.output.image_url",
     "file_search_call.results", "message.input_image.image_url", "reasoning.encrypted_content")
)  # fmt: skip
_TIERS = frozenset(("auto", "default", "flex", "scale", "priority"))
_EFFORTS = frozenset(("none", "minimal", "low", "medium", "high", "xhigh", "max"))
_CALL_FIELDS = frozenset(
    ("type", "arguments", "call_id", "name", "id", "status", "namespace", "async", "caller", "created_by",
     "parsed_arguments")
)  # fmt: skip
_UNREAD = frozenset(("internal_chat_message_metadata_passthrough",))  # of any item; Codex sends it
_SMALLEST_TEMPERATURE = 1e-2  # vLLM raises what is between 0 and this
_GREEDY = 1e-5  # vLLM samples nothing below this


@dataclass(frozen=True, slots=True)
class Habits:
    """How an engine answers on ``/v1/responses``, learnt from one tiny request.

    ``shell``: the response that it gave, of which every call's echo is made; ``None`` where its
    shape is not the one that is known here. ``tool``: the fields of a function tool in its echo, with
    what stands there where a request says nothing. ``limit``: its own limit of output tokens beside
    the model's length.
    """

    asks: bool  # takes `enable_response_messages` and `include` of logprobs
    shell: Json | None = None
    tool: Json | None = None
    max_model_len: int = 0  # tokens
    limit: int | None = None  # tokens
    forces_tools: bool = False  # a forced tool call has a grammar, and `text` is null in its echo

    @property
    def newer(self) -> bool:
        """Whether its types are those of the openai package from version 3 on."""
        return self.tool is not None and "async" in self.tool

    @property
    def translates(self) -> bool:
        """Whether the engine's answers can be told from those of Chat Completions."""
        return self.shell is not None and self.tool is not None and self.max_model_len > 0


@dataclass(frozen=True, slots=True)
class Translated:
    """A request in both languages: for the engine, and what its echo says."""

    chat: Json
    echo: Json  # the fields of the response that repeat the request
    names: dict[str, Json]  # of calls: by the model's name for a function, its `name` and `namespace`


def translate(request: Json, habits: Habits, special: Sequence[Json] = ()) -> Translated | None:
    """The request for Chat Completions, or ``None`` where that might mean something else.

    ``special``: the engine's echo of the tools that are no plain functions.
    """
    try:
        tools = tools_of(request, forces=habits.forces_tools)
        chat = {"model": request["model"], "messages": _messages(request), **_offer(request, tools)}
        echo = _echo(request, habits, special)
        return Translated({**chat, **_sampling(request), **_streaming(request)}, echo, tools.names)
    except (Different, *NOT_A_REQUEST):
        return None


# -- the conversation ----------------------------------------------------------------------------


def _messages(request: Json) -> list[Json]:
    instructions, given = request.get("instructions"), request["input"]
    need(isinstance(instructions, str | None))
    messages: list[Json] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    need(isinstance(given, list) and given)
    # An unfinished last item of the assistant would be continued.
    need(given[-1].get("status") in (None, "completed"))
    for item in given:
        read = {key: value for key, value in item.items() if key not in _UNREAD}
        _READERS[read.get("type", "message")](read, messages)
    return messages


def _message(item: Json, messages: list[Json]) -> None:
    role, content = item["role"], item["content"]
    if role == "assistant":
        text = content if isinstance(content, str) else _output_text(item)
        need(isinstance(text, str))
        _join(messages, "content", text)
        return
    need(role in ("user", "system", "developer"))
    need(item.keys() <= {"type", "role", "content", "id", "status", "phase"})
    messages.append({"role": role, "content": content if isinstance(content, str) else _texts(content)})


def _output_text(item: Json) -> Any:
    """The text of an answer that the agent sends back."""
    need(item.get("type") == "message")
    need(item.keys() <= {"type", "role", "content", "id", "status", "phase", "summary"})
    need(item.get("status", "completed") in ("completed", "incomplete", "in_progress"))
    need(isinstance(item.get("id", ""), str))
    for part in item["content"]:
        need(part["type"] == "output_text" and isinstance(part["text"], str))
        need(part.get("annotations", []) == [] and not part.get("logprobs"))
    return item["content"][0]["text"]


def _texts(content: list[Json]) -> list[Json]:
    need(content)
    for part in content:
        need(part["type"] == "input_text" and isinstance(part["text"], str) and len(part) == 2)
    return [{"type": "text", "text": part["text"]} for part in content]


def _function_call(item: Json, messages: list[Json]) -> None:
    need(item.keys() <= _CALL_FIELDS)
    need(all(isinstance(item[key], str) for key in ("arguments", "call_id", "name")))
    need(all(item.get(key) is None for key in ("async", "caller")))
    need(isinstance(item.get("namespace"), str | None))
    need(isinstance(item.get("id"), str | None))
    need(item.get("status") in (None, "completed", "incomplete", "in_progress"))
    name = flat_name(item["name"], item.get("namespace"))
    function = {"name": name, "arguments": item["arguments"]}
    call = {"id": item["call_id"], "type": "function", "function": function}
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
    else:
        messages.append({"role": "assistant", "tool_calls": [call]})


def _function_output(item: Json, messages: list[Json]) -> None:
    need(item.keys() <= {"type", "call_id", "output", "id", "status"})
    need(isinstance(item["call_id"], str))
    output = item["output"] if isinstance(item["output"], str) else _texts(item["output"])
    messages.append({"role": "tool", "content": output, "tool_call_id": item["call_id"]})


def _reasoning(item: Json, messages: list[Json]) -> None:
    need(item.keys() <= {"type", "id", "summary", "content", "encrypted_content", "status"})
    need(isinstance(item.get("id", ""), str) and not item.get("encrypted_content"))
    need(item.get("status") in (None, "completed"))
    said: list[Json] = item.get("content") or []
    for part in said:
        need(part["type"] == "reasoning_text")
    for part in item["summary"]:
        need(part["type"] == "summary_text")
    texts = [part["text"] for part in said or item["summary"]]
    need(all(isinstance(text, str) for text in texts))
    _join(messages, "reasoning", texts[0] if texts else "")


def _join(messages: list[Json], key: str, text: str) -> None:
    """Into the assistant's message at the end if that has none of this yet, else as a new one."""
    if messages and messages[-1]["role"] == "assistant" and messages[-1].get(key) is None:
        messages[-1][key] = text
    else:
        messages.append({"role": "assistant", key: text})


_READERS: dict[str, Callable[[Json, list[Json]], None]] = {
    "message": _message,
    "function_call": _function_call,
    "function_call_output": _function_output,
    "reasoning": _reasoning,
}


# -- tools, sampling, form -----------------------------------------------------------------------


def _offer(request: Json, tools: Tools) -> Json:
    choice = request.get("tool_choice", "auto")
    if isinstance(choice, dict):
        need(choice.keys() == {"type", "name"} and choice["type"] == "function")
        need(choice["name"] in [function["name"] for function in tools.functions])
        choice = {"type": "function", "function": {"name": choice["name"]}}
    else:
        need(choice in ("auto", "none", "required"))
    functions = [{"type": "function", "function": function} for function in tools.functions]
    return {"tools": functions, "tool_choice": choice}


def _sampling(request: Json) -> Json:
    """Parameters by the names that Chat Completions has for them; only those that are set."""
    made: Json = {}
    for key, low, high in _NUMBERS:
        value = request.get(key)
        if value is not None:
            need(_is_number(value) and low <= value <= high)
            made[key] = value
    for key, chat_key, least in _COUNTS:
        value = request.get(key)
        if value is not None:
            need(isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63)
            made[chat_key] = value
    stop = request.get("stop")
    if stop is not None:
        need(isinstance(stop, str) or all(isinstance(piece, str) for piece in stop))
        made["stop"] = stop
    effort = (request.get("reasoning") or {}).get("effort")
    if effort is not None:
        need(effort in _EFFORTS)
        made["reasoning_effort"] = effort
    return made


_NUMBERS = (
    ("temperature", 0.0, 100.0),
    ("top_p", 1e-9, 1.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("repetition_penalty", 1e-9, 100.0),
)
_COUNTS = (
    ("top_k", "top_k", -1),
    ("seed", "seed", -(2**63)),
    ("max_output_tokens", "max_completion_tokens", 1),
)


def _streaming(request: Json) -> Json:
    stream = request.get("stream")
    need(isinstance(stream, bool | None))
    return {"stream": True, "stream_options": {"include_usage": True}} if stream else {}


# -- the echo ------------------------------------------------------------------------------------


def _echo(request: Json, habits: Habits, special: Sequence[Json]) -> Json:
    shell, tool_shape = habits.shell, habits.tool
    need(shell is not None and tool_shape is not None)
    assert shell is not None
    assert tool_shape is not None
    _only_known(request)
    need((request.get("max_output_tokens") or 0) <= habits.max_model_len)
    echo: Json = {key: request.get(key) for key in ("instructions", *_ECHOED)}
    echo["service_tier"] = request.get("service_tier", "auto")
    echo["parallel_tool_calls"] = request.get("parallel_tool_calls") is not False
    echo["tool_choice"] = request.get("tool_choice", "auto")
    if isinstance(echo["tool_choice"], dict):
        echo["tool_choice"] = {"name": request["tool_choice"]["name"], "type": "function"}
    echo["tools"] = echoed_tools(request, tool_shape, special)
    for key in ("presence_penalty", "frequency_penalty"):
        echo[key] = shell[key] if request.get(key) is None else float(request[key])
    echo["max_output_tokens"] = request.get("max_output_tokens")  # None until the prompt is known
    return {**echo, **_echoed_sampling(request, shell), **_echoed_form(request, shell)}


def _only_known(request: Json) -> None:
    need(request.keys() <= _KNOWN)
    need(request.get("metadata") is None or all(isinstance(v, str) for v in request["metadata"].values()))
    need(isinstance(request.get("user"), str | None))
    need(isinstance(request.get("prompt_cache_key"), str | None))
    need(isinstance(request.get("store"), bool | None))
    need(isinstance(request.get("parallel_tool_calls"), bool | None))
    need(isinstance(request.get("max_tool_calls"), int | None))
    need(request.get("service_tier", "auto") in _TIERS)
    need(request.get("truncation", "disabled") == "disabled")
    need(request.get("background") is None or request["background"] is False)
    need(request.get("previous_response_id") is None and request.get("prompt") is None)
    need(set(request.get("include") or ()) <= _INCLUDES)
    top = request.get("top_logprobs")
    need(top is None or (isinstance(top, int) and not isinstance(top, bool)))


_KNOWN = (
    frozenset(("model", "input", "instructions", "tools", "tool_choice", "parallel_tool_calls", "stop",
               "reasoning", "text", "stream", "truncation", "include", "top_logprobs",
               "background", "previous_response_id", "prompt", *_ECHOED))
    | _IGNORED
    | {key for key, *_ in _NUMBERS}
    | {key for key, *_ in _COUNTS}
)  # fmt: skip


def _echoed_sampling(request: Json, shell: Json) -> Json:
    temperature, top_p = request.get("temperature"), request.get("top_p")
    if temperature is None:
        temperature = shell["temperature"]
    elif 0 < temperature < _SMALLEST_TEMPERATURE:
        temperature = _SMALLEST_TEMPERATURE
    if temperature < _GREEDY:
        top_p = 1.0
    elif top_p is None:
        need(shell["temperature"] >= _GREEDY)  # else the default does not show in the shell
        top_p = shell["top_p"]
    return {"temperature": float(temperature), "top_p": float(top_p)}


def _echoed_form(request: Json, shell: Json) -> Json:
    """``reasoning`` and ``text``; the shell shows all the fields that they have."""
    reasoning, text = request.get("reasoning"), request.get("text")
    if reasoning is not None:
        need(reasoning.keys() <= {"effort", "summary"})
        need(reasoning.get("summary") in (None, "auto", "concise", "detailed"))
        reasoning = {**shell["reasoning"], **reasoning}
    if text is not None:
        need(not any(tool.get("strict") for tool in request["tools"]))  # a grammar might replace it
        need(text.keys() <= {"format", "verbosity"})
        need(text.get("format") in (None, {"type": "text"}))
        need(text.get("verbosity") in (None, "low", "medium", "high"))
        forced = request.get("tool_choice", "auto") not in ("auto", "none")
        text = None if forced else {**shell["text"], **text}
    return {"reasoning": reasoning, "text": text}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
