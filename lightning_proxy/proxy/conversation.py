"""A conversation in normal form: what stays the same when an agent sends it again. No I/O.

Agents re-send the history in their own spelling: arguments re-serialised, ``null`` for ``""`` for
nothing, text beside a tool call dropped, ids shortened, reasoning left out. Each wire has one function
here that turns its messages, and one that turns its reply, into the same list of turns; what clients
were seen to change is not part of a turn. ``Hasher`` makes digests of it in one pass.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import orjson

from .wires.messages_request import BILLING

Json: TypeAlias = dict[str, Any]

SYSTEM, USER, ASSISTANT, CALL, RESULT = b"s", b"u", b"a", b"c", b"t"

_DIGEST_BYTES = 16
_TEXT_PARTS = frozenset(("text", "input_text", "output_text"))
_THINKING = frozenset(("thinking", "redacted_thinking", "reasoning"))
_ROLES = {
    "system": SYSTEM, "developer": SYSTEM, "assistant": ASSISTANT, "tool": RESULT, "function": RESULT,
}  # fmt: skip
# Of an item of the Responses API that is no message and no function call: its content is all else.
_NOT_CONTENT = frozenset(("id", "call_id", "status", "cache_control"))

# An id that an engine drew at random, with room for no chance hit: a UUID, 16 letters and digits in a
# row, or Mistral's 9. Ids that are counted (`call_0`, `functions.search:0`) name nobody.
_RANDOM_RUN = r"(?=[A-Za-z]*[0-9][A-Za-z]*[0-9])(?=[0-9]*[A-Za-z])[A-Za-z0-9]{16,}"
_UNIQUE = re.compile(
    rf"[0-9a-f]{{8}}-[0-9a-f]{{4}}-[0-9a-f]{{4}}-|{_RANDOM_RUN}"
    r"|^(?=[A-Za-z]*[0-9])(?=[0-9]*[A-Za-z])[A-Za-z0-9]{9}$"
)
_ID_IN_TEXT = re.compile(r"[A-Za-z0-9_-]{16,80}")


class Turn(NamedTuple):
    """One thing said, by whom. ``id`` and ``beside`` are no part of the conversation's digest."""

    kind: bytes
    text: str
    id: str | None = None  # of a tool call, or of the call that this is the result of
    beside: str = ""  # what the assistant said beside its tool call: some clients drop it


class Request(NamedTuple):
    """What a request says of its conversation."""

    turns: list[Turn]
    ids: tuple[str, ...] = ()  # of earlier responses and items that it refers to
    whole: bool = True  # the history is all there, not only referred to


class Hasher:
    """A digest of all turns so far; ``copy`` it to go on in two ways."""

    __slots__ = ("_hash",)

    def __init__(self, hash_: Any = None) -> None:
        # SHA-256 has instructions of its own in today's processors: 5 times as fast as BLAKE2 here.
        self._hash = hash_ or hashlib.sha256()

    def add(self, turn: Turn) -> None:
        """Go on by one turn."""
        text = turn.text.encode("utf-8", "surrogatepass")
        self._hash.update(b"%b%d:%b" % (turn.kind, len(text), text))

    def digest(self) -> bytes:
        """16 bytes that stand for the turns so far."""
        digest: bytes = self._hash.digest()
        return digest[:_DIGEST_BYTES]

    def copy(self) -> Hasher:
        """The same so far."""
        return Hasher(self._hash.copy())


def looks_unique(id_: str) -> bool:
    """Whether an id names one thing in the world, and not the first of everybody's."""
    return _UNIQUE.search(id_) is not None


def unique_ids_in(text: str) -> Iterator[str]:
    """Ids written into a text, the last one first: smolagents tells its calls as text, ids and all."""
    return (id_ for id_ in reversed(_ID_IN_TEXT.findall(text)) if looks_unique(id_))


def request_of(wire: str, request: Json) -> Request | None:
    """The conversation that a request goes on with; ``None`` where the wire has none in turns.

    What a request of an unexpected shape raises (``TypeError``, ``ValueError``, ``AttributeError``,
    ``KeyError``, ``RecursionError``) is for the caller to catch.
    """
    read = _REQUESTS.get(wire)
    return read(request) if read is not None else None


def reply_of(response: Json) -> list[list[Turn]]:
    """The turns that an answer adds, one list per choice; what it is, is seen by its shape."""
    if "choices" in response:
        return _chat_reply(response)
    if "output" in response:
        return [responses_turns(response["output"])]
    return [messages_turns([{"role": "assistant", "content": response["content"]}])]


def reply_ids(response: Json) -> list[str]:
    """The ids by which a later request may refer to this answer: its own, and its items'."""
    ids = [response.get("id")]
    output = response.get("output")
    if isinstance(output, list):
        ids += [item.get("id") for item in output]
    return [id_ for id_ in ids if isinstance(id_, str) and looks_unique(id_)]


def system_of(wire: str, request: Json) -> str:
    """The system prompt, whichever way the wire has it; ``""`` where there is none."""
    if wire == "messages":
        return _messages_system(request)
    parts = [_flat(request.get("instructions"))] if wire == "responses" else []
    messages = request.get("input" if wire == "responses" else "messages")
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict) or _ROLES.get(str(message.get("role"))) is not SYSTEM:
            break
        parts.append(_flat(message.get("content")))
    return "\n".join(part for part in parts if part)


def tools_of(request: Json) -> tuple[str, ...]:
    """The sorted names of the tools that the model may call, on any wire."""
    tools = request.get("tools") or request.get("functions")
    names = (_tool_name(tool) for tool in tools) if isinstance(tools, list) else ()
    return tuple(sorted({name for name in names if name}))


# -- Chat Completions ---------------------------------------------------------------------------


def chat_turns(messages: Iterable[Json]) -> list[Turn]:
    """https://platform.openai.com/docs/api-reference/chat/create, ``messages``."""
    turns: list[Turn] = []
    for message in messages:
        role = message.get("role")
        kind = _ROLES.get(role, USER) if isinstance(role, str) else USER
        if kind is not ASSISTANT:
            turns.append(Turn(kind, _flat(message.get("content")), message.get("tool_call_id")))
            continue
        said = spoken(_flat(message.get("content")))
        calls = message.get("tool_calls") or ()
        for call in calls:
            function = call.get("function") or call.get("custom") or {}
            given = function.get("arguments", function.get("input"))
            turns.append(_call(function.get("name"), given, call.get("id"), said))
        if not calls and (call := message.get("function_call")):
            turns.append(_call(call.get("name"), call.get("arguments"), None, said))
        elif not calls:
            turns.append(Turn(ASSISTANT, said))
    return turns


def _chat_request(request: Json) -> Request:
    return Request(chat_turns(request.get("messages") or ()))


def _chat_reply(response: Json) -> list[list[Turn]]:
    messages = [choice["message"] for choice in response["choices"] if "message" in choice]
    return [chat_turns([{**message, "role": "assistant"}]) for message in messages]


# -- Responses ----------------------------------------------------------------------------------


def responses_turns(items: Iterable[Json]) -> list[Turn]:
    """https://platform.openai.com/docs/api-reference/responses/create, ``input`` and ``output``."""
    turns: list[Turn] = []
    for item in items:
        kind = item.get("type") or "message"
        if kind == "message":
            role = _ROLES.get(item.get("role", ""), USER)
            text = _flat(item.get("content"))
            turns.append(Turn(role, spoken(text) if role is ASSISTANT else text))
        elif kind == "function_call":
            turns.append(_call(item.get("name"), item.get("arguments"), item.get("call_id")))
        elif kind in ("function_call_output", "custom_tool_call_output"):
            turns.append(Turn(RESULT, _flat(item.get("output")), item.get("call_id")))
        elif kind == "custom_tool_call":
            turns.append(_call(item.get("name"), item.get("input"), item.get("call_id")))
        elif kind not in _THINKING and kind != "item_reference":
            # A tool of the server's own: the call is the assistant's, an output is not.
            content = {key: value for key, value in item.items() if key not in _NOT_CONTENT}
            text = orjson.dumps(content, option=orjson.OPT_SORT_KEYS).decode()
            turns.append(Turn(RESULT if kind.endswith("_output") else CALL, text, item.get("call_id")))
    return _without_text_beside_calls(turns)


def _responses_request(request: Json) -> Request:
    given = request.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given or []
    instructions = _flat(request.get("instructions"))
    turns = [Turn(SYSTEM, instructions)] if instructions else []
    turns += responses_turns(items)
    ids = [item.get("id") for item in items]
    ids.append(request.get("previous_response_id"))
    referred = any(item.get("type") == "item_reference" for item in items)
    return Request(
        turns,
        tuple(id_ for id_ in ids if isinstance(id_, str) and looks_unique(id_)),
        whole=not (referred or request.get("previous_response_id")),
    )


def _without_text_beside_calls(turns: list[Turn]) -> list[Turn]:
    """Text between two turns of others belongs to the tool calls that stand beside it, if any do."""
    kept: list[Turn] = []
    for turn in turns:
        if turn.kind is CALL and kept and kept[-1].kind is ASSISTANT:
            turn = turn._replace(beside=kept.pop().text)
        elif turn.kind is ASSISTANT and kept and kept[-1].kind is CALL:
            continue
        kept.append(turn)
    return kept


# -- Messages -----------------------------------------------------------------------------------


def messages_turns(messages: Iterable[Json]) -> list[Turn]:
    """https://docs.anthropic.com/en/api/messages, ``messages``."""
    turns: list[Turn] = []
    for message in messages:
        content = message.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        if message.get("role") == "assistant":
            said = spoken(_flat([block for block in blocks if block.get("type") == "text"]))
            calls = [block for block in blocks if str(block.get("type")).endswith("tool_use")]
            turns += [_call(call.get("name"), call.get("input"), call.get("id"), said) for call in calls]
            if not calls:
                turns.append(Turn(ASSISTANT, said))
            continue
        results = [block for block in blocks if block.get("type") == "tool_result"]
        turns += [Turn(RESULT, _flat(result.get("content")), result.get("tool_use_id")) for result in results]
        rest = [block for block in blocks if block.get("type") != "tool_result"]
        if rest or not results:
            turns.append(Turn(USER, _flat(rest)))
    return turns


def _messages_system(request: Json) -> str:
    """Without Claude Code's note to Anthropic, which holds a hash of the call."""
    system = request.get("system")
    if isinstance(system, list):
        system = [block for block in system if not _flat([block]).startswith(BILLING)]
    return _flat(system)


def _messages_request(request: Json) -> Request:
    system = _messages_system(request)
    turns = [Turn(SYSTEM, system)] if system else []
    return Request(turns + messages_turns(request.get("messages") or ()))


# -- Completions --------------------------------------------------------------------------------


def prompt_text(request: Json) -> str | None:
    """The one prompt of a Completions request; ``None`` for several, and for token ids."""
    prompt = request.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    return prompt if isinstance(prompt, str) else None


def completion_texts(response: Json) -> list[str]:
    """The texts that a Completions answer adds to the prompt, one per choice."""
    return [choice["text"] for choice in response["choices"]]


# -- what all of them share -----------------------------------------------------------------------


def _flat(content: object) -> str:
    """Content as text: its text parts joined, anything else in JSON, nothing as ``""``."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    parts = content if isinstance(content, list) else [content]
    return "".join([_part(part) for part in parts])


def _part(part: object) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        kind = part.get("type")
        if kind in _TEXT_PARTS or (kind is None and "text" in part):
            text = part.get("text")
            return text if isinstance(text, str) else ""
        if kind in _THINKING:
            return ""
        part = {key: value for key, value in part.items() if key != "cache_control"}
    return orjson.dumps(part, option=orjson.OPT_SORT_KEYS).decode()


def spoken(text: str) -> str:
    """What the assistant said, without thoughts that the engine left in the text and outer white space."""
    return text.rpartition("</think>")[2].strip()


def _call(name: object, arguments: object, id_: object, beside: str = "") -> Turn:
    return Turn(CALL, f"{name}\n{canonical(arguments)}", id_ if isinstance(id_, str) else None, beside)


def canonical(arguments: object) -> str:
    """Tool arguments such that equal values have equal texts, however a client spelt them."""
    if arguments is None or arguments == "":
        return "{}"
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments)
        except orjson.JSONDecodeError:
            return str(arguments).strip()
    text = orjson.dumps(arguments, option=orjson.OPT_SORT_KEYS)
    if b".0" in text:  # JavaScript has one kind of number: 1.0 comes back as 1
        text = orjson.dumps(_whole_numbers(arguments), option=orjson.OPT_SORT_KEYS)
    return text.decode()


def _whole_numbers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, dict):
        return {key: _whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(item) for item in value]
    return value


def _tool_name(tool: object) -> str:
    if not isinstance(tool, dict):
        return ""
    inner = tool.get("function")
    name = inner.get("name") if isinstance(inner, dict) else tool.get("name")
    return str(name or tool.get("type") or "")


_REQUESTS: Mapping[str, Callable[[Json], Request]] = {
    "chat": _chat_request,
    "responses": _responses_request,
    "messages": _messages_request,
}
