"""Completions: ``POST /v1/completions``."""

from __future__ import annotations

import msgspec

from .base import Json
from .choices import Asked, Choice, ChoicesCollector, ChoicesWire, RawObject, present


class CompletionsWire(ChoicesWire):
    """https://platform.openai.com/docs/api-reference/completions, with ``return_token_ids``."""

    name = "completions"
    ask_logprobs = 0  # the sampled token's own, no alternatives

    def wants_logprobs(self, request: Json) -> bool:
        return request.get("logprobs") is not None

    def may_ask(self, request: Json) -> bool:
        # `echo` mixes the prompt into text, ids and logprobs; beam search samples nothing.
        return not (request.get("echo") or request.get("use_beam_search"))

    def collector(self, asked: Asked) -> ChoicesCollector:
        return _CompletionsCollector(asked)


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float] | None = None


_LOGPROBS = msgspec.json.Decoder(_Logprobs)
_TEXT = msgspec.json.Decoder(str)


class _CompletionsCollector(ChoicesCollector):
    def _logprobs_of(self, logprobs: msgspec.Raw) -> list[float]:
        return _LOGPROBS.decode(logprobs).token_logprobs or []

    def _take_content(self, choice: RawObject, state: Choice) -> None:
        body = state.body
        if not body:
            body.update(index=state.index, text="", finish_reason=None)
        body["finish_reason"] = state.finish_reason
        if (text := present(choice, "text")) is not None:
            body["text"] += _TEXT.decode(text)

    def _is_only_capture(self, choice: RawObject) -> bool:
        return False  # vLLM sends the same chunks either way
