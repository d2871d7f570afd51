"""A runner at work: claims attempts, runs the command for each, and sees to it that each ends.

One thread claims; each attempt has a thread from its start until its end is recorded; one thread keeps
the leases, and one the clock. Whatever happens to the proxy meanwhile, an end is reported until it
arrives. Whatever happens to the runner, its agents end with it (``warden.py``), and what was under way
goes to the next runner: at once, if that has this one's name, else when the lease is over.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import queue
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Self

from lightning_proxy.client.proxy import ProxyClient
from lightning_proxy.errors import InvalidInput, LightningError
from lightning_proxy.runner import pool as pools
from lightning_proxy.runner.command import agent_environment, passed_on
from lightning_proxy.runner.names import Name
from lightning_proxy.runner.pool import Pool
from lightning_proxy.runner.process import AgentProcess, Warden, how_it_ended
from lightning_proxy.runner.taskfile import fill_in, task_environment

log = logging.getLogger(__name__)

STOPPED = "the runner was stopped"
_TIMED_OUT = "took too long"
_WAIT_S = 2.0  # for something to claim: a signal is answered after that
_CLOCK_S = 0.1
_PATIENCE_S = 10.0  # for a proxy that is away, once we were told to stop
_LONGEST_BEAT_S = 10.0
_SHORTEST_BEAT_S = 0.2
_PROGRESS_S = 2.0
_MOST_FAULTS = 3  # of the runner's own, with one rollout


@dataclass(frozen=True, slots=True)
class Work:
    """What a runner is to do, and how."""

    argv: Sequence[str]  # with {field} for the task's fields
    logs: Path  # directory: one file per attempt
    concurrency: int = 1
    task_ids: Sequence[str] | None = None  # None: whatever the pool has
    prefer: str | None = None
    watch: bool = False  # do not end when there is nothing left
    name: str | None = None
    lease_s: float = 60.0
    grace_s: float = 5.0  # between TERM and KILL


@dataclass(slots=True)
class Done:
    """What this runner did."""

    counts: Counter[str] = field(default_factory=Counter)  # attempts by how they ended
    signal: int | None = None  # that stopped it
    error: LightningError | None = None  # that ended it


@dataclass(slots=True)
class _Running:
    given: dict[str, Any]
    process: AgentProcess
    deadline: float | None  # monotonic
    next_beat: float  # monotonic
    beat_s: float
    written: int = 0


class Runner:
    """One runner; ``run`` is its life."""

    def __init__(
        self, proxy: ProxyClient, work: Work, on_progress: Callable[[Mapping[str, Any]], None] | None = None
    ) -> None:
        """``on_progress`` gets the pool's counts now and then."""
        self._proxy = proxy
        self._work = work
        self._on_progress = on_progress
        self._done = Done()
        self._running: dict[tuple[str, int], _Running] = {}
        self._faults: Counter[str] = Counter()  # of this runner's own, by rollout
        self._lock = threading.Lock()  # guards _running, _done and _faults
        self._under_way = 0  # attempts that have a thread; for the claiming thread alone
        self._freed: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for each thread that ended
        self._stopping_since: float | None = None
        self._at_once = False  # the second signal
        self._next_progress = 0.0  # monotonic
        self._ended = threading.Event()

    def run(self) -> Done:
        """Work until there is nothing left, or until told to stop.

        Raises what ``ProxyClient.request`` does where the proxy cannot be reached to begin with.
        """
        name = Name(self._work.logs, self._work.name)
        self._pool = Pool(self._proxy, name.text, self._work.lease_s)
        try:
            if lost := self._pool.abandon():
                log.warning("%s is back: %d attempts that it had begun are begun again", name.text, lost)
            self._warden = Warden(keep_open=name.lock)
            helpers = [
                threading.Thread(target=each, daemon=True) for each in (self._keep_leases, self._clock)
            ]
            try:
                with _Signals(self._told_to_stop):
                    for helper in helpers:
                        helper.start()
                    self._work_off()
            finally:
                self._ended.set()
                self._warden.close()
        finally:
            name.close()
        return self._done

    # -- claiming --------------------------------------------------------------------------------

    def _work_off(self) -> None:
        while not self._stopping:
            self._tell_progress()
            free = self._work.concurrency - self._under_way
            if free == 0:
                self._wait_for_a_slot(1.0)
                continue
            given = self._claim(free)
            for each in given:
                self._begin(each)
            if not given and not self._stopping and self._nothing_left():
                break
            self._wait_for_a_slot(0.0)
        while self._under_way:
            self._wait_for_a_slot(1.0)
            self._tell_progress()

    def _claim(self, limit: int) -> list[dict[str, Any]]:
        work = self._work
        given = pools.patiently(
            lambda: self._pool.claim(limit, task_ids=work.task_ids, prefer=work.prefer, wait_s=_WAIT_S),
            lambda: self._stopping,
        )
        return given or []

    def _nothing_left(self) -> bool:
        if self._work.watch:
            return False
        counts = self._progress()
        return counts is not None and counts["tasks_open"] == 0

    def _begin(self, given: dict[str, Any]) -> None:
        self._under_way += 1
        threading.Thread(target=self._carry_out, args=(given,), daemon=True).start()

    def _wait_for_a_slot(self, seconds: float) -> None:
        try:
            if seconds:
                self._freed.get(timeout=seconds)
                self._under_way -= 1
            while True:
                self._freed.get_nowait()
                self._under_way -= 1
        except queue.Empty:
            pass

    # -- one attempt -----------------------------------------------------------------------------

    def _carry_out(self, given: dict[str, Any]) -> None:
        key = (given["rollout_id"], given["attempt"])
        process: AgentProcess | None = None
        try:
            if self._stopping:
                self._give_back(given, STOPPED)
            elif (process := self._start(given)) is not None:
                running = self._keep(key, given, process)
                self._report(running, process.wait())
        except Exception as error:
            log.exception("attempt %d of rollout %s went wrong in the runner", key[1], key[0])
            if process is not None:
                process.kill()
            self._after_fault(given, f"the runner failed: {error}")
        finally:
            with self._lock:
                self._running.pop(key, None)
            self._freed.put(None)

    def _start(self, given: dict[str, Any]) -> AgentProcess | None:
        """The agent's process; None where there is none, and the attempt has ended or is given back."""
        log_file = self._work.logs / f"{given['rollout_id']}-{given['attempt']}.log"
        try:
            argv = fill_in(self._work.argv, given)
        except InvalidInput as error:  # the pool has tasks of other shapes: this one is not for this command
            self._finish(given, "failed", str(error), "agent_crash")
            return None
        try:
            self._warden.check()
            return AgentProcess(
                argv,
                env=self._environment(given, log_file),
                log=log_file,
                warden=self._warden,
                grace_s=self._work.grace_s,
            )
        except LightningError as error:
            self._give_up(given, error)
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) or error.errno == errno.E2BIG:  # this task's input is at fault
                self._finish(given, "failed", f"the command cannot be started: {error}", "agent_crash")
            else:
                self._give_up(given, InvalidInput(f"no command can be run here: {error}"))
        return None

    def _give_up(self, given: dict[str, Any], error: LightningError) -> None:
        """Stop, for every other attempt would fare like this one."""
        self._done.error = error
        self._stop()
        self._give_back(given, str(error))

    def _give_back(self, given: dict[str, Any], why: str) -> None:
        self._end_with(given, lambda: self._pool.release(given, why), "released")

    def _after_fault(self, given: dict[str, Any], why: str) -> None:
        """Give an attempt back, but not again and again: what went wrong here may do so every time."""
        with self._lock:
            self._faults[given["rollout_id"]] += 1
            last = self._faults[given["rollout_id"]] >= _MOST_FAULTS
        if last:
            self._finish(given, "failed", why, "proxy_fault")
        else:
            self._give_back(given, why)

    def _environment(self, given: dict[str, Any], log_file: Path) -> dict[str, str]:
        env = {
            **passed_on(os.environ),
            **agent_environment(self._proxy.url, given, attempt=given["attempt"]),
            **task_environment(given),
        }
        if "LIGHTNING_TASK" not in env:
            file = log_file.with_suffix(".task.json")
            file.write_text(json.dumps(given["input"], ensure_ascii=False), encoding="utf-8")
            env["LIGHTNING_TASK_FILE"] = str(file.resolve())
        return env

    def _keep(self, key: tuple[str, int], given: dict[str, Any], process: AgentProcess) -> _Running:
        now = time.monotonic()
        limit, silence = given["timeout_s"], given["silence_s"]
        beat_s = min(self._work.lease_s / 3, _LONGEST_BEAT_S, *([] if silence is None else [silence / 3]))
        beat_s = max(beat_s, _SHORTEST_BEAT_S)
        running = _Running(given, process, None if limit is None else now + limit, now + beat_s, beat_s)
        with self._lock:
            self._running[key] = running
        return running

    def _report(self, running: _Running, code: int) -> None:
        given, process = running.given, running.process
        match process.ended_because:
            case None if code == 0:
                self._finish(given, "succeeded", None, None)
            case None:
                how = how_it_ended(code)
                said = process.last_lines()
                self._finish(given, "failed", f"{how}: {said}" if said else how, "agent_crash")
            case why if why == _TIMED_OUT:
                self._finish(given, "failed", f"took longer than its {given['timeout_s']:g} s", "timeout")
            case why if why == STOPPED:
                self._give_back(given, STOPPED)
            case why:
                log.info("attempt %d of rollout %s: %s", given["attempt"], given["rollout_id"], why)
                self._count("ended_by_the_pool")

    def _finish(self, given: dict[str, Any], state: str, reason: str | None, error_class: str | None) -> None:
        how = error_class or state
        self._end_with(given, lambda: self._pool.finish(given, state, reason, error_class), how)

    def _end_with(self, given: dict[str, Any], call: Callable[[], Any], how: str) -> None:
        """Report an end until it arrives, or somebody else has the rollout."""
        try:
            arrived = pools.patiently(lambda: (call(), True), self._lost_patience) is not None
        except LightningError as error:
            log.warning("attempt %d of rollout %s: %s", given["attempt"], given["rollout_id"], error)
            how = "ended_by_the_pool"
        else:
            how = how if arrived else "not_reported"
        self._count(how)

    def _count(self, how: str) -> None:
        with self._lock:
            self._done.counts[how] += 1

    # -- beside it -------------------------------------------------------------------------------

    def _keep_leases(self) -> None:
        """Heartbeats; a proxy that is away is asked again with the next one."""
        while not self._ended.wait(_CLOCK_S):
            now = time.monotonic()
            for running in self._snapshot():
                if running.next_beat > now:
                    continue
                running.next_beat = time.monotonic() + running.beat_s
                written = running.process.written()
                alive, running.written = written > running.written, written
                try:
                    why = self._pool.heartbeat(running.given, alive=alive)
                except LightningError as error:
                    log.debug("no heartbeat: %s", error)
                else:
                    if why is not None:
                        running.process.end(why)

    def _clock(self) -> None:
        """Time limits, and the end of what does not end by itself."""
        while not self._ended.wait(_CLOCK_S):
            now = time.monotonic()
            for running in self._snapshot():
                if running.deadline is not None and now >= running.deadline:
                    running.process.end(_TIMED_OUT)
                if self._stopping:
                    running.process.end(STOPPED)
                if self._at_once:
                    running.process.kill()
                running.process.tick()

    def _snapshot(self) -> list[_Running]:
        with self._lock:
            return list(self._running.values())

    def _told_to_stop(self, signum: int) -> None:
        """A signal; the second one means at once. Takes no lock, for a handler interrupts who has it."""
        self._at_once = self._done.signal is not None
        self._done.signal = self._done.signal or signum
        self._stop()

    def _stop(self) -> None:
        if self._stopping_since is None:
            self._stopping_since = time.monotonic()

    @property
    def _stopping(self) -> bool:
        return self._stopping_since is not None

    def _lost_patience(self) -> bool:
        since = self._stopping_since
        return since is not None and (self._at_once or time.monotonic() - since > _PATIENCE_S)

    def _progress(self) -> dict[str, Any] | None:
        try:
            return pools.progress(self._proxy, self._work.task_ids)
        except pools.AWAY:
            return None

    def _tell_progress(self) -> None:
        now = time.monotonic()
        if self._on_progress is None or now < self._next_progress:
            return
        self._next_progress = now + _PROGRESS_S
        counts = self._progress()
        if counts is not None:
            self._on_progress(counts)


class _Signals:
    """Has the runner stop in order while it is at work, and hear how its agents end."""

    def __init__(self, stop: Callable[[int], None]) -> None:
        self._stop = stop
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[signum] = signal.signal(signum, self._handle)
        # Where it is inherited as ignored, the kernel keeps no exit code for us.
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self._stop(signum)
