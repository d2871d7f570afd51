"""verl's registered advantage estimators, applied once per rollout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_proxy.errors import TrainingError
from lightning_proxy.trainer.advantages import Returns
from lightning_proxy.trainer.backend.stdout import stdout_to_stderr

with stdout_to_stderr():
    import lightning_proxy.trainer.backend.cpu_platform  # noqa: F401  isort: skip  must precede verl

    import torch
    from verl.trainer.config import AlgoConfig
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, get_adv_estimator_fn

# These take more than a number, a length and a group per rollout.
_NEEDS = {
    "gae": "values of a critic",
    "gdpo": "several rewards per rollout",
    "remax": "the reward of a greedy rollout",
    "optimal_token_baseline": "token-level statistics of the policy",
    "tir_optimal_token_baseline": "token-level statistics of the policy",
}


_BY_LENGTH = {"opo"}  # the baseline weighs a rollout by its trained tokens


class VerlEstimator:
    """An estimator of verl's registry, given each rollout as one response of one token.

    ``grpo``: A = (r - mean(group)) / (std(group) + 1e-6), the sample standard deviation (n - 1);
    arXiv 2402.03300, section 4.1.2. Without ``norm_by_std``: A = r - mean(group), Dr. GRPO,
    arXiv 2503.20783. ``rloo``: A = r - mean of the others, arXiv 2402.14740. ``opo``: the mean is weighed
    by length, arXiv 2505.23585. ``reinforce_plus_plus``: A = whitened r over the whole batch,
    ``reinforce_plus_plus_baseline``: whitened r - mean(group), arXiv 2501.03262; whitened over rollouts,
    not over tokens, so that a rollout counts once.
    """

    def __init__(self, name: str, norm_by_std: bool) -> None:
        if name in _NEEDS:
            raise TrainingError(f"[train] estimator = {name!r} needs {_NEEDS[name]}, which there is not here")
        if name not in ADV_ESTIMATOR_REGISTRY:
            names = ", ".join(sorted(set(map(str, ADV_ESTIMATOR_REGISTRY)) - set(_NEEDS)))
            raise TrainingError(f"[train] estimator = {name!r}: verl has {names}")
        self._function = get_adv_estimator_fn(name)
        self._by_length = name in _BY_LENGTH
        self._norm_by_std = norm_by_std

    def __call__(self, credits_R: Returns, groups_R: Sequence[int], lengths_R: Sequence[int]) -> Returns:
        """One advantage per rollout, in float64."""
        rewards_R2 = torch.zeros(len(credits_R), 2, dtype=torch.float64)
        rewards_R2[:, 0] = torch.from_numpy(credits_R)
        mask_R2 = torch.zeros_like(rewards_R2)
        mask_R2[:, 0] = 1
        if self._by_length:  # these only add the mask up
            mask_R2[:, 1] = torch.tensor(lengths_R).clamp(min=1) - 1  # 0: not known, of former members
        advantages_R2, _ = self._function(
            token_level_rewards=rewards_R2,
            response_mask=mask_R2,
            index=np.array(groups_R),
            norm_adv_by_std_in_grpo=self._norm_by_std,
            config=AlgoConfig(norm_adv_by_std_in_grpo=self._norm_by_std),
        )
        return np.asarray(advantages_R2[:, 0].numpy(), dtype=np.float64)
