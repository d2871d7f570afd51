"""Credit assignment: what each call is credited with of its rollout's return, and what is compared.

A rollout of ``T`` calls, ``t = 0 .. T-1`` in order of their start, has the return ``R``, the sum of what it
was paid. ``r_t`` is what it was paid at call ``t``: the rewards for that call, and at the last call those for
the rollout or the attempt as a whole. What is paid for a call that is not the policy's is paid at the
policy's call before it. So the ``r_t`` add up to ``R``.

``identical``: ``c_t = R``. LightningRL as published (arXiv 2508.03680): all calls share in the outcome alike.

``discounted``: ``c_t = gamma^(T-1-t) R``: the discounted return of a reward at the end (Sutton and Barto,
Reinforcement Learning, second edition, equation 3.8), with ``R`` in its place whatever it was paid for. The
baseline is that of ``R``, once per rollout, and the advantage takes the same factor:
``A_t = gamma^(T-1-t) A(R)``. By that earlier calls learn less; it is *not* an estimate of their own worth.

``return_to_go``: ``c_t = G_t = sum over k >= t of gamma^(k-t) r_k`` (the same equation): what was earned
before a call is no credit of that call. ``G_t`` is compared with that of the same step of the others of the
group.

Next to it, and not the same: process-supervised GRPO (arXiv 2402.03300, section 4.1.3) normalises the
``r_k`` of all steps together and adds up what follows; here they are added up first, and compared step by
step. GiGPO (arXiv 2505.10978) compares returns-to-go of steps with the same state of the environment, and
adds an advantage of the episode; here steps are told by their number alone, which is no state, and nothing
is added. With rewards at the end only and ``gamma = 1`` every ``G_t`` is ``R``, compared among the rollouts
that came as far.

With ``by_role`` a role's calls have the return of that role, the sum of the payments that go to it, and
are compared with that role's calls only: ``t`` stays the number among all calls, which discounting goes by;
steps are counted, and compared, within the role.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lightning_proxy.store import Payment, add_up
from lightning_proxy.trainer.transitions import TrainableRollout, Transition


class Place(NamedTuple):
    """What has one advantage: a rollout, or its part in a role, at a step."""

    role: str | None = None  # None too where roles are not told apart
    step: int | None = None  # within the role; None: all steps


@dataclass(frozen=True, slots=True)
class Credit:
    """One of the three, with its discount ``gamma``; see above."""

    method: Literal["identical", "discounted", "return_to_go"] = "identical"
    discount: float = 1.0
    by_role: bool = False

    @property
    def by_step(self) -> bool:
        """Whether each step is compared by itself."""
        return self.method == "return_to_go"

    def credits_of(self, rollout: TrainableRollout) -> Mapping[Place, float]:
        """What is compared of a rollout: one number for each place that it took.

        Steps that are not trained on count too: the rollout went on from there all the same. Without a
        payment that goes to a role, the role has no return and no place.
        """
        found: dict[Place, float] = {}
        roles = dict.fromkeys(step.role for step in rollout.steps) if self.by_role else (None,)
        for role in roles:
            paid = self._paid(rollout, role)
            if not self.by_step:
                whole = rollout.value if len(paid) == len(rollout.payments) else add_up(paid)
                if whole is not None:
                    found[Place(role)] = whole
            elif paid and rollout.steps:
                found |= self._steps(rollout, role, paid)
        return found

    def places_of(self, rollout: TrainableRollout) -> list[Place]:
        """Where each transition of the rollout belongs."""
        if not self.by_step:
            return [Place(each.role if self.by_role else None) for each in rollout.transitions]
        at: list[Place] = []
        so_far: Counter[str | None] = Counter()
        for step in rollout.steps:
            role = step.role if self.by_role else None
            at.append(Place(role, so_far[role]))
            so_far[role] += 1
        return [at[each.step] for each in rollout.transitions]

    def factor_of(self, rollout: TrainableRollout, transition: Transition) -> float:
        """What the credit and the advantage of its place are multiplied by for this transition."""
        after = len(rollout.steps) - 1 - transition.step
        return transition.part * (self.discount**after if self.method == "discounted" else 1.0)

    def _paid(self, rollout: TrainableRollout, role: str | None) -> tuple[Payment, ...]:
        return tuple(each for each in rollout.payments if not self.by_role or each.goes_to(role))

    def _steps(
        self, rollout: TrainableRollout, role: str | None, paid: Sequence[Payment]
    ) -> dict[Place, float]:
        rewards_T = [0.0] * len(rollout.steps)
        for payment, step in zip(paid, rollout.steps_paid(paid), strict=True):
            rewards_T[step] += payment.value
        own = [
            value
            for value, call in zip(returns_to_go(rewards_T, self.discount), rollout.steps, strict=True)
            if not self.by_role or call.role == role
        ]
        return {Place(role, number): value for number, value in enumerate(own)}


IDENTICAL = Credit()


def returns_to_go(rewards_T: Sequence[float], discount: float) -> list[float]:
    """``G_t = r_t + gamma G_(t+1)``, ``T`` numbers."""
    found: list[float] = []
    for reward in reversed(rewards_T):
        found.append(reward + discount * (found[-1] if found else 0.0))
    return found[::-1]
