"""APIs whose answers are made of choices: Chat Completions and Completions.

vLLM tells the tokens of both when asked (``return_token_ids``, ``logprobs``); what was asked for
on capture's behalf is taken out of the answer again.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import orjson

from lightning_proxy.proxy.sse import Event, with_data
from lightning_proxy.store import Fidelity, Generation

from .base import Captured, Collector, Json, Prepared, Wire, packed, sampling_of

SAMPLING_KEYS = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "seed", "n", "max_tokens", "max_completion_tokens",
    "min_tokens", "stop", "tool_choice", "response_format", "structured_outputs",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for on capture's behalf, and so has to come out again."""

    ids: bool = False
    logprobs: bool = False


class ChoicesWire(Wire):
    """A wire whose answers are made of choices."""

    ask_logprobs: Any  # value of the field `logprobs` that asks for the sampled tokens' own

    def prepare(self, body: bytes, request: Json, *, tokens: bool) -> Prepared:
        """See :class:`Wire`."""
        body, asked = self.ask(body, request) if tokens else (body, Asked())
        return Prepared(body, self.collector(asked), sampling_of(request, SAMPLING_KEYS))

    def ask(self, body: bytes, request: Json) -> tuple[bytes, Asked]:
        """Ask for tokens, where that leaves the answer as it was; the body, and what was asked."""
        if not self.may_ask(request):
            return body, Asked()
        asked = Asked(ids=not request.get("return_token_ids"), logprobs=not self.wants_logprobs(request))
        extra: Json = {}
        if asked.ids:
            extra["return_token_ids"] = True
        if asked.logprobs:
            extra["logprobs"] = self.ask_logprobs
        try:
            return _with_fields(body, request, extra), asked
        except TypeError:  # nested deeper than orjson writes
            return body, Asked()

    @abstractmethod
    def may_ask(self, request: Json) -> bool:
        """Whether asking for tokens leaves this request's answer (or error) as it was."""

    @abstractmethod
    def wants_logprobs(self, request: Json) -> bool:
        """Whether the agent itself asked for logprobs."""

    @abstractmethod
    def collector(self, asked: Asked) -> ChoicesCollector:
        """A fresh collector for one call."""


@dataclass(slots=True)
class Choice:
    """One choice while it is being made."""

    prompt_token_ids: list[int] | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    body: Json = field(default_factory=dict)  # the choice as a non-streamed answer would hold it


class ChoicesCollector(Collector):
    """Records one answer made of choices and strips it, event by event or whole."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._head: Json = {}
        self._usage: Json | None = None
        self._choices: dict[int, Choice] = {}
        self._prompt_token_ids: list[int] | None = None
        self._whole: bytes | None = None
        self._changed = False  # the last answer or chunk is not what the engine sent
        self.ended = False
        self.failed = None

    # -- the two ways in ------------------------------------------------------------------

    def whole(self, body: bytes) -> bytes:
        """See :class:`Collector`."""
        answer = orjson.loads(body)
        self.take_whole(answer)
        self._whole = orjson.dumps(answer) if self._changed else body
        return self._whole

    def event(self, event: Event) -> bytes:
        """See :class:`Collector`."""
        data = event.data
        if data is None or data == b"[DONE]":
            self.ended = self.ended or data is not None
            return event.raw
        chunk = orjson.loads(data)
        if not self.take_chunk(chunk):
            return b""
        return with_data(event, orjson.dumps(chunk)) if self._changed else event.raw

    def take_whole(self, answer: Json) -> None:
        """Record a whole answer and strip it in place."""
        self._begin(answer)
        self._usage = answer.get("usage")
        self._take(answer)

    def take_chunk(self, chunk: Json) -> bool:
        """Record one chunk of a stream and strip it in place.

        Returns False where the chunk exists only because of what capture asked for.
        """
        self._changed = False
        choices = chunk.get("choices")
        if choices is None and "error" in chunk:
            self.failed = orjson.dumps(chunk["error"]).decode()
            return True
        if not self._head:
            self._begin(chunk)
        if chunk.get("usage"):
            self._usage = chunk["usage"]
        # Who asked for either of the two would have got every chunk without us as well.
        keep = not (self._asked.ids and self._asked.logprobs)
        self._take(chunk)
        for choice in choices or ():
            self._take_content(choice, self._choice(choice))
            keep = keep or not self._is_only_capture(choice)
        return keep or not choices

    # -- the way out ----------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether every choice that began has come to its end."""
        return bool(self._choices) and all(c.finish_reason is not None for c in self._choices.values())

    def captured(self) -> Captured:
        """The answer so far, in the store's terms."""
        generations = self.generations()
        exact = (
            self.finished
            and len(generations) == len(self._choices) > 0
            and all(
                g.prompt_token_ids and len(g.logprobs) == len(g.response_token_ids) > 0 for g in generations
            )
        )
        body = self._whole
        if body is None:
            choices = [self._choices[index].body for index in sorted(self._choices)]
            kind = str(self._head.get("object", "")).removesuffix(".chunk")
            body = orjson.dumps({**self._head, "object": kind, "choices": choices, "usage": self._usage})
        response_id = self._head.get("id")
        return Captured(
            response=body,
            response_id=response_id if isinstance(response_id, str) else None,
            fidelity=Fidelity.EXACT if exact else Fidelity.TEXT,
            usage=self._usage,
            generations=generations,
        )

    def generations(self) -> tuple[Generation, ...]:
        """The choices that came with token ids, in the order of their index."""
        made = []
        for index in sorted(self._choices):
            choice = self._choices[index]
            prompt = choice.prompt_token_ids or self._prompt_token_ids
            if prompt is None or not choice.token_ids:
                continue
            logprobs = choice.logprobs if len(choice.logprobs) == len(choice.token_ids) else []
            made.append(
                Generation(
                    packed("i", prompt),
                    packed("i", choice.token_ids),
                    packed("f", logprobs),
                    choice.finish_reason,
                )
            )
        return tuple(made)

    # -- per wire -------------------------------------------------------------------------

    @abstractmethod
    def _logprobs_of(self, logprobs: Json) -> list[float]: ...

    @abstractmethod
    def _take_content(self, choice: Json, state: Choice) -> None: ...

    @abstractmethod
    def _is_only_capture(self, choice: Json) -> bool: ...

    # -- shared ---------------------------------------------------------------------------

    def _begin(self, answer: Json) -> None:
        self._head = {k: answer[k] for k in ("id", "object", "created", "model") if k in answer}

    def _choice(self, choice: Json) -> Choice:
        index = choice.get("index", 0)
        state = self._choices.get(index)
        if state is None:
            state = self._choices[index] = Choice()
        return state

    def _take(self, answer: Json) -> None:
        """Record an answer's or a chunk's tokens, and take out what only capture asked for.

        Taken out means null: that is what vLLM says without being asked.
        """
        strip_ids, strip_logprobs = self._asked.ids, self._asked.logprobs
        if (prompt := answer.get("prompt_token_ids")) is not None:
            self._prompt_token_ids = prompt
            if strip_ids:
                answer["prompt_token_ids"] = None
                self._changed = True
        for choice in answer.get("choices") or ():
            state = self._choice(choice)
            if (prompt := choice.get("prompt_token_ids")) is not None:
                state.prompt_token_ids = prompt
                if strip_ids:
                    choice["prompt_token_ids"] = None
                    self._changed = True
            if (token_ids := choice.get("token_ids")) is not None:
                state.token_ids += token_ids
                if strip_ids:
                    choice["token_ids"] = None
                    self._changed = True
            if (logprobs := choice.get("logprobs")) is not None:
                state.logprobs += self._logprobs_of(logprobs)
                if strip_logprobs:
                    choice["logprobs"] = None
                    self._changed = True
            if (finish_reason := choice.get("finish_reason")) is not None:
                state.finish_reason = str(finish_reason)


def _with_fields(body: bytes, request: Json, extra: Json) -> bytes:
    if not extra:
        return body
    if request and not any(key in request for key in extra):
        # Spliced in, so that what the agent wrote stays as it wrote it, number formats included.
        return body.rstrip()[:-1] + b"," + orjson.dumps(extra)[1:]
    return orjson.dumps({**request, **extra})


def merge_delta(into: Json, delta: Json) -> None:
    """Add a streamed delta to a message, as OpenAI's clients do.

    Text grows, numbers and ids are set, list items with an ``index`` merge with their own. The
    delta stays as it is: nothing of it is shared, since it goes on to the agent.
    """
    for key, value in delta.items():
        have = into.get(key)
        if value is None:
            into.setdefault(key, None)
        elif isinstance(value, str) and isinstance(have, str) and key not in ("role", "id", "type"):
            into[key] = have + value
        elif isinstance(value, dict):
            if not isinstance(have, dict):
                have = into[key] = {}
            merge_delta(have, value)
        elif isinstance(value, list):
            into[key] = _merge_items(have if isinstance(have, list) else [], value)
        else:
            into[key] = value


def _merge_items(have: list[Any], items: list[Any]) -> list[Any]:
    for item in items:
        index = item.get("index") if isinstance(item, dict) else None
        if not isinstance(index, int):
            have.append(item)
            continue
        known = next((i for i in have if isinstance(i, dict) and i.get("index") == index), None)
        if known is None:
            known = {}
            have.append(known)
        merge_delta(known, item)
    return have
