"""A Messages request as the Chat Completions request that vLLM makes of it.

vLLM serves Messages by way of its own Chat Completions; this says the same in the proxy, so that the
engine can be asked for tokens. Only what is understood to the last field is translated: whatever
vLLM might refuse, or reads in the light of something that cannot be seen from here (its chat
template), raises ``NotTranslated`` and goes to the engine's own Messages API.

Source of the mapping: vllm/entrypoints/anthropic/{protocol,serving}.py of vLLM 0.31.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from .base import Json

# Fields that vLLM takes and does not look at.
_UNREAD = frozenset({"service_tier", "context_management", "cache_control", "container", "inference_geo"})
_READ = frozenset(
    {
        "model", "messages", "max_tokens", "metadata", "output_config", "thinking", "stop_sequences",
        "stream", "system", "temperature", "tool_choice", "tools", "top_k", "top_p", "chat_template_kwargs",
    }
)  # fmt: skip
_BLOCK_FIELDS = {
    "text": frozenset({"type", "text", "cache_control", "citations"}),
    "image": frozenset({"type", "source", "cache_control"}),
    "tool_use": frozenset({"type", "id", "name", "input", "cache_control", "caller"}),
    "tool_result": frozenset({"type", "tool_use_id", "content", "is_error", "cache_control"}),
    "tool_reference": frozenset({"type", "tool_name", "cache_control"}),
    "thinking": frozenset({"type", "thinking", "signature", "cache_control"}),
    "redacted_thinking": frozenset({"type", "data", "cache_control"}),
}
_TOOL_FIELDS = frozenset(
    {
        "name", "description", "input_schema", "strict", "defer_loading",
        "type", "cache_control", "eager_input_streaming", "input_examples", "allowed_callers",
    }
)  # fmt: skip
_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_EFFORTS = ("low", "medium", "high", "xhigh", "max")
_DISPLAYS = (None, "summarized", "omitted", "updates")
_LEAST_THINKING = 1024  # tokens
_MOST_STOPS = 4  # vLLM's VLLM_MAX_STOP_STRINGS, unless set otherwise
_LARGEST = 2**31 - 1
# An agent's note to Anthropic with a hash that changes per request: vLLM keeps it from the model.
BILLING = "x-anthropic-billing-header"


class NotTranslated(Exception):
    """The request has to go to the engine's own Messages API."""


def has_inline_system(request: Json) -> bool:
    """Whether there are system messages among the others, as Claude Code's reminders are."""
    messages = request.get("messages")
    return isinstance(messages, list) and any(
        isinstance(message, dict) and message.get("role") == "system" for message in messages
    )


def chat_request(request: Json, *, keeps_inline_system: bool | None = None) -> Json:
    """The Chat Completions request for a Messages request as ``json.loads`` gives it.

    ``keeps_inline_system``: whether the engine leaves system messages where they stand, or makes them
    part of the first; ``None`` where that is not known. Raises NotTranslated.
    """
    _only(request, _READ | _UNREAD)
    _optional(request, "metadata", dict)
    asked = _list(request.get("messages"))
    if has_inline_system(request) and keeps_inline_system is None:
        raise NotTranslated("system messages among the others")
    system = _system_text(request.get("system"))
    if not keeps_inline_system:
        system += "".join(_inline_text(message) for message in asked if _is_system(message))
        asked = [message for message in asked if not _is_system(message)]
    messages = [*_as_system(system), *_messages(asked)]
    if not messages:
        raise NotTranslated("no messages")
    most = _whole_number(request.get("max_tokens"), 1)
    chat: Json = {
        "model": _text(request.get("model")),
        "messages": messages,
        "max_tokens": most,
        "max_completion_tokens": most,
        "stop": _stops(request.get("stop_sequences")),
        "tool_choice": None,
    }
    for name in ("temperature", "top_p"):
        if request.get(name) is not None:
            chat[name] = _number(request[name])
    if request.get("top_k") is not None:
        chat["top_k"] = _whole_number(request["top_k"], -_LARGEST)
    if _optional(request, "stream", bool):
        chat["stream"] = True
        chat["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    template = _optional(request, "chat_template_kwargs", dict)
    if template is not None:
        if "chat_template" in template:
            raise NotTranslated("a chat template of its own")
        chat["chat_template_kwargs"] = template
    chat |= _output(request.get("output_config"))
    chat |= _thinking(request.get("thinking"), most)
    chat |= _tools(request.get("tools"), request.get("tool_choice"))
    return chat


# -- messages ----------------------------------------------------------------------------------------


def _system_text(system: Any) -> str:
    if system is None or isinstance(system, str):
        return system or ""
    return _without_billing(_block_of(block, "text").get("text") for block in _list(system))


def _inline_text(message: Json) -> str:
    _only(message, {"role", "content"})
    content = message.get("content")
    blocks = (
        [content] if isinstance(content, str) else [_block_of(b, "text").get("text") for b in _list(content)]
    )
    return _without_billing(blocks)


def _without_billing(texts: Iterable[Any]) -> str:
    return "".join(text for text in map(_text_or_empty, texts) if not text.startswith(BILLING))


def _as_system(text: str) -> list[Json]:
    return [{"role": "system", "content": text}] if text else []


def _is_system(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "system"


def _messages(messages: Any) -> list[Json]:
    made: list[Json] = []
    for message in _list(messages):
        _only(_object(message), {"role", "content"})
        role, content = message.get("role"), message.get("content")
        if role == "system":
            made += _as_system(_inline_text(message))
        elif role not in ("user", "assistant"):
            raise NotTranslated(f"role {role!r}")
        elif isinstance(content, str):
            made.append({"role": role, "content": content})
        elif role == "user":
            made += _of_user(_list(content))
        else:
            made.append(_of_assistant(_list(content)))
    return made


def _of_user(blocks: list[Any]) -> list[Json]:
    """What a user's message becomes: results of tools come before what the user says beside them."""
    made: list[Json] = []
    parts: list[Json] = []
    for block in blocks:
        kind = _block_of(block, "text", "image", "tool_result")["type"]
        if kind == "tool_result":
            made += _of_tool(block)
        elif kind == "image":
            parts.append(_image(block))
        elif _text_or_empty(block.get("text")):
            parts.append({"type": "text", "text": block["text"]})
    return [*made, {"role": "user", "content": _content(parts)}] if parts else made


def _of_assistant(blocks: list[Any]) -> Json:
    message: Json = {"role": "assistant"}
    parts: list[Json] = []
    calls: list[Json] = []
    thoughts: list[str] = []
    for block in blocks:
        kind = _block_of(block, "text", "tool_use", "thinking", "redacted_thinking")["type"]
        if kind == "tool_use":
            # The engine's own JSON: what it spells, the model reads.
            function = {
                "name": _text(block.get("name")),
                "arguments": json.dumps(_object(block.get("input"))),
            }
            calls.append({"id": _text(block.get("id")), "type": "function", "function": function})
        elif kind == "thinking":
            _optional(block, "signature", str)
            thoughts.append(_text_or_empty(block.get("thinking")))
        elif kind == "redacted_thinking":
            _optional(block, "data", str)
        elif _text_or_empty(block.get("text")):
            parts.append({"type": "text", "text": block["text"]})
    if thoughts:
        message["reasoning"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    if parts:
        message["content"] = _content(parts)
    return message


def _of_tool(block: Json) -> list[Json]:
    """The messages that one ``tool_result`` becomes: its text, then its images, then its references."""
    call_id, content = _text(block.get("tool_use_id")), block.get("content")
    _optional(block, "is_error", bool)
    items = [] if content is None or isinstance(content, str) else _list(content)
    texts: list[str] = [content] if isinstance(content, str) else []
    images: list[Json] = []
    references: list[Json] = []
    for item in items:
        kind = _block_of(item, "text", "image", "tool_reference")["type"]
        if kind == "text":
            texts.append(_text_or_empty(item.get("text")))
        elif kind == "image":
            images.append(_image(item))
        else:
            references.append({"type": "tool_reference", "name": _text(item.get("tool_name"))})
    made: list[Json] = [{"role": "tool", "tool_call_id": call_id, "content": "\n".join(texts)}]
    if images:
        made.append({"role": "user", "content": images})
    if references:
        made.append({"role": "tool", "tool_call_id": call_id, "content": references})
    return made


def _image(block: Json) -> Json:
    source = _object(block.get("source"))
    if source.get("type") == "url":
        url = _text(source.get("url"))
    elif source.get("type") == "base64":
        url = f"data:{_text(source.get('media_type'))};base64,{_text(source.get('data'))}"
    else:
        raise NotTranslated(f"image source {source.get('type')!r}")
    return {"type": "image_url", "image_url": {"url": url}}


def _content(parts: list[Json]) -> str | list[Json]:
    if len(parts) == 1 and parts[0]["type"] == "text":
        text: str = parts[0]["text"]
        return text
    return parts


# -- parameters --------------------------------------------------------------------------------------


def _tools(tools: Any, choice: Any) -> Json:
    if tools is None and choice is None:
        return {}
    # Without tools vLLM's two APIs disagree on what a choice means, and on what an empty list does.
    made = [_tool(tool) for tool in _list(tools)]
    if not made:
        raise NotTranslated("no tools")
    if choice is None:
        return {"tools": made, "tool_choice": "auto"}
    _only(_object(choice), {"type", "name", "disable_parallel_tool_use"})
    _optional(choice, "name", str)
    alone = _optional(choice, "disable_parallel_tool_use", bool)
    if choice.get("type") == "tool":
        name = _text(choice.get("name"))
        if name not in {tool["function"]["name"] for tool in made}:
            raise NotTranslated("a tool that is not there")
        chosen: Any = {"type": "function", "function": {"name": name}}
    else:
        chosen = _TOOL_CHOICES.get(_text(choice.get("type")))
        if chosen is None:
            raise NotTranslated(f"tool choice {choice['type']!r}")
    return {"tools": made, "tool_choice": chosen, "parallel_tool_calls": not alone}


def _tool(tool: Any) -> Json:
    _only(_object(tool), _TOOL_FIELDS)
    if tool.get("type") not in (None, "custom"):
        raise NotTranslated(f"a tool of the provider: {tool['type']!r}")
    schema = _object(tool.get("input_schema"))
    function = {
        "name": _text(tool.get("name")),
        "description": _optional(tool, "description", str),
        "parameters": schema if "type" in schema else {**schema, "type": "object"},
        "strict": _optional(tool, "strict", bool),
        "defer_loading": _optional(tool, "defer_loading", bool),
    }
    return {"type": "function", "function": function}


def _thinking(thinking: Any, most: int) -> Json:
    if thinking is None:
        return {}
    kind = _object(thinking).get("type")
    if thinking.get("display") not in _DISPLAYS:
        raise NotTranslated("display of thinking")
    if kind == "adaptive":
        _only(thinking, {"type", "display"})
        return {}
    if kind != "enabled":
        # What disabled means depends on the engine's chat template.
        raise NotTranslated(f"thinking {kind!r}")
    _only(thinking, {"type", "budget_tokens", "display"})
    budget = _whole_number(thinking.get("budget_tokens"), _LEAST_THINKING)
    if budget >= most:
        raise NotTranslated("more thinking than tokens")
    return {"thinking_token_budget": budget}


def _output(config: Any) -> Json:
    if config is None:
        return {}
    _only(_object(config), {"effort", "format"})
    effort, form = config.get("effort"), config.get("format")
    made: Json = {}
    if effort is not None:
        if effort not in _EFFORTS:
            raise NotTranslated(f"effort {effort!r}")
        made["reasoning_effort"] = effort
    if form is not None:
        _only(_object(form), {"type", "schema"})
        schema = _object(form.get("schema"))
        if form.get("type") != "json_schema" or not schema:
            raise NotTranslated("output format")
        named = {"name": "json_schema", "schema": schema}
        made["response_format"] = {"type": "json_schema", "json_schema": named}
    return made


def _stops(stops: Any) -> list[str] | None:
    if stops is None:
        return None
    if len(_list(stops)) > _MOST_STOPS:
        raise NotTranslated("many stop sequences")
    return [_text_or_empty(stop) for stop in stops]


# -- types: as strict as JSON, stricter than vLLM's own ----------------------------------------------


def _only(of: Json, known: Iterable[str]) -> None:
    unknown = of.keys() - known
    if unknown:
        raise NotTranslated(f"unknown: {', '.join(sorted(unknown))}")


def _object(value: Any) -> Json:
    if not isinstance(value, dict):
        raise NotTranslated("not an object")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise NotTranslated("not a list")
    return value


def _text(value: Any) -> str:
    if not _text_or_empty(value):
        raise NotTranslated("an empty text")
    made: str = value
    return made


def _text_or_empty(value: Any) -> str:
    if not isinstance(value, str):
        raise NotTranslated("not a text")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise NotTranslated("not a number")
    made: float = value
    return made


def _whole_number(value: Any, least: int) -> int:
    if type(value) is not int or not least <= value <= _LARGEST:
        raise NotTranslated("not a whole number in range")
    return value


def _optional(of: Json, key: str, kind: type) -> Any:
    value = of.get(key)
    if value is not None and type(value) is not kind:
        raise NotTranslated(f"{key} is no {kind.__name__}")
    return value


def _block_of(block: Any, *kinds: str) -> Json:
    """A content block of one of the kinds that are expected here, with fields that are known."""
    kind = _object(block).get("type")
    if kind not in kinds:
        raise NotTranslated(f"a block {kind!r}")
    _only(block, _BLOCK_FIELDS[str(kind)])
    made: Json = block
    return made
