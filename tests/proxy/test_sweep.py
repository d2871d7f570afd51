"""Rollouts that died in silence, on real traffic; and what ``/api/failures`` says of it all."""

from __future__ import annotations

import pytest

from lightning_proxy.store import ErrorClass, Rollout, RolloutState
from tests.conftest import MakeProxy, ProxyThread, wait_until
from tests.engine import EngineThread, Script
from tests.proxy.raw_http import CHAT, HELLO, Call, chat, recorded, send

TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}
CALLS = Script(tool_calls=(("search", "{}"),))
SOON = {"silence_s": 0.3}


def state_of(proxy: ProxyThread, rollout_id: str) -> Rollout:
    with proxy.store() as store:
        return store.get_rollout(rollout_id)


def has_failed(proxy: ProxyThread, rollout_id: str) -> bool:
    return state_of(proxy, rollout_id).state is RolloutState.FAILED


@pytest.fixture
def swept(engine: EngineThread, make_proxy: MakeProxy) -> ProxyThread:
    """A proxy that takes a third of a second for silence."""
    return make_proxy(engine.base_url, failures=SOON)


def test_a_rollout_whose_last_call_failed_is_failed_by_that(engine: EngineThread, swept: ProxyThread) -> None:
    chat(swept, prefix="/rollout/good")
    engine.script(Script(status=503, body="no room"))
    chat(swept, prefix="/rollout/bad")
    wait_until(lambda: has_failed(swept, "bad"))
    done = state_of(swept, "bad")
    assert (done.error_class, done.presumed) == (ErrorClass.UPSTREAM_ERROR, True)
    assert done.reason == (
        "silent for 0.3 s after a call that failed; its last call ended in upstream_error: no room"
    )
    assert state_of(swept, "good").state is RolloutState.OPEN, "it may have come to its end"


def test_a_tool_call_that_nobody_answers_is_a_silent_death_unless_it_was_what_was_asked_for(
    engine: EngineThread, swept: ProxyThread
) -> None:
    for name, choice in (("forced", "required"), ("free", "auto")):
        engine.script(CALLS)
        chat(swept, prefix=f"/rollout/{name}", tools=[TOOL], tool_choice=choice)
    wait_until(lambda: has_failed(swept, "free"))
    assert state_of(swept, "free").error_class is ErrorClass.SILENT_DEATH
    assert "a tool call that nobody answered" in (state_of(swept, "free").reason or "")
    assert state_of(swept, "forced").state is RolloutState.OPEN


def test_an_agent_that_left_in_the_middle_of_an_answer_and_never_came_back_died(
    engine: EngineThread, swept: ProxyThread
) -> None:
    engine.script(Script(chunk_delay_s=0.05, tokens=2000))  # longer than anybody takes to notice
    with Call(swept.url, f"/rollout/r1{CHAT}", {**HELLO, "stream": True}) as call:
        call.read_until(b'"content":"')
        call.hang_up()
    recorded(swept)
    wait_until(lambda: has_failed(swept, "r1"))
    assert state_of(swept, "r1").error_class is ErrorClass.SILENT_DEATH


def test_a_call_that_comes_after_all_is_recorded_and_opens_nothing(
    engine: EngineThread, swept: ProxyThread
) -> None:
    engine.script(Script(status=503))
    chat(swept, prefix="/rollout/r1")
    wait_until(lambda: has_failed(swept, "r1"))
    assert chat(swept, prefix="/rollout/r1").status == 200
    assert len(recorded(swept, 2)) == 2
    assert send(swept.url, "/reward", {"rollout_id": "r1", "value": 1.0}).status == 201
    assert has_failed(swept, "r1")
    told = send(swept.url, "/api/rollouts/r1", {"state": "succeeded"}, method="PATCH")
    assert (told.status, told.json["presumed"]) == (200, False)
    assert state_of(swept, "r1").state is RolloutState.SUCCEEDED


def test_where_nothing_is_to_be_presumed_nothing_is(engine: EngineThread, make_proxy: MakeProxy) -> None:
    proxy = make_proxy(engine.base_url, failures={"silence_s": 0})
    engine.script(Script(status=503))
    chat(proxy, prefix="/rollout/r1")
    assert state_of(proxy, "r1").state is RolloutState.OPEN


def test_a_crash_is_told_with_what_the_last_call_met(engine: EngineThread, proxy: ProxyThread) -> None:
    engine.script(Script(status=400, body="This model's maximum context length is 8 tokens."))
    chat(proxy, prefix="/rollout/r1")
    change = {"state": "failed", "reason": "exit code 1", "error_class": "agent_crash"}
    done = send(proxy.url, "/api/rollouts/r1", change, method="PATCH").json
    assert done["error_class"] == "context_overflow"
    assert done["reason"].startswith("exit code 1; its last call ended in context_overflow: This model's")


def test_what_failed_is_told_in_numbers(engine: EngineThread, proxy: ProxyThread) -> None:
    for status in (200, 503, 503, 429):
        engine.script(Script(status=status, body=f"said {status}") if status != 200 else Script())
        chat(proxy, [("X-Role", "writer")], prefix=f"/rollout/r{status}")
    recorded(proxy, 4)
    told = send(proxy.url, "/api/failures?since=1h&by=role").json
    assert told["by"] == "role"
    assert [
        (f["error_class"], f["part"], f["calls"], f["rollouts"], f["share"]) for f in told["failures"]
    ] == [
        ("upstream_error", "writer", 2, 1, 0.5),
        ("rate_limited", "writer", 1, 1, 0.25),
    ]
    first = told["failures"][0]["first"]
    assert (first["message"], first["rollout_id"], first["span_id"]) == ("said 503", "r503", 2)
    assert send(proxy.url, "/api/failures?since=soon").status == 400
    assert send(proxy.url, "/api/failures?by=error").status == 400
