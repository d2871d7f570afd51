"""From weights in memory to a version that serves: write, make durable, validate, promote, clear away.

A version's directory, ``<runs_dir>/<policy>/v00001-run12``, comes into being whole, by one rename::

    weights/   what the engine loads: Hugging Face layout, full weights
    adapter/   the LoRA adapter that is contained in them (PEFT's layout), where one is trained
    trainer/   weights in full precision, optimiser and random state, for the next run

It is named by its run too: one that lost its lease and does not know it yet (the machine slept) writes a
version of the same number as the run that took its place, and must not write into that one's.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from lightning_proxy.config.policies import directory_of
from lightning_proxy.config.train import TrainSettings
from lightning_proxy.errors import CheckpointInvalid, PublishFailed
from lightning_proxy.store import PolicyVersion, VersionStatus
from lightning_proxy.trainer.backend import Backend
from lightning_proxy.trainer.checkpoint import companion_files, validate

_LINEAGE = "lineage.json"
_UNFINISHED = ".unfinished"
_NAME = re.compile(r"v\d{5,}(?:-run(?P<run>\d+))?")  # once they were named by their number alone


@dataclass(frozen=True, slots=True)
class Lineage:
    """What a saved trainer state belongs to; another kind of trainer cannot load it."""

    base: str  # weights that a LoRA adapter is relative to
    workers: int
    lora_rank: int
    lora_alpha: int
    algorithm: str = "rl"  # whose gradients the optimiser has seen

    def misfit(self, settings: TrainSettings) -> str | None:
        """Why these settings cannot go on from this state; ``None`` where they can."""
        for name in ("workers", "lora_rank", "lora_alpha"):
            if name == "lora_alpha" and not settings.lora_rank:
                continue
            saved, wanted = getattr(self, name), getattr(settings, name)
            if saved != wanted:
                return f"it was saved with {name} = {saved}, now it is {wanted}"
        if settings.lora_rank and not Path(self.base).is_dir():
            return f"the weights that its adapter belongs to are gone: {self.base}"
        return None


def version_directory(settings: TrainSettings, policy: str, version: int, run_id: int) -> Path:
    """Where a run writes a version of the policy."""
    return _policy_directory(settings, policy) / f"v{version:05d}-run{run_id}"


def state_directory(version: PolicyVersion) -> Path:
    """Where the trainer's state of a version lies, if it has one."""
    return Path(version.path).parent / "trainer"


def read_lineage(version: PolicyVersion) -> Lineage | None:
    """Lineage of the version's saved state; ``None`` where there is no state."""
    path = state_directory(version) / _LINEAGE
    return Lineage(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def write_version(directory: Path, backend: Backend, *, base: Path, lineage: Lineage) -> Path:
    """Write the backend's weights and state as a version; returns the path that the engine loads.

    ``base`` is a checkpoint of the same architecture; its configuration and tokenizer are copied.
    What lies in ``directory`` is of no version, since this run has not committed yet, and is replaced.
    Raises ``CheckpointInvalid``, and leaves nothing behind, where the weights must not be loaded.
    """
    unfinished = directory.with_name(directory.name + _UNFINISHED)
    for leftover in (unfinished, directory):
        shutil.rmtree(leftover, ignore_errors=True)
    for part in ("weights", "trainer", *(["adapter"] if lineage.lora_rank else [])):
        (unfinished / part).mkdir(parents=True)
    for name in companion_files(base):
        shutil.copyfile(base / name, unfinished / "weights" / name)
    backend.export(unfinished / "weights", base)
    if lineage.lora_rank:
        backend.export_adapter(unfinished / "adapter", Path(lineage.base))
    backend.save_state(unfinished / "trainer")
    (unfinished / "trainer" / _LINEAGE).write_text(json.dumps(asdict(lineage)), encoding="utf-8")
    _make_durable(unfinished)
    unfinished.rename(directory)
    _sync(directory.parent)
    try:
        validate(directory / "weights", base)
    except CheckpointInvalid:
        shutil.rmtree(directory)
        raise
    return directory / "weights"


def promote(
    proxy_url: str, policy: str, version: int, *, token: str | None, timeout_s: float
) -> Mapping[str, Any]:
    """Have the proxy put a staged version behind itself; returns its answer.

    Raises ``PublishFailed`` where it does not answer or says no. Whether the version is then still
    staged or rejected, the store tells.
    """
    return _post(proxy_url, f"{_of(policy)}/versions/{version}/promote", {}, token, timeout_s)


def roll_back(
    proxy_url: str, policy: str, version: int, *, token: str | None, timeout_s: float
) -> Mapping[str, Any]:
    """Have the proxy go back to a version that has served; raises as ``promote``."""
    return _post(proxy_url, f"{_of(policy)}/rollback", {"version": version}, token, timeout_s)


def _of(policy: str) -> str:
    return f"/api/policies/{quote(policy, safe='')}"


def _post(
    proxy_url: str, path: str, body: Mapping[str, Any], token: str | None, timeout_s: float
) -> Mapping[str, Any]:
    url = f"{proxy_url.rstrip('/')}{path}"
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers, method="POST")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # ours is named outright
    try:
        with opener.open(request, timeout=timeout_s) as response:
            return cast(Mapping[str, Any], json.load(response))
    except urllib.error.HTTPError as error:
        with error:
            raise PublishFailed(f"{url} answered {error.code}: {_message(error.read())}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise PublishFailed(f"no answer from the proxy at {proxy_url}: {error}") from error


def clear_away(
    settings: TrainSettings,
    policy: str,
    versions: Sequence[PolicyVersion],
    *,
    keep: frozenset[int] = frozenset(),
) -> list[int]:
    """Delete checkpoints of rejected versions, and of those that served all but the newest ``keep_versions``.

    Those stay that one may want to go back to: ``keep``, and the parent of the version that serves. Only
    directories that this trainer wrote, never one of a version that serves or waits, nor one whose weights
    the LoRA adapter of a version that stays is relative to.
    """
    present = [
        each for each in versions if each.status not in (VersionStatus.RETIRED, VersionStatus.REJECTED)
    ]
    wanted = keep | {each.parent for each in present}
    served = [each for each in versions if each.status is VersionStatus.RETIRED]
    served.sort(key=lambda each: -each.version)
    going = [each for each in served[settings.keep_versions :] if each.version not in wanted]
    going += [each for each in versions if each.status is VersionStatus.REJECTED]
    lineages = [read_lineage(each) for each in versions if each not in going]
    needed = {lineage.base for lineage in lineages if lineage is not None and lineage.lora_rank}
    ours = dict(_written(settings, policy))
    cleared = []
    for version in going:
        directory = Path(version.path).parent
        if version.path not in needed and directory in ours:
            shutil.rmtree(directory)
            cleared.append(version.version)
    return cleared


def clear_leftovers(
    settings: TrainSettings,
    policy: str,
    versions: Sequence[PolicyVersion],
    has_ended: Callable[[int], bool],
) -> None:
    """Delete what runs wrote that have ended without a version: a kill, a lost lease, a refused commit.

    ``versions``: all of the policy. ``has_ended``: of a run, by its id.
    """
    named = {Path(each.path).parent for each in versions}
    for directory, run_id in _written(settings, policy):
        if directory not in named and run_id is not None and has_ended(run_id):
            shutil.rmtree(directory)


def _written(settings: TrainSettings, policy: str) -> Iterator[tuple[Path, int | None]]:
    """The directories of versions, finished or not, and the run that wrote each, where its name says so."""
    for directory in _policy_directory(settings, policy).glob("v*"):
        found = _NAME.fullmatch(directory.name.removesuffix(_UNFINISHED))
        if found is not None and directory.is_dir():
            yield directory, None if found["run"] is None else int(found["run"])


def _policy_directory(settings: TrainSettings, policy: str) -> Path:
    return settings.runs_dir.resolve() / directory_of(policy)


def _make_durable(directory: Path) -> None:
    for parent, _, files in os.walk(directory):
        for file in files:
            _sync(Path(parent, file))
        _sync(Path(parent))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
