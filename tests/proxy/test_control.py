"""The routes under /api/, health and metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_proxy.store import PolicyVersion, VersionStatus
from tests.conftest import MakeProxy, ProxyThread
from tests.engine import EngineThread
from tests.proxy.raw_http import HELLO, JSON, chat, recorded, send


def api(proxy: ProxyThread, path: str, body: object = None, *, method: str | None = None) -> Any:
    answer = send(proxy.url, f"/api/{path}", body, JSON, method=method)
    assert answer.status in (200, 201), answer.body
    return answer.json


def refused(
    proxy: ProxyThread, path: str, body: object = None, *, method: str | None = None
) -> tuple[int, str]:
    answer = send(proxy.url, f"/api/{path}", body, JSON, method=method)
    assert answer.status >= 400
    assert answer.json["error"].keys() == {"message", "type", "param", "code"}
    return answer.status, answer.json["error"]["message"]


def test_a_rollout_is_made_once_and_then_found(proxy: ProxyThread) -> None:
    wanted = {"rollout_id": "r1", "task_id": "t1", "metadata": {"split": "train"}}
    first = send(proxy.url, "/api/rollouts", wanted)
    again = send(proxy.url, "/api/rollouts", wanted)
    assert (first.status, again.status) == (201, 200)
    assert first.json.keys() == {"rollout_id", "attempt", "task_id", "state", "api_key", "base_url"}
    assert first.json["api_key"] != again.json["api_key"]
    shown = api(proxy, "rollouts/r1")
    assert (shown["rollout"]["task_id"], shown["rollout"]["metadata"]) == ("t1", {"split": "train"})
    assert refused(proxy, "rollouts", {"rollout_id": "r1", "task_id": "t2"})[0] == 409


def test_a_rollout_needs_no_words(proxy: ProxyThread) -> None:
    one, other = api(proxy, "rollouts", b"", method="POST"), api(proxy, "rollouts", {})
    assert one["rollout_id"] != other["rollout_id"]
    assert one["state"] == "open"


def test_a_list_of_rollouts_is_made_as_one(proxy: ProxyThread) -> None:
    made = api(proxy, "rollouts", [{"rollout_id": f"r{i}", "task_id": "t"} for i in range(3)])
    assert [rollout["rollout_id"] for rollout in made["rollouts"]] == ["r0", "r1", "r2"]
    assert refused(proxy, "rollouts", [{"rollout_id": "r9"}, {"rollout_id": "r1", "task_id": "u"}])[0] == 409
    assert refused(proxy, "rollouts/r9")[0] == 404


@pytest.mark.parametrize(
    "body",
    [
        {"rollout_id": "a/b"},
        {"rollout_id": ""},
        {"rollout_id": 7},
        {"rollout_id": "a b"},
        {"task_id": 7},
        {"task_id": "x" * 10_000},
        {"metadata": [1]},
        {"role": "a b"},
        {"role": 7},
        {"rollout": "r1"},
        "r1",
        [7],
        b"{",
    ],
)
def test_a_rollout_that_makes_no_sense_is_a_400(proxy: ProxyThread, body: object) -> None:
    assert refused(proxy, "rollouts", body, method="POST")[0] == 400
    assert api(proxy, "rollouts") == {"rollouts": []}


def test_a_rollout_ends_once(proxy: ProxyThread) -> None:
    api(proxy, "rollouts", {"rollout_id": "r1"})
    for _ in range(2):
        ended = api(proxy, "rollouts/r1", {"state": "failed", "reason": "bored"}, method="PATCH")
        assert (ended["state"], ended["reason"]) == ("failed", "bored")
    assert refused(proxy, "rollouts/r1", {"state": "succeeded"}, method="PATCH")[0] == 409


@pytest.mark.parametrize(
    "body", [{}, {"state": "done"}, {"state": 7}, {"state": "open"}, {"state": "failed", "x": 1}, []]
)
def test_an_end_that_is_none_is_a_400(proxy: ProxyThread, body: object) -> None:
    api(proxy, "rollouts", {"rollout_id": "r1"})
    assert refused(proxy, "rollouts/r1", body, method="PATCH")[0] == 400


def test_rollouts_are_listed_newest_first_and_by_state_and_task(proxy: ProxyThread) -> None:
    for i in range(3):
        api(proxy, "rollouts", {"rollout_id": f"r{i}", "task_id": f"t{i % 2}"})
    api(proxy, "rollouts/r0", {"state": "succeeded"}, method="PATCH")

    def listed(query: str) -> list[str]:
        return [one["rollout"]["rollout_id"] for one in api(proxy, f"rollouts{query}")["rollouts"]]

    assert listed("") == ["r2", "r1", "r0"]
    assert listed("?state=open") == ["r2", "r1"]
    assert listed("?task_id=t0") == ["r2", "r0"]
    assert listed("?limit=1") == ["r2"]


@pytest.mark.parametrize(
    "query", ["?state=done", "?limit=0", "?limit=x", "?limit=-1", "?limit=100000", "?limit=" + "9" * 30]
)
def test_a_question_that_makes_no_sense_is_a_400(proxy: ProxyThread, query: str) -> None:
    assert refused(proxy, f"rollouts{query}")[0] == 400


def test_a_rollout_is_shown_with_heads_of_spans_and_its_rewards(proxy: ProxyThread) -> None:
    chat(proxy, prefix="/rollout/r1")
    span = recorded(proxy)[0]
    send(proxy.url, "/reward", {"value": 1, "span_id": span.span_id})
    shown = api(proxy, "rollouts/r1")
    (head,) = shown["spans"]
    assert (head["span_id"], head["fidelity"], head["policy_version"]) == (span.span_id, "exact", 0)
    assert not {"request", "response", "generations"} & head.keys()
    assert [reward["value"] for reward in shown["rewards"]] == [1.0]
    summary = api(proxy, "rollouts")["rollouts"][0]
    assert (summary["spans"], summary["errors"], summary["reward"]) == (1, 0, 1.0)


def test_a_span_is_shown_whole(engine: EngineThread, proxy: ProxyThread) -> None:
    answer = chat(proxy).json
    shown = api(proxy, f"spans/{recorded(proxy)[0].span_id}")
    assert (shown["request"], shown["response"]) == (HELLO, answer)
    expected = engine.model.generate(HELLO)
    assert shown["generations"][0]["prompt_token_ids"] == list(expected.prompt_token_ids)
    assert shown["generations"][0]["response_token_ids"] == expected.choices[0].token_ids


def test_spans_are_listed_newest_first_page_by_page(proxy: ProxyThread) -> None:
    for i in range(3):
        chat(proxy, prefix=f"/rollout/r{i % 2}")
    ids = [span.span_id for span in recorded(proxy, 3)][::-1]

    def listed(query: str) -> list[int]:
        return [span["span_id"] for span in api(proxy, f"spans{query}")["spans"]]

    assert listed("") == ids
    assert listed("?rollout_id=r0") == [ids[0], ids[2]]
    assert listed("?limit=2") == ids[:2]
    assert listed(f"?before={ids[1]}") == ids[2:]
    assert refused(proxy, "spans?before=x")[0] == 400


@pytest.mark.parametrize(
    "path", ["rollouts/nobody", "spans/99", "nothing", "policies/policy/versions/7/promote"]
)
def test_what_is_not_there_is_a_404(proxy: ProxyThread, path: str) -> None:
    method = "POST" if path.endswith("promote") else "GET"
    status, message = refused(proxy, path, method=method)
    assert status == 404
    assert message


@pytest.mark.parametrize("path", ["spans/x", "spans/-1", "policies/policy/versions/x/promote"])
def test_an_id_that_is_no_number_is_a_400(proxy: ProxyThread, path: str) -> None:
    assert refused(proxy, path, method="POST" if path.endswith("promote") else "GET")[0] == 400


def test_a_method_that_a_route_does_not_have_stays_with_us(engine: EngineThread, proxy: ProxyThread) -> None:
    for method, path in (("DELETE", "rollouts/r1"), ("PUT", "spans/1"), ("GET", "")):
        assert refused(proxy, path, method=method)[0] == 404
    assert engine.requests == []


def test_policies_are_listed_with_their_versions(
    engine: EngineThread, make_proxy: MakeProxy, tmp_path: Path
) -> None:
    proxy = make_proxy(engine.base_url, policy={"model": tmp_path})
    with proxy.store() as store:
        run = store.begin_run("policy", owner="test", lease_s=60)
        version = PolicyVersion("policy", 1, str(tmp_path), VersionStatus.STAGED, parent=0)
        store.commit_run(run.run_id, report={"loss": 0.5}, version=version)
    (policy,) = api(proxy, "policies")["policies"]
    assert (policy["policy"], policy["active"]) == ("policy", 0)
    assert [(v["version"], v["status"]) for v in policy["versions"]] == [(1, "staged"), (0, "active")]
    (listed,) = api(proxy, "runs")["runs"]
    assert (listed["run_id"], listed["state"], listed["report"]) == (run.run_id, "committed", {"loss": 0.5})


def test_versions_are_compared(proxy: ProxyThread) -> None:
    for number in range(4):
        chat(proxy, prefix=f"/rollout/r{number}")
        send(proxy.url, "/reward", {"rollout_id": f"r{number}", "thumb": "up" if number else "down"})
    recorded(proxy, 4)
    found = api(proxy, "policies/policy/comparison?against=first&since=1h&reward=thumb")
    (version,) = found["versions"]
    assert (version["version"], version["rollouts"], version["rewarded"], version["share"]) == (0, 4, 4, 1.0)
    assert (version["mean"]["value"], version["mean"]["method"]) == (0.5, "wilson")
    assert -1 < version["mean"]["low"] < 0.5 < version["mean"]["high"] < 1
    assert (found["mixed"]["rollouts"], found["unknown"]["rollouts"], found["faulty"]) == (0, 0, 0)
    send(proxy.url, "/reward", {"rollout_id": "r0", "thumb": "up"})
    assert api(proxy, "policies/policy/comparison")["versions"][0]["mean"]["value"] == 1.0
    assert refused(proxy, "policies/nobody/comparison")[0] == 404
    for query in ("against=second", "since=yesterday"):
        assert refused(proxy, f"policies/policy/comparison?{query}")[0] == 400


def test_stats_count_everything(proxy: ProxyThread) -> None:
    chat(proxy, prefix="/rollout/r1")
    send(proxy.url, "/reward", {"value": 1, "rollout_id": "r1"})
    stats = api(proxy, "stats")
    expected = {
        "rollouts": 1,
        "spans": 1,
        "spans_exact": 1,
        "rewards": 1,
        "policy": "policy",
        "held_calls": 0,
    }
    assert {name: stats[name] for name in expected} == expected


def test_health_readiness_and_metrics_answer(proxy: ProxyThread) -> None:
    assert send(proxy.url, "/healthz").json == {"status": "ok"}
    assert send(proxy.url, "/readyz").json == {"ready": True, "waits_for": []}
    metrics = send(proxy.url, "/metrics")
    assert (metrics.header("content-type") or "").startswith("text/plain; version=0.0.4")
    assert b"lightning_calls_total" in metrics.body


def test_a_proxy_is_not_ready_before_an_engine_that_does_not_answer(make_proxy: MakeProxy) -> None:
    proxy = make_proxy("http://127.0.0.1:9/v1")
    answer = send(proxy.url, "/readyz")
    assert answer.status == 503
    assert "engine" in answer.json["waits_for"][0]


@pytest.mark.parametrize("levels", [101, 253, 900])
def test_what_is_nested_too_deeply_to_be_answered_again_is_refused(proxy: ProxyThread, levels: int) -> None:
    def nested(depth: int) -> bytes:
        return b'{"rollout_id":"r","metadata":' + b'{"a":' * (depth - 1) + b"1" + b"}" * depth

    assert refused(proxy, "rollouts", nested(levels)) == (
        400,
        "the body is nested too deeply: 100 levels are possible",
    )
    api(proxy, "rollouts", nested(100))
    assert len(api(proxy, "rollouts")["rollouts"]) == 1


def test_a_reason_that_is_no_text_is_refused(proxy: ProxyThread) -> None:
    api(proxy, "rollouts", {"rollout_id": "r"})
    status, said = refused(proxy, "rollouts/r", {"state": "failed", "reason": {"a": 1}}, method="PATCH")
    assert (status, said) == (400, "reason is {'a': 1}: a text is needed")
