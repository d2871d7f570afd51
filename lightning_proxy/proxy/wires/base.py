"""What every wire is: how a request is prepared, and how its answer is recorded and given back."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec

from lightning_proxy.proxy.sse import Event
from lightning_proxy.store import Fidelity, Generation

Json: TypeAlias = dict[str, Any]

# What an answer of an unexpected shape can raise in a collector.
CAPTURE_FAULTS = (
    KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError, struct.error,
    msgspec.MsgspecError,
)  # fmt: skip


class Untranslatable(Exception):
    """The engine's answer could not be put into the words of the API that the agent speaks."""


@dataclass(frozen=True, slots=True)
class Captured:
    """What a finished answer says, in the store's terms."""

    response: bytes
    response_id: str | None
    fidelity: Fidelity
    usage: Mapping[str, Any] | None
    generations: tuple[Generation, ...]


class Collector(ABC):
    """Takes one answer as the engine sends it, records it, and returns it as the agent gets it.

    ``whole`` and ``event`` may raise any of ``CAPTURE_FAULTS`` where an answer has an unexpected
    shape; the agent then gets the bytes as they came. A collector that translates raises
    ``Untranslatable`` instead, and keeps faults of recording to itself (in ``fault``).
    """

    # Of the answer, where the agent's API has another than the engine gave: it cannot say a tool call.
    status: int | None = None
    ended = False  # the answer is whole: what is fed from here on comes after its end
    failed: str | None = None  # an error that the engine sent inside a stream
    fault: Exception | None = None  # recording failed, the answer did not

    @abstractmethod
    def whole(self, body: bytes) -> bytes:
        """Take a whole answer."""

    @abstractmethod
    def event(self, event: Event) -> bytes:
        """Take one event of a stream (``event.data`` is not None)."""

    def refusal(self, body: bytes) -> bytes:
        """Take the body of an answer with a status of 400 or more."""
        return body

    def rest(self, rest: bytes) -> bytes:
        """Take what came after the last event of a stream that came to a clean end."""
        return rest

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether the generation has come to an end of its own, however the stream ends."""

    @abstractmethod
    def captured(self) -> Captured:
        """The answer so far, in the store's terms."""

    @abstractmethod
    def generations(self) -> tuple[Generation, ...]:
        """What came with token ids, so far."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready to go upstream, and who takes its answer."""

    body: bytes
    collector: Collector
    sampling: Json  # the parameters that shape the distribution the tokens come from
    path: str | None = None  # where it goes in place of the agent's path, query excluded
    fallback: Prepared | None = None  # sent in its place where the engine refuses this one


class Wire(ABC):
    """One generating API. Stateless."""

    name: str

    @abstractmethod
    def prepare(self, body: bytes, request: Json, *, tokens: bool) -> Prepared:
        """Add what capture needs, where ``tokens`` says that the engine can be asked for tokens.

        ``request`` is ``body`` parsed, or {} where it is no JSON object. The agent's own bytes
        stay as they are wherever that is possible.
        """


def sampling_of(request: Json, keys: Iterable[str]) -> Json:
    """The parameters of a request that are set, of those that ``keys`` names."""
    return {key: request[key] for key in keys if request.get(key) is not None}


_SHAPING = {"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0}  # and the values that change nothing


def shaped(sampling: Json) -> bool:
    """Whether these parameters make another distribution of the model's own, and not a single token."""
    return sampling.get("temperature") != 0 and any(
        isinstance(value := sampling.get(name, off), int | float) and value != off
        for name, off in _SHAPING.items()
    )


def packed(typecode: str, values: list[Any]) -> array[Any]:
    """``array(typecode, values)``, three times as fast. Raises struct.error."""
    made: array[Any] = array(typecode)
    made.frombytes(struct.pack(f"{len(values)}{typecode}", *values))
    return made
