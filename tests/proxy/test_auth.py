"""Who may do what, and which keys travel."""

from __future__ import annotations

import pytest

from lightning_proxy.errors import StoreUnavailable
from lightning_proxy.store import Store
from tests.conftest import MakeProxy, ProxyThread, wait_until
from tests.engine import EngineThread
from tests.proxy.raw_http import CHAT, HELLO, JSON, Headers, chat, recorded, send

TOKEN = "the-token"
SHORT = {**HELLO, "max_tokens": 9}  # a request of Chat Completions and of Messages alike
BEARER = [("Authorization", f"Bearer {TOKEN}")]


@pytest.fixture
def guarded(make_proxy: MakeProxy, engine: EngineThread) -> ProxyThread:
    """A proxy with a token."""
    return make_proxy(engine.base_url, proxy={"token": TOKEN})


def keys_seen(engine: EngineThread) -> list[tuple[str, str]]:
    """All keys that ever reached the engine, in whatever request."""
    names = ("authorization", "x-api-key", "proxy-authorization")
    return [pair for request in engine.requests for pair in request.headers if pair[0] in names]


OURS = [
    ("POST", "/reward"),
    ("POST", "/api/rollouts"),
    ("GET", "/api/rollouts"),
    ("GET", "/api/spans"),
    ("GET", "/api/policies"),
    ("POST", "/api/policies/policy/versions/1/promote"),
    ("POST", "/api/policies/policy/rollback"),
    ("GET", "/api/runs"),
    ("GET", "/api/stats"),
    ("GET", "/metrics"),
]
WRONG: list[Headers] = [
    [],
    [("Authorization", "Bearer wrong")],
    [("Authorization", "Bearer ")],
    [("Authorization", "Bearer \xff\xfe")],
    [("Authorization", f"Basic {TOKEN}")],
    [("Authorization", TOKEN)],
    [("x-api-key", TOKEN + "x")],
    [("Authorization", "Bearer lp-00000000000000000000000000000000")],
]


@pytest.mark.parametrize("headers", WRONG, ids=str)
def test_without_the_token_nothing_is_open(
    engine: EngineThread, guarded: ProxyThread, headers: Headers
) -> None:
    for method, path in [*OURS, ("POST", CHAT), ("GET", "/v1/models"), ("GET", "/rollout/r1/v1/models")]:
        answer = send(
            guarded.url, path, HELLO if method == "POST" else None, [*JSON, *headers], method=method
        )
        assert (answer.status, answer.json["error"]["code"]) == (401, "invalid_api_key"), path
        assert TOKEN not in answer.body.decode()
    assert engine.requests == []


def test_health_is_open_to_everybody(guarded: ProxyThread) -> None:
    assert send(guarded.url, "/healthz").status == send(guarded.url, "/readyz").status == 200
    assert send(guarded.url, "/healthz", method="HEAD").status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "OPTIONS"])
@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/%68ealthz"])
def test_what_only_looks_like_a_question_for_health_goes_nowhere(
    engine: EngineThread, make_proxy: MakeProxy, method: str, path: str
) -> None:
    guarded = make_proxy(engine.base_url, proxy={"token": TOKEN, "upstream_api_key": "sk-up"})
    assert send(guarded.url, path, None, method=method).status == 401
    assert engine.requests == []


@pytest.mark.parametrize("headers", [BEARER, [("x-api-key", TOKEN)]], ids=str)
def test_the_token_opens_everything(engine: EngineThread, guarded: ProxyThread, headers: Headers) -> None:
    for path in ("/api/rollouts", "/api/stats", "/metrics", "/v1/models"):
        assert send(guarded.url, path, None, headers).status == 200
    assert chat(guarded, headers).status == 200


def test_a_rollouts_key_opens_model_calls_and_nothing_else(
    engine: EngineThread, guarded: ProxyThread
) -> None:
    key = send(guarded.url, "/api/rollouts", {"rollout_id": "r1"}, [*JSON, *BEARER]).json["api_key"]
    headers = [("Authorization", f"Bearer {key}")]
    assert chat(guarded, headers).status == send(guarded.url, "/v1/models", None, headers).status == 200
    assert recorded(guarded)[0].rollout_id == "r1"
    for method, path in OURS:
        answer = send(guarded.url, path, None, headers, method=method)
        assert (answer.status, answer.json["error"]["code"]) == (403, "not_for_a_rollouts_key")


ADMINISTRATION = [
    "/pause?mode=keep",
    "/resume",
    "/collective_rpc",
    "/sleep",
    "/wake_up",
    "/reset_prefix_cache",
    "/abort_requests",
    "/update_weights",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/%6coad_lora_adapter",
    "/v1/%256coad_lora_adapter",
    "//pause",
    "/v1//load_lora_adapter/",
    "/v1/../pause",
    "/v1/%2e%2e/pause",
    "/v1/models/..%2f..%2fpause",
    "/rollout/r1/v1/load_lora_adapter",
    "/v1/pause",  # where the upstream's base URL is without its /v1
]


@pytest.mark.parametrize("path", ADMINISTRATION)
@pytest.mark.parametrize("token", [TOKEN, None])
def test_a_rollouts_key_does_not_administer_the_engine(
    engine: EngineThread, make_proxy: MakeProxy, token: str | None, path: str
) -> None:
    proxy = make_proxy(engine.base_url, proxy={"token": token} if token else {})
    key = send(proxy.url, "/api/rollouts", {"rollout_id": "r1"}, [*JSON, *BEARER]).json["api_key"]
    answer = send(proxy.url, path, {}, [*JSON, ("Authorization", f"Bearer {key}")])
    assert (answer.status, answer.json["error"]["code"]) == (403, "not_for_a_rollouts_key")
    assert engine.requests == []


@pytest.mark.parametrize("path", ["/tokenize", "/server_info", "/v2/x", "/rollout/r1/tokenize", "/%2576%31"])
def test_with_a_token_a_rollouts_key_reaches_nothing_beside_v1(
    engine: EngineThread, guarded: ProxyThread, path: str
) -> None:
    key = send(guarded.url, "/api/rollouts", {"rollout_id": "r1"}, [*JSON, *BEARER]).json["api_key"]
    headers = [*JSON, ("x-api-key", key)]
    assert send(guarded.url, path, {}, headers).status == 403
    assert engine.requests == []
    assert send(guarded.url, "/rollout/r1", None, headers, method="HEAD").status == 200, "a look at the root"


@pytest.mark.parametrize("headers", [[], [("Authorization", "Bearer EMPTY")]], ids=str)
def test_without_a_token_an_operators_tools_reach_the_whole_engine(
    engine: EngineThread, proxy: ProxyThread, headers: Headers
) -> None:
    for path in ("/pause?mode=keep", "/resume"):
        here, there = (send(url, path, {}, [*JSON, *headers]) for url in (proxy.url, engine.url))
        assert here.end_to_end == there.end_to_end
        assert here.status == 200


def test_the_token_administers_the_engine(engine: EngineThread, guarded: ProxyThread) -> None:
    assert send(guarded.url, "/pause?mode=keep", {}, [*JSON, *BEARER]).status == 200
    assert engine.requests[-1].path == "/pause"


def test_a_rollouts_key_rewards_that_rollout_and_no_other_where_that_is_allowed(
    make_proxy: MakeProxy, engine: EngineThread
) -> None:
    guarded = make_proxy(engine.base_url, proxy={"token": TOKEN, "rollout_keys_reward": True})
    key, _ = (
        send(guarded.url, "/api/rollouts", {"rollout_id": name}, [*JSON, *BEARER]).json["api_key"]
        for name in ("mine", "theirs")
    )
    headers = [*JSON, ("Authorization", f"Bearer {key}")]
    mine, theirs = ({"rollout_id": name, "value": 1} for name in ("mine", "theirs"))
    response_id = chat(guarded, headers[len(JSON) :]).json["id"]
    for good in (mine, [mine, mine], {"response_id": response_id, "value": 1}):
        assert send(guarded.url, "/reward", good, headers).status < 300
    for bad in (theirs, [mine, theirs], [theirs]):
        assert send(guarded.url, "/reward", bad, headers).status == 404
    assert send(guarded.url, "/reward", theirs, [*JSON, *BEARER]).status == 201
    with guarded.store() as store:
        assert (len(store.list_rewards("mine")), len(store.list_rewards("theirs"))) == (4, 1)
    for method, path in OURS[1:]:
        assert send(guarded.url, path, None, headers, method=method).status == 403
    wrong = [("Authorization", "Bearer lp-00000000000000000000000000000000")]
    assert send(guarded.url, "/reward", mine, [*JSON, *wrong]).status == 401


@pytest.mark.parametrize("token", [TOKEN, None])
@pytest.mark.parametrize(
    ("prefix", "headers"),
    [
        ("/rollout/theirs", []),
        ("/sessions/theirs", []),
        ("/rollout/theirs/attempt/2/role/writer", []),
        ("", [("X-Rollout-Id", "theirs")]),
        ("", [("baggage", "rollout_id=theirs")]),
    ],
    ids=str,
)
def test_a_rollouts_key_records_nothing_into_another_rollout(
    engine: EngineThread, make_proxy: MakeProxy, token: str | None, prefix: str, headers: Headers
) -> None:
    proxy = make_proxy(engine.base_url, proxy={"token": token} if token else {})
    key, _ = (
        send(proxy.url, "/api/rollouts", {"rollout_id": name}, [*JSON, *BEARER]).json["api_key"]
        for name in ("mine", "theirs")
    )
    sent = [*headers, ("Authorization", f"Bearer {key}")]
    for path in (CHAT, "/v1/embeddings", "/v1/responses/input_tokens"):
        answer = send(proxy.url, prefix + path, SHORT, [*JSON, *sent])
        assert (answer.status, answer.json["error"]["code"]) == (403, "key_of_another_rollout")
        assert "'mine'" in answer.json["error"]["message"]
    assert engine.requests == []
    mine = prefix.replace("theirs", "mine")
    same = [(name, value.replace("theirs", "mine")) for name, value in sent]
    assert chat(proxy, same, mine).status == 200
    assert [span.rollout_id for span in recorded(proxy)] == ["mine"]


@pytest.mark.parametrize("name", ["X-Session-Id", "baggage"])
def test_a_session_that_an_agent_names_by_itself_is_its_rollouts(guarded: ProxyThread, name: str) -> None:
    key = send(guarded.url, "/api/rollouts", {"rollout_id": "mine"}, [*JSON, *BEARER]).json["api_key"]
    session = (name, "session.id=ses_1" if name == "baggage" else "ses_1")
    assert chat(guarded, [session, ("Authorization", f"Bearer {key}")]).status == 200
    [span] = recorded(guarded)
    assert (span.rollout_id, span.attributed_by) == ("mine", "key")


def away(store: Store, key: str) -> None:
    raise StoreUnavailable("disk I/O error")


def test_a_good_key_that_cannot_be_looked_up_is_not_called_a_bad_one(
    engine: EngineThread, make_proxy: MakeProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = (make_proxy(engine.base_url, proxy={"token": TOKEN}) for _ in range(2))
    key = send(first.url, "/api/rollouts", {"rollout_id": "r1"}, [*JSON, *BEARER]).json["api_key"]
    headers = [("Authorization", f"Bearer {key}")]
    with monkeypatch.context() as trouble:
        trouble.setattr(Store, "owner_of_key", away)
        for path in (CHAT, "/v1/models", "/pause", "/reward"):
            answer = send(again.url, path, SHORT, [*JSON, *headers])
            assert (answer.status, answer.json["error"]["code"]) == (503, "store_unavailable")
            assert answer.header("retry-after") == "1"
        assert chat(again, BEARER).status == 200, "the token is not looked up"
    assert chat(again, headers).status == 200


def test_without_a_token_a_key_that_cannot_be_looked_up_costs_the_record_and_not_the_call(
    engine: EngineThread, make_proxy: MakeProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = (make_proxy(engine.base_url) for _ in range(2))
    key = send(first.url, "/api/rollouts", {"rollout_id": "r1"}).json["api_key"]
    headers = [("Authorization", f"Bearer {key}")]
    monkeypatch.setattr(Store, "owner_of_key", away)
    assert chat(again, headers).status == chat(again, headers, "/rollout/r1").status == 200
    alone, by_path = recorded(again, 2)
    assert (alone.attributed_by, by_path.rollout_id) == ("none", "r1")
    with again.store() as store:
        wait_until(lambda: store.get_rollout(alone.rollout_id).incomplete is not None)
        assert "key of a call could not be looked up" in (
            store.get_rollout(alone.rollout_id).incomplete or ""
        )
        assert store.get_rollout("r1").incomplete is None


@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings", "/v1/messages"])
def test_neither_the_token_nor_a_rollouts_key_ever_reaches_the_engine(
    engine: EngineThread, guarded: ProxyThread, path: str
) -> None:
    key = send(guarded.url, "/api/rollouts", {}, [*JSON, *BEARER]).json["api_key"]
    for secret in (TOKEN, key):
        for headers in (
            [("Authorization", f"Bearer {secret}")],
            [("x-api-key", secret)],
            [("Authorization", f"Bearer {secret}"), ("x-api-key", secret)],
        ):
            assert send(guarded.url, path, SHORT, [*JSON, *headers]).status == 200
    assert keys_seen(engine) == []


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
def test_a_key_of_ours_is_taken_out_beside_a_key_of_the_engines(
    engine: EngineThread, guarded: ProxyThread, path: str
) -> None:
    """Claude Code, for one, may send both headers."""
    key = send(guarded.url, "/api/rollouts", {"rollout_id": "r1"}, [*JSON, *BEARER]).json["api_key"]
    for secret in (TOKEN, key):
        both = [("Authorization", "Bearer sk-theirs"), ("x-api-key", secret)]
        assert send(guarded.url, path, SHORT, [*JSON, *both]).status == 200
        both = [("Authorization", f"Bearer {secret}"), ("x-api-key", "sk-theirs")]
        assert send(guarded.url, path, SHORT, [*JSON, *both]).status == 200
    assert {value for _, value in keys_seen(engine)} == {"Bearer sk-theirs", "sk-theirs"}
    assert [span.rollout_id for span in recorded(guarded, 4)[2:]] == ["r1", "r1"]


def test_without_a_token_the_agents_own_key_goes_to_the_engine(
    engine: EngineThread, proxy: ProxyThread
) -> None:
    chat(proxy, [("Authorization", "Bearer sk-agent"), ("x-api-key", "sk-other")])
    assert {("authorization", "Bearer sk-agent"), ("x-api-key", "sk-other")} == set(keys_seen(engine))


@pytest.mark.parametrize(
    "headers", [[], BEARER, [("x-api-key", "sk-agent")], [("Authorization", "Basic x")]], ids=str
)
@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
def test_the_upstreams_own_key_takes_the_place_of_the_agents(
    engine: EngineThread, make_proxy: MakeProxy, headers: Headers, path: str
) -> None:
    proxy = make_proxy(engine.base_url, proxy={"upstream_api_key": "sk-up"})
    assert send(proxy.url, path, SHORT, [*JSON, *headers]).status == 200
    keys = set(keys_seen(engine))
    assert ("authorization", "Bearer sk-up") in keys
    assert {value.removeprefix("Bearer ") for _, value in keys} == {"sk-up"}
