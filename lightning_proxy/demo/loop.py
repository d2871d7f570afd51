"""The whole loop on one machine: serve, sample, reward, train, swap, again; and the curve of it.

``run`` is the summary; every step of it is a process of its own that could as well be yours:

- ``lightning-proxy serve --model`` with vLLM under it, and ``lightning-proxy train --watch``;
- the agent, one process per rollout, told nothing but its base URL and key;
- the grader (``grade.py``), which posts rewards after the fact.

An ``Experiment`` says which agent, which model and which tasks; ``text_to_sql.py`` has the demo's.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_proxy.config import load_settings
from lightning_proxy.demo.curve import DemoResult, Iteration, describe, save_curve, save_numbers
from lightning_proxy.demo.grade import is_right
from lightning_proxy.demo.processes import Children, DemoFailed, ended_by_signals, run_to_end
from lightning_proxy.demo.sample import (
    AgentHost,
    AgentTask,
    ProxyApi,
    Result,
    sample,
    write_results,
    write_tasks,
)
from lightning_proxy.demo.tasks import Split
from lightning_proxy.errors import EngineRefused, EngineUnreachable

START_TIMEOUT_S = 600.0
TRAIN_TIMEOUT_S = 300.0
_EVALUATE_EVERY = 2  # iterations
_MARKER = "this-is-a-lightning-demo"


@dataclass(frozen=True, slots=True)
class Experiment:
    """An agent, the model that it calls, and tasks for it.

    ``make_tasks(seed, split, count, start=0)`` gives tasks ``start`` to ``start + count`` of a split.
    ``tables`` is TOML that follows the configuration's ``[train]``; it may begin with further lines of that.
    """

    title: str
    policy: str  # the model's name, which the agent asks for
    model: Path
    agent: Path  # a Python script
    make_tasks: Callable[..., Sequence[AgentTask]]
    python: str = sys.executable  # of the environment that has the agent's packages
    tables: str = ""
    tasks_per_turn: int = 16
    runs_per_task: int = 8
    held_out_tasks: int = 64
    iterations: int = 24
    measure_sampled: bool = False  # held-out success at temperature 1 too, before and after
    stop_at: float | None = None  # held-out success at which we are content; None: all iterations are run
    stop_at_sampled: float = 0.8  # once sampling, which explores, succeeds this often too
    stop_after_s: float = 270.0  # or has had this long for it

    def is_content(self, result: DemoResult) -> bool:
        """Whether further iterations would show nothing new."""
        if self.stop_at is None:
            return False
        far = result.iterations[-1].reward >= self.stop_at_sampled or result.seconds >= self.stop_after_s
        return result.final >= self.stop_at and far


_CONFIG = """\
# Written by the loop of `lightning-proxy demo`.
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
{tables}"""

# A control is to be trained whatever becomes of it.
_NO_GUARD = """
[guard]
max_kl = 1e9
max_reward_drop = 1.0
max_entropy_rise = 1e9
"""

Say = Callable[[str], None]


def run(
    experiment: Experiment,
    *,
    workdir: Path,
    seed: int = 0,
    iterations: int | None = None,
    shuffle: bool = False,
    say: Say = print,
) -> DemoResult:
    """Run the loop in ``workdir`` until it has learned (``Experiment.is_content``), or ``iterations`` times.

    With ``shuffle`` rewards are dealt out among an iteration's rollouts at random: the control, which must
    not learn, and always runs all iterations. Leaves ``curve.json`` and ``curve.png`` there, beside the
    database, the logs and all weights. Raises DemoFailed, with the end of the log that tells why, if a part
    of it fails.
    """
    began = time.monotonic()
    workdir = prepare(workdir, experiment.model)
    with ended_by_signals(), running(experiment, workdir, seed, shuffle, say) as turn:
        result = DemoResult(seed, title=experiment.title, shuffled=shuffle, start_s=time.monotonic() - began)
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
    write_config(
        workdir,
        policy=experiment.policy,
        seed=seed,
        min_rollouts=least,
        tables=experiment.tables + (_NO_GUARD if shuffle else ""),
    )
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


@contextmanager
def serving(workdir: Path, say: Say) -> Iterator[tuple[Children, ProxyApi]]:
    """The proxy of ``workdir``'s configuration, with vLLM under it."""
    url = load_settings(config=workdir / "lightning.toml").train.proxy_url
    with Children() as children, ProxyApi(url) as proxy:
        say(f"starting vLLM behind the proxy at {url} (up to a minute); logs are in {workdir}")
        serve = [*command_of("serve", workdir), "--model", str(workdir / "model")]
        children.start("serve", serve, workdir / "serve.log")
        wait_until_ready(proxy, children, workdir / "serve.log")
        yield children, proxy


class Turn:
    """The steps of an iteration."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: Path,
        proxy: ProxyApi,
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

    def take(self, number: int, result: DemoResult) -> None:
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

    def measure_first(self, result: DemoResult) -> None:
        """Held-out success before anything was learned."""
        result.initial = result.final = self.evaluate()[0]
        if self._experiment.measure_sampled:
            result.initial_sampled = self.evaluate(temperature=1.0)[0]

    def measure_last(self, result: DemoResult) -> None:
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

    def _measure(self, result: DemoResult) -> None:
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
            raise DemoFailed(
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
        command = [sys.executable, "-m", "lightning_proxy.demo.grade", "--url", self._proxy.url]
        command += ["--tasks", str(tasks_file), "--results", str(results_file)]
        command += ["--shuffle", f"{self._seed}/{number}"] if self._shuffle else []
        mean = float(json.loads(run_to_end(command, self._workdir / "grade.log"))["mean"])
        if mean == 0 and not self._shuffle:
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


def prepare(workdir: Path, model: Path) -> Path:
    """An empty directory with a copy of the model in it; what an earlier demo left there is removed.

    DemoFailed if something else is in it, or the model is missing.
    """
    workdir = workdir.resolve()
    if not (model / "model.safetensors").is_file():
        raise DemoFailed(
            f"there is no model in {model}: it comes with the repository, and can be built again"
        )
    if workdir.exists() and any(workdir.iterdir()):
        if not (workdir / _MARKER).exists():
            raise DemoFailed(
                f"{workdir} holds something that no demo made: name an empty directory, or a new one"
            )
        shutil.rmtree(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / _MARKER).touch()
    shutil.copytree(model, workdir / "model")
    return workdir


def write_config(
    workdir: Path, *, policy: str, seed: int, min_rollouts: int, tables: str = "", port: int | None = None
) -> Path:
    """A lightning.toml, on a free port unless it names one; for ``tables`` see ``Experiment``."""

    def quoted(name: str) -> str:
        return json.dumps(str(workdir / name))  # a JSON text is a TOML text

    path = workdir / "lightning.toml"
    text = _CONFIG.format(
        port=port or free_port(),
        policy=policy,
        seed=seed,
        min_rollouts=min_rollouts,
        tables=tables,
        db=quoted("lightning.db"),
        model=quoted("model"),
        engine_log=quoted("engine.log"),
        runs_dir=quoted("runs"),
    )
    path.write_text(text, encoding="utf-8")
    return path


def command_of(name: str, workdir: Path) -> list[str]:
    """``lightning-proxy NAME`` with the experiment's configuration."""
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
