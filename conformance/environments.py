"""An environment for each client, made by pip or npm, once, of the newest versions that go together."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conformance.clients import AGENTS, Client

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".conformance"


class CannotInstall(Exception):
    """pip or npm failed; the message is the end of what it said."""


@dataclass(frozen=True, slots=True)
class Environment:
    """Where a client's packages lie and how its agent is started."""

    command: tuple[str, ...]
    binaries: Path  # a folder to be put before PATH
    versions: dict[str, str]  # of what was asked for; the client's own package is among them


def environment_for(client: Client, *, fresh: bool = False) -> Environment:
    """The client's environment, made where it is missing, was made otherwise, or is to be ``fresh``.

    Raises ``CannotInstall``.
    """
    make = _node if client.registry == "npm" else _python
    return make(client, CACHE / (client.env or client.name), fresh)


def _python(client: Client, folder: Path, fresh: bool) -> Environment:
    wanted = client.requires or (client.package,)
    python = python_with(wanted, folder, fresh=fresh)
    installed = {
        entry["name"].lower().replace("_", "-"): entry["version"]
        for entry in json.loads(_run([str(python), "-m", "pip", "list", "--format", "json"]))
    }
    direct = [client.package, *(name.partition("[")[0] for name in wanted)]
    versions = {name: installed[name] for name in direct}
    return Environment((str(python), str(AGENTS / client.agent)), python.parent, versions)


def python_with(wanted: Sequence[str], folder: Path, *, fresh: bool = False) -> Path:
    """The interpreter of an environment in ``folder`` with the packages ``wanted``, made where it has others.

    Raises ``CannotInstall``.
    """
    python, made_of = folder / "bin" / "python", "\n".join(wanted)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two at once would remove each other's
        if fresh or not _is_made_of(folder, made_of):
            print(f"installing {', '.join(wanted)} (once, about a minute)", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(folder)])
            _run([str(python), "-m", "pip", "install", "-qq", *wanted])
            _stamp(folder, made_of)
    return python


def _node(client: Client, folder: Path, fresh: bool) -> Environment:
    # Node looks for modules from the agent's own folder upwards, so the agent is copied to them.
    wanted = (AGENTS / client.agent / "package.json").read_text(encoding="utf-8")
    if fresh or not _is_made_of(folder, wanted):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(AGENTS / client.agent, folder)
        _run(["npm", "install", "--no-audit", "--no-fund", "--loglevel", "error"], folder)
        _stamp(folder, wanted)
    shutil.copytree(AGENTS / client.agent, folder, dirs_exist_ok=True)
    modules = folder / "node_modules"
    versions = {
        name: json.loads((modules / name / "package.json").read_text(encoding="utf-8"))["version"]
        for name in json.loads(wanted)["dependencies"]
    }
    return Environment(("node", str(folder / "agent.mjs")), modules / ".bin", versions)


def _run(command: list[str], folder: Path | None = None) -> str:
    # PYTHONPATH would let the packages of whoever runs us pass for the client's.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environ)
    except FileNotFoundError as error:
        raise CannotInstall(f"{command[0]} is not installed") from error
    if done.returncode:
        said = (
            f"{done.stdout.strip()[-400:]}\n{done.stderr.strip()[-800:]}".strip()
        )  # ensurepip's is on stdout
        raise CannotInstall(f"{' '.join(command[:4])} ...: {said}")
    return done.stdout


def _is_made_of(folder: Path, wanted: str) -> bool:
    stamp = folder / "conformance.stamp"
    return stamp.exists() and stamp.read_text(encoding="utf-8") == wanted


def _stamp(folder: Path, wanted: str) -> None:
    (folder / "conformance.stamp").write_text(wanted, encoding="utf-8")
