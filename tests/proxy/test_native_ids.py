"""Which of the ids that agents send name one run."""

from __future__ import annotations

import json
from typing import Any

import pytest
from multidict import CIMultiDict

from lightning_proxy.proxy.attribution import checked_id
from lightning_proxy.proxy.native_ids import from_native_ids

SESSION = "57a121ec-f78c-48c3-a745-e3036a3ecc33"


@pytest.mark.parametrize(
    ("headers", "request_", "rollout_id", "by"),
    [
        ({"x-claude-code-session-id": SESSION}, {}, f"claude-{SESSION}", "claude_code"),
        (
            {},
            {"metadata": {"user_id": f"user_ab12_account__session_{SESSION}"}},
            f"claude-{SESSION}",
            "claude_code",
        ),
        (
            {},
            {
                "metadata": {
                    "user_id": json.dumps({"device_id": "d", "account_uuid": "", "session_id": SESSION})
                }
            },
            f"claude-{SESSION}",
            "claude_code",
        ),
        ({"session-id": SESSION, "originator": "codex_exec"}, {}, f"codex-{SESSION}", "codex"),
        ({"session_id": SESSION, "user-agent": "codex_cli_rs/0.1"}, {}, f"codex-{SESSION}", "codex"),
        (
            {"session-id": SESSION, "thread-id": "t", "x-codex-turn-metadata": "{}"},
            {},
            f"codex-{SESSION}",
            "codex",
        ),
        (
            {"x-codex-turn-metadata": json.dumps({"session_id": "s1", "thread_id": "t"})},
            {},
            "codex-s1",
            "codex",
        ),
        ({"x-codex-turn-metadata": json.dumps({"thread_id": "t1"})}, {}, "codex-t1", "codex"),
        ({"session_id": "s1"}, {}, "session-s1", "session_header"),
        ({"thread-id": "t1"}, {}, "thread-t1", "thread_header"),
        ({}, {"metadata": {"session_id": "s1"}}, "session-s1", "metadata.session_id"),
        ({}, {"metadata": {"rollout_id": "r1", "trace_id": "t"}}, "r1", "metadata.rollout_id"),
        ({}, {"metadata": {"thread_id": "t1"}}, "thread-t1", "metadata.thread_id"),
        ({}, {"metadata": {"conversation_id": "c1"}}, "conversation-c1", "metadata.conversation_id"),
        ({}, {"metadata": {"trace_id": "t1"}}, "trace-t1", "metadata.trace_id"),
        ({}, {"conversation": {"id": "conv_1"}}, "conversation-conv_1", "conversation"),
        ({}, {"conversation": "conv_1"}, "conversation-conv_1", "conversation"),
    ],
)
def test_an_id_of_one_session_or_thread_or_conversation_names_a_rollout(
    headers: dict[str, str], request_: dict[str, Any], rollout_id: str, by: str
) -> None:
    found = from_native_ids(CIMultiDict(headers), request_)
    assert found is not None
    assert (found.rollout_id, found.by) == (rollout_id, by)
    assert 0.5 < found.confidence < 1


@pytest.mark.parametrize(
    "request_",
    [
        {"user": "ann"},
        {"prompt_cache_key": SESSION},
        {"safety_identifier": "x"},
        {"metadata": {"user_id": "user_ab12"}},
        {"metadata": {"user_id": "{broken"}},
        {"metadata": {"user_id": json.dumps(["session_id"])}},
        {"metadata": {"user_id": 7, "session_id": 7, "env": "prod"}},
        {"metadata": "session_id"},
        {"conversation": 7},
    ],
)
def test_an_id_of_a_user_or_an_app_names_no_rollout(request_: dict[str, Any]) -> None:
    assert from_native_ids(CIMultiDict({"x-codex-turn-metadata": "broken"}), request_) is None


@pytest.mark.parametrize("session", ["a b", "/../x", "ä", "x" * 300, "\udcff", "a\nb", "."])
def test_any_id_becomes_one_that_a_rollout_can_have(session: str) -> None:
    found = from_native_ids(CIMultiDict(session_id=session), {})
    again = from_native_ids(CIMultiDict(session_id=session), {})
    assert found is not None
    assert found == again
    assert checked_id(found.rollout_id, "rollout id").startswith("session-")
    other = from_native_ids(CIMultiDict(session_id=session + "."), {})
    assert other is not None
    assert other.rollout_id != found.rollout_id
