"""Agents that only set the base URL: their rollouts are apart, over real sockets and with a real store."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lightning_proxy.proxy.lineage import BY_ID_SURE, ONE_OF_SEVERAL_SURE, WHOLE_SURE
from lightning_proxy.proxy.roles import fingerprint
from lightning_proxy.store import Span, Store
from lightning_proxy.trainer.transitions import LeftOut, Reason, Terms, transitions_of
from tests.conftest import MakeProxy, MakeProxyProcess, ProxyThread
from tests.engine import EngineThread, Script
from tests.proxy.agents import STYLES, TURNS, Agent, Resend, exact, renamed
from tests.proxy.raw_http import CHAT, HELLO, JSON, chat, leave_early, recorded, send


def take_turns(agents: list[Agent], *urls: str) -> None:
    """All agents make their calls in turn, each one with the next proxy."""
    for turn in range(len(TURNS)):
        for number, agent in enumerate(agents):
            agent.step(urls[(turn + number) % len(urls)])


def spans_of(agent: Agent, proxy: ProxyThread, agents: int) -> list[Span]:
    spans = {span.response_id: span for span in recorded(proxy, agents * len(TURNS))}
    return [spans[id_] for id_ in agent.answers]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("resend", STYLES, ids=lambda style: style.__name__)
def test_agents_of_one_process_end_up_with_a_rollout_each(
    proxy: ProxyThread, resend: Resend, stream: bool
) -> None:
    agents = [Agent(f"task {number}", resend, stream=stream) for number in range(3)]
    take_turns(agents, proxy.url)
    rollouts = []
    for agent in agents:
        spans = spans_of(agent, proxy, len(agents))
        rollouts.append({span.rollout_id for span in spans})
        assert [span.attributed_by for span in spans] == ["none"] + ["conversation"] * 3
        sure = WHOLE_SURE if resend is renamed else BY_ID_SURE
        assert [span.attribution_confidence for span in spans] == [0.0, sure, sure, sure]
        assert all(span.conversation is not None for span in spans)
    assert all(len(own) == 1 for own in rollouts)
    assert len(set.union(*rollouts)) == len(agents)


def test_agents_with_one_task_that_get_the_same_answers_have_a_rollout_each(proxy: ProxyThread) -> None:
    """As at temperature 0: the engine gives even the same ids. Histories are equal, rollouts are whole."""
    agents = [Agent("the task", exact) for _ in range(4)]
    take_turns(agents, proxy.url)
    spans = recorded(proxy, 16)
    assert set(Counter(span.rollout_id for span in spans).values()) == {len(TURNS)}
    for turn, sure in enumerate((0.0, *[ONE_OF_SEVERAL_SURE] * 3)):
        made = spans[turn * 4 : turn * 4 + 4]
        assert {span.attribution_confidence for span in made} == {sure}
        assert len({span.rollout_id for span in made}) == 4


def test_agents_that_run_at_the_same_time_end_up_with_a_rollout_each(proxy: ProxyThread) -> None:
    agents = [Agent(f"task {number}", STYLES[number % len(STYLES)]) for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda agent: [agent.step(proxy.url) for _ in TURNS], agents))
    owners = [{span.rollout_id for span in spans_of(agent, proxy, 16)} for agent in agents]
    assert all(len(own) == 1 for own in owners)
    assert len(set.union(*owners)) == 16


def test_two_proxies_on_one_database_know_each_others_conversations(
    engine: EngineThread, make_proxy: MakeProxy
) -> None:
    first, second = make_proxy(engine.base_url), make_proxy(engine.base_url)
    agents = [Agent(f"task {number}", style) for number, style in enumerate(STYLES)]
    take_turns(agents, first.url, second.url)
    owners = [{span.rollout_id for span in spans_of(agent, first, len(agents))} for agent in agents]
    assert all(len(own) == 1 for own in owners)
    assert len(set.union(*owners)) == len(agents)


def test_a_conversation_goes_on_after_the_proxy_was_killed(
    engine: EngineThread, make_proxy_process: MakeProxyProcess
) -> None:
    agents = [Agent(f"task {number}", style) for number, style in enumerate((exact, renamed))]
    before = make_proxy_process(engine.base_url)
    for agent in agents:
        agent.step(before.url)
    before.kill()
    after = make_proxy_process(engine.base_url, db=before.db)
    for _ in range(3):
        for agent in agents:
            agent.step(after.url)
    with Store.open(before.db) as store:
        owner = {span.response_id: span.rollout_id for span in store.list_spans()}
    owners = [{owner[id_] for id_ in agent.answers} for agent in agents]
    assert [len(own) for own in owners] == [1, 1]
    assert owners[0] != owners[1]


def test_a_completions_agent_is_followed_by_its_prompt(proxy: ProxyThread) -> None:
    prompts = {task: f"{task}: what is 6 times 7?\nThought:" for task in ("one", "two")}
    for _ in range(3):
        for task in prompts:
            answer = send(proxy.url, "/v1/completions", {"model": "policy", "prompt": prompts[task]})
            prompts[task] += answer.json["choices"][0]["text"] + "\nObservation: 42\nThought:"
    spans = recorded(proxy, 6)
    owners = [{span.rollout_id for span in spans[start::2]} for start in (0, 1)]
    assert [len(own) for own in owners] == [1, 1]
    assert owners[0] != owners[1]


def test_a_messages_agent_is_followed_though_its_blocks_change(proxy: ProxyThread) -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    histories: dict[str, list[dict[str, Any]]] = {
        task: [{"role": "user", "content": [{"type": "text", "text": task, **cached}]}]
        for task in ("one", "two")
    }
    tool = {"name": "multiply", "input_schema": {"type": "object"}}
    for turn in TURNS[1:3]:
        for history in histories.values():
            body = {"model": "policy", "max_tokens": 500, "messages": history, "tools": [tool]}
            answer = send(proxy.url, "/v1/messages", body, [*JSON, *turn.to_header().items()])
            content = answer.json["content"]
            if len(history) == 1:
                history[0] = {"role": "user", "content": history[0]["content"][0]["text"]}
            history.append({"role": "assistant", "content": content})
            results = [
                {"type": "tool_result", "tool_use_id": "renamed", "content": "42"}
                for block in content
                if block["type"] == "tool_use"
            ]
            for block in content:
                block.update({"id": "renamed"} if block["type"] == "tool_use" else {})
            history.append(
                {"role": "user", "content": [*results, {"type": "text", "text": "go on", **cached}]}
            )
    spans = recorded(proxy, 4)
    assert [span.wire for span in spans] == ["messages"] * 4
    owners = [{span.rollout_id for span in spans[start::2]} for start in (0, 1)]
    assert [len(own) for own in owners] == [1, 1]
    assert owners[0] != owners[1]
    assert [span.attribution_confidence for span in spans] == [0.0, 0.0, WHOLE_SURE, WHOLE_SURE]


def test_an_agents_own_ids_join_what_the_conversation_does_not(proxy: ProxyThread) -> None:
    for text in ("a title", "the work"):
        chat(proxy, [("session-id", "s-1"), ("originator", "codex_exec")],
             messages=[{"role": "user", "content": text}])  # fmt: skip
    chat(proxy, metadata={"session_id": "s-1"})
    chat(proxy, [("X-Rollout-Id", "r1"), ("session-id", "s-1")])
    spans = recorded(proxy, 4)
    assert [span.rollout_id for span in spans] == ["codex-s-1", "codex-s-1", "session-s-1", "r1"]
    assert [span.attributed_by for span in spans] == ["codex", "codex", "metadata.session_id", "header"]
    assert [span.conversation for span in spans] == [None] * 4


# -- retries --------------------------------------------------------------------------------------


def retried(count: int) -> tuple[str, str]:
    return ("x-stainless-retry-count", str(count))


def test_a_first_call_that_failed_and_its_retries_are_one_rollout(
    engine: EngineThread, proxy: ProxyThread
) -> None:
    agents = [Agent(f"task {number}") for number in range(2)]
    engine.script(Script(status=503), times=4)
    for count in range(2):
        for agent in agents:
            assert send(proxy.url, CHAT, agent.body(), [*JSON, retried(count)]).status == 503
    for agent in agents:
        agent.step(proxy.url, retried(2))
        agent.step(proxy.url, retried(0))
    spans = recorded(proxy, 8)
    owners = Counter(span.rollout_id for span in spans)
    assert sorted(owners.values()) == [4, 4]
    assert [span.retry for span in spans] == [0, 0, 1, 1, 2, 0, 2, 0]
    assert [span.attributed_by for span in spans[:6]] == ["none"] * 2 + ["retry"] * 3 + ["conversation"]


def test_a_retry_after_the_clients_own_timeout_is_of_the_same_rollout(
    engine: EngineThread, proxy: ProxyThread
) -> None:
    engine.script(Script(delay_s=600.0))
    leave_early(proxy.url, CHAT, HELLO, [*JSON, retried(0)], once=lambda: len(engine.calls) == 1)
    assert recorded(proxy)[0].error_class == "client_disconnect"
    send(proxy.url, CHAT, HELLO, [*JSON, retried(1)])
    lost, answered = recorded(proxy, 2)
    assert lost.rollout_id == answered.rollout_id
    assert (answered.retry, answered.attributed_by, answered.error_class) == (1, "retry", None)


@pytest.mark.parametrize("prefix", ["", "/rollout/r1"], ids=["unattributed", "by path"])
def test_an_answer_that_never_arrived_does_not_fork_the_trajectory(proxy: ProxyThread, prefix: str) -> None:
    first = send(proxy.url, prefix + CHAT, HELLO, [*JSON, retried(0)])
    second = send(proxy.url, prefix + CHAT, HELLO, [*JSON, retried(1)])
    assert first.json["id"] != second.json["id"]
    said = second.json["choices"][0]["message"]
    follow = {**HELLO, "messages": [*HELLO["messages"], said, {"role": "user", "content": "go on"}]}
    send(proxy.url, prefix + CHAT, follow)
    spans = recorded(proxy, 3)
    with proxy.store() as store:
        store.add_reward(value=1.0, rollout_id=spans[0].rollout_id)
        [each] = store.preview("policy", 10)
    left_out = LeftOut()
    made = transitions_of(each, Terms("policy", 10_000), left_out)
    assert [transition.span_id for transition in made] == [spans[1].span_id, spans[2].span_id]
    assert left_out.calls == {Reason.SUPERSEDED: 1}


# -- roles ------------------------------------------------------------------------------------------


def test_configured_roles_are_on_the_spans_however_the_rollout_is_told(
    engine: EngineThread, make_proxy: MakeProxy
) -> None:
    mark = fingerprint("You write.", ())
    roles: Any = [{"name": "writer", "fingerprint": mark}, {"name": "critic", "system_contains": "criticise"}]
    proxy = make_proxy(engine.base_url, roles=roles)

    def messages(system: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": system}, {"role": "user", "content": "go"}]

    chat(proxy, messages=messages("You write."))
    chat(proxy, prefix="/rollout/r1", messages=messages("You criticise."))
    chat(proxy, prefix="/rollout/r1/role/boss", messages=messages("You write."))
    chat(proxy, messages=messages("You do neither."))
    assert [span.role for span in recorded(proxy, 4)] == ["writer", "critic", "boss", None]


def test_odd_bodies_are_recorded_and_alone(engine: EngineThread, proxy: ProxyThread) -> None:
    engine.script(Script(status=400), times=3)
    for body in (b"[]", b"not json", json.dumps({**HELLO, "messages": 3}).encode()):
        send(proxy.url, CHAT, body)
    spans = recorded(proxy, 3)
    assert len({span.rollout_id for span in spans}) == 3
