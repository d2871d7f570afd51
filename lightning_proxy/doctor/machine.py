"""Files, room on disk, packages."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lightning_proxy.config import Settings
from lightning_proxy.doctor.finding import Finding, note, ok, problem

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


def weights(settings: Settings) -> Iterator[Finding]:
    """The weights to begin with, and the room for those that will be made of them."""
    about, directory = f"weights of {settings.policy.name}", settings.policy.model
    if directory is None:
        to_do = "`lightning-proxy train --model DIR` or [policy] model names the weights that the engine runs"
        yield note(about, "not named: the first run has nothing to begin with", to_do)
        return
    files = list(directory.glob("*.safetensors"))
    if not files or not (directory / "config.json").is_file():
        to_do = "[policy] model must be a directory in Hugging Face layout"
        yield problem(about, f"{directory} holds no config.json with *.safetensors", to_do)
        return
    size = sum(file.stat().st_size for file in files)
    room, where = _room(settings.train.runs_dir)
    text = f"{directory}, {_size(size)}; {_size(room)} free for new versions in {where}"
    if room < 2 * size:
        to_do = "a version takes as much again, and its optimiser state more: [train] runs_dir elsewhere"
        yield problem(about, text, to_do)
    else:
        yield ok(about, text)


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
