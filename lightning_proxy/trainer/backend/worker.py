"""What runs on each worker of the update: verl's ``TrainingWorker`` with our batches and exports.

Every method runs on all workers at once (they meet in collectives) with the same arguments; each
takes its own share of the rows. The first worker's answer is the answer.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning_proxy.trainer.backend.engine  # noqa: F401  isort: skip  registers; must precede verl

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tensordict import TensorDict
from torch.distributed.tensor import DTensor
from verl.single_controller.base.decorator import Dispatch, register
from verl.trainer.config import CheckpointConfig
from verl.trainer.ppo.core_algos import kl_penalty
from verl.utils import tensordict_utils as tu
from verl.utils.metric import Metric
from verl.workers.config import (
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    PolicyLossConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding

from lightning_proxy.errors import TrainingError
from lightning_proxy.trainer.backend.likelihood import likelihood_loss
from lightning_proxy.trainer.batches import Floats, Ints, Rows, plan_micro_batches
from lightning_proxy.trainer.checkpoint import read_layout

_TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SUMS = ("pg_loss", "kl_loss", "entropy_loss", "nll")  # metrics that are sums over tokens, weighed
_MEANS = ("clip_frac", "kl", "ratio_mean")  # and those that are means; a loss has some of both
_PACKED_ATTENTION = "flash_attention_2"
# While one worker reads a large model or writes it, the others wait in a collective. NCCL's own limit of ten
# minutes would end them. A worker that dies is noticed by Ray at once, whatever this is.
_LONGEST_WAIT = timedelta(hours=2)
_OWN_OPTIONS = ("lr", "initial_lr", "eps", "weight_decay")  # the settings decide, not a saved optimiser


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """All that a worker is built from; plain values, so that it travels to Ray workers."""

    model: str
    device: str  # cpu, cuda
    packed: bool  # rows without padding through flash-attention
    dtype: str  # float32, bfloat16
    learning_rate: float
    adam_eps: float
    weight_decay: float
    grad_clip: float
    loss: str  # policy, likelihood
    policy_loss: str
    clip_low: float
    clip_high: float
    kl_coef: float
    kl_estimator: str
    entropy_coef: float
    micro_batch_tokens: int
    lora_rank: int
    lora_alpha: int
    threads: int
    seed: int


class UpdateWorker(TrainingWorker):  # type: ignore[misc]
    """One process of the update, whole model or shard."""

    def __init__(self, config: WorkerConfig) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        _join_process_group(config.device)
        super().__init__(_training_worker_config(config))
        self.own = config
        torch.manual_seed(config.seed + self.rank)
        policy = functools.partial(policy_loss, _actor_config(config), config)
        self.set_loss_fn(likelihood_loss if config.loss == "likelihood" else policy)
        self.reset()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def logprobs(self, rows: Rows) -> Floats:
        """See ``Backend.logprobs``."""
        logprobs_T = np.zeros(len(rows.tokens), dtype=np.float32)
        with self.engine.eval_mode():
            for own_rows in self._own_share(rows):
                share = rows.select(own_rows) if len(own_rows) else _PADDING
                output = self.engine.infer_batch(self._tensors(share))
                values = output["model_output"]["log_probs"].values().float().cpu().numpy()
                for position, row in enumerate(own_rows):
                    first, last = share.offsets[position], share.offsets[position + 1] - 1
                    start, end = rows.offsets[row], rows.offsets[row + 1]
                    logprobs_T[start + 1 : end] = values[first:last]  # at t: the logprob of token t + 1
        total = torch.from_numpy(logprobs_T)
        dist.all_reduce(total)  # each row is some worker's share exactly once
        return total.numpy()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def update(self, rows: Rows) -> dict[str, float]:
        """See ``Backend.update``."""
        with self.engine.train_mode():
            metrics = self.accumulate(rows)
            metrics["grad_norm"] = float(self.engine.optimizer_step())
        return metrics

    def accumulate(self, rows: Rows) -> dict[str, float]:
        """Add the gradient of these rows' loss to what is there, micro-batch by micro-batch."""
        sums: dict[str, float] = {"tokens": 0.0}
        ratio_max: float | None = None
        for own_rows in self._own_share(rows):
            share = rows.select(own_rows) if len(own_rows) else _PADDING
            output = self.engine.forward_backward_batch(self._tensors(share), self.loss_fn)
            metrics = {name: float(values[0]) for name, values in output["metrics"].items()}
            tokens = share.trained_tokens
            sums["tokens"] += tokens
            for name, value in metrics.items():
                if name in _SUMS or name in _MEANS:
                    sums[name] = sums.get(name, 0.0) + value * (1 if name in _SUMS else tokens)
            if "ratio_max" in metrics:
                ratio_max = max(ratio_max or 0.0, metrics["ratio_max"])
        return self._over_workers(sums, ratio_max)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def export(self, directory: str, base: str) -> None:
        """See ``Backend.export``."""
        layout = read_layout(Path(base))
        places = {name: (file, info.dtype) for file, infos in layout.items() for name, info in infos.items()}
        parts: dict[str, dict[str, torch.Tensor]] = {file: {} for file in layout}
        source = self._merged_weights() if self.own.lora_rank else self.engine.get_per_tensor_param()[0]
        for name, weight in source:  # all gather each; the first worker keeps it, until its file is whole
            if self.rank or name not in places:
                continue
            file, dtype = places[name]
            parts[file][name] = weight.detach().to(_TORCH_DTYPES[dtype]).cpu()
            if len(parts[file]) == len(layout[file]):
                _save(parts.pop(file), Path(directory, file))
        if self.rank == 0 and parts:
            lacking = [name for file in parts for name in layout[file] if name not in parts[file]]
            raise TrainingError(f"the model that is trained has no {', '.join(lacking[:5])}, as {base} has")
        dist.barrier()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def export_adapter(self, directory: str, base: str) -> None:
        """See ``Backend.export_adapter``."""
        adapter = {
            name.replace(".default.", "."): _gathered(value).cpu()
            for name, value in self.engine.module.state_dict().items()
            if ".lora_" in name
        }
        if self.rank == 0:
            _save(adapter, Path(directory, "adapter_model.safetensors"))
            peft_config = self.engine.module.peft_config["default"]
            fields = {**peft_config.to_dict(), "base_model_name_or_path": base, "inference_mode": True}
            text = json.dumps(fields, default=_plain, indent=2, sort_keys=True)
            Path(directory, "adapter_config.json").write_text(text, encoding="utf-8")
        dist.barrier()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def save_state(self, directory: str) -> None:
        """See ``Backend.save_state``."""
        self.engine.save_checkpoint(directory)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def load_state(self, directory: str, optimizer: bool) -> None:
        """See ``Backend.load_state``."""
        groups = self.engine.optimizer.param_groups
        own = [{name: group[name] for name in _OWN_OPTIONS if name in group} for group in groups]
        self.engine.load_checkpoint(directory, del_local_after_load=False)
        for group, options in zip(self.engine.optimizer.param_groups, own, strict=True):
            group.update(options)
        if not optimizer:
            self.engine.optimizer.state.clear()

    def _own_share(self, rows: Rows) -> Iterator[Ints]:
        for step in plan_micro_batches(rows.lengths, self.own.micro_batch_tokens, self.world_size):
            yield step[self.rank]

    def _tensors(self, rows: Rows) -> TensorDict:
        """One micro-batch as the jagged TensorDict that verl's engine and ``ppo_loss`` take."""
        self.engine.samplings = rows.samplings if rows.sampling[rows.mask].any() else rows.samplings[:1]
        starts_N = [int(np.flatnonzero(mask)[0]) if mask.any() else 1 for mask in _per_row(rows, rows.mask)]

        def responses(values_T: Any, dtype: torch.dtype) -> torch.Tensor:
            parts = [row[start:] for row, start in zip(_per_row(rows, values_T), starts_N, strict=True)]
            return _jagged(parts, dtype)

        tokens = _per_row(rows, rows.tokens)
        prompts = [row[:start] for row, start in zip(tokens, starts_N, strict=True)]
        mask = responses(rows.mask, torch.float32)
        return tu.get_tensordict(
            {
                "input_ids": _jagged(tokens, torch.int64),
                "sampling": _jagged(_per_row(rows, np.where(rows.mask, rows.sampling, 0)), torch.int64),
                "position_ids": _jagged([np.arange(length) for length in rows.lengths], torch.int64),
                "prompts": _jagged(prompts, torch.int64),
                "responses": responses(rows.tokens, torch.int64),
                "response_mask": mask,
                "loss_mask": mask,
                "old_log_probs": responses(rows.logprobs, torch.float32),
                "advantages": responses(rows.advantages, torch.float32),
                # verl multiplies each token's loss by this after clipping, whatever the policy loss.
                "rollout_is_weights": responses(rows.weights, torch.float32),
                "reference": responses(rows.reference, torch.float32),
                "token_weights": _jagged(_per_row(rows, rows.weights), torch.float32),
            },
            {
                "temperature": 1.0,  # the engine scales, token by token
                "global_batch_size": len(rows),
                "use_dynamic_bsz": False,
                "micro_batch_size_per_gpu": len(rows),
                "use_remove_padding": self.own.packed,
                "calculate_entropy": self.own.entropy_coef > 0,
            },
        )

    def _over_workers(self, sums: dict[str, float], ratio_max: float | None) -> dict[str, float]:
        total = torch.tensor(list(sums.values()), dtype=torch.float64)
        dist.all_reduce(total)
        metrics = dict(zip(sums, total.tolist(), strict=True))
        tokens = metrics.pop("tokens")
        for name in metrics:  # verl multiplies sums by the workers, since FSDP takes the mean of gradients
            metrics[name] /= self.world_size if name in _SUMS else max(tokens, 1.0)
        if ratio_max is None:
            return metrics
        largest = torch.tensor(ratio_max, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return {**metrics, "ratio_max": largest.item()}

    def _merged_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The base weights with the adapter added: W + alpha / r * B A (LoRA, arXiv 2106.09685, section 4.1).

        verl's own merge rounds to bfloat16.
        """
        state = {
            name.removeprefix("base_model.model."): value
            for name, value in self.engine.module.state_dict().items()
        }
        scale = self.own.lora_alpha / self.own.lora_rank
        for name, value in state.items():
            if ".lora_" in name:
                continue
            plain = name.replace(".base_layer.", ".")
            module = plain.removesuffix(".weight")
            weight = _gathered(value)
            if f"{module}.lora_A.default.weight" in state:
                down, up = (_gathered(state[f"{module}.lora_{side}.default.weight"]) for side in "AB")
                weight = weight.float() + scale * (up.float() @ down.float())
            yield plain, weight


def policy_loss(
    actor: FSDPActorConfig,
    config: WorkerConfig,
    model_output: Mapping[str, Any],
    data: TensorDict,
    dp_group: object = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """verl's ``ppo_loss`` (arXiv 1707.06347, equation 7, in the variant that the settings name).

    With ``kl_coef`` plus its multiple of the divergence from the reference policy (arXiv 2402.03300,
    equation 3, by verl's estimator), with ``entropy_coef`` less its multiple of the entropy, every token
    weighed as in the policy loss. verl's own terms of these kinds would not weigh them.
    Beside it, the ratio of new to old probability, 1 on the first step on fresh data, and their divergence.
    verl's own ``ppo_kl``, the mean of the logprobs' differences, is below 0 where what was sampled became
    likelier, however far the weights have gone.
    """
    output = {name: value for name, value in model_output.items() if name != "entropy"}
    loss, metrics = ppo_loss(config=actor, model_output=output, data=data, dp_group=dp_group)
    values = {
        name: value.aggregate() if isinstance(value, Metric) else value for name, value in metrics.items()
    }
    pg_loss = float(values["actor/pg_loss"])
    mask = data["response_mask"].to_padded_tensor(0.0).bool()
    weights = data["rollout_is_weights"].to_padded_tensor(0.0)
    new = no_padding_2_padding(model_output["log_probs"], data)
    kl_loss = entropy_loss = 0.0
    if config.kl_coef:
        reference = data["reference"].to_padded_tensor(0.0)
        divergence = torch.where(mask, kl_penalty(new, reference, config.kl_estimator), 0.0)
        term = (weights * divergence).sum() * data["dp_size"]
        loss, kl_loss = loss + config.kl_coef * term, float(term)
    if config.entropy_coef:
        entropy = torch.where(mask, no_padding_2_padding(model_output["entropy"], data), 0.0)
        term = (weights * entropy).sum() * data["dp_size"]
        loss, entropy_loss = loss - config.entropy_coef * term, float(term)
    with torch.no_grad():
        difference = (new - data["old_log_probs"].to_padded_tensor(0.0)).clamp(-20.0, 20.0)[mask]  # as verl's
        ratio = torch.exp(difference)
        divergence = ratio - 1 - difference
    return loss, {
        "pg_loss": pg_loss,
        "kl_loss": kl_loss,
        "entropy_loss": entropy_loss,
        "clip_frac": float(values.get("actor/pg_clipfrac", 0.0)),
        "kl": float(divergence.mean()) if len(ratio) else 0.0,
        "ratio_mean": float(ratio.mean()) if len(ratio) else 1.0,
        "ratio_max": float(ratio.max()) if len(ratio) else 0.0,
    }


def _join_process_group(device: str) -> None:
    """verl's own set-up asks for ``cpu:gloo,cpu:gloo`` on a CPU, which torch refuses."""
    if dist.is_initialized():
        return
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    if int(os.environ["WORLD_SIZE"]) == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=_LONGEST_WAIT)
    else:
        dist.init_process_group(backend, timeout=_LONGEST_WAIT)


def _training_worker_config(config: WorkerConfig) -> TrainingWorkerConfig:
    precision = {"float32": "fp32", "bfloat16": "bf16"}[config.dtype]
    return TrainingWorkerConfig(
        model_type="language_model",
        model_config=HFModelConfig(
            path=config.model,
            load_tokenizer=False,
            use_remove_padding=config.packed,
            enable_gradient_checkpointing=config.device == "cuda",
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            override_config={"attn_implementation": _PACKED_ATTENTION if config.packed else "sdpa"},
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",  # "fsdp" cannot synchronise module states on a CPU
            model_dtype="fp32",
            mixed_precision={"param_dtype": precision, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
            use_dynamic_bsz=False,
            use_torch_compile=False,
            seed=config.seed,
        ),
        optimizer_config=FSDPOptimizerConfig(
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            clip_grad=config.grad_clip,
            lr_warmup_steps=0,
            total_training_steps=1,  # of no effect: the schedule is constant
            override_optimizer_config={"eps": config.adam_eps},
        ),
        checkpoint_config=CheckpointConfig(save_lora_only=config.lora_rank > 0),
    )


def _actor_config(config: WorkerConfig) -> FSDPActorConfig:
    return FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        use_dynamic_bsz=True,  # of no effect but to spare a check: micro-batches are ours
        clip_ratio=config.clip_low,
        clip_ratio_low=config.clip_low,
        clip_ratio_high=config.clip_high,
        policy_loss=PolicyLossConfig(loss_mode=config.policy_loss),
        loss_agg_mode="token-sum",  # the rows' weights hold the normalisation
    )


def _per_row(rows: Rows, values_T: Any) -> list[Any]:
    return np.split(values_T, rows.offsets[1:-1])


def _jagged(parts: list[Any], dtype: torch.dtype) -> torch.Tensor:
    tensors = [torch.as_tensor(np.ascontiguousarray(part)).to(dtype) for part in parts]
    return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)


def _gathered(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach()


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(
        {name: value.contiguous().cpu() for name, value in tensors.items()}, path, metadata={"format": "pt"}
    )


def _plain(value: object) -> object:
    """PEFT's enumerations and sets as JSON."""
    return sorted(value) if isinstance(value, set) else str(value)


# What a worker without a share of a step takes through the model, so that all meet in the collectives.
_PADDING = Rows(
    tokens=np.zeros(2, dtype=np.int64),
    mask=np.zeros(2, dtype=np.bool_),
    logprobs=np.zeros(2, dtype=np.float32),
    advantages=np.zeros(2, dtype=np.float32),
    weights=np.zeros(2, dtype=np.float32),
    sampling=np.zeros(2, dtype=np.int16),
    raw=np.zeros(2, dtype=np.bool_),
    importance=np.zeros(2, dtype=np.float32),
    reference=np.zeros(2, dtype=np.float32),
    versions=np.full(2, -1, dtype=np.int64),
    offsets=np.array([0, 2], dtype=np.int64),
    rollouts=("",),
)
