"""What the tests of the pool's runner share: an agent of many kinds, and runners as real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_proxy.store import Store, new_task
from tests.engine.rules import Rule, read_rules

# `kind-attempt` is what it asks the model; the engine's rules answer by that. Shell, since 1,600 starts
# of Python would be a minute of CPU.
AGENT = r"""
echo "$LIGHTNING_ROLLOUT_ID $LIGHTNING_ATTEMPT $TASK_KIND" >> "$RAN"
json='Content-Type: application/json'
said="{\"role\":\"user\",\"content\":\"$TASK_KIND-$LIGHTNING_ATTEMPT\"}"
ask() {
  curl -sS --fail-with-body -m 60 "$OPENAI_BASE_URL/chat/completions" -H "$json" \
    -H "Authorization: Bearer $OPENAI_API_KEY" -d "{\"model\":\"policy\",\"messages\":[$said]}"
}
reward() {
  curl -sS -m 60 "$LIGHTNING_REWARD_URL" -H "$json" \
    -d "{\"rollout_id\":\"$LIGHTNING_ROLLOUT_ID\",\"attempt\":$LIGHTNING_ATTEMPT,\"value\":$1}" >/dev/null
}
case "$TASK_KIND-$LIGHTNING_ATTEMPT" in
  hang-*|hang_once-1) ask; sleep 300;;
  stubborn-*) trap '' TERM; while :; do sleep 0.2; echo still here; done;;
  silent-*|silent_once-1) ask; sleep 300 & wait;;
  crash-*|crash_once-1) ask; echo "no such table" >&2; exit 3;;
  signal-*) kill -SEGV $$;;
esac
sleep "${TASK_SLEEP:-0}"
answer=$(ask) || { echo "the model said: $answer"; exit 22; }
case "$answer" in *"I cannot help"*) reward 0;; *) reward 1;; esac
"""
RULES: list[dict[str, Any]] = [
    {"when": "refused-", "status": 400},
    {"when": "overloaded_once-1", "status": 503},
    {"when": "declined-", "text": "I cannot help with that."},
]

# kind: state, class, what the reason says, attempts (None: any), reward
EXPECTED: Mapping[str, tuple[str, str | None, str, int, float | None]] = {
    "fine": ("succeeded", None, "", 1, 1.0),
    "crash_once": ("succeeded", None, "", 2, 1.0),
    "overloaded_once": ("succeeded", None, "", 2, 1.0),
    "hang_once": ("succeeded", None, "", 2, 1.0),
    "silent_once": ("succeeded", None, "", 2, 1.0),
    "declined": ("succeeded", None, "", 1, 0.0),
    "crash": ("failed", "agent_crash", "exit code 3: ", 2, None),
    "signal": ("failed", "agent_crash", "killed by SIGSEGV", 2, None),
    "refused": ("failed", "upstream_refused", "exit code 22: ", 1, None),
    "hang": ("failed", "timeout", "took longer than its ", 2, None),
    "stubborn": ("failed", "timeout", "took longer than its ", 2, None),
    "silent": ("failed", "silent_death", "neither a call nor another sign of life for ", 2, None),
}


def rules(directory: Path) -> tuple[Rule, ...]:
    """The engine's rules for this agent."""
    file = directory / "rules.json"
    file.write_text(json.dumps(RULES))
    return read_rules(file)


def write_tasks(file: Path, tasks: Iterable[dict[str, Any]]) -> Path:
    """A JSONL file."""
    file.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return file


def enqueue(store: Store, tasks: Iterable[dict[str, Any]]) -> None:
    """Put tasks into the pool by hand."""
    store.enqueue_tasks([new_task(task) for task in tasks])


@dataclass
class Runners:
    """Starts runners in one directory, whose agents note down each attempt that they begin."""

    directory: Path
    proxy: str

    @property
    def ran(self) -> Path:
        """The file in which each agent writes its rollout, attempt and kind, at the start of its work."""
        return self.directory / "ran"

    def start(self, *flags: str | Path, agent: Iterable[str] | None = None) -> subprocess.Popen[str]:
        """``lightning-proxy run`` with these flags."""
        script = self.directory / "agent.sh"
        if not script.exists():
            script.write_text(AGENT)
        command = agent if agent is not None else ("sh", str(script))
        program = str(Path(sys.executable).with_name("lightning-proxy"))
        return subprocess.Popen(
            [program, "run", "--proxy", self.proxy, *map(str, flags), "--", *command],
            cwd=self.directory,
            env={**os.environ, "RAN": str(self.ran)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def begun(self) -> list[tuple[str, int, str]]:
        """(rollout, attempt, kind) of each attempt that an agent began."""
        if not self.ran.exists():
            return []
        fields = [line.split() for line in self.ran.read_text().splitlines()]
        return [(rollout_id, int(attempt), kind) for rollout_id, attempt, kind in fields]


def summary_of(runner: subprocess.Popen[str], timeout_s: float, code: int = 0) -> dict[str, Any]:
    """What ``--json`` prints at the end."""
    out, errors = runner.communicate(timeout=timeout_s)
    assert runner.returncode == code, (runner.returncode, errors)
    summary: dict[str, Any] = json.loads(out)
    return summary


def kill(runner: subprocess.Popen[str]) -> None:
    """kill -9, for the runner alone."""
    runner.send_signal(signal.SIGKILL)
    runner.communicate(timeout=60)
