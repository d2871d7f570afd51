"""The driver: many rollouts of the agent, each its own process, through the proxy.

Rollouts are registered first; each answer names a base URL and a key, which is all that an agent
is told. What came of them is written as JSON lines, for the grader.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from lightning_proxy.client import ProxyClient
from lightning_proxy.errors import LightningError
from lightning_proxy.experiment.definition import AgentTask
from lightning_proxy.experiment.processes import end_group

HERE = Path(__file__).parent
CONCURRENCY = 64
TIMEOUT_S = 60.0


class AgentHostDied(LightningError):
    """The process that runs the agents has ended."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a rollout: an answer, or why there is none."""

    rollout_id: str
    task_id: str
    answer: str | None
    error: str | None = None


class AgentHost:
    """A warm process that runs the agent script, see ``agent_host``.

    ``log`` gets what runs print to stderr; ``no_certificates`` is made, and stays empty.
    """

    def __init__(
        self,
        *,
        log: IO[Any],
        no_certificates: Path,
        script: Path,
        python: str = sys.executable,
        concurrency: int = CONCURRENCY,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._concurrency = concurrency
        no_certificates.mkdir(parents=True, exist_ok=True)
        # The proxy is spoken to without TLS; reading the bundle of certificates would be a third of a run.
        self._env = {
            "SSL_CERT_FILE": "",
            "SSL_CERT_DIR": str(no_certificates),
            "NO_PROXY": "127.0.0.1,localhost",
        }
        # -P: this folder's modules are none of the agent's.
        command = [python, "-P", str(HERE / "agent_host.py"), str(script)]
        command += ["--concurrency", str(concurrency), "--timeout", str(timeout_s)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )

    @property
    def process(self) -> subprocess.Popen[str]:
        """The host; its children are in its session."""
        return self._process

    def run(self, jobs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Answers to the jobs as they end, see ``agent_host``; AgentHostDied if it does not go on."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        sent = done = 0
        while done < len(jobs):
            try:
                # Only so many lines ahead that neither side ever blocks on a full pipe.
                while sent < len(jobs) and sent - done < 2 * self._concurrency:
                    job = jobs[sent]
                    stdin.write(json.dumps({**job, "env": {**self._env, **job["env"]}}) + "\n")
                    sent += 1
                stdin.flush()
                line = stdout.readline()
            except OSError as error:
                raise AgentHostDied(f"the process that runs the agents is gone: {error}") from error
            if not line:
                raise AgentHostDied(
                    f"the process that runs the agents ended with status {self._process.wait()}"
                )
            yield json.loads(line)
            done += 1

    def close(self) -> None:
        """End it and what it runs."""
        end_group(self._process)
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except BrokenPipeError:
                pass  # what it had not read yet

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def sample(
    tasks: Sequence[AgentTask],
    *,
    proxy: ProxyClient,
    host: AgentHost,
    files: Path,
    runs_per_task: int,
    temperature: float,
    metadata: Mapping[str, Any],
    progress: Callable[[int, int], None],
) -> list[Result]:
    """Run the agent on each task, ``runs_per_task`` times; results come as the runs ended."""
    wanted = [task for task in tasks for _ in range(runs_per_task)]
    registered = proxy.request(
        "POST", "/api/rollouts", [{"task_id": task.task_id, "metadata": dict(metadata)} for task in wanted]
    )["rollouts"]
    jobs = [
        {
            "id": rollout["rollout_id"],
            "argv": [*task.arguments(files), "--temperature", str(temperature)],
            "env": {"OPENAI_BASE_URL": rollout["base_url"], "OPENAI_API_KEY": rollout["api_key"]},
        }
        for task, rollout in zip(wanted, registered, strict=True)
    ]
    task_of = {rollout["rollout_id"]: task.task_id for task, rollout in zip(wanted, registered, strict=True)}
    results = []
    for ended in host.run(jobs):
        result = read_result(ended, task_of[ended["id"]])
        state = "succeeded" if result.error is None else "failed"  # of the run, not of the answer
        change = {"state": state} | ({"reason": result.error} if result.error else {})
        proxy.request("PATCH", f"/api/rollouts/{result.rollout_id}", change)
        results.append(result)
        progress(len(results), len(jobs))
    return results


def read_result(ended: Mapping[str, Any], task_id: str) -> Result:
    """The answer is in the last line that the agent printed."""
    if ended["status"] != 0:
        why = (
            "the agent took too long"
            if ended["status"] == "timeout"
            else f"the agent ended with {ended['status']}"
        )
        return Result(ended["id"], task_id, None, why)
    try:
        answer = json.loads(ended["output"].splitlines()[-1])["answer"]
    except (IndexError, ValueError, KeyError, TypeError):
        return Result(ended["id"], task_id, None, f"the agent printed no answer: {ended['output'][-200:]!r}")
    return Result(ended["id"], task_id, answer)


def write_tasks(path: Path, tasks: Sequence[AgentTask], files: Path) -> None:
    """What the grader needs to know of the tasks, as JSON lines."""
    _write_lines(path, [{"task_id": task.task_id, **task.for_grader(files)} for task in tasks])


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Results as JSON lines."""
    _write_lines(path, [asdict(result) for result in results])


def _write_lines(path: Path, objects: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in objects), encoding="utf-8")
