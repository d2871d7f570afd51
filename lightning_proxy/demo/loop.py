"""The whole loop on one machine: serve, sample, reward, train, swap, again; and the curve of it.

``run_demo`` is the summary; every step of it is a process of its own that could as well be yours:

- ``lightning-proxy serve --model`` with vLLM under it, and ``lightning-proxy train --watch``;
- the agent (``agent.py``), one process per rollout, told nothing but its base URL and key;
- the grader (``grade.py``), which posts rewards after the fact.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_proxy.demo.grade import is_right
from lightning_proxy.demo.processes import Children, DemoFailed, ended_by_signals, run_to_end
from lightning_proxy.demo.sample import (
    AgentHost,
    ProxyApi,
    Result,
    sample,
    write_results,
    write_tasks,
)
from lightning_proxy.demo.tasks import Task, make_tasks
from lightning_proxy.errors import EngineRefused, EngineUnreachable

WEIGHTS = Path(__file__).parent / "weights"
POLICY = "tiny-sql"
TASKS = 16
RUNS_PER_TASK = 8
HELD_OUT_TASKS = 64
ITERATIONS = 24
START_TIMEOUT_S = 600.0
TRAIN_TIMEOUT_S = 300.0
GOAL = 0.8  # what held-out success must exceed
STOP_AT = 0.9  # held-out success at which we are content,
STOP_AT_SAMPLED = 0.8  # once sampling, which explores, succeeds this often too
STOP_AFTER_S = 270.0  # or has had this long for it
_EVALUATE_EVERY = 2  # iterations
_MARKER = "this-is-a-lightning-demo"

_CONFIG = """\
# Written by `lightning-proxy demo`.
[proxy]
port = {port}

[store]
db = {db}

[policy]
name = "{policy}"
model = {model}

[engine]
args = [
  "--max-model-len", "2048", "--max-num-seqs", "64", "--dtype", "float32", "--enforce-eager",
  "--distributed-executor-backend", "uni",
]
log = {engine_log}

# On few cores vLLM's separate worker process costs more than the work: both ends wait for each other
# spinning. Three rollouts a second with it, eight without. The first variable is what vLLM on CPU
# asks before it allows "uni".
[engine.env]
VLLM_ENABLE_V1_MULTIPROCESSING = "0"
VLLM_CPU_OMP_THREADS_BIND = "nobind"
OMP_NUM_THREADS = "1"

[train]
proxy_url = "http://127.0.0.1:{port}"
runs_dir = {runs_dir}
learning_rate = 2e-4
adam_eps = 1e-5  # 1e-8 lets a model as small as this collapse
epochs = 2
mini_batch_rows = 32
min_rollouts = {min_rollouts}
threads = 1
device = "cpu"
seed = {seed}
watch_interval_s = 0.2
"""

Say = Callable[[str], None]


@dataclass(slots=True)
class Iteration:
    """One turn of the loop: mean reward, seconds of each phase, held-out success where it was measured."""

    reward: float
    sample_s: float
    reward_s: float = 0.0
    train_s: float = 0.0
    swap_s: float = 0.0
    eval_s: float = 0.0
    heldout: float | None = None
    version: int | None = None  # None: every group agreed, nothing to learn


@dataclass(slots=True)
class DemoResult:
    """How the demo went. ``initial`` and ``final`` are held-out success rates."""

    seed: int
    initial: float = 0.0
    final: float = 0.0
    iterations: list[Iteration] = field(default_factory=list)
    start_s: float = 0.0  # until vLLM answered
    seconds: float = 0.0

    @property
    def reached(self) -> bool:
        """Whether held-out success went over the goal."""
        return self.final > GOAL

    @property
    def content(self) -> bool:
        """Whether further iterations would show nothing new."""
        far = self.iterations[-1].reward >= STOP_AT_SAMPLED or self.seconds >= STOP_AFTER_S
        return self.final >= STOP_AT and far

    def summary(self) -> dict[str, Any]:
        """What ``lightning-proxy demo --json`` prints."""
        return {
            "seed": self.seed,
            "initial": self.initial,
            "final": self.final,
            "iterations": [
                {
                    "reward": turn.reward,
                    "sample_s": round(turn.sample_s, 2),
                    "train_s": round(turn.train_s, 2),
                    "swap_s": round(turn.swap_s, 3),
                }
                for turn in self.iterations
            ],
            "seconds": round(self.seconds, 1),
        }


def run_demo(
    *,
    workdir: Path,
    seed: int = 0,
    iterations: int = ITERATIONS,
    say: Say = print,
) -> DemoResult:
    """Run the loop in ``workdir`` until it has learned (``DemoResult.content``), or ``iterations`` times.

    Leaves ``curve.json`` and ``curve.png`` there, beside the database, the logs and all weights.
    Raises DemoFailed, with the end of the log that tells why, if a part of it fails.
    """
    began = time.monotonic()
    workdir = prepare(workdir)
    with ended_by_signals(), running(workdir, seed, say) as turn:
        result = DemoResult(seed, start_s=time.monotonic() - began)
        say(f"vLLM is up after {result.start_s:.0f} s")
        result.initial = result.final = turn.evaluate()[0]
        say(f"held-out success before training: {result.initial:.3f}")
        for number in range(iterations):
            turn.take(number, result)
            result.seconds = time.monotonic() - began
            say(describe(number, result))
            if result.content:
                break
        turn.measure_last(result)
    result.seconds = time.monotonic() - began
    save_curve(workdir, result)
    return result


@contextmanager
def running(workdir: Path, seed: int, say: Say) -> Iterator[Turn]:
    """Proxy, vLLM, trainer and the agents' host, all of them ended afterwards."""
    port = free_port()
    write_config(workdir, port=port, seed=seed)
    with (
        Children() as children,
        ProxyApi(f"http://127.0.0.1:{port}") as proxy,
        (workdir / "agents.log").open("wb") as log,
        AgentHost(log=log, no_certificates=workdir / "no-certificates") as host,
    ):
        say(f"starting vLLM behind the proxy at {proxy.url} (about a minute); logs are in {workdir}")
        model = str(workdir / "model")
        children.start("serve", [*_command("serve", workdir), "--model", model], workdir / "serve.log")
        wait_until_ready(proxy, children, workdir / "serve.log")
        children.start("train", [*_command("train", workdir), "--watch", "--json"], workdir / "train.log")
        yield Turn(workdir, proxy, host, children, seed)


class Turn:
    """The steps of an iteration."""

    def __init__(
        self, workdir: Path, proxy: ProxyApi, host: AgentHost, children: Children, seed: int
    ) -> None:
        self._workdir = workdir
        self._databases = workdir / "databases"
        self._proxy = proxy
        self._host = host
        self._children = children
        self._seed = seed
        self._reports = Reports(workdir / "train.log")

    def take(self, number: int, result: DemoResult) -> None:
        """Sample, reward, train and swap; measure held-out success now and then."""
        tasks = make_tasks(self._seed, "train", TASKS, start=number * TASKS)
        clock = time.monotonic()
        results = self._sample(tasks, RUNS_PER_TASK, temperature=1.0, split="train", what="sampling")
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

    def measure_last(self, result: DemoResult) -> None:
        """Held-out success after the last iteration, if that is not known."""
        if result.iterations and result.iterations[-1].heldout is None:
            self._measure(result)

    def evaluate(self) -> tuple[float, float]:
        """Held-out success through the proxy at temperature 0, and the seconds it took.

        These rollouts get no reward: they are never trained on.
        """
        began = time.monotonic()
        tasks = make_tasks(self._seed, "heldout", HELD_OUT_TASKS)
        results = self._sample(tasks, 1, temperature=0.0, split="heldout", what="held-out tasks")
        gold = {task.task_id: task.answer for task in tasks}
        right = sum(is_right(result.answer, gold[result.task_id]) for result in results)
        return right / len(results), time.monotonic() - began

    def _measure(self, result: DemoResult) -> None:
        last = result.iterations[-1]
        last.heldout, last.eval_s = self.evaluate()
        result.final = last.heldout

    def _sample(
        self, tasks: Sequence[Task], runs: int, *, temperature: float, split: str, what: str
    ) -> list[Result]:
        self._children.check()
        with progress_bar(what) as progress:
            results = sample(
                tasks,
                proxy=self._proxy,
                host=self._host,
                databases=self._databases,
                runs_per_task=runs,
                temperature=temperature,
                metadata={"split": split},
                progress=progress,
            )
        failed = [result.error for result in results if result.error]
        if len(failed) > len(results) // 4:
            self._children.check()
            raise DemoFailed(
                f"{len(failed)} of {len(results)} runs of the agent failed, e.g.: {failed[0]}",
                self._workdir / "agents.log",
            )
        return results

    def _grade(self, number: int, tasks: Sequence[Task], results: Sequence[Result]) -> float:
        """Rewards, posted by a process of its own; their mean."""
        tasks_file = self._workdir / f"tasks-{number:02d}.jsonl"
        results_file = self._workdir / f"results-{number:02d}.jsonl"
        write_tasks(tasks_file, tasks, self._databases)
        write_results(results_file, results)
        command = [sys.executable, "-m", "lightning_proxy.demo.grade", "--url", self._proxy.url]
        command += ["--tasks", str(tasks_file), "--results", str(results_file)]
        mean = float(json.loads(run_to_end(command, self._workdir / "grade.log"))["mean"])
        if mean == 0:
            raise DemoFailed(f"not one of {len(results)} answers was right: there is nothing to learn from")
        return mean

    def _await_training(self) -> dict[str, Any]:
        """The report of the pass that used what was just rewarded."""
        deadline = time.monotonic() + TRAIN_TIMEOUT_S
        with progress_bar("training"):
            while time.monotonic() < deadline:
                self._children.check()
                for report in self._reports.new():
                    if report["outcome"] in ("rejected", "staged_only", "guarded"):
                        raise DemoFailed(f"no new version took over: {report['message']}", self._reports.path)
                    if report["run_id"] is not None:
                        return report
                newest = self._proxy.request("GET", "/api/runs?limit=1")["runs"]
                if newest and newest[0]["state"] == "failed":
                    raise DemoFailed(f"training failed: {newest[0]['error']}", self._reports.path)
                time.sleep(0.1)
        raise DemoFailed(f"training did not end within {TRAIN_TIMEOUT_S:.0f} s", self._reports.path)


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


# -- before and after ------------------------------------------------------------------------


def prepare(workdir: Path) -> Path:
    """An empty directory with a copy of the model in it; what an earlier demo left there is removed.

    DemoFailed if something else is in it, or the model is missing.
    """
    workdir = workdir.resolve()
    if not (WEIGHTS / "model.safetensors").is_file():
        raise DemoFailed(
            f"the model is missing; make it with: python -m lightning_proxy.demo.model {WEIGHTS}"
        )
    if workdir.exists() and any(workdir.iterdir()):
        if not (workdir / _MARKER).exists():
            raise DemoFailed(
                f"{workdir} holds something that no demo made: name an empty directory, or a new one"
            )
        shutil.rmtree(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / _MARKER).touch()
    shutil.copytree(WEIGHTS, workdir / "model")
    return workdir


def write_config(workdir: Path, *, port: int, seed: int) -> Path:
    """The demo's lightning.toml."""

    def quoted(name: str) -> str:
        return json.dumps(str(workdir / name))  # a JSON text is a TOML text

    path = workdir / "lightning.toml"
    text = _CONFIG.format(
        port=port,
        policy=POLICY,
        seed=seed,
        min_rollouts=TASKS * RUNS_PER_TASK // 2,  # rewards come all at once, of whatever rollouts had a call
        db=quoted("lightning.db"),
        model=quoted("model"),
        engine_log=quoted("engine.log"),
        runs_dir=quoted("runs"),
    )
    path.write_text(text, encoding="utf-8")
    return path


def _command(name: str, workdir: Path) -> list[str]:
    return [sys.executable, "-m", "lightning_proxy.cli", name, "--config", str(workdir / "lightning.toml")]


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until_ready(proxy: ProxyApi, children: Children, log: Path) -> None:
    """Until vLLM answers behind the proxy; DemoFailed if ``serve`` ends, or it takes too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    reason = "nothing listens yet"
    while time.monotonic() < deadline:
        children.check()
        try:
            proxy.request("GET", "/readyz")
            return
        except (EngineUnreachable, EngineRefused) as error:
            reason = str(error)
        time.sleep(0.25)
    raise DemoFailed(f"not ready after {START_TIMEOUT_S:.0f} s: {reason}", log)


def describe(number: int, result: DemoResult) -> str:
    """One line about the iteration that has just ended."""
    turn = result.iterations[-1]
    bar = "#" * round(turn.reward * 20)
    line = f"{number:3d}  sampled {turn.reward:.3f} {bar:<20}  sample {turn.sample_s:4.1f} s  "
    line += f"reward {turn.reward_s:3.1f} s  train {turn.train_s:4.1f} s  swap {turn.swap_s:4.2f} s"
    if turn.heldout is not None:
        line += f"  held-out {turn.heldout:.3f} ({turn.eval_s:.1f} s)"
    return f"{line}  [{result.seconds:.0f} s]"


def save_curve(workdir: Path, result: DemoResult) -> None:
    """curve.json, with the seconds of every phase, and curve.png."""
    whole = asdict(result) | {"reached": result.reached}
    (workdir / "curve.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    os.environ.setdefault("MPLCONFIGDIR", str(workdir / "matplotlib"))
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([turn.reward for turn in result.iterations], marker="o", label="sampled while training")
    measured = [(0, result.initial)]  # before the first update
    measured += [
        (i + 1, turn.heldout) for i, turn in enumerate(result.iterations) if turn.heldout is not None
    ]
    axes.plot(*zip(*measured, strict=True), marker="s", label="held-out, temperature 0")
    axes.axhline(GOAL, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="updates", ylabel="success rate", ylim=(0, 1.03))
    axes.set_title(f"text-to-SQL agent, seed {result.seed}: {result.seconds:.0f} s in all")
    axes.legend()
    figure.savefig(workdir / "curve.png", dpi=120)
    pyplot.close(figure)
