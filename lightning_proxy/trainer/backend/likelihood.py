"""verl's supervised loss, with our weights in place of its mean."""

from __future__ import annotations

import lightning_proxy.trainer.backend.cpu_platform  # noqa: F401  isort: skip  must precede verl

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.utils.losses import sft_loss


def likelihood_loss(
    model_output: dict[str, torch.Tensor], data: TensorDict, dp_group: object = None
) -> tuple[torch.Tensor, dict[str, float]]:
    """``-sum w log p`` over all tokens, by verl's ``sft_loss``: its mask may hold numbers, of either sign.

    It divides by the tokens of the batch. The rows' weights hold the normalisation, so that a token counts
    the same whichever mini-batch and micro-batch it came to lie in; so here it divides by 1.
    """
    weighed = data.copy()
    weighed["loss_mask"] = data["token_weights"]
    tu.assign_non_tensor(weighed, batch_num_tokens=1)
    loss, _ = sft_loss(config=None, model_output=model_output, data=weighed, dp_group=dp_group)
    return loss, {"nll": float(loss)}
