"""What all wires share: the shape of a capture, and assembling a streamed answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import orjson

from lightning_proxy.store import Fidelity, Generation

Json: TypeAlias = dict[str, Any]

_SAMPLING_KEYS = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "seed", "n", "max_tokens", "max_completion_tokens",
    "min_tokens", "stop", "tool_choice", "response_format", "structured_outputs",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready to go upstream, and what has to come out of its answer again."""

    body: bytes
    strip_ids: bool = False
    strip_logprobs: bool = False

    @property
    def strips(self) -> bool:
        """Whether the answer must be rewritten at all."""
        return self.strip_ids or self.strip_logprobs


@dataclass(frozen=True, slots=True)
class Captured:
    """What a finished answer says, in the store's terms."""

    response: bytes
    response_id: str | None
    fidelity: Fidelity
    usage: Mapping[str, Any] | None
    generations: tuple[Generation, ...]


class Wire(ABC):
    """One generating API. Stateless."""

    name: str
    # Value of the field that asks for logprobs, and what is asked for beside it.
    ask_logprobs: Any

    @abstractmethod
    def may_ask(self, request: Json) -> bool:
        """Whether asking for tokens leaves this request's answer (or error) as it was."""

    @abstractmethod
    def collector(self, prepared: Prepared) -> Collector:
        """A fresh collector for one call."""

    def prepare(self, body: bytes, request: Json, *, tokens: bool) -> Prepared:
        """Add what capture needs to a request body; leave the agent's own bytes as they are."""
        if not tokens or not self.may_ask(request):
            return Prepared(body)
        strip_ids = not request.get("return_token_ids")
        strip_logprobs = not self.wants_logprobs(request)
        extra: Json = {}
        if strip_ids:
            extra["return_token_ids"] = True
        if strip_logprobs:
            extra["logprobs"] = self.ask_logprobs
        try:
            return Prepared(_with_fields(body, request, extra), strip_ids, strip_logprobs)
        except TypeError:  # nested deeper than orjson writes
            return Prepared(body)

    @abstractmethod
    def wants_logprobs(self, request: Json) -> bool:
        """Whether the agent itself asked for logprobs."""


def sampling_of(request: Json) -> Json:
    """The parameters that shaped the distribution the tokens came from."""
    return {key: request[key] for key in _SAMPLING_KEYS if request.get(key) is not None}


def _with_fields(body: bytes, request: Json, extra: Json) -> bytes:
    if not extra:
        return body
    if request and not any(key in request for key in extra):
        # Spliced in, so that what the agent wrote stays as it wrote it, number formats included.
        return body.rstrip()[:-1] + b"," + orjson.dumps(extra)[1:]
    return orjson.dumps({**request, **extra})


@dataclass(slots=True)
class Choice:
    """One choice while it is being made."""

    prompt_token_ids: list[int] | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    body: Json = field(default_factory=dict)  # the choice as a non-streamed answer would hold it


class Collector(ABC):
    """Records one answer and strips it, event by event or whole."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._head: Json = {}
        self._usage: Json | None = None
        self._choices: dict[int, Choice] = {}
        self._prompt_token_ids: list[int] | None = None
        self._whole: bytes | None = None
        self.changed = False  # the last answer or chunk is not what the engine sent
        self.failed: str | None = None  # an error that the engine sent inside the stream

    # -- the two ways in ------------------------------------------------------------------

    def whole(self, answer: Json) -> Json:
        """Record a non-streamed answer; return it as the agent should see it."""
        self._begin(answer)
        for choice in answer.get("choices") or ():
            self._take_tokens(choice, self._choice(choice))
        self._usage = answer.get("usage")
        self._strip(answer)
        self._whole = orjson.dumps(answer)
        return answer

    def whole_bytes(self) -> bytes:
        """The stripped non-streamed answer, serialised."""
        return self._whole or b""

    def event(self, chunk: Json) -> bool:
        """Record one chunk of a stream and strip it in place.

        Returns False where the chunk exists only because of what capture asked for.
        """
        self.changed = False
        if "error" in chunk and "choices" not in chunk:
            self.failed = orjson.dumps(chunk["error"]).decode()
            return True
        if not self._head:
            self._begin(chunk)
        if chunk.get("usage"):
            self._usage = chunk["usage"]
        # Who asked for either of the two would have got every chunk without us as well.
        keep = not (self._prepared.strip_ids and self._prepared.strip_logprobs)
        choices = chunk.get("choices") or ()
        for choice in choices:
            state = self._choice(choice)
            self._take_tokens(choice, state)
            self._take_content(choice, state)
            keep = keep or not self._is_only_capture(choice)
        self._strip(chunk)
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
                    array("i", prompt),
                    array("i", choice.token_ids),
                    array("f", logprobs),
                    choice.finish_reason,
                )
            )
        return tuple(made)

    # -- per wire -------------------------------------------------------------------------

    @abstractmethod
    def _logprobs_of(self, choice: Json) -> list[float]: ...

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

    def _take_tokens(self, choice: Json, state: Choice) -> None:
        if choice.get("prompt_token_ids"):
            state.prompt_token_ids = choice["prompt_token_ids"]
        if choice.get("token_ids"):
            state.token_ids += choice["token_ids"]
        if choice.get("logprobs"):
            state.logprobs += self._logprobs_of(choice)
        if choice.get("finish_reason") is not None:
            state.finish_reason = str(choice["finish_reason"])

    def _strip(self, answer: Json) -> None:
        """Set what capture asked for to what vLLM says without being asked: null."""
        if answer.get("prompt_token_ids"):
            self._prompt_token_ids = answer["prompt_token_ids"]
        prepared = self._prepared
        if prepared.strip_ids:
            self._take_out(answer, "prompt_token_ids")
        for choice in answer.get("choices") or ():
            if prepared.strip_ids:
                self._take_out(choice, "token_ids")
                self._take_out(choice, "prompt_token_ids")
            if prepared.strip_logprobs:
                self._take_out(choice, "logprobs")

    def _take_out(self, where: Json, key: str) -> None:
        if where.get(key) is not None:
            where[key] = None
            self.changed = True


def merge_delta(into: Json, delta: Json) -> None:
    """Add a streamed delta to a message, as OpenAI's clients do.

    Text grows, numbers and ids are set, list items with an ``index`` merge with their own.
    """
    for key, value in delta.items():
        have = into.get(key)
        if value is None:
            into.setdefault(key, None)
        elif isinstance(value, str) and isinstance(have, str) and key not in ("role", "id", "type"):
            into[key] = have + value
        elif isinstance(value, dict) and isinstance(have, dict):
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
