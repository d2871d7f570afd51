"""The update through verl's ``TrainingWorker``: in this process, or on several workers of ``on_ray``."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from lightning_proxy.config.train import TrainSettings
from lightning_proxy.errors import TrainingError
from lightning_proxy.trainer.backend.stdout import stdout_to_stderr
from lightning_proxy.trainer.batches import Floats, Rows

with stdout_to_stderr():
    import torch

    from lightning_proxy.trainer.backend.worker import UpdateWorker, WorkerConfig
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY  # isort: skip  after cpu_platform

# These aggregate by row on their own terms, so that a rollout would count by its number of rows.
_OWN_AGGREGATION = {"sapo", "geo_mean", "bypass_mode"}
_NEEDS_SETTING = {"dro": "dro_beta"}


class _Workers(Protocol):
    def call(self, method: str, *arguments: object) -> Any:
        """Run the method on every worker; the first one's answer."""

    def close(self) -> None: ...


class VerlBackend:
    """See ``Backend``."""

    def __init__(self, settings: TrainSettings, model: Path) -> None:
        config = worker_config(settings, model)
        with stdout_to_stderr():
            self._workers: _Workers = (
                _InProcess(config) if settings.workers == 1 else _on_ray(config, settings.workers)
            )

    def logprobs(self, rows: Rows) -> Floats:
        return cast(Floats, self._call("logprobs", rows))

    def update(self, rows: Rows) -> Mapping[str, float]:
        return cast(Mapping[str, float], self._call("update", rows))

    def export(self, directory: Path, base: Path) -> None:
        self._call("export", str(directory), str(base))

    def export_adapter(self, directory: Path, base: Path) -> None:
        self._call("export_adapter", str(directory), str(base))

    def save_state(self, directory: Path) -> None:
        self._call("save_state", str(directory))

    def load_state(self, directory: Path, *, optimizer: bool = True) -> None:
        self._call("load_state", str(directory), optimizer)

    def close(self) -> None:
        with stdout_to_stderr():
            self._workers.close()

    def _call(self, method: str, *arguments: object) -> Any:
        with stdout_to_stderr():
            return self._workers.call(method, *arguments)


def worker_config(settings: TrainSettings, model: Path) -> WorkerConfig:
    """What the settings mean on this machine. ``TrainingError`` where they cannot be carried out."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise TrainingError("[train] device = 'cuda', but torch sees no GPU; 'auto' would take the CPU")
    _check_policy_loss(settings.policy_loss)
    device = "cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu"
    if settings.flash_attention:
        _check_flash_attention(device)
    return WorkerConfig(
        model=str(model),
        device=device,
        packed=settings.flash_attention,
        dtype=settings.dtype,
        learning_rate=settings.learning_rate,
        adam_eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
        grad_clip=settings.grad_clip,
        loss="policy" if settings.algorithm == "rl" else "likelihood",
        policy_loss=settings.policy_loss,
        clip_low=settings.clip_ratio,
        clip_high=settings.clip_ratio_high or settings.clip_ratio,
        kl_coef=settings.kl_coef,
        kl_estimator=settings.kl_estimator,
        entropy_coef=settings.entropy_coef if settings.algorithm == "rl" else 0.0,
        micro_batch_tokens=settings.micro_batch_tokens,
        lora_rank=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        threads=settings.threads,
        seed=settings.seed,
    )


def _check_flash_attention(device: str) -> None:
    if device != "cuda":
        raise TrainingError("[train] flash_attention = true needs a GPU; the update is on the CPU")
    if importlib.util.find_spec("flash_attn") is None:
        raise TrainingError("[train] flash_attention = true, but flash_attn is not installed")


def _check_policy_loss(name: str) -> None:
    if name in _OWN_AGGREGATION:
        raise TrainingError(
            f"[train] policy_loss = {name!r} averages over rows by itself, so a rollout would count by "
            "the number of rows it became; take another"
        )
    if name in _NEEDS_SETTING:
        raise TrainingError(
            f"[train] policy_loss = {name!r} needs {_NEEDS_SETTING[name]}, which cannot be set yet"
        )
    if name not in POLICY_LOSS_REGISTRY:
        names = ", ".join(sorted(set(POLICY_LOSS_REGISTRY) - _OWN_AGGREGATION - set(_NEEDS_SETTING)))
        raise TrainingError(f"[train] policy_loss = {name!r}: verl has {names}")


class _InProcess:
    """One worker, here."""

    def __init__(self, config: WorkerConfig) -> None:
        # verl's Worker reads its place from the environment, as a launcher would have set it.
        os.environ.update(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        self._worker: UpdateWorker | None = UpdateWorker(config)

    def call(self, method: str, *arguments: object) -> Any:
        return getattr(self._worker, method)(*arguments)

    def close(self) -> None:
        self._worker = None  # the process group stays: another worker of this process can use it
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _on_ray(config: WorkerConfig, count: int) -> _Workers:
    from lightning_proxy.trainer.backend.on_ray import OnRay  # which imports Ray: seconds

    return OnRay(config, count)
