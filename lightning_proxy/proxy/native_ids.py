"""Ids that agents send by themselves, and which of them name one run. No I/O.

Strong ids stand for one session, thread or conversation, and make a rollout's id. ``user``,
``prompt_cache_key`` and ``safety_identifier`` may be the same for a whole app: they only ever keep
apart what differs in them (see ``lineage``).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import orjson
from multidict import istr

from .attribution import Attribution

SESSION_SURE = 0.9  # the agent's own name for one session
NAMED_SURE = 0.8  # a field by which its author tells conversations apart
TRACE_SURE = 0.7  # a trace may be a part of a run

_CLAUDE_SESSION = istr("X-Claude-Code-Session-Id")
_SESSION_HEADERS = (istr("session-id"), istr("session_id"))
_THREAD_HEADERS = (istr("thread-id"), istr("thread_id"))
_CODEX_TURN = istr("X-Codex-Turn-Metadata")
_ORIGINATOR = istr("originator")

# Claude Code until 2.1.77: user_{hash}_account_{id}_session_{uuid}; since then JSON with a session_id.
_CLAUDE_USER = re.compile(r"user_[^ ]*_session_([0-9a-fA-F-]{32,36})")
# Fields of OpenAI's `metadata`: the key, the prefix of the rollout's id, how sure.
_METADATA = (
    ("rollout_id", "", NAMED_SURE),
    ("session_id", "session", NAMED_SURE),
    ("conversation_id", "conversation", NAMED_SURE),
    ("thread_id", "thread", NAMED_SURE),
    ("trace_id", "trace", TRACE_SURE),
)
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,99}")


def from_native_ids(headers: Mapping[str, str], request: Mapping[str, Any]) -> Attribution | None:
    """The rollout that an agent's own ids name; ``None`` where it sends none that names a run."""
    if session := headers.get(_CLAUDE_SESSION):
        return _rollout("claude", session, "claude_code", SESSION_SURE)
    for name in _SESSION_HEADERS:
        if session := headers.get(name):
            return _session(headers, session)
    if _CODEX_TURN in headers and (session := _codex_session(headers[_CODEX_TURN])):
        return _session(headers, session)
    for name in _THREAD_HEADERS:
        if thread := headers.get(name):
            return _rollout("thread", thread, "thread_header", SESSION_SURE)
    return _from_body(request)


def _from_body(request: Mapping[str, Any]) -> Attribution | None:
    metadata = request.get("metadata")
    if isinstance(metadata, dict) and metadata:
        if session := _claude_session(metadata.get("user_id")):
            return _rollout("claude", session, "claude_code", SESSION_SURE)
        for key, prefix, sure in _METADATA:
            value = metadata.get(key)
            if isinstance(value, str) and value:
                return _rollout(prefix, value, f"metadata.{key}", sure)
    conversation = request.get("conversation")  # of the Responses API: a conversation kept by the server
    if isinstance(conversation, dict):
        conversation = conversation.get("id")
    if isinstance(conversation, str) and conversation:
        return _rollout("conversation", conversation, "conversation", SESSION_SURE)
    return None


def _session(headers: Mapping[str, str], session: str) -> Attribution:
    agent = headers.get(_ORIGINATOR) or headers.get("User-Agent") or ""
    if agent.lower().startswith("codex") or _CODEX_TURN in headers:
        return _rollout("codex", session, "codex", SESSION_SURE)
    return _rollout("session", session, "session_header", SESSION_SURE)


def _claude_session(user_id: object) -> str | None:
    if not isinstance(user_id, str):
        return None
    if user_id.startswith("{"):
        return _text_in(user_id, "session_id")
    match = _CLAUDE_USER.fullmatch(user_id)
    return match[1] if match else None


def _codex_session(turn: str) -> str | None:
    return _text_in(turn, "session_id") or _text_in(turn, "thread_id")


def _text_in(json: str, key: str) -> str | None:
    try:
        value = orjson.loads(json)
    except orjson.JSONDecodeError:
        return None
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, str) and found else None


def _rollout(prefix: str, id_: str, by: str, sure: float) -> Attribution:
    """The id as it is where it can be part of a rollout's id, else a digest of it."""
    if not _PLAIN.fullmatch(id_):
        id_ = hashlib.sha256(id_.encode("utf-8", "surrogatepass")).hexdigest()[:24]
    return Attribution(f"{prefix}-{id_}" if prefix else id_, 1, None, by, sure)
