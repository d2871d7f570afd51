"""verl's FSDP2 engine as every worker runs it, on a CPU as on CUDA; registered at verl's extension point."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning_proxy.trainer.backend.cpu_platform  # noqa: F401  isort: skip  must precede verl

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from verl.utils import tensordict_utils as tu
from verl.utils.torch_functional import entropy_from_logits
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from lightning_proxy.trainer.backend.shaping import shape_logits
from lightning_proxy.trainer.checkpoint import read_layout
from lightning_proxy.trainer.sampling import PLAIN, Sampling

_AT_ONCE = 1 << 28  # logits that go through a softmax together: 1 GiB in float32


@EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu")
@EngineRegistry.register(  # by vendor: the entry without one is verl's own engine
    model_type="language_model", backend="fsdp2", device="cuda", vendor=["nvidia", "amd"]
)
class UpdateEngine(FSDPEngineWithLMHead):  # type: ignore[misc]
    """Nothing in verl's engine needs an accelerator; two things are done otherwise."""

    samplings: tuple[Sampling, ...] = (PLAIN,)  # of the next micro-batch

    def _build_lora_module(self, module: torch.nn.Module) -> torch.nn.Module:
        """Frozen weights stay in the bfloat16 that they are stored in: half the memory, the same numbers.

        The adapter is float32 always: AdamW's steps are smaller than bfloat16's.
        """
        adapted: torch.nn.Module = super()._build_lora_module(module)
        if stored_in_bfloat16(Path(self.model_config.local_path)):
            for parameter in adapted.parameters():  # not the buffers: rotary frequencies need float32
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
        return adapted

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: Any, logits_processor_func: object
    ) -> dict[str, torch.Tensor]:
        """Logprobs of the rows' tokens, and the entropy where it is asked for: all that we ask for.

        Of the distributions that the tokens were sampled from: the micro-batch's ``sampling`` says which of
        ``samplings``. verl's own keeps the logits several times over, and without flash-attention it takes
        one autograd node per token (half of an update's time on a CPU). Here they are never copied: padding
        goes through the softmax too, and its values are left out.
        """
        offsets = micro_batch["input_ids"].offsets()
        rows, longest, _ = output.logits.shape  # packed: 1 x tokens
        places = _places(offsets, rows, longest)
        logits = output.logits.flatten(0, 1)
        # The logits at a token are those of the next one.
        followed_by = output_args["input_ids_rmpad_rolled"], micro_batch["sampling"].values().roll(-1)
        padded = [torch.zeros(len(logits), dtype=of.dtype, device=of.device) for of in followed_by]
        given = [to.index_copy(0, places, of) for to, of in zip(padded, followed_by, strict=True)]
        functions = {"log_probs": _logprobs}
        if tu.get_non_tensor_data(micro_batch, "calculate_entropy", default=False):
            functions["entropy"] = _entropy
        values = {
            name: piecewise(
                functools.partial(function, self.samplings), logits, *given, at_once=self._at_once
            )
            for name, function in functions.items()
        }
        return {
            name: torch.nested.nested_tensor_from_jagged(of[places], offsets) for name, of in values.items()
        }

    @property
    def _at_once(self) -> int:
        """Fewer where tokens are cut: sorting takes several times the memory."""
        return _AT_ONCE // 4 if any(each.cuts for each in self.samplings) else _AT_ONCE


def _places(offsets: torch.Tensor, rows: int, longest: int) -> torch.Tensor:
    """Where the tokens of the rows lie among rows x longest."""
    if rows < len(offsets) - 1:  # packed, one after the other
        return torch.arange(longest, device=offsets.device)
    columns = torch.arange(longest, device=offsets.device)
    return (columns < offsets.diff().unsqueeze(-1)).flatten().nonzero()[:, 0]


def stored_in_bfloat16(model: Path) -> bool:
    """Whether every tensor of the checkpoint is bfloat16."""
    return {info.dtype for file in read_layout(model).values() for info in file.values()} == {"BF16"}


def piecewise(
    function: Callable[..., torch.Tensor],
    logits: torch.Tensor,
    *others: torch.Tensor,
    at_once: int = _AT_ONCE,
) -> torch.Tensor:
    """``function`` of tokens x vocabulary logits and of what else there is per token, one number per token.

    Where there are many logits, piece by piece, each computed again for its gradient: a large vocabulary's
    logits in float32 would take more memory than the layers.
    """
    rows = max(1, at_once // logits.shape[-1])
    if len(logits) <= rows:
        return function(logits, *others)
    pieces = zip(*(torch.split(each, rows) for each in (logits, *others)), strict=True)
    return torch.cat([checkpoint(function, *piece, use_reentrant=False) for piece in pieces])


def _logprobs(
    samplings: Sequence[Sampling], logits: torch.Tensor, labels: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    shaped = _shaped(samplings, logits, labels, codes)
    return -functional.cross_entropy(shaped, labels, reduction="none")


def _entropy(
    samplings: Sequence[Sampling], logits: torch.Tensor, labels: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    entropy: torch.Tensor = entropy_from_logits(_shaped(samplings, logits, labels, codes))
    return entropy


def _shaped(
    samplings: Sequence[Sampling], logits: torch.Tensor, labels: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    if all(each == PLAIN for each in samplings):
        return logits.float()
    return shape_logits(logits.float(), labels, codes, samplings)
