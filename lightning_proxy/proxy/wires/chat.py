"""Chat Completions: ``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Any

import msgspec

from .base import Json
from .choices import Asked, Choice, ChoicesCollector, ChoicesWire, RawObject, merge_delta, present


class ChatWire(ChoicesWire):
    """https://platform.openai.com/docs/api-reference/chat, with vLLM's ``return_token_ids``."""

    name = "chat"
    ask_logprobs = True

    def wants_logprobs(self, request: Json) -> bool:
        return bool(request.get("logprobs"))

    def may_ask(self, request: Json) -> bool:
        # `top_logprobs` without `logprobs` is an error that the agent must get; beam search has
        # no sampled distribution; hidden reasoning hides its tokens.
        lonely_top = request.get("top_logprobs") and not request.get("logprobs")
        hidden = request.get("include_reasoning") is False
        return not (lonely_top or hidden or request.get("use_beam_search") or request.get("echo"))

    def collector(self, asked: Asked) -> ChoicesCollector:
        return _ChatCollector(asked)


class _Token(msgspec.Struct):
    logprob: float


class _Logprobs(msgspec.Struct):
    content: list[_Token] | None = None


_LOGPROBS = msgspec.json.Decoder(_Logprobs)
_DELTA = msgspec.json.Decoder(dict[str, Any])
_EMPTY = msgspec.Raw(b"{}")


class _ChatCollector(ChoicesCollector):
    def _logprobs_of(self, logprobs: msgspec.Raw) -> list[float]:
        return [token.logprob for token in _LOGPROBS.decode(logprobs).content or ()]

    def _take_content(self, choice: RawObject, state: Choice) -> None:
        body = state.body
        if not body:
            body.update(index=state.index, message={}, finish_reason=None)
        body["finish_reason"] = state.finish_reason
        if (delta := present(choice, "delta")) is not None:
            merge_delta(body["message"], _DELTA.decode(delta))

    def _is_only_capture(self, choice: RawObject) -> bool:
        # vLLM holds a chunk back while its tool parser has nothing to say, unless token ids were
        # asked for: then it sends an empty delta.
        return present(choice, "delta") in (None, _EMPTY) and present(choice, "finish_reason") is None
