"""What to say where a pass finds nothing to learn from: the reason, and what would change it."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_proxy.trainer.report import TrainReport
from lightning_proxy.trainer.transitions import Reason

_NO_REWARDS = (
    "none of the {} recorded rollouts has a reward: POST /reward with the rollout_id, or with the id of a "
    "response, says how a run went; [automatic_rewards] takes rewards from the traffic itself"
)
_HELD = (
    "{} wait for the rest of their group of the task pool, or for its rewards: `lightning-proxy tasks` shows "
    "how far it is, and [train] group_wait_s is how long they wait"
)
_NO_CALLS: Mapping[str, str] = {
    Reason.GREEDY: "were at temperature 0, where nothing is sampled and so nothing is learnt from a choice: "
    "[[exploration]] samples a share of the rollouts at a temperature of its own",
    Reason.NOT_EXACT: "were recorded without the engine's own token ids: vLLM tells them, asked by "
    '[proxy] capture = "auto" or "tokens"; of other endpoints there is text only',
    Reason.REDACTED: "lost their token ids with what a rule of [[redaction]] took out: rules for one role or "
    "one path cost less",
    Reason.ERROR: "ended in an error: `lightning-proxy rollouts --failed` says which",
    Reason.OTHER_POLICY: "went to another model than [policy] name",
    Reason.OTHER_ROLE: "were made in roles that [train] roles does not name",
    Reason.NO_LOGPROBS: "were recorded without a logprob for every token",
    Reason.PENALISED: "were sampled with penalties or biases, whose distribution cannot be computed again",
    Reason.CONSTRAINED: "were held to a grammar (a forced tool, a format), which is not the policy's choice",
    Reason.UNKNOWN_LOGPROBS: "were sampled by earlier weights at another temperature, or cut: an engine with "
    "`--logprobs-mode processed_logprobs` tells the logprobs of what it sampled from",
    Reason.TOO_OLD: "were answered by weights more than [train] max_version_age updates away",
    Reason.TRAINED_BEFORE: "were trained on before, for the return that their rollout still has",
    Reason.TOO_LONG: "are longer than [train] max_row_tokens",
    Reason.ROLE_ALONE: "were made in a role that too few rollouts of their group have a return for",
}
_NO_ROLLOUTS: Mapping[str, str] = {
    Reason.GROUP_ALL_EQUAL: "every group agrees: all rollouts of a task have the same return, so none is "
    "better than the others; other tasks, finer rewards or a higher temperature would set them apart",
    Reason.GROUP_TOO_SMALL: "too few rollouts of the same task to compare: give runs of one task the same "
    "task id, and begin several of each (`lightning-proxy run --tasks FILE --group-size 8`)",
    Reason.GROUP_GONE: "what came again for late rewards has nobody to be compared with: the others of "
    "its group were deleted",
    Reason.INCOMPLETE_ROLLOUT: "capture lost calls of the rollouts: the proxy's log says why",
    Reason.NO_REWARD: "the rollouts' rewards are for earlier attempts than the last",
}


def advice(report: TrainReport, *, unrewarded: int = 0, held: int = 0) -> str | None:
    """Why there is nothing to train on, by what a pass counted; ``None`` where there is something.

    ``unrewarded``: rollouts that are recorded and wait for a reward; ``held``: that wait for their group. It
    says what most of it is due to.
    """
    rollouts, calls = (report.left_out.get(of, {}) for of in ("rollouts", "calls"))
    if report.counts.get("rollouts"):
        return None
    if not rollouts and held:
        return _HELD.format(held)
    if not rollouts:
        return _NO_REWARDS.format(unrewarded) if unrewarded else None
    reason = _most(rollouts)
    if reason == Reason.NO_TRANSITION and calls:
        return _of_calls(calls)
    if reason.startswith("failure_"):
        return (
            f"most rollouts were dropped for the failure {_class(reason)}: "
            "`lightning-proxy rollouts --failed` shows examples"
        )
    return _NO_ROLLOUTS.get(reason)


def _of_calls(calls: Mapping[str, int]) -> str:
    reason = _most(calls)
    which = "all calls" if len(calls) == 1 else f"most calls ({calls[reason]} of {sum(calls.values())})"
    if reason.startswith("failure_"):
        return f"{which} were masked for the failure {_class(reason)}, as [failures] training says"
    return f"{which} {_NO_CALLS.get(reason, 'were left out: ' + reason.replace('_', ' '))}"


def _most(counts: Mapping[str, int]) -> str:
    return max(counts, key=lambda name: counts[name])


def _class(reason: str) -> str:
    return reason.removeprefix("failure_")
