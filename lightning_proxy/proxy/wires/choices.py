"""APIs whose answers are made of choices: Chat Completions and Completions.

vLLM tells the tokens of both when asked (``return_token_ids``, ``logprobs``); what was asked for
on capture's behalf is taken out of the answer again.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec
import orjson
from msgspec import Raw

from lightning_proxy.proxy.sse import Event, with_data
from lightning_proxy.store import Fidelity, Generation

from .base import Captured, Collector, Json, Prepared, Wire, packed, sampling_of

# An answer is taken apart only as far as it is needed: the rest stays the engine's own bytes, and
# the many objects that logprobs consist of are never made.
RawObject: TypeAlias = dict[str, Raw]
NULL = Raw(b"null")
_OBJECT = msgspec.json.Decoder(RawObject)
_OBJECTS = msgspec.json.Decoder(list[RawObject])
_IDS = msgspec.json.Decoder(list[int])
_INT = msgspec.json.Decoder(int)
_ANY = msgspec.json.Decoder()
_encoded = msgspec.json.Encoder().encode

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
            return with_fields(body, request, extra), asked
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

    index: int
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
        self.ended = False
        self.failed = None

    # -- the two ways in ------------------------------------------------------------------

    def whole(self, body: bytes) -> bytes:
        """See :class:`Collector`."""
        answer = _OBJECT.decode(body)
        self._begin(answer)
        self._usage = _decoded(answer.get("usage"))
        changed = self._take(answer, self._choices_of(answer))
        self._whole = _encoded(answer) if changed else body
        return self._whole

    def event(self, event: Event) -> bytes:
        """See :class:`Collector`."""
        data = event.data
        if data is None or data == b"[DONE]":
            self.ended = self.ended or data is not None
            return event.raw
        stripped = self.chunk(data)
        if stripped is None:
            return b""
        return event.raw if stripped is data else with_data(event, stripped)

    def chunk(self, data: bytes) -> bytes | None:
        """Record one chunk of a stream; return it stripped, the same object where that is nothing.

        ``None`` stands for a chunk that exists only because of what capture asked for.
        """
        chunk = _OBJECT.decode(data)
        choices = self._choices_of(chunk)
        if choices is None and "error" in chunk:
            self.failed = bytes(chunk["error"]).decode()
            return data
        if not self._head:
            self._begin(chunk)
        self._usage = _decoded(chunk.get("usage")) or self._usage
        # Who asked for either of the two would have got every chunk without us as well.
        keep = not (self._asked.ids and self._asked.logprobs)
        changed = self._take(chunk, choices)
        for choice in choices or ():
            self._take_content(choice, self._choice(choice))
            keep = keep or not self._is_only_capture(choice)
        if choices and not keep:
            return None
        return _encoded(chunk) if changed else data

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
    def _logprobs_of(self, logprobs: Raw) -> list[float]: ...

    @abstractmethod
    def _take_content(self, choice: RawObject, state: Choice) -> None: ...

    @abstractmethod
    def _is_only_capture(self, choice: RawObject) -> bool: ...

    # -- shared ---------------------------------------------------------------------------

    def _begin(self, answer: RawObject) -> None:
        self._head = {k: _ANY.decode(answer[k]) for k in ("id", "object", "created", "model") if k in answer}

    def _choices_of(self, answer: RawObject) -> list[RawObject] | None:
        """The choices of an answer or a chunk, put into it in a form that can be changed in place."""
        choices = answer.get("choices")
        if choices is None or choices == NULL:
            return None
        decoded = _OBJECTS.decode(choices)
        answer["choices"] = decoded  # type: ignore[assignment]  # encodes as what it was decoded from
        return decoded

    def _choice(self, choice: RawObject) -> Choice:
        index = _INT.decode(choice["index"]) if "index" in choice else 0
        state = self._choices.get(index)
        if state is None:
            state = self._choices[index] = Choice(index)
        return state

    def _take(self, answer: RawObject, choices: list[RawObject] | None) -> bool:
        """Record an answer's or a chunk's tokens, and take out what only capture asked for.

        Taken out means null: that is what vLLM says without being asked. Returns whether anything was.
        """
        asked, changed = self._asked, False
        if (prompt := present(answer, "prompt_token_ids")) is not None:
            self._prompt_token_ids = _IDS.decode(prompt)
            changed |= _cleared(answer, "prompt_token_ids", asked.ids)
        for choice in choices or ():
            state = self._choice(choice)
            if (prompt := present(choice, "prompt_token_ids")) is not None:
                state.prompt_token_ids = _IDS.decode(prompt)
                changed |= _cleared(choice, "prompt_token_ids", asked.ids)
            if (token_ids := present(choice, "token_ids")) is not None:
                state.token_ids += _IDS.decode(token_ids)
                changed |= _cleared(choice, "token_ids", asked.ids)
            if (logprobs := present(choice, "logprobs")) is not None:
                state.logprobs += self._logprobs_of(logprobs)
                changed |= _cleared(choice, "logprobs", asked.logprobs)
            if (finish_reason := present(choice, "finish_reason")) is not None:
                state.finish_reason = str(_ANY.decode(finish_reason))
        return changed


def present(of: RawObject, key: str) -> Raw | None:
    """A field that is there and not null."""
    value = of.get(key)
    return None if value is None or value == NULL else value


def _cleared(of: RawObject, key: str, asked: bool) -> bool:
    if asked:
        of[key] = NULL
    return asked


def _decoded(value: Raw | None) -> Any:
    return None if value is None else _ANY.decode(value)


def with_fields(body: bytes, request: Json, extra: Json) -> bytes:
    """A request's body (``request``: the same, parsed) with more fields. Raises TypeError."""
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
