"""Several upstreams: which calls go where, with which key, and how they are recorded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_proxy.config import UpstreamSettings
from lightning_proxy.errors import ConfigError
from lightning_proxy.proxy.upstreams import endpoint_of
from lightning_proxy.store import Fidelity
from tests.conftest import MakeProxy
from tests.engine import EngineThread, FakeEngine, Script
from tests.proxy.raw_http import CHAT, CUT, HELLO, Answer, chat, recorded, send

# pydantic's remarks on litellm's types are not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore:.*ReadOnly. qualifier:UserWarning")

MakeEngine = Callable[[FakeEngine], EngineThread]


@pytest.fixture
def other(make_engine: MakeEngine) -> EngineThread:
    """A hosted provider that speaks the OpenAI API, and refuses what it does not know."""
    return make_engine(FakeEngine(name="gpt-9", owner="openai", refuse_token_ids=True))


def test_a_model_goes_to_the_upstream_that_names_it_and_the_rest_to_the_main_one(
    make_proxy: MakeProxy, engine: EngineThread, other: EngineThread
) -> None:
    proxy = make_proxy(engine.base_url, upstreams=[{"models": ("gpt-*",), "url": other.base_url}])
    ours = chat(proxy)
    theirs = chat(proxy, model="gpt-9", stream=True)
    assert (ours.status, theirs.status) == (200, 200)
    assert (len(engine.calls), len(other.calls)) == (1, 1)
    main, hosted = recorded(proxy, 2)
    assert (main.policy, main.policy_version, main.fidelity) == ("policy", 0, Fidelity.EXACT)
    assert (hosted.policy, hosted.policy_version, hosted.fidelity) == (None, None, Fidelity.TEXT)
    assert b"return_token_ids" not in other.calls[0].body


def test_the_first_upstream_that_fits_takes_the_call(
    make_proxy: MakeProxy, engine: EngineThread, other: EngineThread
) -> None:
    proxy = make_proxy(
        engine.base_url,
        upstreams=[
            {"models": ("gpt-9",), "url": other.base_url},
            {"models": ("*",), "url": "http://127.0.0.1:9/v1"},
        ],
    )
    assert chat(proxy, model="gpt-9").status == 200
    assert chat(proxy, model="policy").status == 502


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/anything/else"])
def test_a_call_that_is_not_captured_goes_by_its_model_too(
    make_proxy: MakeProxy, engine: EngineThread, other: EngineThread, path: str
) -> None:
    proxy = make_proxy(engine.base_url, upstreams=[{"models": ("text-*",), "url": other.base_url}])
    raw = json.dumps({"model": "text-embedding-3", "input": "x"}).encode()
    assert send(proxy.url, path, raw).body == raw  # the fake engine's echo
    assert [request.body for request in other.requests] == [raw]
    assert send(proxy.url, path, b'{"model":"mine"}').status == 200
    assert send(proxy.url, path, b"no json").status == 200
    assert [request.body for request in engine.requests] == [b'{"model":"mine"}', b"no json"]


def test_each_upstream_gets_its_own_key_and_no_span_holds_one(
    make_proxy: MakeProxy,
    engine: EngineThread,
    other: EngineThread,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("THEIR_KEY", "sk-of-the-environment")
    (tmp_path / "key").write_text("sk-of-the-file\n")
    proxy = make_proxy(
        engine.base_url,
        upstreams=[
            {"models": ("gpt-9",), "url": other.base_url, "api_key_env": "THEIR_KEY"},
            {"models": ("gpt-8",), "url": other.base_url, "api_key_file": tmp_path / "key"},
            {"models": ("gpt-7",), "url": other.base_url},
        ],
    )
    for model in ("policy", "gpt-9", "gpt-8", "gpt-7"):
        chat(proxy, [("Authorization", "Bearer sk-agent")], model=model)
    sent = [request.header("authorization") for request in (*engine.calls, *other.calls)]
    assert sent == [
        "Bearer sk-agent",
        "Bearer sk-of-the-environment",
        "Bearer sk-of-the-file",
        "Bearer sk-agent",
    ]
    recorded(proxy, 4)
    assert b"sk-" not in b"".join(path.read_bytes() for path in proxy.db.parent.glob("lightning.db*"))


def test_only_the_main_upstream_holds_calls_while_it_cannot_take_them(
    make_proxy: MakeProxy, engine: EngineThread, other: EngineThread
) -> None:
    proxy = make_proxy(
        engine.base_url,
        proxy={"hold_timeout_s": 0.1},
        upstreams=[{"models": ("gpt-*",), "url": other.base_url}],
    )
    proxy.hold("a test")
    assert chat(proxy).status == 503
    assert chat(proxy, model="gpt-9").status == 200


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"api_key_env": "NOT_SET_ANYWHERE"},
            "the upstream for m: api_key_env names NOT_SET_ANYWHERE, which is not",
        ),
        ({"api_key_file": Path("nowhere")}, "the upstream for m: api_key_file cannot be read"),
        ({"api_key_file": Path("/dev/null")}, "api_key_file /dev/null is empty"),
    ],
)
def test_a_key_that_is_not_there_is_said_at_the_start(given: dict[str, object], said: str) -> None:
    settings = UpstreamSettings.model_validate({"models": ("m",), "url": "http://x/v1", **given})
    with pytest.raises(ConfigError, match=said):
        endpoint_of(settings, None)


def text_of(answer: Answer) -> str:
    """What the first choice says, streamed or not."""
    if answer.header("content-type") == "application/json":
        return str(answer.json["choices"][0]["message"]["content"])
    chunks = [event for event in answer.events if event != "[DONE]" and event["choices"]]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


# -- providers through litellm -------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_provider_is_called_through_litellm_and_its_calls_are_recorded_as_text(
    make_proxy: MakeProxy, engine: EngineThread, other: EngineThread, stream: bool
) -> None:
    hosted = {"models": ("gpt-*",), "provider": "hosted_vllm", "url": other.base_url}
    proxy = make_proxy(engine.base_url, upstreams=[hosted])
    other.script(Script(text="from afar"))
    answer = chat(proxy, [("Authorization", "Bearer sk-agent")], model="gpt-9", stream=stream)
    assert answer.status == 200
    assert text_of(answer) == "from afar"
    assert other.calls[0].header("authorization") == "Bearer sk-agent"
    assert json.loads(other.calls[0].body)["model"] == "gpt-9"
    span = recorded(proxy)[0]
    assert (span.wire, span.model, span.fidelity, span.streamed) == ("chat", "gpt-9", Fidelity.TEXT, stream)
    assert (span.response_id, span.policy) == (
        answer.json["id"] if not stream else answer.events[0]["id"],
        None,
    )


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_of_chat_completions_reaches_a_provider_that_speaks_messages(
    make_proxy: MakeProxy, engine: EngineThread, make_engine: MakeEngine, stream: bool
) -> None:
    anthropic = make_engine(FakeEngine(name="claude-x", owner="anthropic"))
    anthropic.script(Script(text="from afar"), path="/v1/messages")
    hosted = {"models": ("claude-*",), "provider": "anthropic", "url": anthropic.url}
    proxy = make_proxy(engine.base_url, upstreams=[hosted])
    answer = chat(proxy, [("Authorization", "Bearer sk-agent")], model="claude-x", stream=stream)
    assert (answer.status, text_of(answer)) == (200, "from afar")
    (call,) = anthropic.calls
    assert (call.path, call.header("x-api-key")) == ("/v1/messages", "sk-agent")
    span = recorded(proxy)[0]
    assert (span.wire, span.fidelity, span.usage is not None) == ("chat", Fidelity.TEXT, not stream)


@pytest.mark.parametrize("stream", [False, True])
def test_a_providers_refusal_keeps_its_status_and_its_advice(
    make_proxy: MakeProxy, engine: EngineThread, other: EngineThread, stream: bool
) -> None:
    hosted = {"models": ("gpt-*",), "provider": "hosted_vllm", "url": other.base_url}
    proxy = make_proxy(engine.base_url, upstreams=[hosted])
    other.script(Script(status=429, headers={"retry-after": "7"}))
    answer = chat(proxy, model="gpt-9", stream=stream)
    assert (answer.status, answer.header("retry-after")) == (429, "7")
    assert "scripted" in answer.json["error"]["message"]
    span = recorded(proxy)[0]
    assert (span.error_class, span.status) == ("rate_limited", 429)


def test_a_providers_stream_that_breaks_off_breaks_off_for_the_agent(
    make_proxy: MakeProxy, engine: EngineThread, other: EngineThread
) -> None:
    hosted = {"models": ("gpt-*",), "provider": "hosted_vllm", "url": other.base_url}
    proxy = make_proxy(engine.base_url, upstreams=[hosted])
    other.script(Script(cut_after=3, cut_by="reset"))
    with pytest.raises(CUT):
        chat(proxy, model="gpt-9", stream=True)
    assert recorded(proxy)[0].error_class == "cut_stream"


def test_litellm_is_imported_only_where_a_provider_is_called(
    make_proxy: MakeProxy, engine: EngineThread
) -> None:
    program = (
        "import sys, lightning_proxy.proxy.app as app; from lightning_proxy.config import Settings; "
        "app.create_app(Settings.model_validate({'proxy': {'upstream': 'http://x/v1'}, 'upstreams': "
        "[{'models': ('m',), 'provider': 'anthropic'}]})); print('litellm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_paths_that_a_provider_does_not_have_are_said_to_be_missing(
    make_proxy: MakeProxy, engine: EngineThread, other: EngineThread
) -> None:
    hosted = {"models": ("gpt-*",), "provider": "hosted_vllm", "url": other.base_url}
    proxy = make_proxy(engine.base_url, upstreams=[hosted])
    answer = send(proxy.url, "/v1/images/generations", json.dumps({**HELLO, "model": "gpt-9"}).encode())
    assert answer.status == 404
    assert send(proxy.url, CHAT, json.dumps({"model": "gpt-0", "messages": []}).encode()).status == 404
