"""Which rollout an unattributed call goes on with, told from the conversation itself. No I/O.

``Lineage`` remembers, for each call that ended well, the ids that its answer gave out and the digest of
its messages and reply. A later call is traced back by either: its ``Strand`` is its place in that.
Everything here happens on the event loop without a pause, so two calls never take the same place.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from lightning_proxy.store import ConversationEnd

from .attribution import Attribution, own_rollout
from .conversation import (
    ASSISTANT,
    CALL,
    Hasher,
    Json,
    Turn,
    completion_texts,
    looks_unique,
    prompt_text,
    reply_ids,
    reply_of,
    request_of,
    unique_ids_in,
)
from .passages import Passages
from .prompts import Prompts

log = logging.getLogger(__name__)

BY_CONVERSATION, BY_RETRY = "conversation", "retry"
BY_ID_SURE = 0.95  # an id that an engine drew at random came back
WHOLE_SURE = 0.9  # the last reply and all before it came back, and one rollout had that
PART_SURE = 0.7  # an earlier part of it did
REWRITTEN_SURE = 0.6  # a passage of the reply came back inside a rewritten prompt
ONE_OF_SEVERAL_SURE = 0.5  # several rollouts had exactly this history: it is one of theirs

# What a request or an answer of an unexpected shape can raise when it is read.
_ODD_SHAPES = (KeyError, TypeError, ValueError, AttributeError, RecursionError, IndexError)
_MOST_CALLS = 20_000  # remembered; about 1 KB each
_MOST_ALIKE = 64  # rollouts remembered for one conversation
_MOST_TRIES = 10_000
_TRY_AGE_S = 1800.0  # clients give a call up after 600 s at most, and then try again
_WEAK_FIELDS = ("user", "prompt_cache_key", "safety_identifier")

_Key = bytes | str  # a conversation's digest, or an id


@dataclass(slots=True, eq=False)
class Owner:
    """A call that ended well, as what a later one may go on from."""

    rollout_id: str
    attempt: int
    weak: int = 0  # hash of what names the user or the app; 0: nothing does
    beside: int = 0  # hash of the text beside the reply's tool call; 0: there is none
    extended: int = 0  # calls that went on from here
    keys: tuple[_Key, ...] = ()


@dataclass(slots=True, eq=False)
class _Try:
    attribution: Attribution
    owner: Owner | None  # what it goes on from
    at: float
    failed: bool = False
    repeated: bool = False


@dataclass(slots=True)
class Place:
    """Where a request stands: what can be looked up, and where its reply will go on."""

    hasher: Hasher | None = None  # after all of its turns
    end: bytes = b""  # the same as a digest
    points: list[tuple[bytes, int]] = field(default_factory=list)  # after each reply: digest, `beside`
    ids: list[str] = field(default_factory=list)  # of tool calls, last first
    references: tuple[str, ...] = ()  # to responses and their items
    turns: list[Turn] = field(default_factory=list)
    prompt: str | None = None  # of a Completions request
    weak: int = 0


@dataclass(slots=True, eq=False)
class Strand:
    """One call's place in its conversation while it is under way."""

    lineage: Lineage
    wire: str
    place: Place
    attribution: Attribution
    went_on_from: Owner | None
    tried: _Try

    def ended(self, response: bytes | None) -> bytes | None:
        """The call is over; ``None``: it failed. Must come before the agent can act on the answer.

        Returns the digest by which the conversation, reply included, is known in the store.
        """
        if response is None:
            self.tried.failed = True
            if self.went_on_from is not None:
                self.went_on_from.extended -= 1
            return None
        try:
            return self.lineage.remember_reply(self, orjson.loads(response))
        except _ODD_SHAPES as error:
            log.debug("the reply of a %s call cannot be followed: %r", self.wire, error)
            return None


class Lineage:
    """The recent calls that nothing else attributed, by whatever a next call can be told by.

    Bounded: beyond ``most_calls`` the oldest is forgotten, and looked for in the store.
    """

    def __init__(self, most_calls: int = _MOST_CALLS) -> None:
        self._most_calls = most_calls
        self._by_key: dict[_Key, list[Owner]] = {}
        self._owners: deque[Owner] = deque()
        self._tries: OrderedDict[tuple[object, ...], list[_Try]] = OrderedDict()
        self._prompts = Prompts()
        self._passages = Passages()

    # -- a call begins ----------------------------------------------------------------------

    def place_of(self, wire: str, request: Json) -> Place:
        """Read a request, once; one of an odd shape has a place that nothing leads to."""
        try:
            in_text = wire == "completions"
            place = self._place_in_text(request) if in_text else _place_in_turns(wire, request)
            place.weak = _weak(request)
        except _ODD_SHAPES as error:
            log.debug("a %s request cannot be followed: %r", wire, error)
            return Place()
        return place

    def needs_store(self, place: Place) -> bool:
        """Whether this process does not remember where the call goes on from, and the store may."""
        if not place.points and not place.references:
            return False
        if place.prompt is not None:  # the store does not know where in a text to look
            return False
        ids = (*place.references, *place.ids)
        if any(self._only(self._by_key.get(id_, ())) is not None for id_ in ids):
            return False
        return not place.points or self._one_of(place, *place.points[-1]) is None

    def learn(self, ends: Iterable[ConversationEnd]) -> None:
        """Remember calls that the store has, from another process or from before a restart."""
        for end in ends:
            alike = self._by_key.get(end.conversation or "", ())
            if any(known.rollout_id == end.rollout_id for known in alike):
                continue
            owner = Owner(end.rollout_id, end.attempt, extended=int(end.extended))
            keys: list[_Key] = [end.conversation] if end.conversation else []
            try:
                response = orjson.loads(end.response)
                keys += reply_ids(response)
                for turns in reply_of(response):
                    keys += _ids_of(turns)
                    owner.beside = owner.beside or _beside(turns)
            except _ODD_SHAPES:
                pass
            self._remember(owner, keys)

    def begin(self, wire: str, body: bytes, place: Place, retry: int) -> Attribution:
        """Decide whose call it is. The attribution carries the strand, to be told the end."""
        key = _try_key(body, place)
        repeated, sure = self._try_before(key) if retry else (None, 0.0)
        if repeated is not None:
            repeated.repeated = True
            owner, before = repeated.owner, repeated.attribution
            found = Attribution(before.rollout_id, before.attempt, None, BY_RETRY, sure)
        else:
            owner, sure = self._owner_of(place)
            found = (
                Attribution(owner.rollout_id, owner.attempt, None, BY_CONVERSATION, sure)
                if owner is not None
                else own_rollout()
            )
        if owner is not None:
            owner.extended += 1
        tried = self._note_try(key, found, owner)
        strand = Strand(self, wire, place, found, owner, tried)
        return Attribution(
            found.rollout_id, found.attempt, None, found.by, found.confidence, retry=retry, strand=strand
        )

    def _owner_of(self, place: Place) -> tuple[Owner | None, float]:
        for id_ in (*place.references, *place.ids):
            if (owner := self._only(self._by_key.get(id_, ()))) is not None:
                return owner, BY_ID_SURE
        last = len(place.points) - 1
        for number in range(last, -1, -1):
            found = self._one_of(place, *place.points[number])
            if found is None:
                continue
            owner, alone = found
            if not alone:
                return owner, ONE_OF_SEVERAL_SURE
            # In a prompt without messages the later points are only lengths that others had.
            whole = number == last or place.prompt is not None
            return owner, WHOLE_SURE if whole else PART_SURE
        return self._rewritten(place)

    def _rewritten(self, place: Place) -> tuple[Owner | None, float]:
        """Histories that do not come back as messages: ids told as text, or passages in the prompt."""
        for turn in reversed(place.turns):
            if turn.kind is ASSISTANT:
                for id_ in unique_ids_in(turn.text):
                    if (owner := self._only(self._by_key.get(id_, ()))) is not None:
                        return owner, BY_ID_SURE
        owner = self._passages.find(place.turns, place.weak)
        return owner, REWRITTEN_SURE if owner is not None else 0.0

    def _only(self, owners: Iterable[Owner]) -> Owner | None:
        """The newest of these, if they are of one rollout: an id that several know names nobody."""
        owners = list(owners)
        return owners[-1] if len({owner.rollout_id for owner in owners}) == 1 else None

    def _one_of(self, place: Place, digest: bytes, beside: int) -> tuple[Owner, bool] | None:
        """Of the rollouts with this history the one to go on with, and whether it is the only one.

        Several of them are exchangeable, their histories being equal: the newest that none has gone
        on from is taken. (With the oldest, one abandoned rollout would take the next one's calls, that
        the one after's, and so on for ever.) None is left: the call stays alone.
        """
        alike = [
            owner
            for owner in self._by_key.get(digest, ())
            if not (owner.weak and place.weak) or owner.weak == place.weak
        ]
        if len(alike) > 1 and beside:
            alike = [owner for owner in alike if owner.beside == beside] or alike
        if len(alike) == 1:
            return alike[0], True
        free = [owner for owner in alike if not owner.extended]
        return (free[-1], False) if free else None

    # -- retries ------------------------------------------------------------------------------

    def _try_before(self, key: tuple[object, ...]) -> tuple[_Try | None, float]:
        """The call that a marked retry repeats, and how surely: a failed one, else the only one alike."""
        oldest = time.monotonic() - _TRY_AGE_S
        tries = [t for t in self._tries.get(key, ()) if t.at >= oldest and not t.repeated]
        candidates = [t for t in tries if t.failed] or tries
        if len({t.attribution.rollout_id for t in candidates}) == 1:
            return candidates[-1], WHOLE_SURE
        failed = bool(candidates) and candidates[0].failed
        return (candidates[0], ONE_OF_SEVERAL_SURE) if failed else (None, 0.0)

    def _note_try(self, key: tuple[object, ...], found: Attribution, owner: Owner | None) -> _Try:
        now = time.monotonic()
        tried = _Try(found, owner, now)
        self._tries.setdefault(key, []).append(tried)
        self._tries.move_to_end(key)
        while self._tries:
            newest = next(iter(self._tries.values()))[-1]
            if len(self._tries) <= _MOST_TRIES and newest.at >= now - _TRY_AGE_S:
                break
            self._tries.popitem(last=False)
        del self._tries[key][:-_MOST_ALIKE]
        return tried

    # -- a call ended ---------------------------------------------------------------------------

    def remember_reply(self, strand: Strand, response: Json) -> bytes | None:
        """Make a call's answer known to those that may follow; returns its first choice's digest."""
        place, found = strand.place, strand.attribution
        owner = Owner(found.rollout_id, found.attempt, place.weak)
        keys: list[_Key] = list(reply_ids(response))
        digest = None
        if place.prompt is not None:
            keys += self._prompts.remember(place.prompt, completion_texts(response))
        for number, turns in enumerate(reply_of(response)):
            keys += _ids_of(turns)
            owner.beside = owner.beside or _beside(turns)
            if place.hasher is None:
                continue
            hasher = place.hasher.copy()
            for turn in turns:
                hasher.add(turn)
            keys.append(hasher.digest())
            if number == 0:
                digest = hasher.digest()
                self._passages.remember(owner, place.turns, turns)
        self._remember(owner, keys, first_of_rollout=found.by == "none")
        return digest

    def _remember(self, owner: Owner, keys: Iterable[_Key], *, first_of_rollout: bool = False) -> None:
        owner.keys = tuple(dict.fromkeys(keys))
        for key in owner.keys:
            alike = self._by_key.get(key)
            if alike is None:
                self._by_key[key] = [owner]
                continue
            if not first_of_rollout:
                alike[:] = [other for other in alike if other.rollout_id != owner.rollout_id]
            alike.append(owner)
            if len(alike) > _MOST_ALIKE:
                del alike[0]
        self._owners.append(owner)
        if len(self._owners) > self._most_calls:
            self._forget(self._owners.popleft())

    def _forget(self, owner: Owner) -> None:
        for key in owner.keys:
            alike = self._by_key.get(key, [])
            if owner in alike:
                alike.remove(owner)
            if not alike:
                self._by_key.pop(key, None)

    def _place_in_text(self, request: Json) -> Place:
        prompt = prompt_text(request)
        if prompt is None:
            return Place()
        return Place(points=[(digest, 0) for digest in self._prompts.points(prompt)], prompt=prompt)


def _place_in_turns(wire: str, request: Json) -> Place:
    read = request_of(wire, request)
    if read is None:
        return Place()
    hasher, points, ids = Hasher(), list[tuple[bytes, int]](), list[str]()
    turns = read.turns
    beside = ""
    for number, turn in enumerate(turns):
        hasher.add(turn)
        if turn.id is not None and looks_unique(turn.id):
            ids.append(turn.id)
        if turn.kind is not ASSISTANT and turn.kind is not CALL:
            continue
        beside = beside or turn.beside
        next_kind = turns[number + 1].kind if number + 1 < len(turns) else None
        if next_kind is not ASSISTANT and next_kind is not CALL:
            points.append((hasher.digest(), hash(beside)))
            beside = ""
    if not read.whole:
        return Place(ids=ids[::-1], references=read.ids[::-1], turns=turns)
    return Place(hasher, hasher.digest(), points, ids[::-1], read.ids[::-1], turns)


def _ids_of(turns: Iterable[Turn]) -> list[str]:
    return [turn.id for turn in turns if turn.id is not None and looks_unique(turn.id)]


def _beside(turns: Iterable[Turn]) -> int:
    return hash(next((turn.beside for turn in turns if turn.beside), ""))


def _weak(request: Mapping[str, Any]) -> int:
    """A number for the ids that name a user or an app: calls that differ in it belong to two runs."""
    given = [request.get(name) for name in _WEAK_FIELDS]
    metadata = request.get("metadata")
    if isinstance(metadata, dict):
        given.append(metadata.get("user_id"))
    if not any(given):
        return 0
    return hash(tuple(value if isinstance(value, str) else None for value in given)) or 1


def _try_key(body: bytes, place: Place) -> tuple[object, ...]:
    """Equal for equal bodies, and as good as never for others, without hashing a long body twice."""
    if not place.end:
        return (hash(body),)
    return (place.end, len(body), hash(body[:256]), hash(body[-256:]))
