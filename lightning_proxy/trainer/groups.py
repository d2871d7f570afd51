"""Which rollouts are compared with one another: GRPO's groups (arXiv 2402.03300)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from lightning_proxy.trainer.transitions import Group, LeftOut, Reason, TrainableRollout

BY_TASK = "task_id"
BY_PROMPT = "first_prompt"


@dataclass(frozen=True, slots=True)
class Grouping:
    """Groups to train on, and the rollouts that are for a later run."""

    groups: tuple[tuple[TrainableRollout, ...], ...]
    for_later: tuple[str, ...]


def form_groups(
    rollouts: Iterable[TrainableRollout], *, min_size: int, may_wait: bool, left_out: LeftOut
) -> Grouping:
    """Group the rollouts and record group and method on each transition.

    Groups smaller than ``min_size`` are for a later run, in which more of their task may have come;
    with ``may_wait`` false they are left out for good. Groups whose returns are all equal are left
    out: every advantage in them is 0. Both are counted in ``left_out``.
    """
    members: dict[Group, list[TrainableRollout]] = {}
    for rollout in rollouts:
        group = group_of(rollout)
        tagged = tuple(replace(transition, group=group) for transition in rollout.transitions)
        members.setdefault(group, []).append(replace(rollout, transitions=tagged))
    kept: list[tuple[TrainableRollout, ...]] = []
    for_later: list[str] = []
    for group_members in members.values():
        if len(group_members) < min_size:
            left_out.rollouts[Reason.GROUP_TOO_SMALL] += len(group_members)
            for_later += [rollout.rollout_id for rollout in group_members if may_wait]
        elif len({rollout.value for rollout in group_members}) == 1:
            left_out.rollouts[Reason.GROUP_ALL_EQUAL] += len(group_members)
        else:
            kept.append(tuple(group_members))
    return Grouping(tuple(kept), tuple(for_later))


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
