"""An environment for each client, made by pip or npm from the default index, once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
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
    path: str  # to be put before PATH
    versions: dict[str, str]  # distribution -> installed version


def environment_for(client: Client) -> Environment:
    """The client's environment, made where it is missing or its requirements changed.

    Raises ``CannotInstall``.
    """
    return _node(client) if client.npm else _python(client)


def _python(client: Client) -> Environment:
    folder = CACHE / (client.shares or client.name)
    python = folder / "bin" / "python"
    if _is_stale(folder, "\n".join(client.requires)):
        shutil.rmtree(folder, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(folder)])
        _run([str(python), "-m", "pip", "install", "-qq", *client.requires])
        _stamp(folder, "\n".join(client.requires))
    listed = _run([str(python), "-m", "pip", "list", "--format", "json"])
    versions = {entry["name"].lower().replace("_", "-"): entry["version"] for entry in json.loads(listed)}
    return Environment((str(python), str(AGENTS / client.agent)), str(python.parent), versions)


def _node(client: Client) -> Environment:
    """npm installs beside the agent, because Node looks for modules from the agent's folder upwards."""
    source, folder = AGENTS / client.agent, CACHE / client.name
    wanted = (source / "package.json").read_text(encoding="utf-8")
    if _is_stale(folder, wanted):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        _run(["npm", "install", "--no-audit", "--no-fund", "--loglevel", "error"], folder)
        _stamp(folder, wanted)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    versions = {
        name: json.loads((folder / "node_modules" / name / "package.json").read_text())["version"]
        for name in json.loads(wanted)["dependencies"]
    }
    return Environment(
        ("node", str(folder / "agent.mjs")), str(folder / "node_modules" / ".bin"), versions
    )


def _run(command: list[str], folder: Path | None = None) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=_install_environ())
    if done.returncode:
        raise CannotInstall(f"{' '.join(command[:4])} ...: {done.stderr.strip()[-800:]}")
    return done.stdout


def _install_environ() -> dict[str, str]:
    # The packages of the environment that runs us are not the client's.
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def _is_stale(folder: Path, wanted: str) -> bool:
    stamp = folder / "conformance.stamp"
    return not stamp.exists() or stamp.read_text() != _fingerprint(wanted)


def _stamp(folder: Path, wanted: str) -> None:
    (folder / "conformance.stamp").write_text(_fingerprint(wanted))


def _fingerprint(wanted: str) -> str:
    return hashlib.sha256(f"{sys.version_info[:2]}\n{wanted}".encode()).hexdigest()
