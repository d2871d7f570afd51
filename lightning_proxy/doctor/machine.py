"""Files, room on disk, packages."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lightning_proxy.config import Settings
from lightning_proxy.config.train import TrainSettings
from lightning_proxy.doctor.finding import Finding, note, ok, problem
from lightning_proxy.errors import CheckpointInvalid
from lightning_proxy.store import PolicyVersion

_GIB = 2**30
_LEAST_ROOM = _GIB  # bytes
_TRAINING = ("verl", "torch", "transformers", "tensordict", "peft", "safetensors")


def packages(settings: Settings) -> Iterator[Finding]:
    """What `train` needs beside the core."""
    missing = [name for name in _TRAINING if importlib.util.find_spec(name) is None]
    if missing:
        to_do = (
            "where `lightning-proxy train` is to run, `pip install 'lightning-proxy[gpu]'` (without a GPU: "
            "scripts/setup.sh); the proxy alone needs none of it"
        )
        yield note("packages", f"this environment cannot train: {', '.join(missing)} not installed", to_do)
    else:
        yield ok("packages", "all that training needs is installed")


def weights(settings: Settings, active: PolicyVersion | None) -> Iterator[Finding]:
    """The weights that the next run begins with, and the room for those that it makes of them."""
    about = f"weights of {settings.policy.name}"
    directory = settings.policy.model if active is None else Path(active.path)
    if directory is None:
        to_do = "`lightning-proxy train --model DIR` or [policy] model names the weights that the engine runs"
        yield note(about, "not named: the first run has nothing to begin with", to_do)
        return
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    if not size or not (directory / "config.json").is_file():
        layout = "a directory in Hugging Face layout is needed"
        yield problem(about, f"{directory} holds no config.json with *.safetensors", layout)
        return
    try:
        needed = _size_of_a_version(directory, size, settings.train)
    except CheckpointInvalid as error:
        yield problem(about, str(error))
        return
    room, where = _room(settings.train.runs_dir)
    text = (
        f"{directory}, {_size(size)}; a new version takes {_size(needed)}, {_size(room)} are free in {where}"
    )
    kept = settings.train.keep_versions + 2  # beside the one that serves, the one that is being made
    if room < needed:
        yield problem(about, text, "[train] runs_dir names a larger disk")
    elif room < kept * needed:
        yield note(
            about, text, f"up to {kept} lie there at a time: [train] keep_versions, or another runs_dir"
        )
    else:
        yield ok(about, text)


def _size_of_a_version(directory: Path, size: int, settings: TrainSettings) -> int:
    """Bytes: the weights again, and with full ones their float32 copy and Adam's two moments."""
    if settings.lora_rank:
        return size  # the adapter's state is small beside it
    try:
        from lightning_proxy.trainer.checkpoint import read_layout
    except ImportError:
        return size  # an environment that cannot train
    numbers = sum(
        math.prod(tensor.shape) for tensors in read_layout(directory).values() for tensor in tensors.values()
    )
    return size + 3 * 4 * numbers


def database(settings: Settings) -> Iterator[Finding]:
    """Whether it is there, can be written, and has room to grow."""
    db = settings.store.db
    room, where = _room(db.parent)
    if not os.access(db if db.exists() else where, os.W_OK):
        yield problem("database", f"{db} cannot be written by this user", "[store] db names another file")
    elif room < _LEAST_ROOM:
        to_do = "`lightning-proxy prune --older-than 30d --vacuum` makes room"
        yield problem("database", f"{db}: only {_size(room)} free on its disk", to_do)
    elif not db.exists():
        yield note("database", f"{db} is not there yet", "`lightning-proxy serve` makes it")
    else:
        yield ok("database", f"{db.resolve()}, {_size(db.stat().st_size)}; {_size(room)} free")


def _room(directory: Path) -> tuple[int, Path]:
    """Free bytes where a directory is, or will be; the part of its path that is there."""
    there = directory.resolve()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free, there


def _size(count: int) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / 2**20:.1f} MiB"
