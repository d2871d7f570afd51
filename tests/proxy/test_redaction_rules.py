"""What rules take out never reaches the disk, in whatever way it came; the agent notices nothing."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_proxy.errors import ConfigError
from lightning_proxy.proxy.app import create_app
from lightning_proxy.store import Fidelity, Span, Store
from lightning_proxy.store.packing import pack_ids
from tests.conftest import MakeProxy, ProxyThread, wait_until
from tests.engine import EngineThread, Script
from tests.proxy.raw_http import CHAT, COMPLETIONS, HELLO, JSON, Answer, Call, chat, metric, recorded, send

Json = dict[str, Any]

SECRET = "zoë.quux+7@secret-corp.example"
EMAIL = {"name": "email", "builtin": "email"}
ASK: Json = {"role": "user", "content": "hello"}
CALLED: Json = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "mail", "arguments": json.dumps({"to": [SECRET], "urgent": True})},
        }
    ],
}
RESULT: Json = {"role": "tool", "tool_call_id": "call_1", "content": f"sent to <{SECRET}>"}


def half_a_pair(secret: str) -> Json:
    arguments = f'{{"to": {json.dumps(secret)}, "smile": "\\ud83d"}}'
    return {"id": "call_1", "type": "function", "function": {"name": "mail", "arguments": arguments}}


# Where a secret comes in: (path, body, what the engine does)
WAYS: dict[str, tuple[str, Json, Script]] = {
    "system prompt": (CHAT, {"messages": [{"role": "system", "content": f"be {SECRET}"}, ASK]}, Script()),
    "user message": (CHAT, {"messages": [{"role": "user", "content": f"mail {SECRET}!"}]}, Script()),
    "content part": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": SECRET}]}]},
        Script(),
    ),
    "tool arguments": (CHAT, {"messages": [ASK, CALLED, RESULT]}, Script()),
    "tool result": (CHAT, {"messages": [ASK, RESULT]}, Script()),
    "tool arguments with half a surrogate pair": (
        CHAT,
        {"messages": [ASK, {**CALLED, "tool_calls": [half_a_pair(SECRET)]}]},
        Script(),
    ),
    "a field's name": (CHAT, {"messages": [ASK], "metadata": {SECRET: "x"}}, Script()),
    "stop": (CHAT, {"messages": [ASK], "stop": [SECRET]}, Script()),
    "reply": (CHAT, {"messages": [ASK]}, Script(text=f"It is {SECRET}, I think.")),
    "reply with logprobs": (
        CHAT,
        {"messages": [ASK], "logprobs": True, "top_logprobs": 2, "return_token_ids": True},
        Script(text=f"It is {SECRET}, I think."),
    ),
    "tool call of the reply": (
        CHAT,
        {"messages": [ASK]},
        Script(tool_calls=(("mail", json.dumps({"to": SECRET})),)),
    ),
    "prompt": (COMPLETIONS, {"prompt": f"once {SECRET}"}, Script()),
    "completion": (COMPLETIONS, {"prompt": "once", "logprobs": 2}, Script(text=f"upon {SECRET}")),
    "messages' system": (
        "/v1/messages",
        {"max_tokens": 9, "system": SECRET, "messages": [ASK]},
        Script(),
    ),
    "messages' reply": ("/v1/messages", {"max_tokens": 99, "messages": [ASK]}, Script(text=f"to {SECRET}")),
    "responses' input": ("/v1/responses", {"input": f"mail {SECRET}"}, Script()),
    "responses' reply": ("/v1/responses", {"input": "hello"}, Script(text=f"to {SECRET}")),
    "an error": (CHAT, {"messages": [ASK]}, Script(status=400, body=f'{{"error": "no user {SECRET}"}}')),
    "an error that is long": (
        CHAT,
        {"messages": [ASK]},
        Script(status=400, body="x" * (4096 - len(SECRET) - 20) + f" {SECRET} {SECRET} {SECRET}"),
    ),
}  # fmt: skip


def on_disk(proxy: ProxyThread) -> bytes:
    """Every byte of every file of the database, and of the content that is packed in it."""
    files = [file.read_bytes() for file in sorted(proxy.db.parent.glob(f"{proxy.db.name}*"))]
    with proxy.store() as store:
        for span in store.list_spans(limit=1000):
            files += [span.request, span.response or b""]
            for generation in span.generations:
                files += [pack_ids(generation.prompt_token_ids), pack_ids(generation.response_token_ids)]
    return b"".join(files)


def forms(secret: str, engine: EngineThread) -> list[bytes]:
    """A secret as it could stand in the files: as text, as JSON spells it, as token ids."""
    once = json.dumps(secret)[1:-1]
    texts = dict.fromkeys((secret, once, json.dumps(once)[1:-1]))
    ids = [pack_ids(array("i", engine.model.encode(text))) for text in texts]
    return [text.encode() for text in texts] + ids


def check_nothing_is_kept(proxy: ProxyThread, engine: EngineThread, secret: str = SECRET) -> None:
    data = on_disk(proxy)
    assert [form for form in forms(secret, engine) if form in data] == []


def call(proxy: ProxyThread, way: str, *, stream: bool, prefix: str = "") -> Answer:
    path, body, script = WAYS[way]
    headers = [*JSON, *script.with_({"split": 7}).to_header().items()]
    return send(proxy.url, prefix + path, {"model": "policy", **body, "stream": stream}, headers)


def check_marked(span: Span) -> None:
    assert span.redacted == "email"
    assert span.fidelity is not Fidelity.EXACT
    assert all(not (g.prompt_token_ids or g.response_token_ids or g.logprobs) for g in span.generations)
    assert span.conversation is None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_it_is_on_the_disk(
    make_proxy: MakeProxy, engine: EngineThread, way: str, stream: bool
) -> None:
    proxy = make_proxy(engine.base_url, redaction=[EMAIL])
    call(proxy, way, stream=stream, prefix="/rollout/r")
    check_marked(recorded(proxy)[0])
    check_nothing_is_kept(proxy, engine)


@pytest.mark.parametrize("way", ["reply", "tool call of the reply", "completion", "user message"])
def test_without_rules_it_would_be_there(make_proxy: MakeProxy, engine: EngineThread, way: str) -> None:
    proxy = make_proxy(engine.base_url)
    call(proxy, way, stream=False, prefix="/rollout/r")
    assert recorded(proxy)[0].redacted is None
    data = on_disk(proxy)
    assert [form for form in forms(SECRET, engine) if form in data]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_agent_gets_every_byte_of_it(
    make_proxy: MakeProxy, engine: EngineThread, way: str, stream: bool, tmp_path: Path
) -> None:
    plain = make_proxy(engine.base_url, store={"db": tmp_path / "plain.db"})
    ruled = make_proxy(engine.base_url, redaction=[EMAIL])
    first, second = (call(proxy, way, stream=stream) for proxy in (plain, ruled))
    drawn = {"/v1/messages", "/v1/responses"}  # their ids are drawn in other places too
    if WAYS[way][0] in drawn:
        assert (first.status, len(first.body)) == (second.status, len(second.body))
        return
    assert first.end_to_end == second.end_to_end
    sent = [request.body for request in engine.calls]
    assert sent[0] == sent[1]


def test_how_many_tokens_there_were_is_kept(make_proxy: MakeProxy, engine: EngineThread) -> None:
    proxy = make_proxy(engine.base_url, redaction=[EMAIL])
    call(proxy, "user message", stream=True)
    reply = engine.model.generate(WAYS["user message"][1])
    span = recorded(proxy)[0]
    assert span.usage is not None
    assert span.usage["prompt_tokens"] == len(reply.prompt_token_ids)
    assert span.usage["completion_tokens"] == len(reply.choices[0].token_ids)
    assert [generation.finish_reason for generation in span.generations] == ["stop"]


def test_what_holds_none_of_it_is_kept_to_the_byte(make_proxy: MakeProxy, engine: EngineThread) -> None:
    proxy = make_proxy(engine.base_url, redaction=[EMAIL])
    raw = json.dumps(HELLO, indent=3).encode()
    send(proxy.url, CHAT, raw)
    span = recorded(proxy)[0]
    assert (span.request, span.redacted, span.fidelity) == (raw, None, Fidelity.EXACT)


def test_later_calls_of_the_conversation_lose_it_too(make_proxy: MakeProxy, engine: EngineThread) -> None:
    """A rule that looks at answers only: the agent sends the answer again, where the rule does not look."""
    rule = {"name": "said", "path": "choices[*].message.content", "where": "response"}
    proxy = make_proxy(engine.base_url, redaction=[rule])
    said = f"The code is {SECRET}."
    headers = list(Script(text=said).to_header().items())
    chat(proxy, headers, prefix="/rollout/r")
    history = [ASK, {"role": "assistant", "content": said + "\n"}, {"role": "user", "content": "And?"}]
    chat(proxy, prefix="/rollout/r", messages=history)
    chat(proxy, prefix="/rollout/another", messages=[ASK])
    first, second, other = recorded(proxy, 3)
    assert (first.redacted, second.redacted) == ("said", "said")
    assert second.fidelity is Fidelity.TEXT
    assert other.redacted == "said"  # each answer is taken out whole
    assert json.loads(second.request)["messages"][1]["content"] == "[redacted]\n"
    check_nothing_is_kept(proxy, engine)


def test_what_a_path_takes_out_is_taken_out_of_the_answer_too(
    make_proxy: MakeProxy, engine: EngineThread
) -> None:
    proxy = make_proxy(engine.base_url, redaction=[{"name": "user", "path": "metadata.name"}])
    headers = list(Script(text="Hello, Grace Hopper!").to_header().items())
    chat(proxy, headers, metadata={"name": "Grace Hopper"})
    span = recorded(proxy)[0]
    assert span.response is not None
    assert json.loads(span.response)["choices"][0]["message"]["content"] == "Hello, [redacted]!"
    check_nothing_is_kept(proxy, engine, "Grace Hopper")


def test_a_rule_may_be_for_one_role(make_proxy: MakeProxy, engine: EngineThread) -> None:
    proxy = make_proxy(engine.base_url, redaction=[{**EMAIL, "roles": ["writer"]}])
    for role in ("writer", "critic"):
        call(proxy, "user message", stream=False, prefix=f"/rollout/{role}/role/{role}")
    assert [span.redacted for span in recorded(proxy, 2)] == ["email", None]


def test_an_answer_that_is_cut_keeps_no_token_ids(make_proxy: MakeProxy, engine: EngineThread) -> None:
    """Its text was never whole, so nobody has looked at what its tokens say."""
    proxy = make_proxy(engine.base_url, redaction=[EMAIL])
    script = Script(text=f"It is {SECRET}, I think.", cut_after=40)
    body = {"model": "policy", "messages": [ASK], "stream": True}
    headers = [*JSON, *script.to_header().items()]
    with Call(proxy.url, CHAT, body, headers) as begun:
        got = bytearray()
        with pytest.raises(Exception, match=r".*"):
            begun.drain(got)
    span = recorded(proxy)[0]
    assert (span.error_class, span.redacted) == ("cut_stream", "unread")
    check_nothing_is_kept(proxy, engine, SECRET[:12])


def test_a_history_that_is_kept_elsewhere_is_not_vouched_for(
    make_proxy: MakeProxy, engine: EngineThread
) -> None:
    proxy = make_proxy(engine.base_url, redaction=[EMAIL])
    ids = list(engine.model.encode(f"mail {SECRET}"))
    send(proxy.url, COMPLETIONS, {"model": "policy", "prompt": ids})
    span = recorded(proxy)[0]
    assert span.redacted == "unread"
    assert json.loads(span.request)["prompt"] == "[redacted]"
    check_nothing_is_kept(proxy, engine)
    assert json.dumps(ids).encode()[1:-1] not in on_disk(proxy)


ADDRESS = "john.doe@example.com"  # which could be an id


@pytest.mark.parametrize(
    "rule", [EMAIL, {**EMAIL, "roles": ["writer"]}, {"name": "all", "path": "metadata.*"}]
)
@pytest.mark.parametrize(
    "sent",
    [
        {"session_id": ADDRESS},
        {"rollout_id": ADDRESS},
        {"session_id": SECRET},
        {"user_id": json.dumps({"session_id": ADDRESS})},
    ],
    ids=str,
)
def test_a_session_that_is_called_by_it_is_one_rollout_of_another_name(
    make_proxy: MakeProxy, engine: EngineThread, rule: Json, sent: Json
) -> None:
    proxy = make_proxy(engine.base_url, redaction=[rule])
    for _ in range(2):
        chat(proxy, metadata=sent)
    chat(proxy, metadata={**sent, next(iter(sent)): json.dumps({"session_id": "x@example.com"})})
    first, second, other = recorded(proxy, 3)
    assert first.rollout_id == second.rollout_id != other.rollout_id
    for secret in (ADDRESS, SECRET):
        assert secret not in first.rollout_id + other.rollout_id
        if rule is EMAIL:
            check_nothing_is_kept(proxy, engine, secret)


@pytest.mark.parametrize("header", ["session-id", "thread-id", "x-claude-code-session-id"])
def test_a_session_that_a_header_calls_by_it_has_another_name_too(
    make_proxy: MakeProxy, engine: EngineThread, header: str
) -> None:
    proxy = make_proxy(engine.base_url, redaction=[EMAIL])
    chat(proxy, [(header, ADDRESS)])
    check_nothing_is_kept(proxy, engine, ADDRESS)


def test_a_session_in_whose_name_no_rule_finds_anything_keeps_it(
    make_proxy: MakeProxy, engine: EngineThread
) -> None:
    proxy = make_proxy(engine.base_url, redaction=[EMAIL, {"name": "user", "path": "metadata.user"}])
    chat(proxy, metadata={"session_id": "s1", "user": SECRET})
    assert recorded(proxy)[0].rollout_id == "session-s1"


def test_comments_and_metadata_lose_it_as_well(make_proxy: MakeProxy, engine: EngineThread) -> None:
    proxy = make_proxy(engine.base_url, redaction=[EMAIL])
    send(proxy.url, "/api/rollouts", {"rollout_id": "r", "metadata": {"user": {"mail": SECRET}}})
    send(proxy.url, "/reward", {"rollout_id": "r", "value": 1.0, "comment": f"{SECRET} liked it"})
    send(proxy.url, "/reward", [{"rollout_id": "r", "value": 1.0, "comment": SECRET}])
    send(proxy.url, "/api/rollouts/r", {"state": "failed", "reason": SECRET}, method="PATCH")
    with proxy.store() as store:
        assert store.list_rewards("r")[0].comment == "[redacted] liked it"
        assert store.get_rollout("r").metadata == {"user": {"mail": "[redacted]"}}
        assert store.get_rollout("r").reason == "[redacted]"
    check_nothing_is_kept(proxy, engine)


def test_reasons_that_workers_give_lose_it_as_well(make_proxy: MakeProxy, engine: EngineThread) -> None:
    proxy = make_proxy(engine.base_url, redaction=[EMAIL])

    def claimed(task_id: str) -> str:
        send(proxy.url, "/api/tasks", {"task_id": task_id, "input": "x"})
        [given] = send(proxy.url, "/api/tasks/claim", {"worker": "w"}).json["assignments"]
        return str(given["rollout_id"])

    failed, back, cancelled = claimed("a"), claimed("b"), claimed("c")
    ended = [
        (f"/api/rollouts/{failed}/attempts/1/finish", {"state": "failed", "reason": f"of {SECRET}"}),
        (f"/api/rollouts/{back}/attempts/1/release", {"reason": SECRET}),
        ("/api/tasks/c/cancel", {"reason": f"by {SECRET}"}),
    ]
    for path, body in ended:
        assert send(proxy.url, path, body).status == 200
    with proxy.store() as store:
        assert store.get_rollout(failed).reason == "of [redacted]"
        assert store.get_rollout(cancelled).reason == "by [redacted]"
    check_nothing_is_kept(proxy, engine)


def test_the_last_value_alone_is_kept_of_a_name_that_stands_twice(
    make_proxy: MakeProxy, engine: EngineThread
) -> None:
    proxy = make_proxy(engine.base_url, redaction=[EMAIL])
    messages = json.dumps([{"role": "user", "content": f"mail {SECRET}"}])
    body = f'{{"messages": {messages}, "model": "policy", "messages": {json.dumps([ASK])}}}'
    assert send(proxy.url, CHAT, body.encode()).status == 200
    span = recorded(proxy)[0]
    assert (span.redacted, json.loads(span.request)["messages"]) == ("unread", [ASK])
    check_nothing_is_kept(proxy, engine)


def deep(levels: int) -> str:
    return '{"a":' * levels + f'"{SECRET}"' + "}" * levels


def test_what_is_nested_too_deeply_to_be_searched_is_refused(
    make_proxy: MakeProxy, engine: EngineThread
) -> None:
    proxy = make_proxy(engine.base_url, redaction=[EMAIL])
    send(proxy.url, "/api/rollouts", {"rollout_id": "r"})
    send(proxy.url, "/api/tasks", {"task_id": "t", "input": {"q": "x"}})
    [given] = send(proxy.url, "/api/tasks/claim", {"worker": "w"}).json["assignments"]
    attempt = f"/api/rollouts/{given['rollout_id']}/attempts/1"
    in_a_text = json.dumps(deep(900))
    posts = [
        ("POST", "/api/rollouts", f'{{"rollout_id": "s", "metadata": {deep(300)}}}', "the body"),
        ("POST", "/api/rollouts", f'{{"rollout_id": "s", "metadata": {{"m": {in_a_text}}}}}', "metadata"),
        ("PATCH", "/api/rollouts/r", f'{{"state": "failed", "reason": {in_a_text}}}', "reason"),
        ("POST", f"{attempt}/release", f'{{"reason": {in_a_text}}}', "reason"),
        ("POST", f"{attempt}/finish", f'{{"state": "failed", "reason": {in_a_text}}}', "reason"),
        ("POST", "/api/tasks/t/cancel", f'{{"reason": {in_a_text}}}', "reason"),
        ("POST", "/reward", f'{{"rollout_id": "r", "value": 1, "comment": {in_a_text}}}', "comment"),
        ("POST", "/reward", f'{{"rollout_id": "r", "demonstration": {in_a_text}}}', "demonstration"),
    ]
    for method, path, body, what in posts:
        refused = send(proxy.url, path, body.encode(), method=method)
        message = refused.json["error"]["message"]
        assert (refused.status, message.startswith(f"{what} is nested too deeply")) == (400, True), path
    check_nothing_is_kept(proxy, engine)


def test_a_call_with_such_a_text_goes_through(make_proxy: MakeProxy, engine: EngineThread) -> None:
    proxy = make_proxy(engine.base_url, redaction=[EMAIL])
    asked = {"role": "user", "content": deep(900)}
    assert send(proxy.url, CHAT, {"model": "policy", "messages": [asked]}).status == 200
    assert recorded(proxy)[0].redacted == "unread"
    check_nothing_is_kept(proxy, engine)


def test_the_conversation_is_followed_by_what_was_really_said(
    make_proxy: MakeProxy, engine: EngineThread
) -> None:
    """Two users whose messages look the same once redacted are two rollouts, each with its own calls."""
    proxy = make_proxy(engine.base_url, redaction=[EMAIL])
    for user in ("ann@a.example", "bob@b.example", "ann@a.example", "bob@b.example"):
        first = {"role": "user", "content": f"I am {user}"}
        reply = engine.model.generate({"messages": [first]}).choices[0].content
        known = [first, {"role": "assistant", "content": reply}, {"role": "user", "content": "And?"}]
        with proxy.store() as store:
            again = len(store.list_spans()) >= 2
        chat(proxy, messages=known if again else [first])
    spans = recorded(proxy, 4)
    assert [span.attributed_by for span in spans] == ["none", "none", "conversation", "conversation"]
    assert spans[0].rollout_id == spans[2].rollout_id != spans[1].rollout_id == spans[3].rollout_id


def test_what_was_taken_out_is_counted(make_proxy: MakeProxy, engine: EngineThread) -> None:
    proxy = make_proxy(engine.base_url, redaction=[EMAIL])
    call(proxy, "reply", stream=False)
    recorded(proxy)
    assert metric(proxy.url, 'lightning_redacted_spans_total{rule="email"}') == 1


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"pattern": "(ab"}, r"'\(ab' is no regular expression"),
        ({"pattern": "a*"}, "fits where there is nothing"),
        ({"path": "messages[*"}, r"the path 'messages\[\*' cannot be read"),
    ],
)
def test_a_bad_rule_keeps_the_proxy_from_starting(rule: Json, said: str, tmp_path: Path) -> None:
    from lightning_proxy.config import Settings

    given = {
        "proxy": {"upstream": "http://127.0.0.1:9/v1"},
        "store": {"db": tmp_path / "x.db"},
        "redaction": [{"name": "mine", **rule}],
    }
    with pytest.raises(ConfigError, match=said):
        create_app(Settings.model_validate(given))


secrets = st.from_regex(r"\A[A-Za-zé漢][A-Za-z0-9é漢._%+-]{5,20}@[a-z][a-z0-9-]{1,10}\.[a-z]{2,6}\Z")


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    secret=secrets,
    before=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    way=st.sampled_from(["user", "tool", "arguments", "reply"]),
    stream=st.booleans(),
    split=st.integers(1, 40),
)
def test_whatever_the_secret_and_wherever_it_comes(
    proxies: ProxyThread, engine: EngineThread, secret: str, before: str, way: str, stream: bool, split: int
) -> None:
    text = f"{before} {secret} "
    messages: list[Json] = [ASK]
    if way in ("user", "tool"):
        messages = [{"role": way, "content": text, **({"tool_call_id": "c"} if way == "tool" else {})}]
    elif way == "arguments":
        function = {"name": "f", "arguments": json.dumps({"a": [text]})}
        messages = [
            {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function}]}
        ]
    script = Script(text=text if way == "reply" else None, split=split)
    body = {"model": "policy", "messages": messages, "stream": stream}
    answer = send(proxies.url, CHAT, body, [*JSON, *script.to_header().items()])
    assert answer.status == 200
    with Store.open(proxies.db) as store:
        wait_until(lambda: bool(store.list_spans(limit=1)))
        check_marked(store.list_spans(limit=1)[0])
    check_nothing_is_kept(proxies, engine, secret)


@pytest.fixture
def proxies(make_proxy: MakeProxy, engine: EngineThread) -> ProxyThread:
    """One proxy for all examples."""
    return make_proxy(engine.base_url, redaction=[EMAIL])
