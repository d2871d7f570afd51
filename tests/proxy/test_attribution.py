"""Whose call it is, from what the call itself says."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import orjson
import pytest
from multidict import CIMultiDict

from lightning_proxy.config.settings import RoleSettings
from lightning_proxy.errors import InvalidInput, StoreUnavailable
from lightning_proxy.proxy.attribution import (
    Attribution,
    api_keys,
    from_headers,
    from_session_headers,
    own_rollout,
    parse_baggage,
    split_path,
)
from lightning_proxy.proxy.keys import Attributor
from lightning_proxy.proxy.roles import Roles
from lightning_proxy.store import ConversationEnd, KeyOwner

TRACKED = Attribution("r1", 1, None, "path", 1.0)


def headers(**values: str) -> CIMultiDict[str]:
    return CIMultiDict((name.replace("_", "-"), value) for name, value in values.items())


@pytest.mark.parametrize(
    ("path", "rest", "attribution"),
    [
        ("/rollout/r1/v1/models", "/v1/models", TRACKED),
        ("/sessions/r1/v1/chat/completions", "/v1/chat/completions", TRACKED),
        ("/rollout/r1/v1", "/v1", TRACKED),
        ("/rollout/r1/", "/", TRACKED),
        ("/rollout/r1", "/", TRACKED),
        ("/rollout/r1/v1/a?x=/v1/b", "/v1/a?x=/v1/b", TRACKED),
        ("/rollout/r1/attempt/3/v1/x", "/v1/x", Attribution("r1", 3, None, "path", 1.0)),
        ("/rollout/r1/role/writer/v1/x", "/v1/x", Attribution("r1", 1, "writer", "path", 1.0)),
        ("/rollout/r1/attempt/2/role/w.1/v1/x", "/v1/x", Attribution("r1", 2, "w.1", "path", 1.0)),
        ("/rollout/a%3Ab%40c/v1/x", "/v1/x", Attribution("a:b@c", 1, None, "path", 1.0)),
        ("/rollout/r1/v1/a%2Fb", "/v1/a%2Fb", TRACKED),
    ],
)
def test_a_path_names_rollout_attempt_and_role(path: str, rest: str, attribution: Attribution) -> None:
    split = split_path(path)
    assert (split.path, split.attribution) == (rest, attribution)


@pytest.mark.parametrize(
    "path", ["/v1/rollout/r1/v1", "/rollouts/r1/v1/x", "/rollout", "/", "/rollout/r1/v2/x"]
)
def test_other_paths_name_nobody(path: str) -> None:
    split = split_path(path)
    assert (split.path, split.attribution) == (path, None)


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("http://any.host/v1/models?limit=1", "/v1/models?limit=1"),
        ("https://any.host:8443/rollout/r1/v1/models", "/v1/models"),
        ("HTTP://any.host", "/"),
        ("http://any.host?x=1", "/?x=1"),
    ],
)
def test_a_target_may_be_a_whole_url(target: str, path: str) -> None:
    assert split_path(target).path == path


@pytest.mark.parametrize("target", ["*", "any.host:443", "@any.host/v1", "any.host/v1", ""])
def test_a_target_without_a_path_is_refused(target: str) -> None:
    with pytest.raises(InvalidInput, match="is no path"):
        split_path(target)


@pytest.mark.parametrize("path", ["/rollout/r1/v1?x=1", "/rollout/r1?x=1", "/rollout/r1/attempt/2/v1?a=/b"])
def test_a_query_may_follow_the_prefix_at_once(path: str) -> None:
    split = split_path(path)
    assert split.attribution is not None
    assert split.path.partition("?")[2] == path.partition("?")[2]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/rollout/%20/v1/x", "rollout id"),
        ("/rollout/.hidden/v1/x", "rollout id"),
        ("/rollout/a%2Fb/v1/x", "rollout id"),
        ("/rollout/%00/v1/x", "rollout id"),
        ("/rollout/a%0A/v1/x", "rollout id"),
        ("/rollout/" + "a" * 201 + "/v1/x", "rollout id"),
        ("/rollout/r1/role/a%20b/v1/x", "role"),
        ("/rollout/r1/attempt/0/v1/x", "attempt"),
        ("/rollout/r1/attempt/-1/v1/x", "attempt"),
        ("/rollout/r1/attempt/two/v1/x", "attempt"),
        ("/rollout/r1/attempt/2147483648/v1/x", "attempt"),
        ("/rollout/r1/attempt/" + "9" * 5000 + "/v1/x", "attempt"),
        ("/rollout/r1/attempt/²/v1/x", "attempt"),
    ],
)
def test_an_id_that_cannot_be_one_is_refused_with_what_would_be_right(path: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as refused:
        split_path(path)
    assert "needed" in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (headers(X_Rollout_Id="r1"), Attribution("r1", 1, None, "header", 1.0)),
        (headers(X_Session_Id="s", X_Attempt="4"), Attribution("s", 4, None, "header", 1.0)),
        (
            headers(baggage="rollout_id=r1;p=1, attempt=2,role=critic"),
            Attribution("r1", 2, "critic", "baggage", 1.0),
        ),
        (headers(baggage="session.id=a%3Ab"), Attribution("a:b", 1, None, "baggage", 1.0)),
        (
            headers(X_Rollout_Id="r1", baggage="rollout_id=r2,role=x"),
            Attribution("r1", 1, None, "header", 1.0),
        ),
    ],
)
def test_headers_name_a_rollout(sent: CIMultiDict[str], expected: Attribution) -> None:
    assert (from_headers(sent) or from_session_headers(sent)) == expected


@pytest.mark.parametrize(
    "sent",
    [
        headers(),
        headers(X_Rollout_Id="a b"),
        headers(X_Session_Id="\udcff"),
        headers(baggage="x=1"),
        headers(baggage=";,="),
    ],
)
def test_a_header_that_holds_no_id_names_nobody(sent: CIMultiDict[str]) -> None:
    assert from_headers(sent) is from_session_headers(sent) is None


@pytest.mark.parametrize("attempt", ["0", "-3", "x", "9" * 20, "9" * 5000, "²", ""])
def test_an_attempt_in_a_header_that_cannot_be_one_counts_as_the_first(attempt: str) -> None:
    found = from_headers(headers(X_Rollout_Id="r1", X_Attempt=attempt))
    assert found == Attribution("r1", 1, None, "header", 1.0)


def test_baggage_is_read_as_the_standard_says() -> None:
    assert parse_baggage("a=1;x=y;z , b = two%20words,broken,c=") == {"a": "1", "b": "two words", "c": ""}


@pytest.mark.parametrize(
    ("sent", "keys"),
    [
        (headers(Authorization="Bearer k"), ["k"]),
        (headers(Authorization="bearer  k "), ["k"]),
        (headers(X_Api_Key="k"), ["k"]),
        (headers(Authorization="Basic abc", x_api_key="k"), ["k"]),
        (headers(Authorization="Bearer k", x_api_key="l"), ["k", "l"]),
        (headers(), []),
    ],
)
def test_keys_are_found_by_either_convention(sent: CIMultiDict[str], keys: list[str]) -> None:
    assert api_keys(sent) == keys


def test_calls_that_nobody_owns_stand_alone() -> None:
    first, second = own_rollout(), own_rollout()
    assert first.rollout_id != second.rollout_id
    assert (first.by, first.confidence) == ("none", 0.0)


async def test_the_path_goes_before_headers_and_headers_before_keys() -> None:
    asked: list[str] = []

    def look_up(key: str) -> KeyOwner | None:
        asked.append(key)
        return KeyOwner("by-key", 2, "writer")

    attributor = Attributor(look_up)
    sent = headers(X_Rollout_Id="by-header", Authorization="Bearer lp-1")
    assert (await attributor.attribute(TRACKED, sent)).rollout_id == "r1"
    assert (await attributor.attribute(None, sent)).rollout_id == "by-header"
    by_key = Attribution("by-key", 2, "writer", "key", 1.0)
    for _ in range(2):
        assert await attributor.attribute(None, headers(Authorization="Bearer lp-1")) == by_key
    for session in ({"X_Session_Id": "s"}, {"baggage": "session.id=s"}):  # agents send those by themselves
        assert await attributor.attribute(None, headers(Authorization="Bearer lp-1", **session)) == by_key
        assert (await attributor.attribute(None, headers(**session))).rollout_id == "s"
    assert asked == ["lp-1"]


async def test_a_key_of_somebody_else_is_never_looked_up() -> None:
    def look_up(key: str) -> KeyOwner | None:
        raise AssertionError(key)

    found = await Attributor(look_up).attribute(None, headers(Authorization="Bearer sk-1"))
    assert found.by == "none"


async def test_a_store_in_trouble_leaves_the_call_alone_and_asks_again_later() -> None:
    troubled = [True]

    def look_up(key: str) -> KeyOwner | None:
        if troubled:
            troubled.pop()
            raise StoreUnavailable("locked")
        return KeyOwner("r", 1)

    attributor = Attributor(look_up)
    first = await attributor.attribute(None, headers(x_api_key="lp-1"))
    assert (first.by, first.doubt) == ("none", "the key of a call could not be looked up: locked")
    again = await attributor.attribute(None, headers(x_api_key="lp-1"))
    assert (again.rollout_id, again.doubt) == ("r", None)


async def test_a_role_header_fills_in_and_never_overrides() -> None:
    attributor = Attributor(lambda key: None)
    assert (await attributor.attribute(TRACKED, headers(X_Role="writer"))).role == "writer"
    named = Attribution("r1", 1, "critic", "path", 1.0)
    assert (await attributor.attribute(named, headers(X_Role="writer"))).role == "critic"


@pytest.mark.parametrize("role", ["\udcff", "a b", "x" * 300, ""])
async def test_a_role_that_cannot_be_one_is_ignored(role: str) -> None:
    attributor = Attributor(lambda key: None)
    assert (await attributor.attribute(TRACKED, headers(X_Role=role))).role is None
    found = await attributor.attribute(None, headers(baggage=f"rollout_id=r1,role={role}"))
    assert found.role is None


# -- beyond path, headers and keys --------------------------------------------------------------------


def messages(*texts: str) -> dict[str, Any]:
    """A request: asked and said in turn."""
    return {
        "messages": [
            {"role": "assistant" if number % 2 else "user", "content": text}
            for number, text in enumerate(texts)
        ]
    }


def answered(text: str) -> bytes:
    return orjson.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


async def attribute(attributor: Attributor, request: dict[str, Any], **sent: str) -> Attribution:
    return await attributor.attribute(
        None, headers(**sent), wire="chat", request=request, body=orjson.dumps(request)
    )


async def test_keys_go_before_the_agents_own_ids_and_those_before_the_conversation() -> None:
    attributor = Attributor(lambda key: KeyOwner("by-key", 2, None) if key == "lp-1" else None)
    first = await attribute(attributor, messages("a"))
    assert first.strand is not None
    first.strand.ended(answered("b"))
    follow = messages("a", "b", "c")
    named = {**follow, "metadata": {"session_id": "s"}}
    assert (await attribute(attributor, named, Authorization="Bearer lp-1")).rollout_id == "by-key"
    assert (await attribute(attributor, named)).rollout_id == "session-s"
    assert (await attribute(attributor, follow)).rollout_id == first.rollout_id


@pytest.mark.parametrize(
    "sent", [{"X_Rollout_Id": "r1"}, {"Authorization": "Bearer lp-1"}, {"session_id": "s"}]
)
async def test_a_call_that_something_else_attributes_is_not_looked_into(sent: dict[str, str]) -> None:
    attributor = Attributor(lambda key: KeyOwner("by-key", 2, None))
    assert (await attribute(attributor, messages("a"), **sent)).strand is None


async def test_a_conversation_that_the_store_knows_is_asked_for_once_per_history() -> None:
    asked: list[tuple[int, list[str]]] = []

    def find(digests: Sequence[bytes], ids: Sequence[str]) -> Sequence[ConversationEnd]:
        asked.append((len(digests), list(ids)))
        return ()

    attributor = Attributor(lambda key: None, find)
    await attribute(attributor, messages("a"))
    for _ in range(2):
        found = await attribute(attributor, messages("a", "b", "c", "d", "e"))
        assert found.by == "none"
    assert asked == [(2, [])]


async def test_a_store_in_trouble_leaves_a_conversation_alone_and_is_asked_again() -> None:
    first = await attribute(Attributor(lambda key: None), messages("a"))
    assert first.strand is not None
    digest = first.strand.ended(answered("b"))
    troubled = [True]

    def find(digests: Sequence[bytes], ids: Sequence[str]) -> Sequence[ConversationEnd]:
        if troubled:
            troubled.pop()
            raise StoreUnavailable("locked")
        return [ConversationEnd("r1", 1, digest, answered("b"), extended=False)]

    attributor = Attributor(lambda key: None, find)
    assert (await attribute(attributor, messages("a", "b", "c"))).by == "none"
    assert (await attribute(attributor, messages("a", "b", "c"))).rollout_id == "r1"


async def test_a_store_that_does_not_answer_holds_no_call() -> None:
    answer, asked = threading.Event(), []

    def find(digests: Sequence[bytes], ids: Sequence[str]) -> Sequence[ConversationEnd]:
        asked.append(digests)
        answer.wait(30)
        return ()

    attributor = Attributor(lambda key: None, find, patience_s=0.01)
    for _ in range(2):  # while the first question has no answer, there is no second one
        assert (await attribute(attributor, messages("a", "b", "c"))).by == "none"
    answer.set()
    assert len(asked) == 1


async def test_conversations_that_are_looked_up_at_once_are_all_found() -> None:
    def find(digests: Sequence[bytes], ids: Sequence[str]) -> Sequence[ConversationEnd]:
        time.sleep(0.1)
        return [ConversationEnd("r", 1, digests[0], b"{}", extended=False)]

    attributor = Attributor(lambda key: None, find, patience_s=30)
    calls = [attribute(attributor, messages(text, "b", "c")) for text in "xy"]
    assert [found.rollout_id for found in await asyncio.gather(*calls)] == ["r", "r"]


@pytest.mark.parametrize(
    ("sent", "retry"), [("2", 2), ("0", 0), ("-1", 0), ("x", 0), ("", 0), ("²", 0), ("9" * 5000, 0)]
)
async def test_the_count_of_retries_is_taken_where_it_is_one(sent: str, retry: int) -> None:
    attributor = Attributor(lambda key: None)
    sent_headers = headers(X_Stainless_Retry_Count=sent)
    assert (await attributor.attribute(TRACKED, sent_headers)).retry == retry
    assert (await attributor.attribute(None, sent_headers, wire="chat")).retry == retry


async def test_a_configured_role_fills_in_and_never_overrides() -> None:
    roles = Roles([RoleSettings(name="writer", system_contains="You write")])
    attributor = Attributor(lambda key: None, roles=roles)
    request = {"messages": [{"role": "system", "content": "You write."}]}
    named = Attribution("r1", 1, "critic", "path", 1.0)
    for by_path, role in ((TRACKED, "writer"), (named, "critic"), (None, "writer")):
        found = await attributor.attribute(by_path, headers(), wire="chat", request=request)
        assert found.role == role
    found = await attributor.attribute(TRACKED, headers(X_Role="judge"), wire="chat", request=request)
    assert found.role == "judge"
