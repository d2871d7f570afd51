"""Automatic rewards: off unless asked for, entered once, and ledger entries like any other."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from lightning_proxy.config import Settings
from lightning_proxy.config.settings import PolicySettings, StoreSettings
from lightning_proxy.config.train import TrainSettings
from lightning_proxy.errors import ConfigError
from lightning_proxy.store import ErrorClass, Finding, Reward, RolloutState, Store
from lightning_proxy.trainer.automatic import AutomaticRewards, Entered
from lightning_proxy.trainer.report import Outcome
from lightning_proxy.trainer.run import train_once
from tests.trainer.recording import POLICY, failed_span, generation, record_group, span


def settings(**given: object) -> Settings:
    return Settings.model_validate({"automatic_rewards": given})


def enter(store: Store, **given: object) -> tuple[Entered, list[str]]:
    lines: list[str] = []
    automatic = AutomaticRewards(settings(**given).automatic_rewards, store)
    return automatic.enter(POLICY, lines.append), lines


def call(
    store: Store, rollout_id: str, *found: Finding, request: Any = None, response: Any = None, **changes: Any
) -> int:
    bodies = {"request": orjson.dumps(request or {}), "response": orjson.dumps(response or {})}
    return store.add_span(span(rollout_id, generation([1], [2]), **bodies, findings=found, **changes))


def asking(call_id: str) -> dict[str, Any]:
    function = {"name": "query", "arguments": "{}"}
    return {
        "choices": [{"message": {"role": "assistant", "tool_calls": [{"id": call_id, "function": function}]}}]
    }


FAILED_TOOL = Finding(ErrorClass.TOOL_FAILURE, "Error: no such table", "c1")
CUT = Finding(ErrorClass.TRUNCATED, "it ended at its token limit")
MALFORMED = Finding(ErrorClass.MALFORMED_TOOL_CALL, "there is no tool 'query'", "c1")


def entries(store: Store, rollout_id: str = "r") -> list[tuple[str, float | None, int | None, int | None]]:
    return [(each.name, each.value, each.span_id, each.attempt) for each in store.list_rewards(rollout_id)]


def test_nothing_is_entered_unless_it_is_asked_for(store: Store) -> None:
    call(store, "r", CUT)
    store.finish_rollout("r", RolloutState.FAILED)
    automatic = AutomaticRewards(settings().automatic_rewards, store)
    assert not automatic.on
    assert entries(store) == []


def test_a_failed_tool_is_held_against_the_call_that_asked_for_it(store: Store) -> None:
    asked = call(store, "r", response=asking("c1"))
    call(store, "r", response={"choices": []})  # another agent of the same rollout
    call(store, "r", FAILED_TOOL)
    call(store, "r", FAILED_TOOL, started_at=2e9, ended_at=2e9)  # once a call
    store.finish_rollout("r", RolloutState.SUCCEEDED)
    assert enter(store, tool_error=-0.25)[0] == Entered(judged=1, rewards=1)
    assert entries(store) == [("tool_error", -0.25, asked, None)]
    [entry] = store.list_rewards("r")
    assert (entry.source, entry.idempotency_key) == ("automatic", f"automatic:tool_error:{asked}")


def test_truncation_and_malformed_tool_calls_are_held_against_their_own_call(store: Store) -> None:
    first = call(store, "r", CUT)
    second = call(store, "r", MALFORMED)
    store.add_span(failed_span("r"))
    store.finish_rollout("r", RolloutState.SUCCEEDED)
    enter(store, truncated=-1, malformed_tool_call=-0.5)
    assert sorted(entries(store)) == [
        ("malformed_tool_call", -0.5, second, None),
        ("truncated", -1, first, None),
    ]


def test_a_try_that_was_superseded_is_not_held_against_anybody(store: Store) -> None:
    call(store, "r", CUT, request={"n": 1})
    call(store, "r", request={"n": 1}, response={"choices": []}, retry=1)
    store.finish_rollout("r", RolloutState.SUCCEEDED)
    assert enter(store, truncated=-1)[0].rewards == 0


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (RolloutState.SUCCEEDED, [("exit_code", 1.0, None, 1)]),
        (RolloutState.FAILED, [("exit_code", 0.0, None, 1)]),
        (RolloutState.CANCELLED, []),
    ],
)
def test_the_exit_code_rewards_the_attempt(store: Store, state: RolloutState, expected: object) -> None:
    call(store, "r")
    store.finish_rollout("r", state)
    enter(store, exit_code=True)
    assert entries(store) == expected


def test_they_are_entered_once_however_often_a_pass_begins(store: Store) -> None:
    call(store, "r", CUT)
    store.finish_rollout("r", RolloutState.FAILED)
    assert enter(store, truncated=-1, exit_code=True)[0] == Entered(judged=1, rewards=2)
    assert enter(store, truncated=-1, exit_code=True)[0] == Entered()
    assert enter(store, truncated=-1)[0] == Entered(judged=1)  # other kinds: looked at again, entered once
    assert len(entries(store)) == 2


def test_a_correction_of_one_stays(store: Store) -> None:
    span_id = call(store, "r", CUT)
    store.finish_rollout("r", RolloutState.FAILED)
    enter(store, truncated=-1)
    store.add_reward(value=0.0, span_id=span_id, name="truncated", source="reviewer")
    enter(store, truncated=-1)
    assert [each.value for each in store.counting_rewards("r")] == [0.0]


def test_an_open_rollout_waits_until_it_is_quiet_or_rewarded(store: Store) -> None:
    now = time.time()
    for rollout_id in ("talking", "quiet", "rewarded"):
        ended = now - 1000 if rollout_id == "quiet" else now
        call(store, rollout_id, CUT, started_at=ended, ended_at=ended)
    store.add_reward(value=1.0, rollout_id="rewarded")
    assert enter(store, truncated=-1, quiet_s=100)[0] == Entered(judged=2, rewards=2)
    assert entries(store, "talking") == []


def test_a_rollout_that_went_on_is_judged_again(store: Store, tmp_path: Path) -> None:
    function = write(tmp_path, "def calls(rollout): return len(rollout['calls'])")
    call(store, "r", CUT, started_at=1.0, ended_at=1.0)
    enter(store, truncated=-1, function=function, exit_code=True)
    call(store, "r", CUT, started_at=2.0, ended_at=2.0)
    enter(store, truncated=-1, function=function, exit_code=True)
    store.finish_rollout("r", RolloutState.SUCCEEDED)
    enter(store, truncated=-1, function=function, exit_code=True)
    counting = sorted((each.name, each.value) for each in store.counting_rewards("r"))
    assert counting == [("calls", 2.0), ("exit_code", 1.0), ("truncated", -1.0), ("truncated", -1.0)]


def test_what_was_trained_on_is_left_alone(store: Store) -> None:
    record_group(store, "task", [1.0])
    run = store.begin_run(POLICY, owner="here", lease_s=60)
    store.drain(run.run_id, limit=10)
    store.commit_run(run.run_id, report={}, version=None)
    store.finish_rollout("task-0-0", RolloutState.SUCCEEDED)
    assert enter(store, exit_code=True)[0] == Entered()


# --- a function of the user's -------------------------------------------------------------------


def write(directory: Path, source: str) -> str:
    path = directory / "judge.py"
    path.write_text(source)
    return f"{path}:{source.split('def ')[-1].split('(')[0]}"


def test_a_function_is_given_the_rollout_as_plain_values(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.create_rollout(rollout_id="r", task_id="t", metadata={"answer": "42"})
    messages = [{"role": "user", "content": "6 times 7?"}]
    answer = {
        "choices": [{"finish_reason": "length", "message": {"role": "assistant", "content": "42"}}],
    }
    span_id = call(
        store, "r", CUT, request={"messages": messages}, response=answer, role="solver", model="policy"
    )
    store.add_reward(value=0.5, rollout_id="r", name="style")
    store.finish_rollout("r", RolloutState.FAILED, "exit code 3")
    seen = tmp_path / "seen.json"
    source = (
        "import orjson, pathlib\n"
        "def right(rollout):\n"
        f"    pathlib.Path({str(seen)!r}).write_bytes(orjson.dumps(rollout))\n"
        "    print('not on stdout')\n"
        "    return rollout['reply'] == rollout['metadata']['answer']"
    )
    enter(store, function=write(tmp_path, source))
    assert orjson.loads(seen.read_bytes()) == {
        "rollout_id": "r",
        "task_id": "t",
        "attempt": 1,
        "state": "failed",
        "reason": "exit code 3",
        "metadata": {"answer": "42"},
        "messages": [*messages, {"role": "assistant", "content": "42"}],
        "reply": "42",
        "calls": [
            {
                "span_id": span_id,
                "role": "solver",
                "wire": "chat",
                "model": "policy",
                "policy_version": 0,
                "request": {"messages": messages},
                "response": answer,
                "error_class": None,
                "findings": ["truncated"],
            }
        ],
        "rewards": [{"name": "style", "value": 0.5, "span_id": None}],
    }
    assert entries(store)[1:] == [("right", 1.0, None, 1)]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("wire", "request_", "response", "messages", "reply"),
    [
        (
            "responses",
            {"input": "hi"},
            {"output": [{"type": "message", "content": [{"type": "output_text", "text": "ho"}]}]},
            2,
            "ho",
        ),
        (
            "messages",
            {"messages": [{"role": "user"}]},
            {"content": [{"type": "text", "text": "ho"}]},
            2,
            "ho",
        ),
        ("completions", {"prompt": "hi"}, {"choices": [{"text": "ho"}]}, 2, "ho"),
    ],
)
def test_every_apis_reply_is_given_as_text(
    store: Store, tmp_path: Path, wire: str, request_: Any, response: Any, messages: int, reply: str
) -> None:
    call(store, "r", request=request_, response=response, wire=wire)
    store.finish_rollout("r", RolloutState.SUCCEEDED)
    source = (
        f"def f(rollout): return {{'same': rollout['reply'] == {reply!r}, 'n': len(rollout['messages'])}}"
    )
    enter(store, function=write(tmp_path, source))
    assert [(each.name, each.value) for each in store.list_rewards("r")] == [("same", 1.0), ("n", messages)]


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("0.5", {"f": 0.5}),
        ("None", {}),
        ("{'a': 1, 'b': -2.0, 'c': None}", {"a": 1.0, "b": -2.0}),
        ("True", {"f": 1.0}),
    ],
)
def test_a_function_returns_a_number_nothing_or_numbers_by_name(
    store: Store, tmp_path: Path, returned: str, expected: dict[str, float]
) -> None:
    call(store, "r")
    store.finish_rollout("r", RolloutState.SUCCEEDED)
    enter(store, function=write(tmp_path, f"def f(rollout): return {returned}"))
    assert {each.name: each.value for each in store.list_rewards("r")} == expected
    assert enter(store, function=write(tmp_path, "def f(rollout): return 7"))[0] == Entered()  # judged


@pytest.mark.parametrize("body", ["1 / 0", "'high'", "[1]", "float('nan')", "{'a': 'b'}"])
def test_a_function_that_fails_is_told_with_the_rollouts_id_and_asked_again(
    store: Store, tmp_path: Path, body: str
) -> None:
    for rollout_id in ("bad", "good"):
        call(store, rollout_id, CUT)
        store.finish_rollout(rollout_id, RolloutState.SUCCEEDED)
    source = f"def f(rollout): return 1 if rollout['rollout_id'] == 'good' else {body}"
    done, lines = enter(store, truncated=-1, function=write(tmp_path, source))
    assert done == Entered(judged=2, rewards=3, failed=1)
    assert lines[0].startswith("the reward function failed on rollout bad: ")
    assert lines[-1] == "automatic rewards: 3 entered for 2 rollouts, the function failed on 1"
    assert [name for name, *_ in entries(store, "bad")] == ["truncated"]
    function = write(tmp_path, "def f(rollout): return 0.5")
    assert enter(store, truncated=-1, function=function)[0] == Entered(judged=1, rewards=1)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, "no file"),
        ("def g(): ...", "no function 'f'"),
        ("1 / 0", "ZeroDivisionError"),
        ("f = 7", "no function"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_an_error_that_says_why(
    store: Store, tmp_path: Path, source: str | None, said: str
) -> None:
    path = tmp_path / "judge.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(ConfigError, match=said):
        enter(store, function=f"{path}:f")


def test_a_functions_file_that_fails_leaves_the_module_that_was_there(store: Store, tmp_path: Path) -> None:
    call(store, "r")
    store.finish_rollout("r", RolloutState.SUCCEEDED)
    enter(store, function=write(tmp_path, "def f(rollout): return 1"))
    before = sys.modules["lightning_reward_judge"]
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        enter(store, function=write(tmp_path, "1 / 0\ndef f(rollout): return 1"))
    assert sys.modules["lightning_reward_judge"] is before


def test_a_functions_file_may_define_dataclasses_with_annotations_that_are_text(
    store: Store, tmp_path: Path
) -> None:
    call(store, "r")
    store.finish_rollout("r", RolloutState.SUCCEEDED)
    source = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Verdict:\n    value: float\ndef f(rollout): return Verdict(0.5).value"
    )
    enter(store, function=write(tmp_path, source))
    assert {each.name: each.value for each in store.list_rewards("r")} == {"f": 0.5}


# --- in a pass ----------------------------------------------------------------------------------


def test_a_pass_begins_by_entering_them_and_a_dry_run_does_not(store: Store, tmp_path: Path) -> None:
    for number, state in enumerate((RolloutState.SUCCEEDED, RolloutState.SUCCEEDED)):
        store.create_rollout(rollout_id=f"r{number}", task_id="t")
        call(store, f"r{number}")
        store.finish_rollout(f"r{number}", state)
    asked = Settings(
        store=StoreSettings(db=store.path),
        policy=PolicySettings(name=POLICY, model=tmp_path),
        train=TrainSettings(runs_dir=tmp_path / "runs", min_rollouts=2),
        automatic_rewards=settings(exit_code=True).automatic_rewards,
    )
    lines: list[str] = []

    def note(line: str, done: float | None = None) -> None:
        lines.append(line)

    train_once(asked, store=store, progress=note, dry_run=True)
    assert store.stats()["rewards"] == 0
    report = train_once(asked, store=store, progress=note)
    assert report.automatic == {"judged": 2, "rewards": 2, "failed": 0}
    assert lines[0] == "automatic rewards: 2 entered for 2 rollouts"
    assert report.outcome is Outcome.NOTHING  # both have return 1
    assert report.left_out == {"rollouts": {"group_all_equal": 2}, "calls": {}}
    assert [each.name for each in _all(store)] == ["exit_code"] * 2


def _all(store: Store) -> list[Reward]:
    return [reward for number in range(2) for reward in store.list_rewards(f"r{number}")]
