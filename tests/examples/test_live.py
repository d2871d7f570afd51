"""Live traffic: users, their late thumbs, and the report on what they got."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from examples.live.report import Recorded, by_version, line_of, mixed_up, recorded_answers, save
from examples.live.run import SERVICE
from examples.live.users import Agent, AgentDied, Answered, Crowd, Habits
from tests.conftest import ProxyThread
from tests.engine import EngineThread, Script

HURRIED = Habits(
    users=4, pause_s=0.05, rate=0.5, delay_s=(0.1, 0.4), mistaken=0.5, correct_after_s=(0.05, 0.1)
)


def _answers(version: int, right: int, wrong: int) -> list[tuple[Answered, Recorded]]:
    made = [True] * right + [False] * wrong
    ids = [f"{version}/{number}" for number in range(len(made))]
    return [(Answered(0.0, i, is_right), Recorded(i, version)) for i, is_right in zip(ids, made, strict=True)]


def test_each_version_is_compared_with_the_first(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    said = [*_answers(0, 20, 80), *_answers(2, 45, 55)]
    answered, recorded = [a for a, _ in said], {a.response_id: seen for a, seen in said}
    rows = by_version(answered, recorded)
    assert mixed_up(answered, recorded) == 0
    assert mixed_up(answered, recorded | {"0/1": Recorded("0/2", 0)}) == 2
    assert mixed_up(answered, {k: v for k, v in recorded.items() if k != "0/1"}) == 1
    blameless = by_version(answered, recorded | {"0/1": Recorded("0/1", None)})
    assert [row.answers for row in blameless] == [99, 100]
    first, last = rows
    assert (first.version, first.answers, first.right) == (0, 100, 20)
    # Wilson's interval of 20 of 100, Newcombe's of the difference to 45 of 100: worked out by hand.
    assert (first.success.low, first.success.high) == pytest.approx((0.1334, 0.2888), abs=1e-4)
    assert last.gain.value == pytest.approx(0.25)
    assert last.gain.low is not None
    assert 0.1 < last.gain.low < 0.25
    assert "45 of  100 right" in line_of(last)
    save(tmp_path, rows, {"seed": 1})
    saved = json.loads((tmp_path / "live.json").read_text())
    assert [row["version"] for row in saved["versions"]] == [0, 2]
    assert (tmp_path / "live.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.clients
@pytest.mark.timeout(300)
def test_users_without_ids_are_told_apart_and_their_thumbs_arrive(
    proxy: ProxyThread, engine: EngineThread, python: str, tmp_path: Path
) -> None:
    engine.script(Script(text="42"), times=100_000)

    async def use() -> Crowd:
        env = {"OPENAI_BASE_URL": proxy.base_url, "OPENAI_API_KEY": "any", "PATH": os.environ["PATH"]}
        with (tmp_path / "agent.log").open("wb") as log:
            async with await Agent.start([python, str(SERVICE)], env, log) as agent:
                await agent.ask("up", "What is 6 * 7?")  # by then it has imported what it needs
                crowd = Crowd(agent, proxy.url, HURRIED, seed=1)
                while not crowd.failed and not (crowd.thumbs > 10 and 0 < crowd.corrected < crowd.thumbs):
                    await crowd.work(6.0, lambda crowd: None)
        return crowd

    crowd = asyncio.run(use())
    assert crowd.failed == 0, (tmp_path / "agent.log").read_text()
    with proxy.store() as store:
        rollouts = store.list_rollouts(limit=10_000)
        assert len(rollouts) == 1 + len(crowd.answered)  # one conversation each
        entries = [entry for r in rollouts for entry in store.list_rewards(r.rollout.rollout_id)]
    assert len(entries) == crowd.thumbs + crowd.corrected
    assert {entry.value for entry in entries} <= {1.0, -1.0}
    assert mixed_up(crowd.answered, recorded_answers(proxy.db)) == 0


@pytest.mark.clients
@pytest.mark.timeout(300)
def test_an_agent_that_ends_lets_nobody_wait_and_a_thumb_that_is_not_taken_ends_nothing(
    proxy: ProxyThread, engine: EngineThread, python: str, tmp_path: Path
) -> None:
    engine.script(Script(text="42"), times=100_000)
    env = {"OPENAI_BASE_URL": proxy.base_url, "OPENAI_API_KEY": "any", "PATH": os.environ["PATH"]}

    async def use(command: list[str], url: str) -> Crowd:
        with (tmp_path / "agent.log").open("ab") as log:
            async with await Agent.start(command, env, log) as agent:
                crowd = Crowd(agent, url, HURRIED, seed=1)
                while not crowd.refused:
                    await crowd.work(3.0, lambda crowd: None)
        return crowd

    for ends in ("import sys; sys.stdin.readline()", "print('no JSON'); input()", "print('{}'); input()"):
        with pytest.raises(ExceptionGroup) as raised:
            asyncio.run(use([python, "-c", ends], proxy.url))
        assert raised.group_contains(AgentDied)
    crowd = asyncio.run(use([python, str(SERVICE)], "http://127.0.0.1:1"))
    assert crowd.answered
    assert crowd.refused > 0
    assert crowd.thumbs == 0
