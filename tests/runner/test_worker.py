"""`lightning-proxy run --tasks` and `--worker`: real runners, a real proxy, agents that misbehave."""

from __future__ import annotations

import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_proxy.client import ProxyClient
from lightning_proxy.runner import Runner, Work
from lightning_proxy.runner.process import AgentProcess
from lightning_proxy.store import Store
from tests.conftest import MakeProxyProcess, ProxyThread, wait_until
from tests.engine import EngineThread, FakeEngine
from tests.runner.pool import EXPECTED, Runners, enqueue, kill, rules, summary_of, write_tasks

pytestmark = pytest.mark.drill

BEGUN = '"$LIGHTNING_ROLLOUT_ID $LIGHTNING_ATTEMPT x"'  # what `Runners.begun` reads


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    """An engine that answers the agent by what it asks."""
    thread = EngineThread(FakeEngine(rules=rules(tmp_path)))
    yield thread
    thread.stop()


@pytest.fixture
def runners(tmp_path: Path, proxy: ProxyThread) -> Runners:
    return Runners(tmp_path, proxy.url)


def tasks_of(*kinds: str, **fields: Any) -> list[dict[str, Any]]:
    return [{"task_id": f"{kind}-{i}", "input": {"kind": kind, **fields}} for i, kind in enumerate(kinds)]


def check(store: Store, task_id: str, group_size: int) -> None:
    """Every rollout of a task ended as its kind has to."""
    kind = store.get_task(task_id).task.input["kind"]
    state, error_class, reason, _, reward = EXPECTED[kind]
    rollouts = store.list_rollouts(task_id=task_id, limit=1000)
    assert len(rollouts) == group_size, task_id
    for each in rollouts:
        rollout = each.rollout
        assert (rollout.state, rollout.error_class, each.reward) == (state, error_class, reward), rollout
        assert (rollout.reason or "").startswith(reason), rollout


def test_a_file_of_tasks_is_worked_off_whatever_its_agents_do(runners: Runners, proxy: ProxyThread) -> None:
    kinds = ("fine", "crash", "crash_once", "signal", "refused", "declined", "overloaded_once")
    file = write_tasks(runners.directory / "tasks.jsonl", tasks_of(*kinds))
    flags = ("--tasks", file, "--group-size", "2", "--max-attempts", "2", "--concurrency", "4")
    done = summary_of(runners.start(*flags, "--json"), 120)
    assert (done["rollouts"], done["succeeded"], done["failed"], done["tasks_open"]) == (14, 8, 6, 0)
    assert done["failed_by_class"] == {"agent_crash": 4, "upstream_refused": 2}
    with proxy.store() as store:
        for number, kind in enumerate(kinds):
            check(store, f"{kind}-{number}", 2)
        spans = store.list_spans(limit=1000)
    assert {span.attributed_by for span in spans} == {"path"}
    assert {span.attempt for span in spans} == {1, 2}
    begun = len(runners.begun())
    assert begun == sum(2 * EXPECTED[kind][3] for kind in kinds)
    again = summary_of(runners.start(*flags, "--json"), 120)
    assert (again["succeeded"], again["attempts_here"]) == (8, {})
    assert len(runners.begun()) == begun


def test_hangs_and_silence_end_by_the_clock(runners: Runners, proxy: ProxyThread) -> None:
    tasks = [
        {"task_id": "slow", "input": {"kind": "hang"}, "timeout_s": 1.5},
        {"task_id": "deaf", "input": {"kind": "stubborn"}, "timeout_s": 1.5},
        {"task_id": "quiet", "input": {"kind": "silent"}, "silence_s": 1.5},
        # Its second attempt comes to its end, and may take its time for that.
        {"task_id": "quiet once", "input": {"kind": "silent_once"}, "silence_s": 5.0},
    ]
    file = write_tasks(runners.directory / "tasks.jsonl", tasks)
    flags = ("--tasks", file, "--max-attempts", "2", "--concurrency", "4", "--grace", "0.5")
    done = summary_of(runners.start(*flags, "--json"), 120)
    assert (done["succeeded"], done["failed_by_class"]) == (1, {"timeout": 2, "silent_death": 1})
    with proxy.store() as store:
        for task_id in ("slow", "deaf", "quiet", "quiet once"):
            check(store, task_id, 1)


def test_where_nothing_succeeds_the_exit_code_says_so(runners: Runners) -> None:
    file = write_tasks(runners.directory / "tasks.jsonl", tasks_of("crash"))
    runner = runners.start("--tasks", file)
    out, errors = runner.communicate(timeout=120)
    assert runner.returncode == 1
    assert out == "1/1 rollouts, 0 succeeded (0%), 1 failed (1 agent_crash)\n"
    assert "1 tasks in" in errors


def test_fields_reach_the_command_and_its_log_is_kept(runners: Runners, proxy: ProxyThread) -> None:
    file = write_tasks(
        runners.directory / "tasks.jsonl", [{"task_id": "t", "q": "why?", "long": "x" * 200_000}]
    )
    agent = ("sh", "-c", 'echo "$0 $TASK_Q $LIGHTNING_TASK_ID"; wc -c < "$LIGHTNING_TASK_FILE"', "{q}")
    runner = runners.start("--tasks", file, "--logs", "my-logs", agent=agent)
    runner.communicate(timeout=120)
    assert runner.returncode == 0
    with proxy.store() as store:
        [rollout] = store.list_rollouts()
    log = runners.directory / "my-logs" / f"{rollout.rollout.rollout_id}-1.log"
    first, size = log.read_text().split("\n")[:2]
    assert first == "why? why? t"
    assert int(size) > 200_000


def test_an_unknown_field_is_refused_before_anything_is_enqueued(
    runners: Runners, proxy: ProxyThread
) -> None:
    file = write_tasks(runners.directory / "tasks.jsonl", tasks_of("fine"))
    runner = runners.start("--tasks", file, agent=("echo", "{kin}"))
    _, errors = runner.communicate(timeout=120)
    assert runner.returncode == 2
    assert "no such field; it has kind" in errors
    with proxy.store() as store:
        assert store.list_tasks() == []


def test_a_task_without_the_field_fails_and_the_worker_goes_on(runners: Runners, proxy: ProxyThread) -> None:
    with proxy.store() as store:
        odd = [{"task_id": f"odd-{i}", "input": {"question": "why?"}} for i in range(2)]
        enqueue(store, [odd[0], *tasks_of("fine", "fine"), odd[1]])
        done = summary_of(runners.start("--worker", "--json", agent=("echo", "{kind}")), 60)
        assert (done["succeeded"], done["failed_by_class"], done["tasks_open"]) == (2, {"agent_crash": 2}, 0)
        [rollout] = store.list_rollouts(task_id="odd-0")
    assert "no such field; it has question" in (rollout.rollout.reason or "")


def test_agents_get_no_secret_of_the_proxy(
    runners: Runners, proxy: ProxyThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = ("LIGHTNING_PROXY__TOKEN", "LIGHTNING_PROXY__UPSTREAM_API_KEY", "LIGHTNING_TOKEN")
    for name in secrets:
        monkeypatch.setenv(name, "open sesame")
    monkeypatch.setenv("LIGHTNING_ENGINE__ENV", '{"HF_TOKEN": "open sesame"}')
    monkeypatch.setenv("MY_OWN", "kept")
    file = write_tasks(runners.directory / "tasks.jsonl", tasks_of("fine"))
    runner = runners.start("--tasks", file, "--logs", "logs", agent=("env",))
    runner.communicate(timeout=60)
    assert runner.returncode == 0
    [log] = (runners.directory / "logs").glob("*.log")
    assert "open sesame" not in log.read_text()
    assert "MY_OWN=kept" in log.read_text()


# -- the runner in this process ----------------------------------------------------------------------


def test_where_child_signals_are_inherited_as_ignored_each_task_runs_once(
    tmp_path: Path, proxy: ProxyThread
) -> None:
    ran = tmp_path / "count"
    with proxy.store() as store:
        enqueue(store, tasks_of("fine", "fine"))
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        work = Work(["/bin/sh", "-c", f"echo x >> {ran}; exit 3"], tmp_path / "logs")
        done = Runner(ProxyClient(proxy.url), work).run()
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert done.counts == {"agent_crash": 2}
    assert ran.read_text() == "x\n" * 2


def test_a_fault_of_the_runners_own_ends_an_attempt_after_a_few_tries(
    tmp_path: Path, proxy: ProxyThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    def last_lines(process: AgentProcess) -> str:
        raise RuntimeError("no such luck")

    with proxy.store() as store:
        enqueue(store, tasks_of("fine"))
        monkeypatch.setattr(AgentProcess, "last_lines", last_lines)
        done = Runner(ProxyClient(proxy.url), Work(["/bin/false"], tmp_path / "logs")).run()
        [rollout] = store.list_rollouts(task_id="fine-0")
    assert done.counts == {"released": 2, "proxy_fault": 1}
    assert (rollout.rollout.state, rollout.rollout.error_class) == ("failed", "proxy_fault")
    assert rollout.rollout.reason == "the runner failed: no such luck"


def test_a_runner_that_can_run_nothing_any_more_is_no_fault_of_the_agent(
    runners: Runners, proxy: ProxyThread
) -> None:
    file = write_tasks(
        runners.directory / "tasks.jsonl", [{"task_id": "a", "q": 1}, {"task_id": "b", "q": 2}]
    )
    logs = runners.directory / "logs"
    flags = ("--tasks", file, "--logs", logs)
    runner = runners.start(*flags, agent=("sh", "-c", f"rm -r {logs}; touch {logs}"))
    _, errors = runner.communicate(timeout=120)
    assert (runner.returncode, "no command can be run here" in errors) == (2, True), errors
    with proxy.store() as store:
        assert (store.get_task("a").succeeded, store.get_task("b").waiting) == (1, 1)
    runner = runners.start(*flags)
    _, errors = runner.communicate(timeout=120)
    assert (runner.returncode, "cannot be used" in errors) == (2, True), errors


def test_an_input_that_does_not_fit_into_a_command_fails_its_own_rollout(
    runners: Runners, proxy: ProxyThread
) -> None:
    tasks = [{"task_id": "long", "q": "x" * 200_000}, {"task_id": "short", "q": "x"}]
    file = write_tasks(runners.directory / "tasks.jsonl", tasks)
    done = summary_of(runners.start("--tasks", file, "--json", agent=("true", "{q}")), 120)
    assert (done["succeeded"], done["failed_by_class"]) == (1, {"agent_crash": 1})
    with proxy.store() as store:
        [rollout] = store.list_rollouts(task_id="long")
    assert "Argument list too long" in (rollout.rollout.reason or "")


def test_workers_share_a_pool_and_end_when_it_is_done(runners: Runners, proxy: ProxyThread) -> None:
    with proxy.store() as store:
        enqueue(store, [{**task, "group_size": 4} for task in tasks_of(*["fine"] * 6)])
    script = f'echo {BEGUN} >> "$RAN"; while [ ! -e go ]; do sleep 0.05; done'
    flags = ("--worker", "--concurrency", "3", "--json")
    both = [runners.start(*flags, agent=("sh", "-c", script)) for _ in range(2)]
    wait_until(lambda: len(runners.begun()) == 6)  # both are at work, with all the agents they may have
    (runners.directory / "go").touch()
    done = [summary_of(each, 120) for each in both]
    attempts = [each["attempts_here"].get("succeeded", 0) for each in done]
    assert sum(attempts) == 24
    assert min(attempts) >= 3
    assert len(set(runners.begun())) == len(runners.begun()) == 24


def test_a_runner_that_is_told_to_stop_gives_back_what_it_has(runners: Runners, proxy: ProxyThread) -> None:
    file = write_tasks(runners.directory / "tasks.jsonl", tasks_of(*["hang_once"] * 3))
    runner = runners.start("--tasks", file, "--concurrency", "3")
    wait_until(lambda: len(runners.begun()) == 3)
    runner.send_signal(signal.SIGTERM)
    runner.communicate(timeout=120)
    assert runner.returncode == 128 + signal.SIGTERM
    with proxy.store() as store:
        assert store.pool_progress().waiting == 3
        attempts = [store.list_attempts(rollout_id)[0] for rollout_id, _, _ in runners.begun()]
        assert {(each.state, each.reason) for each in attempts} == {("cancelled", "the runner was stopped")}
    done = summary_of(runners.start("--tasks", file, "--concurrency", "3", "--json"), 120)
    assert done["succeeded"] == 3
    assert sorted(attempt for _, attempt, _ in runners.begun()) == [1, 1, 1, 2, 2, 2]


def test_cancelling_a_task_ends_its_agents(runners: Runners, proxy: ProxyThread) -> None:
    file = write_tasks(
        runners.directory / "tasks.jsonl", [{"task_id": "h", "input": {"kind": "hang"}, "silence_s": 60}]
    )
    runner = runners.start("--tasks", file, "--lease", "10", "--json")
    wait_until(lambda: len(runners.begun()) == 1)
    with proxy.store() as store:
        store.cancel_task("h")
    done = summary_of(runner, 120)
    assert (done["tasks_cancelled"], done["cancelled"]) == (1, 1)
    assert done["attempts_here"] == {"ended_by_the_pool": 1}


def test_an_end_arrives_though_the_proxy_was_away(
    tmp_path: Path, engine: EngineThread, make_proxy_process: MakeProxyProcess
) -> None:
    first = make_proxy_process(engine.base_url)
    port = first.url.rpartition(":")[2]
    runners = Runners(tmp_path, first.url)
    file = write_tasks(tmp_path / "tasks.jsonl", [{"task_id": f"t{i}", "q": i} for i in range(3)])
    agent = ("sh", "-c", f'echo {BEGUN} >> "$RAN"; sleep 1')
    runner = runners.start("--tasks", file, "--concurrency", "3", "--lease", "30", "--json", agent=agent)
    wait_until(lambda: len(runners.begun()) == 3)
    first.kill()
    time.sleep(2)  # the agents end meanwhile
    make_proxy_process(engine.base_url, "--port", port)
    done = summary_of(runner, 120)
    assert (done["succeeded"], done["attempts_here"]) == (3, {"succeeded": 3})
    assert len(runners.begun()) == 3


def test_a_runner_that_is_killed_again_and_again_runs_nothing_finished_twice(
    runners: Runners, proxy: ProxyThread
) -> None:
    tasks, group_size, kills = 12, 4, 6
    draw = random.Random()
    file = write_tasks(
        runners.directory / "tasks.jsonl", tasks_of(*["fine", "crash_once"] * (tasks // 2), sleep="0.15")
    )
    flags = ("--tasks", file, "--group-size", str(group_size), "--max-attempts", "2", "--concurrency", "4")
    finished_at_kill = []
    for _ in range(kills):
        begun = len(runners.begun())
        runner = runners.start(*flags)
        wait_until(lambda: len(runners.begun()) > begun or runner.poll() is not None)  # noqa: B023
        time.sleep(draw.uniform(0.0, 0.8))
        kill(runner)
        with proxy.store() as store:
            finished_at_kill.append(store.pool_progress().succeeded)
    done = summary_of(runners.start(*flags, "--json"), 120)
    assert (done["succeeded"], done["rollouts"], done["tasks_open"]) == (48, 48, 0)
    begun_attempts = runners.begun()
    lost = check_attempts(proxy.db, begun_attempts)
    with proxy.store() as store:
        for number in range(tasks):
            check(store, f"{('fine', 'crash_once')[number % 2]}-{number}", group_size)
    print(
        f"\n{kills} kills of the runner, {finished_at_kill} rollouts finished at each: {done['succeeded']} "
        f"succeeded, {len(begun_attempts)} attempts begun, {lost} lost with their runner, none twice"
    )


def check_attempts(db: Path, begun: list[tuple[str, int, str]]) -> int:
    """No attempt was begun twice, and none after its rollout had ended; returns how many were lost."""
    pairs = [(rollout_id, attempt) for rollout_id, attempt, _ in begun]
    assert len(pairs) == len(set(pairs)), "an attempt was begun twice"
    lost = 0
    with Store.open(db) as store:
        for rollout_id in {rollout_id for rollout_id, _ in pairs}:
            attempts = store.list_attempts(rollout_id)
            assert max(n for each, n in pairs if each == rollout_id) <= len(attempts)
            ended = [each for each in attempts if each.state == "succeeded"]
            assert len(ended) <= 1, attempts
            assert not ended or ended[0] == attempts[-1], "it was run again after it had succeeded"
            lost += sum(bool(re.match("its worker", each.reason or "")) for each in attempts)
    return lost


def test_another_runner_takes_over_when_the_lease_is_over(runners: Runners, proxy: ProxyThread) -> None:
    file = write_tasks(runners.directory / "tasks.jsonl", tasks_of("hang_once"))
    first = runners.start("--tasks", file, "--lease", "1.5", "--name", "first")
    wait_until(lambda: len(runners.begun()) == 1)
    kill(first)
    done = summary_of(runners.start("--tasks", file, "--name", "second", "--json"), 120)
    assert done["succeeded"] == 1
    with proxy.store() as store:
        [task] = store.rollouts_of_task("hang_once-0")
        reason = store.list_attempts(task["rollout_id"])[0].reason
    assert reason == "its worker first was not heard of for 1.5 s"


def test_a_preference_for_disagreement_says_what_it_skipped(runners: Runners) -> None:
    file = write_tasks(runners.directory / "tasks.jsonl", tasks_of("fine", "declined"))
    flags = ("--tasks", file, "--group-size", "2", "--concurrency", "2", "--rounds", "3")
    runner = runners.start(*flags, "--prefer-disagreement")
    out, errors = runner.communicate(timeout=120)
    assert runner.returncode == 0, errors
    counted, skipped = out.splitlines()
    assert counted == "4/4 rollouts, 4 succeeded (100%)"
    assert skipped.startswith("skipped 2 rounds of solved tasks and 2 of hopeless ones: ")
    assert len(runners.begun()) == 4
