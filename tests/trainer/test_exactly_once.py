"""Kill the trainer or the proxy at any point: no span, no reward, no consumption is lost or doubled."""

from __future__ import annotations

import http.client
import json
import multiprocessing
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from lightning_proxy.config import Settings
from lightning_proxy.errors import LightningError
from lightning_proxy.store import ErrorClass, Finding, RunState, Store, VersionStatus
from lightning_proxy.trainer.report import Outcome
from lightning_proxy.trainer.run import train_once
from tests.conftest import MakeProxyProcess, ProxyProcess, wait_until
from tests.trainer import paper
from tests.trainer.checkpoints import write_checkpoint
from tests.trainer.conftest import RECIPE
from tests.trainer.fake_proxy import fake_proxy
from tests.trainer.recording import POLICY, flat, generation, record_group, record_rollout, span

KILLS = 30
KILLS_OF_REAL_TRAINING = 5
CLIENTS = 4
GROUP = 4  # rollouts of one task

# A process that has imported everything forks, so that a life costs milliseconds.
_lives = multiprocessing.get_context("forkserver")
_lives.set_forkserver_preload(["tests.trainer.paper"])


# --- at each point of a pass --------------------------------------------------------------------


@pytest.mark.parametrize("point", paper.POINTS)
def test_a_trainer_killed_there_has_lost_and_doubled_nothing(
    point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper.install(monkeypatch.setattr)
    db, model = tmp_path / "store.db", write_checkpoint(tmp_path / "model")
    with Store.open(db) as store, fake_proxy(db) as proxy:
        how = paper.settings(db, model, proxy.url, lease_s=60.0)
        record(store)
        kill_at(point, how)
        with store.transaction():  # what it held has run out
            store.connection.execute("UPDATE training_runs SET lease_expires_at = 1 WHERE state = 'running'")
        finish(store, how)
        check_consumptions(store)
        check_versions(store, how)
        committed = [run for run in store.list_runs(POLICY) if run.state is RunState.COMMITTED]
        assert [run.report["counts"]["rollouts"] for run in committed if run.report["version"]] == [4]
        active = store.active_version(POLICY)
        assert active is not None
        assert active.version == 1
        assert [each.rollout.rollout_id for each in store.preview(POLICY, 10)] == ["alone-0-0"]
        truncated = [entry for entry in store.list_rewards("cut") if entry.name == "truncated"]
        assert [entry.value for entry in truncated] == [-0.125]


def record(store: Store) -> None:
    """A group to train on, one member of it with an automatic reward to come; one that has no group."""
    record_group(store, "task", [0.0, 1.0, 1.0])
    record_rollout(store, "cut", [([2, 3, 4], [5])], None, task_id="task")
    cut = Finding(ErrorClass.TRUNCATED, "it ended at its token limit")
    store.add_span(span("cut", generation([2, 3, 4, 5], [6], flat), findings=(cut,)))
    store.add_reward(value=0.5, rollout_id="cut")
    record_group(store, "alone", [1.0])


def kill_at(point: str, how: Settings) -> None:
    life = _lives.Process(target=paper.train_and_die, args=(how, point))
    life.start()
    life.join(120)
    assert life.exitcode == -signal.SIGKILL, f"it did not come to {point}"


def finish(store: Store, how: Settings, timeout_s: float = 60.0) -> None:
    """Pass after pass until nothing is left but what waits for company; what was leased runs out."""
    deadline = time.monotonic() + timeout_s
    idle = 0
    while idle < 2:  # the first may only have promoted what was staged
        assert time.monotonic() < deadline, "it did not come to an end"
        try:
            report = train_once(how, store=store, progress=paper.silent)
            idle = idle + 1 if report.outcome is Outcome.NOTHING else 0
        except LightningError:
            time.sleep(0.05)


# --- at random points, with agents calling and rewarding meanwhile ------------------------------


@dataclass
class Seen:
    """What the clients know for sure."""

    whole: set[str] = field(default_factory=set)  # ids of responses received to the last byte
    acknowledged: dict[str, Any] = field(default_factory=dict)  # idempotency key: posted, after a 2xx
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""
    stop: threading.Event = field(default_factory=threading.Event)


class Client:
    """Works on tasks, four rollouts each; rewards them, and later corrects some of what it said."""

    def __init__(self, number: int, seen: Seen, seed: int) -> None:
        self._number = number
        self._seen = seen
        self._draw = random.Random(seed)

    def run(self) -> None:
        tasks = 0
        while not self._seen.stop.is_set():
            tasks += 1
            self._work_on(f"task-{self._number}-{tasks}")
            if tasks > 2:
                self._correct(f"task-{self._number}-{self._draw.randrange(1, tasks)}")

    def _work_on(self, task: str) -> None:
        for member in range(GROUP):
            rollout_id = f"{task}-{member}"
            registered = {"rollout_id": rollout_id, "task_id": task}
            if self._insist("/api/rollouts", registered) is None:
                return
            body = {"model": POLICY, "messages": [{"role": "user", "content": task}]}
            answer = self._insist(f"/rollout/{rollout_id}/v1/chat/completions", body)
            if answer is None:
                return
            with self._seen.lock:
                self._seen.whole.add(answer["id"])
            self._reward(rollout_id, self._draw.choice([0.0, 1.0]), key=f"first of {rollout_id}")

    def _correct(self, task: str) -> None:
        rollout_id = f"{task}-{self._draw.randrange(GROUP)}"
        key = f"correction {self._draw.random()} of {rollout_id}"
        self._reward(rollout_id, self._draw.choice([0.0, 0.5, 1.0]), key=key)

    def _reward(self, rollout_id: str, value: float, *, key: str) -> None:
        posted = {"value": value, "rollout_id": rollout_id, "idempotency_key": key}
        if self._insist("/reward", posted) is not None:
            with self._seen.lock:
                self._seen.acknowledged[key] = posted

    def _insist(self, path: str, body: Any) -> Any:
        """The answer, however often the proxy dies meanwhile; None once it is time to stop."""
        while True:
            try:
                return post(self._seen.url, path, body)
            except (OSError, http.client.HTTPException, ValueError):
                if self._seen.stop.wait(0.02):
                    return None


def post(url: str, path: str, body: Any) -> Any:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        raw = response.read()  # raises IncompleteRead unless it is whole
    finally:
        connection.close()
    if response.status == 404 and path == "/reward":
        return {}  # its rollout was never registered: the task was given up
    assert response.status < 300, raw
    return json.loads(raw)


@pytest.fixture
def engine_url() -> Iterator[str]:
    """A fake engine in a process of its own."""
    command = [sys.executable, "-m", "tests.engine.fake_engine", "--tokens", "8"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1] + "/v1"
        process.kill()


class World:
    """A proxy, a trainer, and clients that go on through all the kills."""

    def __init__(self, make_proxy: MakeProxyProcess, engine_url: str, db: Path, model: Path) -> None:
        self._make_proxy = make_proxy
        self._engine_url = engine_url
        self._db = db
        self._model = model
        self.killed: Counter[str] = Counter()
        self.seen = Seen()
        self._proxy = self._start_proxy()
        self._trainer = self._start_trainer()

    def _start_proxy(self) -> ProxyProcess:
        env = {"LIGHTNING_TRAIN__VERIFY_TOLERANCE": "1000", "LIGHTNING_POLICY__MODEL": str(self._model)}
        proxy = self._make_proxy(self._engine_url, db=self._db, env=env)
        self.seen.url = proxy.url
        return proxy

    def settings(self, lease_s: float = 60.0) -> Settings:
        """For a pass, with the proxy where it is now."""
        return paper.settings(self._db, self._model, self.seen.url, lease_s=lease_s)

    def _start_trainer(self) -> Any:
        # Short, so that the next life soon takes over what this one held.
        life = _lives.Process(target=paper.train_until_killed, args=(self.settings(lease_s=0.3), True))
        life.start()
        return life

    def kill(self, what: str) -> None:
        """kill -9, and start the next one."""
        self.killed[what] += 1
        if what != "trainer":
            self._proxy.kill()
        if what != "proxy":
            self.kill_trainer()
        if what != "trainer":
            self._proxy = self._start_proxy()
        if what != "proxy":
            self._trainer = self._start_trainer()

    def has_seen_it_all(self) -> bool:
        """Whether there was load, a run was cut off, and a rollout was trained on again."""
        with Store.open(self._db) as store:
            failed = store.scalar("SELECT count(*) FROM training_runs WHERE state = 'failed'")
            again = store.scalar(
                "SELECT count(*) - count(DISTINCT rollout_id) FROM consumptions "
                "JOIN training_runs USING (run_id) WHERE state = 'committed'"
            )
        return len(self.seen.whole) > 10 * CLIENTS and failed > 0 and again > 0

    def kill_trainer(self) -> None:
        """For good."""
        self._trainer.kill()
        self._trainer.join(60)
        assert self._trainer.exitcode == -signal.SIGKILL, "it died by itself"


def live_through(world: World, draw: random.Random, kills: int, pause_s: tuple[float, float]) -> None:
    threads = [
        threading.Thread(target=Client(number, world.seen, draw.randrange(10**9)).run)
        for number in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in range(kills):
            time.sleep(draw.uniform(*pause_s))
            world.kill(draw.choices(["trainer", "proxy", "both"], [6, 1, 1])[0])
        wait_until(world.has_seen_it_all, 120)
    finally:
        world.seen.stop.set()
        for thread in threads:
            thread.join(60)
        world.kill_trainer()
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_killing_trainer_and_proxy_at_random_moments_loses_and_doubles_nothing(
    engine_url: str, make_proxy_process: MakeProxyProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = random.randrange(10**6)
    print(f"\nseed {seed}")
    db, model = tmp_path / "lightning.db", write_checkpoint(tmp_path / "model")
    world = World(make_proxy_process, engine_url, db, model)
    live_through(world, random.Random(seed), KILLS, (0.05, 0.4))
    paper.install(monkeypatch.setattr)
    with Store.open(db) as store:
        finish(store, world.settings())
        check_everything(store, world)


@pytest.mark.train
@pytest.mark.filterwarnings("ignore")  # verl and torch warn about themselves
@pytest.mark.timeout(1800)
def test_killing_a_trainer_that_really_updates_loses_and_doubles_nothing(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Each life is cut somewhere in a run that has drained; rewards are corrected between the lives."""
    draw = random.Random()
    db = tmp_path / "store.db"
    with Store.open(db, busy_timeout_s=30) as store, fake_proxy(db) as proxy:
        how = paper.settings(db, tiny_model, proxy.url, **RECIPE | {"lease_s": 3.0})
        for number in range(KILLS_OF_REAL_TRAINING):
            record_group(store, f"task-{number}", [0.0, 1.0, 1.0])
            life = _lives.Process(target=paper.train_until_killed, args=(how, False))
            life.start()
            wait_until(lambda: holds_something(store), 240)  # importing verl alone takes ten seconds
            time.sleep(draw.uniform(0.0, 4.0))
            life.kill()
            life.join(60)
            assert life.exitcode == -signal.SIGKILL, "it died by itself"
            store.add_reward(value=draw.random(), rollout_id=f"task-{draw.randint(0, number)}-0-0")
        last = _lives.Process(target=paper.train_until_killed, args=(how, False))
        last.start()
        wait_until(lambda: is_done(store), 300)
        last.kill()
        last.join(60)
        consumed, again = check_consumptions(store)
        versions = check_versions(store, how)
        assert consumed == 3 * KILLS_OF_REAL_TRAINING
        print(
            f"\n{KILLS_OF_REAL_TRAINING} kills: {consumed} rollouts trained on, {again} of them again, "
            f"{versions} versions"
        )


def holds_something(store: Store) -> bool:
    newest = store.list_runs(POLICY, limit=1)
    return bool(newest) and newest[0].state is RunState.RUNNING and newest[0].lease_expires_at > time.time()


def is_done(store: Store) -> bool:
    return (
        store.backlog(POLICY).rollouts_ready == 0
        and store.list_runs(POLICY, limit=1)[0].state is not RunState.RUNNING
        and store.staged_version(POLICY) is None
    )


# --- what must hold -----------------------------------------------------------------------------


def check_everything(store: Store, world: World) -> None:
    seen, how = world.seen, world.settings()
    ids = [
        row["response_id"] for row in store.rows("SELECT response_id FROM spans WHERE error_class IS NULL")
    ]
    assert len(seen.whole) > 10 * CLIENTS, "there was hardly any load"
    assert seen.whole - set(ids) == set(), "spans were lost"
    assert [one for one, count in Counter(ids).items() if count > 1] == [], "spans were doubled"
    keys = Counter(row[0] for row in store.rows("SELECT idempotency_key FROM rewards"))
    expected = {key for key, posted in seen.acknowledged.items() if known(store, posted["rollout_id"])}
    assert expected - set(keys) == set(), "rewards were lost"
    assert [key for key, count in keys.items() if count > 1] == [], "rewards were doubled"
    for key in expected:
        row = store.row("SELECT rollout_id, value FROM rewards WHERE idempotency_key = ?", (key,))
        assert row is not None
        posted = seen.acknowledged[key]
        assert (row["rollout_id"], row["value"]) == (posted["rollout_id"], posted["value"])
    consumed, again = check_consumptions(store)
    versions = check_versions(store, how)
    runs = Counter(run.state.value for run in store.list_runs(POLICY, limit=100_000))
    print(
        f"killed {dict(world.killed)}: {len(seen.whole)} answers received whole, {len(expected)} rewards "
        f"acknowledged; {consumed} rollouts trained on, {again} of them again after a late reward; runs "
        f"{dict(runs)}, {versions} versions; lost 0, doubled 0"
    )
    assert runs["failed"] > 0, "no run was cut off"
    assert again > 0, "no reward came late"


def known(store: Store, rollout_id: str) -> bool:
    return store.row("SELECT 1 FROM rollouts WHERE rollout_id = ?", (rollout_id,)) is not None


def check_consumptions(store: Store) -> tuple[int, int]:
    """Each return of a rollout was trained on once; how many rollouts were, and how often one was again."""
    rows = store.rows(
        "SELECT c.rollout_id, c.attempt, c.last_reward_id FROM consumptions AS c "
        "JOIN training_runs AS t USING (run_id) WHERE t.state = 'committed' ORDER BY c.run_id"
    )
    known_ids: dict[str, int] = {}
    returns: dict[str, float | None] = {}
    again = 0
    for row in rows:
        rollout_id, last = row["rollout_id"], row["last_reward_id"]
        value = store.rule.return_of(store.counting_rewards_of_attempt(rollout_id, row["attempt"], last))
        assert value is not None
        if rollout_id in returns:
            again += 1
            assert last > known_ids[rollout_id], f"{rollout_id} was consumed twice with the same ledger"
            assert value != returns[rollout_id], f"{rollout_id} was consumed twice with the same return"
        known_ids[rollout_id], returns[rollout_id] = last, value
    waiting = {each.rollout.rollout_id: each.value for each in store.preview(POLICY, 100_000)}
    for row in store.rows("SELECT DISTINCT rollout_id FROM rewards JOIN spans USING (rollout_id)"):
        rollout_id = row["rollout_id"]
        present = store.rule.return_of(store.counting_rewards_of_attempt(rollout_id, 1))
        assert waiting.get(rollout_id, returns.get(rollout_id)) == present, (
            f"a reward of {rollout_id} is lost"
        )
    assert [run for run in store.list_runs(limit=100_000) if run.state is RunState.RUNNING] == []
    assert store.scalar("PRAGMA integrity_check") == "ok"
    assert store.rows("PRAGMA foreign_key_check") == []
    return len(returns), again


def check_versions(store: Store, how: Settings) -> int:
    """Runs and versions belong to one another, and what is on disk is what the store knows."""
    runs = {run.run_id: run for run in store.list_runs(POLICY, limit=100_000)}
    versions = store.list_versions(POLICY)
    made = [run for run in runs.values() if run.state is RunState.COMMITTED and run.report.get("version")]
    assert sorted(run.report["version"] for run in made) == sorted(v.version for v in versions if v.version)
    for version in versions:
        if version.version:
            assert version.run_id is not None
            assert runs[version.run_id].report["version"] == version.version
    assert [version.version for version in versions if version.status is VersionStatus.STAGED] == []
    active = store.active_version(POLICY)
    assert active is not None
    assert active.version == versions[0].version  # the newest
    assert Path(active.path).is_dir()
    on_disk = {path.name for path in (how.train.runs_dir / POLICY).glob("*")}
    named = {Path(version.path).parent.name for version in versions}
    assert on_disk <= named, "something was left behind"
    return len(made)
