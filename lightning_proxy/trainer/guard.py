"""Stops a run that must not be published.

Collapse goes one way: a policy whose rollouts all end alike has no gradient back.

``collapse`` looks at what was drained, before the update: where that shows a policy that gets worse, it
counts as used. ``check_steps`` and ``check_probe`` look at what the update did: where that was at fault
they raise, and what was drained waits for a better one.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from lightning_proxy.config.train import GuardSettings
from lightning_proxy.errors import CheckpointInvalid
from lightning_proxy.store.intervals import Returns, Sample, difference_of

_CONFIDENCE = 0.9973  # three standard errors of many rollouts; more of a few
_WAY_BACK = "`lightning-proxy policies rollback --to {}` goes back"


@dataclass(frozen=True, slots=True)
class Collapse:
    """Why nothing is to be trained on what was drained; ``best`` is the version to go back to, if any."""

    message: str
    best: int | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """What a run saw of the version that it began with."""

    version: int
    rewards: Mapping[str, float]  # mean, std, min, max, count of the returns
    entropy: float | None = None

    @classmethod
    def at(cls, report: Mapping[str, Any]) -> Look | None:
        """What a report of an earlier run says; ``None`` where that run saw too little."""
        rewards, parent = report.get("rewards"), report.get("parent")
        if not rewards or parent is None:
            return None
        return cls(int(parent), rewards, report.get("entropy"))


def collapse(
    now: Look | None,
    before: Sequence[Look],
    settings: GuardSettings,
    *,
    mixed: int,
    equal: int,
    there: Container[int],
) -> Collapse | None:
    """What speaks against an update, if anything does; ``mixed`` and ``equal`` are numbers of groups.

    ``there``: the versions whose weights are still there; to others there is no way back.
    """
    worse = (
        None if now is None else _drop(now, before, settings, there) or _noise(now, before, settings, there)
    )
    return worse or _agreement(mixed, mixed + equal, settings.min_mixed_groups)


def best_of(looks: Sequence[Look]) -> Look | None:
    """The look with the highest mean reward, the latest of equals."""
    return max(reversed(looks), key=lambda look: look.rewards["mean"], default=None)


def _drop(
    now: Look, before: Sequence[Look], settings: GuardSettings, there: Container[int]
) -> Collapse | None:
    """A drop counts where it is larger than ``max_reward_drop`` of the range of all returns seen, and the
    interval of the difference (``store.intervals``) leaves no room for none: a few unlucky rollouts are no
    collapse. Nor do a few lucky ones hide one: it is looked for against every version, the best first.
    """
    seen = [now, *before]
    low, high = min(look.rewards["min"] for look in seen), max(look.rewards["max"] for look in seen)
    returns = Returns(low, high, two_valued=False)
    for best in sorted(before, key=lambda look: (-look.rewards["mean"], -look.version)):
        change = difference_of(_sample(now), _sample(best), returns, _CONFIDENCE)
        if -change.value <= settings.max_reward_drop * (high - low):
            return None
        if change.high is not None and change.high < 0:
            return _collapse(
                f"mean reward fell from {best.rewards['mean']:.3g} (version {best.version}) to "
                f"{now.rewards['mean']:.3g} (version {now.version}), by more than [guard] max_reward_drop = "
                f"{settings.max_reward_drop:g} of the range of rewards",
                best if best.version in there else _best_there(now, before, there),
            )
    return None


def _noise(
    now: Look, before: Sequence[Look], settings: GuardSettings, there: Container[int]
) -> Collapse | None:
    entropies = [look.entropy for look in before if look.entropy]
    if now.entropy is None or not entropies:
        return None
    if now.entropy <= settings.max_entropy_rise * median(entropies):
        return None
    return _collapse(
        f"the entropy of version {now.version} is {now.entropy:.3g} nats a token, more than [guard] "
        f"max_entropy_rise = {settings.max_entropy_rise:g} times the {median(entropies):.3g} of the runs "
        "before",
        _best_there(now, before, there),
    )


def _best_there(now: Look, before: Sequence[Look], there: Container[int]) -> Look | None:
    """The best to go back to; ``None`` where the present version is the best that is left."""
    best = best_of([look for look in before if look.version in there])
    return None if best is None or best.version == now.version else best


def _collapse(message: str, best: Look | None) -> Collapse:
    if best is None:
        return Collapse(f"{message}; no version to go back to is left")
    return Collapse(f"{message}; {_WAY_BACK.format(best.version)}", best.version)


def _agreement(mixed: int, groups: int, least: float) -> Collapse | None:
    if not groups or mixed / groups >= least:
        return None
    return Collapse(
        f"returns differ in {mixed} of {groups} groups: less than [guard] min_mixed_groups = {least:g}"
    )


def check_steps(steps: Sequence[Mapping[str, float]], settings: GuardSettings) -> None:
    """Raise ``CheckpointInvalid`` where a step's loss or gradient was not finite, or went too far.

    A step's ``kl`` is of before its own update: from the parent's weights it is 0 at the first step, and what
    the last step did is in none. With ``importance = "behaviour"`` it is from the sampler's.
    """
    for number, metrics in enumerate(steps, start=1):
        for name in ("pg_loss", "nll", "dpo_loss", "grad_norm"):  # as far as the algorithm has it
            if not math.isfinite(metrics.get(name, 0.0)):
                raise CheckpointInvalid(
                    f"{name} was {metrics[name]} in step {number} of {len(steps)}: nothing is published. "
                    "Lower [train] learning_rate, or look for broken logprobs among the drained spans"
                )
        if metrics.get("kl", 0.0) > settings.max_kl:
            raise CheckpointInvalid(
                f"by step {number} of {len(steps)} the policy had moved {metrics['kl']:.3g} nats a token, "
                f"more than [guard] max_kl = {settings.max_kl:g}: nothing is published. Lower learning_rate "
                "or epochs"
            )


def check_probe(logprobs: Sequence[float]) -> None:
    """Raise ``CheckpointInvalid`` where the new weights give the fixed prompt no finite logprobs."""
    if not all(map(math.isfinite, logprobs)):
        raise CheckpointInvalid("the new weights give logprobs that are not finite: nothing is published")


def _sample(look: Look) -> Sample:
    told = look.rewards
    return Sample.told(int(told["count"]), told["mean"], told["std"], told["min"], told["max"])
