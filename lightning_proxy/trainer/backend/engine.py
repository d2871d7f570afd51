"""verl's FSDP2 engine as every worker runs it, on a CPU as on CUDA; registered at verl's extension point."""

from __future__ import annotations

from collections.abc import Callable
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

from lightning_proxy.trainer.checkpoint import read_layout

_AT_ONCE = 1 << 28  # logits that go through a softmax together: 1 GiB in float32


@EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu")
@EngineRegistry.register(  # by vendor: the entry without one is verl's own engine
    model_type="language_model", backend="fsdp2", device="cuda", vendor=["nvidia", "amd"]
)
class UpdateEngine(FSDPEngineWithLMHead):  # type: ignore[misc]
    """Nothing in verl's engine needs an accelerator; two things are done otherwise."""

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

        Without flash-attention verl's own takes one autograd node per token (half of an update's time on a
        CPU), and keeps the logits several times over.
        """
        if tu.get_non_tensor_data(micro_batch, "use_remove_padding", default=False):
            packed: dict[str, torch.Tensor] = super().prepare_model_outputs(
                output, output_args, micro_batch, logits_processor_func
            )
            return packed
        offsets = micro_batch["input_ids"].offsets()
        lengths = offsets.diff().tolist()
        logits = output.logits  # rows x longest row x vocabulary
        if min(lengths) == max(lengths):
            logits = logits.flatten(0, 1)
        else:
            logits = torch.cat([row[:length] for row, length in zip(logits, lengths, strict=True)])
        values = {"log_probs": piecewise(_logprobs, logits, output_args["input_ids_rmpad_rolled"])}
        if tu.get_non_tensor_data(micro_batch, "calculate_entropy", default=False):
            values["entropy"] = piecewise(_entropy, logits)
        return {name: torch.nested.nested_tensor_from_jagged(of, offsets) for name, of in values.items()}


def stored_in_bfloat16(model: Path) -> bool:
    """Whether every tensor of the checkpoint is bfloat16."""
    return {info.dtype for file in read_layout(model).values() for info in file.values()} == {"BF16"}


def piecewise(
    function: Callable[..., torch.Tensor], logits: torch.Tensor, *others: torch.Tensor
) -> torch.Tensor:
    """``function`` of tokens x vocabulary logits and of what else there is per token, one number per token.

    Where there are many logits, piece by piece, each computed again for its gradient: a large vocabulary's
    logits in float32 would take more memory than the layers.
    """
    rows = max(1, _AT_ONCE // logits.shape[-1])
    if len(logits) <= rows:
        return function(logits, *others)
    pieces = zip(*(torch.split(each, rows) for each in (logits, *others)), strict=True)
    return torch.cat([checkpoint(function, *piece, use_reentrant=False) for piece in pieces])


def _logprobs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -functional.cross_entropy(logits.float(), labels, reduction="none")


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    entropy: torch.Tensor = entropy_from_logits(logits.float())
    return entropy
