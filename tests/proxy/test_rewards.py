"""POST /reward: durable, all or nothing, and clear about what it refuses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from lightning_proxy.store import Reward, Store
from tests.conftest import MakeProxy, ProxyThread
from tests.proxy.raw_http import JSON, Answer, chat, recorded, send


@pytest.fixture
def store(proxy: ProxyThread) -> Iterator[Store]:
    """The ledger, read beside the proxy."""
    with proxy.store() as opened:
        opened.create_rollout(rollout_id="r1")
        yield opened


def post(proxy: ProxyThread, reward: Any) -> Answer:
    return send(proxy.url, "/reward", reward, JSON)


def refusal(answer: Answer, status: int = 400) -> str:
    assert answer.status == status, answer.body
    error = answer.json["error"]
    assert error["code"] == {400: "invalid_input", 404: "not_found"}[status]
    return str(error["message"])


def test_a_reward_is_there_when_it_is_acknowledged(proxy: ProxyThread, store: Store) -> None:
    given = {
        "value": 0.5,
        "rollout_id": "r1",
        "attempt": 1,
        "name": "style",
        "source": "judge",
        "comment": "é",
    }
    answer = post(proxy, given)
    (reward,) = store.list_rewards("r1")
    assert answer.status == 201
    assert answer.json == {
        "reward_id": reward.reward_id,
        "rollout_id": "r1",
        "span_id": None,
        "created": True,
    }
    assert {name: getattr(reward, name) for name in given} == given


@pytest.mark.parametrize("value", [1, 0, -2, 1.5, 1e300, 2**60])
def test_every_finite_number_is_a_value(proxy: ProxyThread, store: Store, value: float) -> None:
    assert post(proxy, {"value": value, "rollout_id": "r1"}).status == 201
    assert [reward.value for reward in store.list_rewards("r1")] == [float(value)]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_reward_finds_its_span_by_the_id_that_the_agent_saw(
    proxy: ProxyThread, store: Store, streamed: bool
) -> None:
    answer = chat(proxy, prefix="/rollout/r2", stream=streamed)
    response_id = (answer.events[0] if streamed else answer.json)["id"]
    given = post(proxy, {"value": 1, "response_id": response_id})
    span = recorded(proxy)[0]
    assert (given.json["rollout_id"], given.json["span_id"]) == ("r2", span.span_id)
    assert [reward.span_id for reward in store.list_rewards("r2")] == [span.span_id]
    assert post(proxy, {"value": 2, "span_id": span.span_id}).json["rollout_id"] == "r2"


def test_the_same_idempotency_key_gets_the_first_answer(proxy: ProxyThread, store: Store) -> None:
    first = post(proxy, {"value": 1, "rollout_id": "r1", "idempotency_key": "k"})
    again = post(proxy, {"value": 9, "rollout_id": "r1", "idempotency_key": "k"})
    assert (first.status, again.status) == (201, 200)
    assert again.json == {**first.json, "created": False}
    assert [reward.value for reward in store.list_rewards("r1")] == [1.0]


def test_a_list_is_taken_as_one(proxy: ProxyThread, store: Store) -> None:
    answer = post(proxy, [{"value": i, "rollout_id": "r1", "name": f"n{i}"} for i in range(3)])
    assert answer.status == 200
    assert [reward["created"] for reward in answer.json["rewards"]] == [True] * 3
    assert [reward.value for reward in store.list_rewards("r1")] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "bad",
    [
        {"value": 1, "rollout_id": "nobody"},
        {"value": "1", "rollout_id": "r1"},
        {"rollout_id": "r1"},
        {"value": 1, "rollout_id": "r1", "worth": 2},
        7,
    ],
)
def test_a_list_with_one_bad_entry_changes_nothing(proxy: ProxyThread, store: Store, bad: object) -> None:
    good = {"value": 1, "rollout_id": "r1"}
    answer = post(proxy, [good, bad, good])
    assert answer.status in (400, 404)
    assert store.list_rewards("r1") == []


def test_an_empty_list_is_nothing(proxy: ProxyThread) -> None:
    assert post(proxy, []).json == {"rewards": []}


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"rollout_id": "nobody"}, "nobody"),
        ({"response_id": "chatcmpl-0"}, "chatcmpl-0"),
        ({"span_id": 999}, "999"),
        ({"rollout_id": "r1", "attempt": 7}, "attempt 7"),
    ],
)
def test_an_unknown_target_is_a_404_that_says_what_was_looked_for(
    proxy: ProxyThread, store: Store, target: dict[str, Any], said: str
) -> None:
    assert said in refusal(post(proxy, {"value": 1, **target}), 404)


@pytest.mark.parametrize(
    "value", ["true", "null", '"1"', "[1]", "{}", "NaN", "Infinity", "-Infinity", "1e400"]
)
def test_what_is_no_finite_number_is_refused(proxy: ProxyThread, store: Store, value: str) -> None:
    refusal(post(proxy, b'{"rollout_id": "r1", "value": %b}' % value.encode()))
    assert store.list_rewards("r1") == []


@pytest.mark.parametrize(
    "reward",
    [
        {"value": 1},
        {"value": 1, "rollout_id": "r1", "span_id": 1},
        {"value": 1, "rollout_id": 5},
        {"value": 1, "span_id": "1"},
        {"value": 1, "span_id": True},
        {"value": 1, "span_id": 2**70},
        {"value": 1, "rollout_id": "r1", "attempt": 0},
        {"value": 1, "rollout_id": "r1", "attempt": 1.5},
        {"value": 1, "rollout_id": "r1", "name": ""},
        {"value": 1, "rollout_id": "r1", "comment": 7},
        {"value": 1, "rollout_id": "r1", "idempotency_key": 7},
        {"value": 1, "rollout_id": "r1", "rewards": 7},
        "reward",
        7,
        None,
    ],
)
def test_a_reward_that_makes_no_sense_is_a_400(proxy: ProxyThread, store: Store, reward: Any) -> None:
    assert refusal(post(proxy, b"null" if reward is None else reward))
    assert store.list_rewards("r1") == []


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"value=1"])
def test_what_is_no_json_is_a_400(proxy: ProxyThread, body: bytes) -> None:
    assert "JSON" in refusal(post(proxy, body))


def test_a_corrected_reward_is_one_entry_more_and_the_last_one_counts(
    proxy: ProxyThread, store: Store
) -> None:
    for value in (0.0, 1.0):
        post(proxy, {"value": value, "rollout_id": "r1"})

    def values(rewards: list[Reward] | tuple[Reward, ...]) -> list[float | None]:
        return [reward.value for reward in rewards]

    assert values(store.list_rewards("r1")) == [0.0, 1.0]
    assert values(store.counting_rewards("r1")) == [1.0]


@pytest.mark.parametrize(("thumb", "value"), [("up", 1.0), ("down", -1.0)])
def test_a_thumb_is_a_reward_of_that_name(proxy: ProxyThread, store: Store, thumb: str, value: float) -> None:
    response_id = chat(proxy, prefix="/rollout/r2").json["id"]
    assert post(proxy, {"thumb": thumb, "response_id": response_id}).status == 201
    (reward,) = store.list_rewards("r2")
    assert (reward.name, reward.value) == ("thumb", value)
    assert post(proxy, {"thumb": thumb, "rollout_id": "r1", "name": "usefulness"}).status == 201
    assert [reward.name for reward in store.list_rewards("r1")] == ["usefulness"]


@pytest.mark.parametrize("thumb", [{"thumb": "sideways"}, {"thumb": True}, {"thumb": "up", "value": 1}])
def test_a_thumb_is_up_or_down_and_stands_alone(proxy: ProxyThread, thumb: dict[str, Any]) -> None:
    assert "thumb" in refusal(post(proxy, {"rollout_id": "r1", **thumb}))


def test_a_boolean_is_refused_with_what_would_be_right(proxy: ProxyThread, store: Store) -> None:
    assert "send thumb: up or down" in refusal(post(proxy, {"value": True, "rollout_id": "r1"}))


@pytest.mark.parametrize(
    "demonstration", ["The answer is 42.", {"role": "assistant", "content": "The answer is 42."}]
)
def test_a_demonstration_is_kept_with_or_without_a_value_and_shown(
    proxy: ProxyThread, store: Store, demonstration: Any
) -> None:
    given = {"rollout_id": "r1", "demonstration": demonstration}
    assert post(proxy, {**given, "value": 0}).status == post(proxy, given).status == 201
    assert [reward.demonstration for reward in store.list_rewards("r1")] == [demonstration] * 2
    assert [reward.value for reward in store.counting_rewards("r1")] == [0.0]
    shown = send(proxy.url, "/api/rollouts/r1").json["rewards"]
    assert [(entry["value"], entry["demonstration"]) for entry in shown] == [
        (0.0, demonstration),
        (None, demonstration),
    ]


@pytest.mark.parametrize("demonstration", [7, ["a"], {"content": "without a role"}, {"role": 7}])
def test_a_demonstration_is_a_text_or_a_message(proxy: ProxyThread, store: Store, demonstration: Any) -> None:
    assert "message" in refusal(post(proxy, {"rollout_id": "r1", "demonstration": demonstration}))


def test_a_comment_may_stand_alone_and_gives_no_return(proxy: ProxyThread, store: Store) -> None:
    assert post(proxy, {"rollout_id": "r1", "comment": "odd"}).status == 201
    assert store.counting_rewards("r1") == ()
    assert store.list_rollouts()[0].reward is None


def test_ten_thousand_rewards_are_taken_at_once(proxy: ProxyThread, store: Store) -> None:
    many = [
        {"value": i, "rollout_id": "r1", "name": f"n{i}", "idempotency_key": f"k{i}"} for i in range(10_000)
    ]
    begun = time.process_time()
    assert all(reward["created"] for reward in post(proxy, many).json["rewards"])
    assert time.process_time() - begun < 5  # of CPU, with what the client takes: about 0.4 s
    assert store.stats()["rewards"] == 10_000
    assert not any(reward["created"] for reward in post(proxy, many).json["rewards"])
    assert "20000 at a time" in refusal(post(proxy, many * 3))


def test_what_is_wrong_in_a_list_is_said_with_its_place(proxy: ProxyThread, store: Store) -> None:
    good = {"value": 1, "rollout_id": "r1"}
    assert "rewards[1]: no rollout 'r9'" in refusal(post(proxy, [good, {**good, "rollout_id": "r9"}]), 404)
    assert "rewards[2] lacks 'value'" in refusal(post(proxy, [good, good, {"rollout_id": "r1"}]))


def test_a_rollouts_return_is_shown_by_weight_and_direction(make_proxy: MakeProxy, engine: Any) -> None:
    rules = [{"name": "latency", "direction": "minimize"}, {"name": "style", "weight": 2.0}]
    proxy = make_proxy(engine.base_url, rewards=rules)
    send(proxy.url, "/api/rollouts", {"rollout_id": "r1"}, JSON)
    post(proxy, [{"value": 0.5, "rollout_id": "r1", "name": name} for name in ("latency", "style", "reward")])
    assert send(proxy.url, "/api/rollouts").json["rollouts"][0]["reward"] == 1.0


def test_rewards_never_reach_the_engine(proxy: ProxyThread, engine: Any) -> None:
    post(proxy, {"value": 1, "rollout_id": "r1"})
    assert send(proxy.url, "/reward", None).status == 404
    assert engine.requests == []
