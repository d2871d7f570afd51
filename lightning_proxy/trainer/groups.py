"""Which rollouts are compared with one another: GRPO's groups (arXiv 2402.03300).

By task id where there is one; else by the first prompt, to the token or normalised (``prompts``); else, for
rollouts whose prompt nobody else has, by a running baseline.

A running baseline is REINFORCE's (Williams 1992), as a group: the rollouts of this run and the last returns
of earlier ones of the same key, which count as ``baseline_only``. The key is the role of the first call to
the policy in a role that is trained, whether that call is trained on or not, and ``baseline_key`` of the
rollout's metadata, where there is one; the policy is that of the run. As in every group of GRPO a rollout is
part of its own mean, which shrinks the expected gradient by ``(n-1)/n`` for ``n`` members: by 1/256 with a
full window, by half for two. ``rloo`` leaves it out. The returns of earlier versions are a baseline too: it
does not depend on the action, so it adds variance and no bias.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from lightning_proxy.store import RecordedRollout
from lightning_proxy.trainer.advantages import compare
from lightning_proxy.trainer.credit import IDENTICAL, Credit, Place
from lightning_proxy.trainer.prompts import normalised_prompt
from lightning_proxy.trainer.transitions import (
    Group,
    LeftOut,
    Reason,
    Terms,
    TrainableRollout,
    first_prompt,
    steps_of,
)

BY_TASK = "task_id"
BY_PROMPT = "first_prompt"
BY_NORMALISED_PROMPT = "normalised_prompt"
RUNNING = "running"  # the store knows this word: recent_members

# The last members of a group, by its key in the store; and those that these versions answered (None: any
# version that is not too old).
Recent = Callable[[str], Sequence[TrainableRollout]]
Former = Callable[[str, Collection[int | None] | None], Sequence[TrainableRollout]]


@dataclass(slots=True)
class GroupCounts:
    """Groups by what became of them, and of each by method; a group may be in two."""

    trained: Counter[str] = field(default_factory=Counter)
    lost_members: Counter[str] = field(default_factory=Counter)  # trained without some that were left out
    of_one: Counter[str] = field(default_factory=Counter)  # nobody to compare with
    too_small: Counter[str] = field(default_factory=Counter)  # those of one among them
    all_equal: Counter[str] = field(default_factory=Counter)  # at every step and in every role

    def as_dict(self) -> dict[str, dict[str, int]]:
        """``{"trained": {method: n}, ...}``, without what there was none of."""
        counts = {
            "trained": self.trained,
            "lost_members": self.lost_members,
            "of_one": self.of_one,
            "too_small": self.too_small,
            "all_equal": self.all_equal,
        }
        return {
            name: {method: number for method, number in of.items() if number}
            for name, of in counts.items()
            if of.total()
        }


@dataclass(frozen=True, slots=True)
class Grouping:
    """Groups to train on, the rollouts that are for a later run, and the group of each other one.

    ``keys`` is what the store remembers a group by: method and key as one text, by rollout id.
    """

    groups: tuple[tuple[TrainableRollout, ...], ...]
    for_later: tuple[str, ...]
    keys: Mapping[str, str] = field(default_factory=dict)
    counts: GroupCounts = field(default_factory=GroupCounts)

    @property
    def all_equal(self) -> int:
        """Groups left out because their returns do not differ."""
        return sum(self.counts.all_equal.values())

    @property
    def trained(self) -> list[TrainableRollout]:
        """The rollouts of all groups but those that are only compared with."""
        return [rollout for members in self.groups for rollout in members if not rollout.baseline_only]


def form_groups(
    rollouts: Iterable[TrainableRollout],
    *,
    min_size: int,
    may_wait: bool,
    left_out: LeftOut,
    credit: Credit = IDENTICAL,
    recent: Recent | None = None,
    former: Former | None = None,
    lost: Container[Group] = (),
) -> Grouping:
    """Group the rollouts and record group and method on each transition.

    Groups smaller than ``min_size`` are for a later run, in which more of their task may have come; with
    ``may_wait`` false they are left out for good, and always where all of them come again. With ``recent``
    those that only their prompt held together get a running baseline instead. Groups whose returns are all
    equal, at every step and in every role that is compared, are left out: every advantage in them is 0. All
    are counted in ``left_out``. A group of which members were left out before (``lost``) is one of those that
    are there: its mean and deviation are theirs.

    Members that earlier runs trained on are members here too, with the returns that they have now and
    ``baseline_only``: they count in the group's size and statistics, and are not trained on again. Such are
    the companions of a rollout that comes again after a late reward; and, with ``former``, those that the
    same versions answered, for a pass may have lain in the middle of a group. Where that is too few, so are
    those that any version answered that is not too old: better a baseline of some updates ago than none.
    """
    kept: list[tuple[TrainableRollout, ...]] = []
    for_later: list[str] = []
    keys: dict[str, str] = {}
    counts = GroupCounts()
    for group, (own, others) in _by_group(rollouts, min_size, recent, former).items():
        everyone = (*own, *others)
        trained = {place for rollout in own for place in _places(rollout, credit) if place}
        comparisons = compare(everyone, credit, min_size) if len(everyone) >= min_size else []
        comparisons = [each for each in comparisons if each.place in trained]
        counts.of_one[group.method] += len(everyone) == 1
        if not comparisons:
            counts.too_small[group.method] += 1
            left_behind = all(rollout.again for rollout in own)  # nobody will join them
            gone = left_behind and len(everyone) < min_size
            left_out.rollouts[Reason.GROUP_GONE if gone else Reason.GROUP_TOO_SMALL] += len(own)
            if may_wait and not left_behind:
                for_later += [rollout.rollout_id for rollout in own]
                continue
        elif not any(comparison.differs for comparison in comparisons):
            counts.all_equal[group.method] += 1
            left_out.rollouts[Reason.GROUP_ALL_EQUAL] += len(own)
        else:
            compared = {comparison.place for comparison in comparisons}
            kept.append(tuple(_with_comparison(each, credit, compared, left_out) for each in everyone))
            counts.trained[group.method] += 1
            counts.lost_members[group.method] += group in lost
        keys |= {rollout.rollout_id: _key(group) for rollout in own}
    return Grouping(tuple(kept), tuple(for_later), keys, counts)


class _Members(NamedTuple):
    """Of a group: those of this run, and those of earlier ones, for comparison only."""

    own: list[TrainableRollout]
    others: list[TrainableRollout]


def _by_group(
    rollouts: Iterable[TrainableRollout], min_size: int, recent: Recent | None, former: Former | None
) -> dict[Group, _Members]:
    """By task or prompt; with ``recent`` those of a prompt that are too few by their running baseline."""
    found: dict[Group, list[TrainableRollout]] = {}
    for rollout in rollouts:
        found.setdefault(group_of(rollout), []).append(rollout)
    present = {rollout.rollout_id for own in found.values() for rollout in own}
    members: dict[Group, _Members] = {}
    for group, own in found.items():
        others = _others(group, own, present, min_size, former)
        runs = recent is not None and group.method != BY_TASK and len(own) + len(others) < min_size
        for rollout in own:
            into = _running(rollout) if runs else group
            tagged = tuple(replace(transition, group=into) for transition in rollout.transitions)
            of = members.setdefault(into, _Members([], [] if runs else others))
            of.own.append(replace(rollout, transitions=tagged))
    if recent is not None:
        for group, of in members.items():
            if group.method == RUNNING:
                of.others.extend(each for each in recent(_key(group)) if each.rollout_id not in present)
    return members


def _others(
    group: Group,
    own: Sequence[TrainableRollout],
    present: Set[str],
    min_size: int,
    former: Former | None,
) -> list[TrainableRollout]:
    """Whom earlier runs trained on in this group, each once, but for who is here."""
    companions = {each.rollout_id: each for rollout in own for each in rollout.companions}
    found = companions
    if former is not None:
        answered_by = {each.policy_version for rollout in own for each in rollout.transitions}
        for versions in (answered_by, None):
            near = {each.rollout_id: each for each in former(_key(group), versions)}
            found = companions | near
            if len(own) + len(found.keys() - present) >= min_size:
                break
    return [each for rollout_id, each in found.items() if rollout_id not in present]


def _places(rollout: TrainableRollout, credit: Credit) -> list[Place | None]:
    """Where each transition of the rollout belongs; ``None`` where its role has no return."""
    own = credit.credits_of(rollout)
    return [place if place in own else None for place in credit.places_of(rollout)]


def _with_comparison(
    rollout: TrainableRollout, credit: Credit, compared: Collection[Place], left_out: LeftOut
) -> TrainableRollout:
    """Without the transitions that nothing is compared with: those of a role that is too rare."""
    if rollout.baseline_only:
        return rollout
    places = _places(rollout, credit)
    kept = tuple(each for each, place in zip(rollout.transitions, places, strict=True) if place in compared)
    if alone := len(places) - len(kept):
        left_out.calls[Reason.ROLE_ALONE] += alone
    if not kept:
        left_out.rollouts[Reason.NO_TRANSITION] += 1
        return replace(rollout, transitions=(), baseline_only=True)
    return replace(rollout, transitions=kept)


def group_of(rollout: TrainableRollout) -> Group:
    """The task id where there is one, else a hash of the token ids of the rollout's first prompt.

    Token ids are the prompt as the model read it, after the chat template: whatever two clients do
    differently in JSON or in white space that the template drops makes no difference. A prompt that
    carries a time or a random number makes a group of one; such agents need task ids, or prompts that are
    normalised.
    """
    if rollout.task_id is not None:
        return Group(BY_TASK, rollout.task_id)
    if rollout.normalised_prompt is not None:
        return Group(BY_NORMALISED_PROMPT, rollout.normalised_prompt)
    first = rollout.first_prompt_ids
    return _by_prompt(rollout.transitions[0].prompt_ids if first is None else first)


def groups_of_recorded(recorded: Iterable[RecordedRollout], terms: Terms) -> set[Group]:
    """The groups that these would have belonged to, as far as what was recorded of them says."""
    found = set()
    for each in recorded:
        ours = [each.spans[position] for position in steps_of(each.spans, terms)]
        if each.rollout.task_id is not None:
            found.add(Group(BY_TASK, each.rollout.task_id))
        elif terms.normalised_prompts:
            found |= {Group(BY_NORMALISED_PROMPT, normalised_prompt(span.request) or "") for span in ours[:1]}
        elif (prompt := first_prompt(ours)) is not None:
            found.add(_by_prompt(prompt))
    return found


def _by_prompt(prompt_ids: array[int]) -> Group:
    return Group(BY_PROMPT, hashlib.sha256(prompt_ids.tobytes()).hexdigest()[:32])


def _running(rollout: TrainableRollout) -> Group:
    # What can be trained on of a rollout must not decide whom it is compared with, as for first prompts.
    first = rollout.steps[0] if rollout.steps else rollout.transitions[0]
    key = first.role or "-"
    return Group(RUNNING, key if rollout.baseline_key is None else f"{key}/{rollout.baseline_key}")


def _key(group: Group) -> str:
    return f"{group.method}:{group.key}"
