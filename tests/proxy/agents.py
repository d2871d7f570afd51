"""Agents that send their history again in the ways in which real clients were seen to."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.engine import Script
from tests.proxy.raw_http import CHAT, JSON, Answer, send

Json = dict[str, Any]
Resend = Callable[[Json], Json]

TOOLS = [{"type": "function", "function": {"name": "multiply", "parameters": {"type": "object"}}}]
# What the model does in each turn: two calls at once beside text, one call, then it talks.
BOTH = (("multiply", '{"a": 6, "b": 7}'), ("multiply", '{"b":1.0,"a":2}'))
TURNS = (
    Script(text="Let me see.", tool_calls=BOTH),
    Script(tool_calls=(("multiply", '{"a": 42, "b": 2}'),)),
    Script(text=" It is 84. "),
    Script(text="You are welcome."),
)


def _calls(message: Json, **changes: Callable[[Any], Any]) -> Json:
    """The message with its calls' ids or arguments changed."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call["function"])
        if "arguments" in changes:
            function["arguments"] = changes["arguments"](json.loads(function["arguments"]))
        id_ = changes["id"](call["id"]) if "id" in changes else call["id"]
        calls.append({**call, "id": id_, "function": function})
    return {**message, "tool_calls": calls}


def _known(message: Json, *more: str) -> Json:
    """Only the fields that a client knows, and only where they hold something."""
    return {key: message[key] for key in ("role", "content", "tool_calls", *more) if message.get(key)}


def exact(message: Json) -> Json:
    """autogen, llama-index, openai-agents."""
    return message


def reserialised(message: Json) -> Json:
    """langchain, haystack, ag2: arguments written anew, reasoning dropped."""
    return {"content": None, **_known(_calls(message, arguments=json.dumps))}


def compact(message: Json) -> Json:
    """pydantic-ai, vercel, qwen-code: arguments compact, with the keys in another order."""

    def write(arguments: Json) -> str:
        turned = {key: int(arguments[key]) for key in sorted(arguments, reverse=True)}
        return json.dumps(turned, separators=(",", ":"))

    return {**_known(_calls(message, arguments=write)), "refusal": None}


def missing(message: Json) -> Json:
    """google-adk: nothing instead of null."""
    return _known(_calls(message, arguments=json.dumps))


def emptied(message: Json) -> Json:
    """camel, langchain-js: "" instead of null."""
    return {"content": "", **_known(message)}


def textless(message: Json) -> Json:
    """crewai, semantic-kernel: text beside a tool call is dropped."""
    return {**message, "content": None} if message.get("tool_calls") else message


def renamed(message: Json) -> Json:
    """agno: ids of more than 40 characters are rewritten."""
    return _calls(message, id=lambda id_: "call_" + str(len(id_)))


def in_parts(message: Json) -> Json:
    """Content as a list of parts; a name and unknown fields; thoughts that nobody asked for."""
    content = message.get("content")
    parts = [{"type": "text", "text": content, "cache_control": {"type": "ephemeral"}}] if content else None
    return {**message, "content": parts, "name": "bot", "provider_specific_fields": {}, "reasoning": "hm"}


STYLES: tuple[Resend, ...] = (
    exact, reserialised, compact, missing, emptied, textless, renamed, in_parts,
)  # fmt: skip


class Agent:
    """Asks, calls tools, says thanks: four calls, the history sent again each time."""

    def __init__(self, task: str, resend: Resend = exact, *, stream: bool = False) -> None:
        self.resend, self.stream = resend, stream
        system = {"role": "system", "content": "You help."}
        self.history: list[Json] = [system, {"role": "user", "content": task}]
        self.answers: list[str] = []  # ids of the responses
        self._turns = iter(TURNS)

    def body(self) -> Json:
        """The next request."""
        last = len(self.answers) == len(TURNS) - 1  # autogen's last call has no tools any more
        tools = {} if last else {"tools": TOOLS}
        return {"model": "policy", "messages": self.history, "stream": self.stream, **tools}

    def step(self, url: str, *headers: tuple[str, str]) -> Answer:
        """One call; the answer becomes part of the history."""
        script = tuple(next(self._turns).to_header().items())
        answer = send(url, CHAT, self.body(), [*JSON, *script, *headers])
        assert answer.status == 200, answer.body
        self.take(answer)
        return answer

    def take(self, answer: Answer) -> None:
        """Go on from an answer."""
        message, id_ = _streamed(answer) if self.stream else _whole(answer)
        self.answers.append(id_)
        again = self.resend(message)
        self.history = [*self.history, again]
        for call in again.get("tool_calls") or ():
            self.history.append({"role": "tool", "tool_call_id": call["id"], "content": "42"})
        if not again.get("tool_calls"):
            self.history.append({"role": "user", "content": "Thanks. And now?"})


def _whole(answer: Answer) -> tuple[Json, str]:
    return answer.json["choices"][0]["message"], answer.json["id"]


def _streamed(answer: Answer) -> tuple[Json, str]:
    """The message that a client makes of the chunks."""
    text, calls = "", dict[int, Json]()
    for event in answer.events[:-1]:
        delta = event["choices"][0]["delta"]
        text += delta.get("content") or ""
        for piece in delta.get("tool_calls") or ():
            call = calls.setdefault(piece["index"], {"type": "function", "function": {"arguments": ""}})
            function = piece["function"]
            call["function"]["arguments"] += function.get("arguments") or ""
            if "id" in piece:
                call["id"], call["function"]["name"] = piece["id"], function["name"]
    message: Json = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    return message, answer.events[0]["id"]
