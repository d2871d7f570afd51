"""Whole passes of the trainer without verl: all that it does but the arithmetic of the update.

Leases, draining, giving back, checkpoints on disk, commits and promotions are the real ones.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_proxy.config import Settings
from lightning_proxy.errors import LightningError
from lightning_proxy.store import Store
from lightning_proxy.trainer import steps, warm
from lightning_proxy.trainer.advantages import Returns
from lightning_proxy.trainer.algorithms import rl
from lightning_proxy.trainer.batches import Rows
from lightning_proxy.trainer.run import train_once
from tests.trainer.checkpoints import PaperBackend
from tests.trainer.recording import POLICY


class PaperUpdates(PaperBackend):
    """An update engine whose steps change nothing and cost a moment."""

    def update(self, rows: Rows) -> Mapping[str, float]:
        time.sleep(0.05)
        return {"pg_loss": 0.0, "grad_norm": 0.0, "clip_frac": 0.0, "kl": 0.0}


def paper_estimator(credits_R: Returns, groups_R: Sequence[int], lengths_R: Sequence[int]) -> Returns:
    """r - mean(group)."""
    groups = np.array(groups_R)
    return np.array([r - credits_R[groups == g].mean() for r, g in zip(credits_R, groups, strict=True)])


def install(patch: Callable[[Any, str, object], None] = setattr) -> None:
    """Put them in the place of verl's, in this process."""
    patch(warm, "open_backend", lambda settings, model: PaperUpdates())
    patch(rl, "estimator", lambda settings: paper_estimator)


def settings(db: Path, model: Path, proxy_url: str, **train: object) -> Settings:
    values = {
        "proxy_url": proxy_url,
        "runs_dir": db.parent / "runs",
        "min_rollouts": 1,
        "max_rollouts": 32,
        "lease_s": 0.5,
        "keep_versions": 2,
    }
    return Settings.model_validate(
        {
            "store": {"db": db},
            "policy": {"name": POLICY, "model": model},
            "train": values | train,
            "automatic_rewards": {"truncated": -0.125},
        }
    )


def silent(line: str, done: float | None = None) -> None:
    """No one looks."""


def train_until_killed(how: Settings, paper: bool) -> None:
    """Pass after pass, whatever they come to: the body of a process that somebody kills."""
    if paper:
        install()
    with Store.open(how.store.db, busy_timeout_s=10) as store:
        while True:
            try:
                train_once(how, store=store, progress=silent)
            except LightningError:  # the lease of one that was killed, a proxy that is gone
                pass
            time.sleep(0.02)


def train_and_die(how: Settings, where: str) -> None:
    """One pass, killed at a point: behind the ``after`` or before the ``before`` function it names."""
    install()
    order, _, name = where.partition(" ")
    owner, attribute = _places()[name]
    real = getattr(owner, attribute)

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if order == "after":
            real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, attribute, deadly)
    with Store.open(how.store.db) as store:
        train_once(how, store=store, progress=silent)


def _places() -> Mapping[str, tuple[Any, str]]:
    """What a pass does that can be cut off, in its order."""
    return {
        "entering automatic rewards": (Store, "enter_judgement"),
        "beginning": (Store, "begin_run"),
        "draining": (Store, "drain"),
        "giving back": (Store, "give_back"),
        "updating": (PaperUpdates, "update"),
        "writing weights": (PaperBackend, "export"),
        "saving state": (PaperBackend, "save_state"),
        "writing the version": (steps, "write_version"),
        "committing": (Store, "commit_run"),
        "promoting": (steps, "promote"),
        "clearing away": (steps, "clear_away"),
    }


POINTS = [f"{order} {name}" for name in _places() for order in ("before", "after")]
