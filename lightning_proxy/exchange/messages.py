"""Requests and answers of all four APIs as one list of messages, for whoever reads a span elsewhere.

What it says stays as it was said: texts are joined, never trimmed, and tool arguments stay the JSON
text that they were where the API has them as text. (Attribution compares conversations in a normal form
of its own, which leaves out more: ``proxy/conversation.py``.) No I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import orjson

from lightning_proxy.store import Span

Json: TypeAlias = dict[str, Any]

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"

_ROLES = {"developer": SYSTEM, "function": TOOL}
_TEXTS = frozenset(("text", "input_text", "output_text", "refusal", "summary_text", "reasoning_text"))
_CALLS = frozenset(("function_call", "custom_tool_call", "mcp_call"))
_OUTPUTS = frozenset(("function_call_output", "custom_tool_call_output"))
_MAY_BE_ODD = (KeyError, TypeError, ValueError, AttributeError, RecursionError)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call of the assistant's; ``arguments`` is JSON text as a rule, and any text in bad cases."""

    id: str | None
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message. ``role`` is system, user, assistant or tool, or what the agent made up.

    ``parts`` is JSON text: the list of those content parts that are no text (images, files, server
    tools), as the API has them; ``None`` where there are none.
    """

    role: str
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    parts: str | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """One choice of an answer."""

    message: Message
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that the model may call. ``parameters`` is JSON text: its schema, or all there is of it."""

    type: str
    name: str
    description: str | None
    parameters: str | None


@dataclass(frozen=True, slots=True)
class Exchange:
    """A span's request and answer, read. What could not be read is empty."""

    messages: tuple[Message, ...]
    replies: tuple[Reply, ...]
    tools: tuple[Tool, ...]


def exchange_of(span: Span) -> Exchange:
    """Read a span; a request or an answer of an unexpected shape has no messages."""
    request = parsed(span.request)
    read = _REQUESTS.get(span.wire, _chat_request)
    return Exchange(
        tuple(_tried(lambda: list(read(request)))),
        tuple(_tried(lambda: list(replies_of(parsed(span.response))))),
        tuple(_tried(lambda: list(tools_of(request)))),
    )


def parsed(body: bytes | None) -> Json:
    """A body as a JSON object; {} where it is none."""
    try:
        value = orjson.loads(body or b"{}")
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def replies_of(response: Json) -> Iterator[Reply]:
    """The choices of an answer; which API it is of, is seen by its shape."""
    if "choices" in response:
        for choice in response["choices"]:
            message = choice.get("message")
            said = (
                Message(ASSISTANT, str(choice.get("text") or ""))
                if message is None
                else chat_message(message)
            )
            yield Reply(said, choice.get("finish_reason"))
    elif "output" in response:
        details = response.get("incomplete_details") or {}
        reason = details.get("reason") or response.get("status")
        messages = list(_items(response["output"]))
        yield Reply(_merged(messages), reason)
    elif "content" in response:
        yield Reply(_merged(list(_blocks(ASSISTANT, response["content"]))), response.get("stop_reason"))


def tools_of(request: Json) -> Iterator[Tool]:
    """The tools that a request offers, on any wire."""
    for tool in request.get("tools") or request.get("functions") or ():
        kind = str(tool.get("type") or "function")
        inner = tool.get("function") or tool.get("custom") or tool
        schema = inner.get("parameters", inner.get("input_schema", inner.get("format")))
        if schema is None and inner.get("name") is None:  # a tool of the server's own: its settings
            schema = tool
        yield Tool(
            "function" if "input_schema" in inner else kind,
            str(inner.get("name") or kind),
            inner.get("description"),
            None if schema is None else to_json(schema),
        )


def same_turn(message: Message) -> tuple[object, ...]:
    """What stays of a message when an agent sends it again, spelt in its own way."""
    calls = tuple((call.name, _value(call.arguments)) for call in message.tool_calls)
    # Text beside a tool call, ids and reasoning are what clients drop or rewrite.
    return message.role, "" if calls else message.content.strip(), calls, message.parts


def to_json(value: Any) -> str:
    """A value as JSON text."""
    return orjson.dumps(value).decode()


# -- the four APIs -----------------------------------------------------------------------------------


def _chat_request(request: Json) -> Iterator[Message]:
    for message in request.get("messages") or ():
        yield chat_message(message)


def chat_message(message: Json) -> Message:
    """A message of Chat Completions. Raises what a message of another shape raises."""
    role = str(message.get("role") or ASSISTANT)
    calls = [
        _call(call.get("id"), call.get("function") or call.get("custom") or {})
        for call in message.get("tool_calls") or ()
    ]
    if not calls and (call := message.get("function_call")):
        calls = [_call(None, call)]
    text, parts = _content(message.get("content") or message.get("refusal"))
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    return Message(
        _ROLES.get(role, role),
        text,
        reasoning if isinstance(reasoning, str) else None,
        tuple(calls),
        message.get("tool_call_id"),
        parts,
    )


def _completions_request(request: Json) -> Iterator[Message]:
    prompt = request.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if prompt is not None:
        yield Message(USER, prompt if isinstance(prompt, str) else to_json(prompt))


def _responses_request(request: Json) -> Iterator[Message]:
    if request.get("instructions"):
        yield Message(SYSTEM, _content(request["instructions"])[0])
    given = request.get("input")
    items = [{"role": USER, "content": given}] if isinstance(given, str) else given or ()
    pending: list[Message] = []  # an assistant's reasoning, text and calls are items of their own
    for message in _items(items):
        if message.role == ASSISTANT and not (pending and message.content and pending[-1].content):
            pending.append(message)
            continue
        if pending:
            yield _merged(pending)
            pending = []
        if message.role == ASSISTANT:
            pending.append(message)
        else:
            yield message
    if pending:
        yield _merged(pending)


def _items(items: Iterable[Json]) -> Iterator[Message]:
    for item in items:
        kind = item.get("type") or "message"
        if kind == "message":
            role = str(item.get("role") or ASSISTANT)
            text, parts = _content(item.get("content"))
            yield Message(_ROLES.get(role, role), text, parts=parts)
        elif kind in _CALLS:
            yield Message(ASSISTANT, tool_calls=(_call(item.get("call_id") or item.get("id"), item),))
        elif kind in _OUTPUTS:
            text, parts = _content(item.get("output"))
            yield Message(TOOL, text, tool_call_id=item.get("call_id"), parts=parts)
        elif kind == "reasoning":
            yield Message(ASSISTANT, reasoning=_reasoning(item))
        elif kind != "item_reference":  # a server's tool: told as it is
            yield Message(TOOL if kind.endswith("_output") else ASSISTANT, parts=to_json([item]))


def _reasoning(item: Json) -> str | None:
    pieces = [*(item.get("content") or ()), *(item.get("summary") or ())]
    return "\n".join(piece["text"] for piece in pieces if piece.get("text")) or None


def _messages_request(request: Json) -> Iterator[Message]:
    if request.get("system"):
        yield Message(SYSTEM, _content(request["system"])[0])
    for message in request.get("messages") or ():
        role = str(message.get("role"))
        made = list(_blocks(role, message.get("content")))
        yield from [_merged(made)] if role == ASSISTANT and made else made


def _blocks(role: str, content: Any) -> Iterator[Message]:
    """A message of Anthropic's: its tool results become messages of their own, as elsewhere."""
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content or ()
    rest = []
    for block in blocks:
        kind = block.get("type")
        if kind == "tool_result":
            text, parts = _content(block.get("content"))
            yield Message(TOOL, text, tool_call_id=block.get("tool_use_id"), parts=parts)
        elif kind == "tool_use":
            arguments = block.get("input")
            text = arguments if isinstance(arguments, str) else to_json(arguments)
            call = ToolCall(block.get("id"), str(block.get("name")), text)
            yield Message(ASSISTANT, tool_calls=(call,))
        elif kind == "thinking":
            yield Message(ASSISTANT, reasoning=block.get("thinking"))
        else:
            rest.append(block)
    if rest:
        text, parts = _content(rest)
        yield Message(_ROLES.get(role, role), text, parts=parts)


_REQUESTS: Mapping[str, Callable[[Json], Iterator[Message]]] = {
    "chat": _chat_request,
    "completions": _completions_request,
    "responses": _responses_request,
    "messages": _messages_request,
}


# -- what they share --------------------------------------------------------------------------------


def _merged(messages: list[Message]) -> Message:
    """What one assistant said in one go, told piece by piece, as one message."""
    reasoning = [message.reasoning for message in messages if message.reasoning]
    parts = [part for message in messages if message.parts for part in orjson.loads(message.parts)]
    return Message(
        ASSISTANT,
        "".join(message.content for message in messages),
        "\n".join(reasoning) or None,
        tuple(call for message in messages for call in message.tool_calls),
        parts=to_json(parts) if parts else None,
    )


def _call(id_: object, function: Json) -> ToolCall:
    given = function.get("arguments", function.get("input"))
    arguments = given if isinstance(given, str) else to_json({} if given is None else given)
    return ToolCall(id_ if isinstance(id_, str) else None, str(function.get("name") or ""), arguments)


def _content(content: Any) -> tuple[str, str | None]:
    """Its texts, joined, and what is no text as a JSON list."""
    if isinstance(content, str):
        return content, None
    if content is None:
        return "", None
    texts, others = [], []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            texts.append(part)
        elif part.get("type") in _TEXTS or ("type" not in part and "text" in part):
            texts.append(str(part.get("text") or part.get("refusal") or ""))
        else:
            others.append(part)
    return "".join(texts), to_json(others) if others else None


def _value(arguments: str) -> str:
    try:
        return orjson.dumps(orjson.loads(arguments or "{}"), option=orjson.OPT_SORT_KEYS).decode()
    except orjson.JSONDecodeError:
        return arguments.strip()


def _tried(read: Callable[[], list[Any]]) -> list[Any]:
    try:
        return read()
    except _MAY_BE_ODD:
        return []
