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

# These take more than one number and a group per rollout.
_NEEDS = {
    "gae": "values of a critic",
    "gdpo": "several rewards per rollout",
    "remax": "the reward of a greedy rollout",
    "opo": "the lengths of the responses",
    "reinforce_plus_plus": "token-level returns",
    "reinforce_plus_plus_baseline": "token-level whitening",
    "optimal_token_baseline": "token-level statistics of the policy",
    "tir_optimal_token_baseline": "token-level statistics of the policy",
}


class VerlEstimator:
    """An estimator of verl's registry, given each rollout as one response of one token.

    ``grpo``: A = (r - mean(group)) / (std(group) + 1e-6), the sample standard deviation (n - 1);
    arXiv 2402.03300, section 4.1.2. Without ``norm_by_std``: A = r - mean(group), Dr. GRPO,
    arXiv 2503.20783.
    """

    def __init__(self, name: str, norm_by_std: bool) -> None:
        if name in _NEEDS:
            raise TrainingError(f"[train] estimator = {name!r} needs {_NEEDS[name]}, which there is not here")
        if name not in ADV_ESTIMATOR_REGISTRY:
            names = ", ".join(sorted(set(map(str, ADV_ESTIMATOR_REGISTRY)) - set(_NEEDS)))
            raise TrainingError(f"[train] estimator = {name!r}: verl has {names}")
        self._function = get_adv_estimator_fn(name)
        self._norm_by_std = norm_by_std

    def __call__(self, credits_R: Returns, groups_R: Sequence[int]) -> Returns:
        """One advantage per rollout, in float64."""
        advantages_R1, _ = self._function(
            token_level_rewards=torch.tensor(credits_R, dtype=torch.float64).unsqueeze(-1),
            response_mask=torch.ones(len(credits_R), 1, dtype=torch.float64),
            index=np.array(groups_R),
            norm_adv_by_std_in_grpo=self._norm_by_std,
            config=AlgoConfig(norm_adv_by_std_in_grpo=self._norm_by_std),
        )
        return np.asarray(advantages_R1.squeeze(-1).numpy(), dtype=np.float64)
