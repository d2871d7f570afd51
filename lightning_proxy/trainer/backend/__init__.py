"""The update engine: the only place that imports verl, torch and ray, and only when it is opened.

``open_backend`` gives a ``Backend``; ``verl_backend`` implements it with verl's ``TrainingWorker``,
in this process or, by ``on_ray``, on several Ray workers; ``worker`` is what runs on each of them, on
verl's engine as ``engine`` has it; ``cpu_platform`` teaches verl to run on a CPU; ``estimators`` are verl's
advantage estimators by name; ``tokens`` puts demonstrations into the model's tokens. This file itself needs
no torch.
"""

from __future__ import annotations

import importlib
import os
from array import array
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

from lightning_proxy.config.train import TrainSettings
from lightning_proxy.errors import MissingExtra
from lightning_proxy.store import Span
from lightning_proxy.trainer.advantages import AdvantageEstimator
from lightning_proxy.trainer.batches import Floats, Rows
from lightning_proxy.trainer.transitions import Reason


class Backend(Protocol):
    """Weights, an optimiser, and what a pass of the trainer does with them."""

    def logprobs(self, rows: Rows) -> Floats:
        """Log-probability (natural log, temperature 1) of each token given those before it in its row.

        One per token of ``rows.tokens``; 0 for the first token of a row.
        """

    def update(self, rows: Rows) -> Mapping[str, float]:
        """One optimiser step on one mini-batch, whose loss is the sum over tokens of weight x loss.

        With ``[train] algorithm = "sft"`` or ``"dpo"`` a token's loss is ``-log p``: ``nll, grad_norm``. Else
        returns ``pg_loss, kl_loss, entropy_loss, clip_frac, kl, ratio_mean, ratio_max, grad_norm`` (before
        clipping); ``kl``: the divergence of new from old, in nats a token, never below 0 (J. Schulman,
        "Approximating KL divergence", 2020, estimator k3). Where loss or gradient are not finite the weights
        stay as they were and the metrics say so.
        """

    def export(self, directory: Path, base: Path) -> None:
        """Write the weights into ``directory``, in the files, names and dtypes of ``base``."""

    def export_adapter(self, directory: Path, base: Path) -> None:
        """Write the LoRA adapter in PEFT's layout. Only where there is one."""

    def save_state(self, directory: Path) -> None:
        """Save weights in full precision, optimiser and random state."""

    def load_state(self, directory: Path, *, optimizer: bool = True) -> None:
        """Load what ``save_state`` saved; learning rate and such stay those of the settings.

        Without ``optimizer`` that begins anew.
        """

    def close(self) -> None:
        """Give back processes and memory."""


class Answers(Protocol):
    """The model's tokenizer and chat template, for answers that the model did not give."""

    def tokens(self, span: Span, demonstration: str | Mapping[str, Any]) -> array[int] | Reason:
        """The ids that the engine would have made, had it answered the call so, the end of turn included.

        For Chat Completions what the template puts after the conversation, where the conversation makes the
        very prompt that was recorded; for Completions the text. For other APIs, texts only, what the
        template puts after another conversation, where the recorded prompt ends as that one does. Else the
        reason why there are none.
        """


def open_answers(model: Path) -> Answers:
    """Those of the model in this directory. Raises ``MissingExtra``, or ``TrainingError``: no tokenizer."""
    return cast(Answers, _import("tokens").TokenizerAnswers(model))


def open_backend(settings: TrainSettings, model: Path) -> Backend:
    """The update engine on the weights in ``model`` (Hugging Face layout), with a fresh optimiser.

    Raises ``MissingExtra`` where verl or torch is not installed, ``TrainingError`` for settings that
    this machine or this verl cannot carry out.
    """
    return cast(Backend, _load("verl_backend", settings).VerlBackend(settings, model))


def estimator(settings: TrainSettings) -> AdvantageEstimator:
    """verl's advantage estimator that the settings name. ``TrainingError`` lists the names there are."""
    return cast(
        AdvantageEstimator,
        _load("estimators", settings).VerlEstimator(settings.estimator, settings.norm_by_std),
    )


def preload(settings: TrainSettings) -> None:
    """Import verl now (some ten seconds) rather than in the first pass. Raises as the two above."""
    estimator(settings)
    _load("verl_backend", settings)


def _load(module: str, settings: TrainSettings) -> ModuleType:
    # All are read once, on import. OpenMP's waiting threads would otherwise spin, and take the CPU from
    # whatever else runs on the machine, the engine first of all.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("VERL_LOGGING_LEVEL", "WARNING")
    if settings.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return _import(module)


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"{__name__}.{module}")
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"training needs the extra `train` (pip install 'lightning-proxy[train]'): {error}"
        ) from error
