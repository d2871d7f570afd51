"""Requests as agents send them: valid, odd and broken; for the engine itself and for the proxy before it.

``corpus(model)`` is all of them. A generating wire joins by one line there: ``*wire(...)`` with a
body that is valid for it and the variations that are its own; the odd and the broken ones that
every wire shares are made from that body.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.proxy.raw_http import JSON, Headers

Json = dict[str, Any]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGA"
    "WjR9awAAAABJRU5ErkJggg=="
)
SQL = {"query": {"type": "string"}}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "sql",
        "description": "Run a query.",
        "parameters": {"type": "object", "properties": SQL, "required": ["query"]},
    },
}
CALLED = {"id": "call_1", "type": "function", "function": {"name": "sql", "arguments": '{"query": "é"}'}}
SCHEMA = {
    "name": "answer",
    "schema": {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]},
}
USAGE = {"stream_options": {"include_usage": True}}


@dataclass(frozen=True)
class Case:
    """One request."""

    name: str
    target: str
    body: bytes | None = None
    method: str = "POST"
    headers: Headers = field(default=JSON)

    def __str__(self) -> str:
        return self.name


def corpus(model: str) -> list[Case]:
    """Every request; ``model`` is one that the engine serves."""
    chat: Json = {
        "model": model,
        "messages": [
            {"role": "system", "content": "items(price, stock)"},
            {"role": "user", "content": "What is the highest price?"},
        ],
        "max_tokens": 12,
        "temperature": 0,
    }
    message = {**chat, "messages": chat["messages"][1:], "system": "items(price, stock)"}
    response = {
        "model": model,
        "instructions": "items(price, stock)",
        "input": "What is the highest price?",
        "max_output_tokens": 12,
        "temperature": 0,
    }
    completion = {"model": model, "prompt": "once upon", "max_tokens": 12, "temperature": 0}
    return [
        *wire("chat", CHAT, chat, CHAT_FIELDS, CHAT_WRONG),
        *wire("completions", COMPLETIONS, completion, COMPLETION_FIELDS, COMPLETION_WRONG),
        *wire("messages", MESSAGES, message, MESSAGE_FIELDS, MESSAGE_WRONG),
        *wire("responses", RESPONSES, response, RESPONSE_FIELDS, RESPONSE_WRONG),
        *others(model, chat),
    ]


# -- generating wires ----------------------------------------------------------------------------

# name: what a valid body has besides, or in place of what it has.
CHAT_FIELDS: dict[str, Json] = {
    "unicode": {"messages": [{"role": "user", "content": "é漢😀\u0000\u2028\ud83d"[:-1]}]},
    "content in parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}] * 2}]},
    "an image as a data URL": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "what is it?"},
                                                  {"type": "image_url", "image_url": {"url": PIXEL}}]}]
    },
    "many turns": {"messages": [{"role": role, "content": "x"} for role in ("user", "assistant") * 9][:-1]},
    "a turn with a tool call": {
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": None, "tool_calls": [CALLED]},
            {"role": "tool", "tool_call_id": "call_1", "content": "42"},
        ]
    },
    "two choices": {"n": 2, "seed": 1, "temperature": 1.0},
    "tools": {"tools": [TOOL], "max_tokens": 40},
    "tools that must be called": {"tools": [TOOL], "tool_choice": "required", "max_tokens": 40},
    "a tool that must be called": {
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "sql"}},
        "max_tokens": 40,
    },
    "tools that may not be called": {"tools": [TOOL], "tool_choice": "none"},
    "tools called in parallel": {"tools": [TOOL, {**TOOL, "function": {**TOOL["function"], "name": "b"}}],
                                 "parallel_tool_calls": True, "max_tokens": 40},
    "logprobs": {"logprobs": True},
    "top logprobs": {"logprobs": True, "top_logprobs": 2},
    "lonely top logprobs": {"top_logprobs": 2},
    "no logprobs, said so": {"logprobs": False},
    "token ids": {"return_token_ids": True},
    "token ids and logprobs": {"return_token_ids": True, "logprobs": True},
    "no token ids, said so": {"return_token_ids": False, "logprobs": None},
    "stop": {"stop": ["e"]},
    "stop as one": {"stop": "e"},
    "one token": {"max_tokens": 1},
    "max_completion_tokens": {"max_tokens": None, "max_completion_tokens": 3},
    "structured output": {"response_format": {"type": "json_schema", "json_schema": SCHEMA}},
    "json mode": {"response_format": {"type": "json_object"}, "max_tokens": 3},
    "sampling": {"temperature": 1.0, "seed": 7, "top_p": 0.9, "presence_penalty": 0.1},
    "everything SDKs add": {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
}  # fmt: skip

COMPLETION_FIELDS: dict[str, Json] = {
    "unicode": {"prompt": "é漢😀\u0000"},
    "token ids as the prompt": {"prompt": [5, 6, 7]},
    "two choices": {"n": 2, "seed": 1, "temperature": 1.0},
    "logprobs": {"logprobs": 2},
    "no alternatives": {"logprobs": 0},
    "prompt logprobs": {"prompt_logprobs": 0},
    "echo": {"echo": True},
    "token ids": {"return_token_ids": True},
    "stop": {"stop": ["e"]},
    "suffix": {"suffix": "x"},
    "best_of": {"best_of": 2},
}

CLAUDE_TOOL = {"name": "sql", "input_schema": {"type": "object", "properties": SQL, "required": ["query"]}}
MESSAGE_FIELDS: dict[str, Json] = {
    "unicode": {"messages": [{"role": "user", "content": "é漢😀\u0000"}]},
    "content in parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}] * 2}]},
    "no system": {"system": None},
    "system in parts": {"system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
    "a turn with a tool call": {
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "sql",
                                               "input": {"query": "é"}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "42"}]},
        ]
    },
    "tools": {"tools": [CLAUDE_TOOL], "max_tokens": 40},
    "tools that must be called": {"tools": [CLAUDE_TOOL], "tool_choice": {"type": "any"}, "max_tokens": 40},
    "stop sequences": {"stop_sequences": ["e"]},
    "one token": {"max_tokens": 1},
    "sampling": {"temperature": 1.0, "top_p": 0.9, "top_k": 1},
    "metadata": {"metadata": {"user_id": "u"}},
}  # fmt: skip
MESSAGE_WRONG: dict[str, Json] = {
    "no max_tokens": {"max_tokens": None},
    "no messages": {"messages": []},
    "messages that are text": {"messages": "hello"},
    "a role that nobody knows": {"messages": [{"role": "wizard", "content": "x"}]},
    "a part of no kind": {"messages": [{"role": "user", "content": [{"type": "smell"}]}]},
    "a tool without a name": {"tools": [{"input_schema": {}}]},
}

FUNCTION: Json = {"type": "function", **TOOL["function"]}
RESPONSE_FIELDS: dict[str, Json] = {
    "unicode": {"input": "é漢😀\u2028"},
    "a conversation": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": "and now?"},
        ]
    },
    "tools": {"tools": [FUNCTION], "max_output_tokens": 40},
    "no choice of tools": {"tools": [FUNCTION], "tool_choice": "none"},
    "a call and its output": {
        "tools": [FUNCTION],
        "input": [
            {"role": "user", "content": "hi"},
            {"type": "function_call", "call_id": "c1", "name": "sql", "arguments": '{"query": "é"}'},
            {"type": "function_call_output", "call_id": "c1", "output": "42"},
        ],
    },
    "stop": {"stop": ["e"]},
    "one token": {"max_output_tokens": 1},
    "logprobs asked for": {"include": ["message.output_text.logprobs"]},
    "messages asked for": {"enable_response_messages": True},
    "metadata": {"metadata": {"a": "b"}, "user": "u", "store": False},
}
RESPONSE_WRONG: dict[str, Json] = {
    "no input": {"input": None},
    "an input that is a number": {"input": 7},
    "an item of no kind": {"input": [{"type": "smell"}]},
    "a tool without a name": {"tools": [{"type": "function"}]},
    "a response that there is not": {"previous_response_id": "resp_nobody"},
    "a choice without tools": {"tool_choice": "required"},
    "include of what there is not": {"include": ["everything"]},
}

CHAT_WRONG: dict[str, Json] = {
    "no messages": {"messages": []},
    "messages that are text": {"messages": "hello"},
    "a message without a role": {"messages": [{"content": "x"}]},
    "a role that nobody knows": {"messages": [{"role": "wizard", "content": "x"}]},
    "a tool without a name": {"tools": [{"type": "function", "function": {}}]},
    "tools that are an object": {"tools": {}},
    "too many top logprobs": {"logprobs": True, "top_logprobs": 30},
    "a schema that is none": {"response_format": {"type": "json_schema"}},
}

COMPLETION_WRONG: dict[str, Json] = {
    "no prompt": {"prompt": None},
    "a prompt of mixed kinds": {"prompt": [1, "a"]},
    "a token that there is not": {"prompt": [10**9]},
    "negative logprobs": {"logprobs": -1},
}

# For every wire: whether the engine takes or refuses these, both sides of the proxy must agree.
ODD: dict[str, Json] = {
    "an unknown field": {"unheard_of": {"by": ["anybody", None]}},
    "no model": {"model": None},
    "an unknown model": {"model": "nobody"},
    "a model that is a number": {"model": 7},
    "a long model": {"model": "x" * 5000},
    "stream as a number": {"stream": 1},
    "stream as text": {"stream": "yes"},
    "stream as null": {"stream": None},
    "stream as a list": {"stream": []},
    "stream options without a stream": USAGE,
    "hot temperature": {"temperature": "hot"},
    "a temperature below zero": {"temperature": -1},
    "max_tokens of 0": {"max_tokens": 0},
    "max_tokens below zero": {"max_tokens": -5},
    "max_tokens beyond the model": {"max_tokens": 99_999},
    "max_tokens beyond all": {"max_tokens": 10**30},
    "max_tokens as text": {"max_tokens": "12"},
    "a float for max_tokens": {"max_tokens": 3.5},
    "n of 0": {"n": 0},
    "n as text": {"n": "two"},
    "a large seed": {"seed": 2**63 - 1},
    "a seed beyond all": {"seed": 10**25},
    "a seed as text": {"seed": "x"},
    "stop as a number": {"stop": 5},
    "logprobs as text": {"logprobs": "yes"},
    "return_token_ids as text": {"return_token_ids": "yes"},
}
STREAMED_ODD: dict[str, Json] = {
    "with usage": USAGE,
    "with usage all the time": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "without usage, said so": {"stream_options": {"include_usage": False}},
    "with odd options": {"stream_options": "yes"},
}


def wire(
    name: str, target: str, valid: Json, own: Mapping[str, Json], wrong: Mapping[str, Json]
) -> list[Case]:
    """All cases of one generating wire. ``own`` are sent streamed as well."""
    bodies: dict[str, Json] = {"plain": valid, "streamed": {**valid, "stream": True}}
    for variation, fields in own.items():
        bodies[variation] = {**valid, **fields}
        bodies[f"{variation}, streamed"] = {**valid, **fields, "stream": True}
    for variation, fields in STREAMED_ODD.items():
        bodies[f"streamed {variation}"] = {**valid, **fields, "stream": True}
    for variation, fields in {**ODD, **wrong}.items():
        bodies[variation] = {**valid, **fields}
    bodies["an unknown model, streamed"] = {**valid, "model": "nobody", "stream": True}
    cases = [Case(f"{name}: {which}", target, json.dumps(body).encode()) for which, body in bodies.items()]
    cases += [Case(f"{name}: {which}", target, raw) for which, raw in malformed(valid).items()]
    return cases + [Case(f"{name}: {case.name}", case.target, case.body, case.method, case.headers)
                    for case in oddly_sent(target, json.dumps(valid).encode())]  # fmt: skip


def malformed(valid: Json) -> dict[str, bytes]:
    """Bodies that no JSON encoder makes of ``valid``."""
    raw = json.dumps(valid).encode()
    return {
        "an empty body": b"",
        "a body that breaks off": raw[:-7],
        "two objects": raw + raw,
        "a list": b"[" + raw + b"]",
        "null": b"null",
        "a number": b"7",
        "a text": b'"hello"',
        "an empty object": b"{}",
        "no UTF-8": raw.replace(b'"model": "', b'"model": "\xff', 1),
        "a byte order mark": b"\xef\xbb\xbf" + raw,
        "UTF-16": raw.decode().encode("utf-16"),
        "latin-1": raw.replace(b"{", b'{"x": "\xe9", ', 1),
        "duplicate keys": b'{"model": "nobody", "max_tokens": 1, ' + raw[1:],
        "token ids asked for and not": raw[:-1] + b', "return_token_ids": true, "return_token_ids": false}',
        "a duplicate stream": b'{"stream": true, "stream": false, ' + raw[1:],
        "NaN": raw[:-1] + b', "top_p": NaN}',
        "Infinity": raw[:-1] + b', "x": [Infinity, -Infinity]}',
        "numbers of every size": raw[:-1] + b', "x": [1e400, 1e-400, 12345678901234567890123, -0.0, 1E5]}',
        "a lone surrogate": raw[:-1] + b', "user": "\\ud800"}',
        "a null character": raw[:-1] + b', "user": "\\u0000"}',
        "deep nesting": raw[:-1] + b', "x": ' + b"[" * 300 + b"]" * 300 + b"}",
        "odd spacing": b"\r\n\t " + json.dumps(valid, indent=3).replace("\n", "\r\n").encode() + b"\n \n",
        "single quotes": str(valid).encode(),
        "a trailing comma": raw[:-1] + b",}",
        "a comment": b"/* x */" + raw,
        "a form": b"model=x&prompt=y",
        "a large unknown field": raw[:-1] + b', "x": "' + b"y" * 2**20 + b'"}',
    }  # fmt: skip


def oddly_sent(target: str, raw: bytes) -> list[Case]:
    """A valid body in a request that is odd by its method, path or headers."""
    typed = {
        "no content type": [],
        "text/plain": [("Content-Type", "text/plain")],
        "a charset": [("Content-Type", "application/json; charset=latin-1")],
        "a form's content type": [("Content-Type", "application/x-www-form-urlencoded")],
        "an empty content type": [("Content-Type", "")],
        "a vendor's content type": [("Content-Type", "application/vnd.x+json")],
    }
    headers: dict[str, list[tuple[str, str]]] = {
        "Accept for another type": [("Accept", "text/html")],
        "Accept-Encoding": [("Accept-Encoding", "gzip, br, zstd, deflate")],
        "no Accept-Encoding": [("Accept-Encoding", "identity;q=0")],
        "SDK headers": [("User-Agent", "OpenAI/Python 1"), ("X-Stainless-Lang", "python"),
                        ("Authorization", "Bearer sk-1"), ("OpenAI-Beta", "x")],
        "cookies": [("Cookie", "a=1; b=2"), ("Cookie", "c=3")],
        "a long header": [("X-Long", "x" * 7000)],
        "many headers": [(f"X-{i}", str(i)) for i in range(60)],
        "ids of its own": [("X-Request-Id", "mine"), ("Idempotency-Key", "k"), ("traceparent", "00-a-b-01")],
        "a range": [("Range", "bytes=0-10"), ("If-None-Match", "*")],
        "a preflight's origin": [("Origin", "https://a.b")],
        "a forwarded address": [("X-Forwarded-For", "10.0.0.1"), ("Forwarded", "for=10.0.0.1")],
        "Expect": [("Expect", "100-continue")],
    }  # fmt: skip
    encoded = {"gzip": gzip.compress(raw), "deflate": zlib.compress(raw), "br": b"\x0b\x02\x80hello\x03"}
    return [
        *(Case(name, target, raw, headers=head) for name, head in typed.items()),
        *(Case(name, target, raw, headers=[*JSON, *head]) for name, head in headers.items()),
        *(Case(f"a body in {name}", target, body, headers=[*JSON, ("Content-Encoding", name)])
          for name, body in encoded.items()),
        *(Case(method, target, None, method, []) for method in ("GET", "HEAD", "DELETE", "OPTIONS", "TRACE")),
        *(Case(f"{method} with a body", target, raw, method) for method in ("PUT", "PATCH", "DELETE", "GET")),
        Case("POST without a body", target, None),
        Case("a query", target + "?beta=true&x=%20", raw),
        Case("a trailing slash", target + "/", raw),
        Case("two slashes", target.replace("/v1/", "/v1//"), raw),
        Case("upper case", target.upper(), raw),
        Case("an escaped slash", "/v1/" + target.removeprefix("/v1/").replace("/", "%2F") + "%20", raw),
        Case("an escaped letter", target.replace("/v1/c", "/v1/%63"), raw),
        Case("without /v1", target.removeprefix("/v1"), raw),
    ]  # fmt: skip


# -- everything else -----------------------------------------------------------------------------


def others(model: str, chat: Json) -> list[Case]:
    """Requests that are forwarded unread."""
    messages = {"model": model, "messages": chat["messages"][1:], "max_tokens": 5}
    bodies = {
        "/v1/embeddings": {"model": model, "input": "é"},
        "/v1/messages/count_tokens?beta=true": {"model": model, "messages": chat["messages"][1:]},
        "/tokenize": {"model": model, "prompt": "hello"},
        "/detokenize": {"model": model, "tokens": [5, 6]},
        "/v1/rerank": {"model": model, "query": "a", "documents": ["b"]},
        "/v1/audio/transcriptions": {"model": model},
        "/v1/nowhere": messages,
        "/nowhere": {},
    }
    plain = ["/v1/models", f"/v1/models/{model}", "/v1/models/nobody", "/v1/models/org%2Fname?x=%20y&&z",
             "/health", "/version", "/", "/?q=1", "/v1", "/v1/", "/v1?a=b", "/favicon.ico",
             "/v1/files/f%20%25?a",
             "/v1/a/../b/./c//d;e=f:@!$'()*,=+~", "/v1/api/rollouts", "/openapi"]  # fmt: skip
    heads, methods = ("/", "/health", "/v1/models", "/v1/x"), ("DELETE", "OPTIONS", "POST", "PURGE")
    return [
        *(Case(f"POST {target}", target, json.dumps(body).encode()) for target, body in bodies.items()),
        *(Case(f"a broken POST {target}", target, b"{") for target in bodies),
        *(Case(f"GET {target}", target, None, "GET", []) for target in plain),
        *(Case(f"HEAD {target}", target, None, "HEAD", []) for target in heads),
        *(Case(f"{method} /v1/x", "/v1/x", None, method, []) for method in methods),
        Case("PUT of bytes", "/v1/files/%C3%BC", b"\x00\xff" * 100, "PUT", [("Content-Type", "x/y")]),
        Case("PATCH", "/v1/x", b"{}", "PATCH"),
        Case("a form of parts", "/v1/files", b"--x\r\n\r\n1\r\n--x--\r\n", "POST",
             [("Content-Type", "multipart/form-data; boundary=x")]),
        Case("an empty POST", "/v1/empty", b""),
        Case("a POST in gzip", "/v1/embeddings", gzip.compress(b"{}"), "POST",
             [*JSON, ("Content-Encoding", "gzip")]),
        Case("odd headers", "/v1/h", None, "GET",
             [("X-Two", "1"), ("X-Two", "2"), ("Cookie", "a=1; b=2"), ("Accept-Encoding", "br, zstd"),
              ("User-Agent", "OpenAI/Python 1"), ("X-Utf8", "é".encode().decode("latin-1")),
              ("Authorization", "Bearer sk-1"), ("Accept", "*/*"), ("X-Empty", ""), ("x-lower", "y")]),
    ]  # fmt: skip
