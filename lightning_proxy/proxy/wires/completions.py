"""Completions: ``POST /v1/completions``."""

from __future__ import annotations

from .base import Json
from .choices import Asked, Choice, ChoicesCollector, ChoicesWire


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


class _CompletionsCollector(ChoicesCollector):
    def _logprobs_of(self, logprobs: Json) -> list[float]:
        return logprobs.get("token_logprobs") or []

    def _take_content(self, choice: Json, state: Choice) -> None:
        body = state.body
        if not body:
            body.update(index=choice.get("index", 0), text="", finish_reason=None)
        if choice.get("finish_reason") is not None:
            body["finish_reason"] = choice["finish_reason"]
        body["text"] += choice.get("text") or ""

    def _is_only_capture(self, choice: Json) -> bool:
        return False  # vLLM sends the same chunks either way
