"""Which rollouts are compared with one another: GRPO's groups (arXiv 2402.03300)."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace

from lightning_proxy.trainer.transitions import Group, LeftOut, Reason, TrainableRollout

BY_TASK = "task_id"
BY_PROMPT = "first_prompt"


@dataclass(frozen=True, slots=True)
class Grouping:
    """Groups to train on, the rollouts that are for a later run, and the group of each other one.

    ``keys`` is what the store remembers a group by: method and key as one text, by rollout id.
    """

    groups: tuple[tuple[TrainableRollout, ...], ...]
    for_later: tuple[str, ...]
    keys: Mapping[str, str] = field(default_factory=dict)
    all_equal: int = 0  # groups left out because their returns do not differ

    @property
    def trained(self) -> list[TrainableRollout]:
        """The rollouts of all groups but those that are only compared with."""
        return [rollout for members in self.groups for rollout in members if not rollout.baseline_only]


def form_groups(
    rollouts: Iterable[TrainableRollout], *, min_size: int, may_wait: bool, left_out: LeftOut
) -> Grouping:
    """Group the rollouts and record group and method on each transition.

    Groups smaller than ``min_size`` are for a later run, in which more of their task may have come;
    with ``may_wait`` false they are left out for good. Groups whose returns are all equal are left
    out: every advantage in them is 0. Both are counted in ``left_out``.

    A rollout that comes again after a late reward has left its group behind, in runs that have trained on
    it. So the others of that group are members here too, with the returns that they have now and
    ``baseline_only``: they count in the group's size and statistics, and are not trained on again.
    """
    members: dict[Group, list[TrainableRollout]] = {}
    for rollout in rollouts:
        group = group_of(rollout)
        tagged = tuple(replace(transition, group=group) for transition in rollout.transitions)
        members.setdefault(group, []).append(replace(rollout, transitions=tagged))
    present = {rollout.rollout_id for group_members in members.values() for rollout in group_members}
    kept: list[tuple[TrainableRollout, ...]] = []
    for_later: list[str] = []
    keys: dict[str, str] = {}
    all_equal = 0
    for group, group_members in members.items():
        everyone = (*group_members, *_baseline(group_members, present))
        if len(everyone) < min_size:
            left_out.rollouts[Reason.GROUP_TOO_SMALL] += len(group_members)
            if may_wait:
                for_later += [rollout.rollout_id for rollout in group_members]
                continue
        elif len({rollout.value for rollout in everyone}) == 1:
            left_out.rollouts[Reason.GROUP_ALL_EQUAL] += len(group_members)
            all_equal += 1
        else:
            kept.append(everyone)
        keys |= {rollout.rollout_id: f"{group.method}:{group.key}" for rollout in group_members}
    return Grouping(tuple(kept), tuple(for_later), keys, all_equal)


def _baseline(members: Iterable[TrainableRollout], present: Container[str]) -> list[TrainableRollout]:
    """What these were compared with in earlier runs, each once, but for what is here itself."""
    returns = {
        companion.rollout_id: companion.value
        for rollout in members
        for companion in rollout.companions
        if companion.rollout_id not in present
    }
    return [
        TrainableRollout(rollout_id, None, value, (), baseline_only=True)
        for rollout_id, value in returns.items()
    ]


def group_of(rollout: TrainableRollout) -> Group:
    """The task id where there is one, else a hash of the token ids of the rollout's first prompt.

    Token ids are the prompt as the model read it, after the chat template: whatever two clients do
    differently in JSON or in white space that the template drops makes no difference. A prompt that
    carries a time or a random number makes a group of one; such agents need task ids.
    """
    if rollout.task_id is not None:
        return Group(BY_TASK, rollout.task_id)
    first = rollout.first_prompt_ids
    prompt = rollout.transitions[0].prompt_ids if first is None else first
    return Group(BY_PROMPT, hashlib.sha256(prompt.tobytes()).hexdigest()[:32])
