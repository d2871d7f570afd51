"""Chat Completions: ``POST /v1/chat/completions``."""

from __future__ import annotations

from .base import Json
from .choices import Asked, Choice, ChoicesCollector, ChoicesWire, merge_delta


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


class _ChatCollector(ChoicesCollector):
    def _logprobs_of(self, logprobs: Json) -> list[float]:
        return [entry["logprob"] for entry in logprobs.get("content") or ()]

    def _take_content(self, choice: Json, state: Choice) -> None:
        body = state.body
        if not body:
            body.update(index=choice.get("index", 0), message={}, finish_reason=None)
        if choice.get("finish_reason") is not None:
            body["finish_reason"] = choice["finish_reason"]
        delta = choice.get("delta")
        if delta:
            merge_delta(body["message"], delta)

    def _is_only_capture(self, choice: Json) -> bool:
        # vLLM holds a chunk back while its tool parser has nothing to say, unless token ids were
        # asked for: then it sends an empty delta.
        return not choice.get("delta") and choice.get("finish_reason") is None
