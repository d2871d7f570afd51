"""What the tests of the store share: spans to write, scripts to run as processes of their own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_proxy.store import Fidelity, Generation, Span, Store

POLICY = "policy"

_ROOT = Path(__file__).parents[2]  # where `import tests` works

_SPAN = Span(
    rollout_id="r1",
    attempt=1,
    wire="chat",
    started_at=1000.0,
    ended_at=1001.5,
    request=b'{"model":"policy"}',
    fidelity=Fidelity.EXACT,
    model=POLICY,
    policy=POLICY,
    policy_version=3,
    policy_version_end=4,
    attributed_by="path",
    attribution_confidence=1.0,
    first_byte_at=1000.25,
    streamed=True,
    status=200,
    response_id="chatcmpl-1",
    response=b'{"id":"chatcmpl-1"}',
    usage={"prompt_tokens": 3, "completion_tokens": 2},
    sampling={"temperature": 0.5},
    generations=(
        Generation(array("i", [1, 2, 3]), array("i", [4, 5]), array("f", [-0.5, -0.25]), "stop"),
        Generation(array("i", [1, 2, 3]), array("i", [6]), array("f", [-1.0]), "length"),
    ),
)


def make_span(**changes: Any) -> Span:
    """An exact span of two choices, with ``changes``."""
    return replace(_SPAN, **changes)


def add_ready_rollout(store: Store, rollout_id: str, *, value: float = 1.0, **changes: Any) -> None:
    """A rollout with one span of the policy and one reward: what a drain gives."""
    store.create_rollout(rollout_id=rollout_id)
    store.add_span(make_span(rollout_id=rollout_id, response_id=f"response-{rollout_id}", **changes))
    store.add_reward(value=value, rollout_id=rollout_id)


def start_script(script: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """Run Python source in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
    )


def output_of(process: subprocess.Popen[str], *, returncode: int = 0, timeout_s: float = 120.0) -> list[str]:
    """The lines that it printed, once it has ended as expected."""
    out, errors = process.communicate(timeout=timeout_s)
    assert process.returncode == returncode, errors
    return out.splitlines()
