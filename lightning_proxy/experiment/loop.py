"""The whole loop on one machine: serve, sample, reward, train, swap, again; and the curve of it.

``run`` is the summary; every step of it is a process of its own that could as well be yours:

- ``lightning-proxy serve --model`` with vLLM under it, and ``lightning-proxy train --watch``;
- the agent, one process per rollout, told nothing but its base URL and key;
- the grader (``grade.py``), which posts rewards after the fact.

An ``Experiment`` says which agent, which model and which tasks; ``demo/text_to_sql.py`` is one.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_proxy.client import ProxyClient
from lightning_proxy.experiment.curve import ExperimentResult, Iteration, describe, save_curve, save_numbers
from lightning_proxy.experiment.definition import AgentTask, Experiment, Split
from lightning_proxy.experiment.grade import is_right
from lightning_proxy.experiment.processes import Children, ExperimentFailed, ended_by_signals, run_to_end
from lightning_proxy.experiment.sample import AgentHost, Result, sample, write_results, write_tasks
from lightning_proxy.experiment.workdir import Say, command_of, prepare, serving, write_config

TRAIN_TIMEOUT_S = 300.0
_EVALUATE_EVERY = 2  # iterations


# A control is to be trained whatever becomes of it.
_NO_GUARD = {"guard": {"max_kl": 1e9, "max_reward_drop": 1.0, "max_entropy_rise": 1e9}}


def run(
    experiment: Experiment,
    *,
    workdir: Path,
    seed: int = 0,
    iterations: int | None = None,
    shuffle: bool = False,
    say: Say = print,
) -> ExperimentResult:
    """Run the loop in ``workdir`` until it has learned (``Experiment.is_content``), or ``iterations`` times.

    With ``shuffle`` rewards are dealt out among an iteration's rollouts at random: the control, which must
    not learn, and always runs all iterations. Leaves ``curve.json`` and ``curve.png`` there, beside the
    database, the logs and all weights. Raises ExperimentFailed, with the end of the log that tells why, if
    a part of it fails.
    """
    began = time.monotonic()
    workdir = prepare(workdir, experiment.model)
    with ended_by_signals(), running(experiment, workdir, seed, shuffle, say) as turn:
        result = ExperimentResult(
            seed, title=experiment.title, shuffled=shuffle, start_s=time.monotonic() - began
        )
        say(f"vLLM is up after {result.start_s:.0f} s")
        turn.measure_first(result)
        say(f"held-out success before training: {result.initial:.3f}")
        for number in range(iterations or experiment.iterations):
            turn.take(number, result)
            result.seconds = time.monotonic() - began
            say(describe(number, result))
            save_numbers(workdir, result)  # whatever comes
            if experiment.is_content(result) and not shuffle:
                break
        turn.measure_last(result)
    result.seconds = time.monotonic() - began
    save_curve(workdir, result)
    return result


@contextmanager
def running(experiment: Experiment, workdir: Path, seed: int, shuffle: bool, say: Say) -> Iterator[Turn]:
    """Proxy, vLLM, trainer and the agents' host, all of them ended afterwards."""
    # Rewards come all at once, of whatever rollouts had a call.
    least = experiment.tasks_per_turn * experiment.runs_per_task // 2
    settings = {**experiment.settings, **(_NO_GUARD if shuffle else {})}
    settings["train"] = {**settings.get("train", {}), "seed": seed, "min_rollouts": least}
    write_config(workdir, settings, policy=experiment.policy)
    with (
        serving(workdir, say) as (children, proxy),
        (workdir / "agents.log").open("wb") as log,
        AgentHost(
            log=log,
            no_certificates=workdir / "no-certificates",
            script=experiment.agent,
            python=experiment.python,
        ) as host,
    ):
        children.start("train", [*command_of("train", workdir), "--watch", "--json"], workdir / "train.log")
        yield Turn(experiment, workdir, proxy, host, children, seed, shuffle)


class Turn:
    """The steps of an iteration."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: Path,
        proxy: ProxyClient,
        host: AgentHost,
        children: Children,
        seed: int,
        shuffle: bool = False,
    ) -> None:
        self._experiment = experiment
        self._shuffle = shuffle
        self._workdir = workdir
        self._files = workdir / "tasks"
        self._proxy = proxy
        self._host = host
        self._children = children
        self._seed = seed
        self._reports = Reports(workdir / "train.log")
        self._failed_runs = 0

    def take(self, number: int, result: ExperimentResult) -> None:
        """Sample, reward, train and swap; measure held-out success now and then."""
        count, runs = self._experiment.tasks_per_turn, self._experiment.runs_per_task
        tasks = self._experiment.make_tasks(self._seed, "train", count, start=number * count)
        clock = time.monotonic()
        results = self._sample(tasks, runs, temperature=1.0, split="train", what="sampling")
        sampled = time.monotonic()
        mean = self._grade(number, tasks, results)
        rewarded = time.monotonic()
        report = self._await_training()
        trained = time.monotonic()
        swap_s = float((report.get("promotion") or {}).get("swap_s", 0.0))
        turn = Iteration(mean, sampled - clock, rewarded - sampled, trained - rewarded - swap_s, swap_s)
        turn.version = report["version"]
        result.iterations.append(turn)
        if number % _EVALUATE_EVERY == _EVALUATE_EVERY - 1:
            self._measure(result)

    def measure_first(self, result: ExperimentResult) -> None:
        """Held-out success before anything was learned."""
        result.initial = result.final = self.evaluate()[0]
        if self._experiment.measure_sampled:
            result.initial_sampled = self.evaluate(temperature=1.0)[0]

    def measure_last(self, result: ExperimentResult) -> None:
        """Held-out success after the last iteration, if that is not known."""
        if result.iterations and result.iterations[-1].heldout is None:
            self._measure(result)
        if self._experiment.measure_sampled:
            result.final_sampled = self.evaluate(temperature=1.0)[0]
        result.failed_runs = self._failed_runs

    def evaluate(self, temperature: float = 0.0) -> tuple[float, float]:
        """Held-out success through the proxy, and the seconds it took.

        These rollouts get no reward: they are never trained on.
        """
        began = time.monotonic()
        tasks = self._experiment.make_tasks(self._seed, "heldout", self._experiment.held_out_tasks)
        results = self._sample(tasks, 1, temperature=temperature, split="heldout", what="held-out tasks")
        gold = {task.task_id: task.answer for task in tasks}
        right = sum(is_right(result.answer, gold[result.task_id]) for result in results)
        return right / len(results), time.monotonic() - began

    def _measure(self, result: ExperimentResult) -> None:
        last = result.iterations[-1]
        last.heldout, last.eval_s = self.evaluate()
        result.final = last.heldout

    def _sample(
        self, tasks: Sequence[AgentTask], runs: int, *, temperature: float, split: Split, what: str
    ) -> list[Result]:
        self._children.check()
        with progress_bar(what) as progress:
            results = sample(
                tasks,
                proxy=self._proxy,
                host=self._host,
                files=self._files,
                runs_per_task=runs,
                temperature=temperature,
                metadata={"split": split},
                progress=progress,
            )
        failed = [result.error for result in results if result.error]
        self._failed_runs += len(failed)
        if len(failed) > len(results) // 4:
            self._children.check()
            raise ExperimentFailed(
                f"{len(failed)} of {len(results)} runs of the agent failed, e.g.: {failed[0]}",
                self._workdir / "agents.log",
            )
        return results

    def _grade(self, number: int, tasks: Sequence[AgentTask], results: Sequence[Result]) -> float:
        """Rewards, posted by a process of its own; their mean."""
        tasks_file = self._workdir / f"tasks-{number:02d}.jsonl"
        results_file = self._workdir / f"results-{number:02d}.jsonl"
        write_tasks(tasks_file, tasks, self._files)
        write_results(results_file, results)
        command = [sys.executable, "-m", "lightning_proxy.experiment.grade", "--url", self._proxy.url]
        command += ["--tasks", str(tasks_file), "--results", str(results_file)]
        command += ["--shuffle", f"{self._seed}/{number}"] if self._shuffle else []
        mean = float(json.loads(run_to_end(command, self._workdir / "grade.log"))["mean"])
        if mean == 0 and not self._shuffle:
            raise ExperimentFailed(
                f"not one of {len(results)} answers was right: there is nothing to learn from"
            )
        return mean

    def _await_training(self) -> dict[str, Any]:
        """The report of the pass that used what was just rewarded."""
        deadline = time.monotonic() + TRAIN_TIMEOUT_S
        with progress_bar("training"):
            while time.monotonic() < deadline:
                self._children.check()
                for report in self._reports.new():
                    if report["outcome"] in ("rejected", "staged_only", "guarded"):
                        raise ExperimentFailed(
                            f"no new version took over: {report['message']}", self._reports.path
                        )
                    if report["run_id"] is not None or report["counts"].get("given_back"):
                        return report
                newest = self._proxy.get("/api/runs?limit=1")["runs"]
                if newest and newest[0]["state"] == "failed":
                    raise ExperimentFailed(f"training failed: {newest[0]['error']}", self._reports.path)
                time.sleep(0.1)
        raise ExperimentFailed(f"training did not end within {TRAIN_TIMEOUT_S:.0f} s", self._reports.path)


class Reports:
    """The reports that ``train --watch --json`` prints, among whatever else is in its log."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0

    def new(self) -> list[dict[str, Any]]:
        """Those that were not returned before."""
        text = self.path.read_text(encoding="utf-8", errors="replace")
        found = []
        while (start := text.find("{\n", self._read)) >= 0:
            try:
                report, end = json.JSONDecoder().raw_decode(text, start)
            except json.JSONDecodeError:
                break  # not all of it is written yet
            self._read = end
            found.append(report)
        return found


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows (done, total) in one line of a terminal's stderr, gone at the end; elsewhere nothing."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return

    def show(done: int, total: int) -> None:
        filled = 30 * done // max(total, 1)
        sys.stderr.write(f"\r     {what:<15} [{'=' * filled:<30}] {done}/{total}\x1b[K")
        sys.stderr.flush()

    show(0, 1)
    try:
        yield show
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
