"""Which class of failure a call ended in. No I/O.

What is wrong in calls that ended well is found by ``findings``; ``store/causes.py`` says by which of
its calls a rollout failed.
"""

from __future__ import annotations

import re

from lightning_proxy.store import ErrorClass

_LOOKED_INTO = 4096  # characters of an error: engines say the reason first and repeat the request last

# "The prompt does not fit", in the words of: OpenAI and Azure (`context_length_exceeded`; "exceeds the
# context window"), vLLM and SGLang ("maximum context length", "max_model_len", "maximum model length",
# "longer than the model's context length"), Anthropic ("prompt is too long", "exceed context limit"),
# llama.cpp ("available context size"), TGI, Gemini, Bedrock, xAI.
_OVERFLOW = re.compile(
    r"context_length_exceeded|exceed_context_size|exceeds? (?:the |model's )?context (?:window|limit|length)"
    r"|maximum (?:context|prompt|model) length|model's context length|max_model_len|prompt is too long"
    r"|available context size|`inputs` tokens \+ `max_new_tokens`|maximum number of tokens allowed"
    r"|input is too long for|too many (?:input )?tokens",
    re.IGNORECASE,
)
# The names that OpenAI and Anthropic have for it inside a stream, where there is no status.
_RATE_LIMIT = re.compile(r"\brate_limit_(?:error|exceeded)\b")
_MAY_OVERFLOW = frozenset((400, 413, 422, 500))


def class_of_status(status: int, body: str) -> ErrorClass:
    """Of an answer with a status of 400 or more, by what it says."""
    if status == 429:
        return ErrorClass.RATE_LIMITED
    if status in (408, 504):
        return ErrorClass.TIMEOUT
    if status in _MAY_OVERFLOW and _OVERFLOW.search(body, 0, _LOOKED_INTO):
        return ErrorClass.CONTEXT_OVERFLOW
    return ErrorClass.UPSTREAM_ERROR if status >= 500 else ErrorClass.UPSTREAM_REFUSED


def class_of_event(error: str) -> ErrorClass:
    """Of an error that came inside a stream."""
    if _OVERFLOW.search(error, 0, _LOOKED_INTO):
        return ErrorClass.CONTEXT_OVERFLOW
    if _RATE_LIMIT.search(error, 0, _LOOKED_INTO):
        return ErrorClass.RATE_LIMITED
    return ErrorClass.ENGINE_ERROR


def class_without_answer(error: Exception) -> ErrorClass:
    """Of what was raised before an answer came: aiohttp's timeouts are TimeoutErrors."""
    return ErrorClass.TIMEOUT if isinstance(error, TimeoutError) else ErrorClass.UPSTREAM_UNREACHABLE
