"""What was acknowledged survives kill -9 at any moment."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from lightning_proxy.store import Store
from tests.store.support import start_script

pytestmark = pytest.mark.drill

_ROUNDS = 4
_LOAD = 60  # acknowledgements of a round at least: spans and, of every third, a reward

_SCRIPT = """
import asyncio, os, sys
from array import array
from lightning_proxy.store import Generation, Writer
from tests.store.support import make_span

async def agent(writer, run, number):
    for call in range(1_000_000):
        name = f"{run}-{number}-{call}"
        ids = array("i", range(call % 300))
        generation = Generation(ids, ids, array("f", [-0.5] * len(ids)), "stop")
        span = make_span(rollout_id=f"{run}-{number}", response_id=name, generations=(generation,))
        span_id = await writer.submit_span(span)
        os.write(1, f"span {span_id} {name} {len(ids)}\\n".encode())
        if call % 3 == 0:
            reward, _ = await writer.submit(lambda store: store.add_reward(value=call, response_id=name))
            os.write(1, f"reward {reward.reward_id} {name} {call}\\n".encode())

async def main():
    writer = Writer(sys.argv[1])
    writer.start()
    await asyncio.gather(*[agent(writer, sys.argv[2], number) for number in range(16)])

asyncio.run(main())
"""


def test_every_acknowledged_span_and_reward_is_there_after_kill_9(db: Path) -> None:
    acknowledged: list[list[str]] = []
    for run in range(_ROUNDS):
        process = start_script(_SCRIPT, db, str(run))
        assert process.stdout is not None
        first = "".join(process.stdout.readline() for _ in range(_LOAD))
        time.sleep(random.uniform(0.05, 0.4))
        process.kill()
        out, errors = process.communicate(timeout=60)
        assert not errors
        acknowledged += [line.split() for line in (first + out).splitlines()]
    with Store.open(db) as store:
        for kind, number, name, count in acknowledged:
            if kind == "span":
                span = store.get_span(int(number))
                assert span.response_id == name
                assert len(span.generations[0].logprobs) == int(count)
            else:
                rewards = {reward.reward_id: reward for reward in store.list_rewards(name.rpartition("-")[0])}
                assert rewards[int(number)].value == float(count)
        assert store.scalar("PRAGMA integrity_check") == "ok"
        assert store.rows("PRAGMA foreign_key_check") == []
        stats = store.stats()
    spans = sum(kind == "span" for kind, *_ in acknowledged)
    rewards_seen = len(acknowledged) - spans
    print(
        f"{_ROUNDS} kills: {spans} spans and {rewards_seen} rewards acknowledged, "
        f"{stats['spans']} and {stats['rewards']} stored"
    )
    assert spans > 100
    assert stats["spans"] >= spans
    assert stats["rewards"] >= rewards_seen
