"""Child processes: started in groups of their own, watched, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from lightning_proxy.errors import LightningError

_TAIL_LINES = 25
_STOP_TIMEOUT_S = 20.0


class ExperimentFailed(LightningError):
    """A part of an experiment failed; the end of the log that may tell why is part of the message."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        if log is not None and log.exists():
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
            message += f"\nThe end of {log}:\n" + "\n".join(f"  {line}" for line in lines)
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Child:
    """A process that is to run until the experiment ends."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


class Children:
    """Processes that run beside it; all of them end with the context."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    def start(self, name: str, command: Sequence[str], log: Path) -> None:
        """Start one, with its output in ``log``."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=clean_environment(),
            )
        self._children.append(Child(name, process, log))

    def check(self) -> None:
        """ExperimentFailed if one of them has ended."""
        for child in self._children:
            status = child.process.poll()
            if status is not None:
                raise ExperimentFailed(
                    f"`lightning-proxy {child.name}` ended with status {status}", child.log
                )

    def pids(self) -> list[int]:
        """Their process ids, in the order of their start."""
        return [child.process.pid for child in self._children]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in reversed(self._children):
            if child.process.poll() is None:
                child.process.terminate()  # each ends its own children in order
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        for child in reversed(self._children):
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass  # dealt with next
            end_group(child.process)


def end_group(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """Kill what is left of the process's group; it must have been started in a session of its own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # nothing was left
    process.wait()


def run_to_end(command: Sequence[str], log: Path, *, timeout_s: float = 120.0) -> str:
    """What a command printed; ExperimentFailed if it fails or takes too long. Its stderr goes to ``log``."""
    with log.open("ab") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            env=clean_environment(),
        )
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise ExperimentFailed(f"{' '.join(command)} took more than {timeout_s:.0f} s", log) from None
        finally:
            end_group(process)
            if process.stdout is not None:
                process.stdout.close()
    if process.returncode != 0:
        raise ExperimentFailed(f"{' '.join(command)} ended with status {process.returncode}", log)
    return output


def clean_environment() -> dict[str, str]:
    """Ours without the user's own settings, which are none of an experiment; this package can be imported."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("LIGHTNING_")}
    package_root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package_root, ours.get("PYTHONPATH"))))
    return {**ours, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that no process is left behind. For the main thread."""

    def leave(signum: int, frame: FrameType | None) -> None:
        sys.exit(128 + signum)

    former = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
