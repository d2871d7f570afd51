"""Ids that agents send by themselves, and which of them name one run. No I/O.

Strong ids stand for one session, thread or conversation, and make a rollout's id. ``user``,
``prompt_cache_key`` and ``safety_identifier`` may be the same for a whole app: they only ever keep
apart what differs in them (see ``lineage``).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
_PEPPER = os.urandom(16)
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,99}")


class _Id(NamedTuple):
    """What an agent sent: the prefix of the rollout's id, the id, what it is, how sure."""

    prefix: str
    id: str
    by: str
    sure: float


def from_native_ids(
    headers: Mapping[str, str],
    request: Mapping[str, Any],
    redacted: Callable[[dict[str, Any]], Any] | None = None,
) -> Attribution | None:
    """The rollout that an agent's own ids name; ``None`` where it sends none that names a run.

    ``redacted``: a part of a request without what must not be kept. An id that would lose something does
    not become a rollout's id, which is kept.
    """
    found = _from_headers(headers)
    if found is not None:
        kept = redacted is None or redacted({"id": found.id}) == {"id": found.id}
        return _rollout(found, kept)
    found = _from_body(request)
    if found is None:
        return None
    if redacted is None:
        return _rollout(found, kept=True)
    left = redacted({name: request[name] for name in ("metadata", "conversation") if name in request})
    return _rollout(found, kept=isinstance(left, dict) and _from_body(left) == found)


def _from_headers(headers: Mapping[str, str]) -> _Id | None:
    if session := headers.get(_CLAUDE_SESSION):
        return _Id("claude", session, "claude_code", SESSION_SURE)
    for name in _SESSION_HEADERS:
        if session := headers.get(name):
            return _session(headers, session)
    if _CODEX_TURN in headers and (session := _codex_session(headers[_CODEX_TURN])):
        return _session(headers, session)
    for name in _THREAD_HEADERS:
        if thread := headers.get(name):
            return _Id("thread", thread, "thread_header", SESSION_SURE)
    return None


def _from_body(request: Mapping[str, Any]) -> _Id | None:
    metadata = request.get("metadata")
    if isinstance(metadata, dict) and metadata:
        if session := _claude_session(metadata.get("user_id")):
            return _Id("claude", session, "claude_code", SESSION_SURE)
        for key, prefix, sure in _METADATA:
            value = metadata.get(key)
            if isinstance(value, str) and value:
                return _Id(prefix, value, f"metadata.{key}", sure)
    conversation = request.get("conversation")  # of the Responses API: a conversation kept by the server
    if isinstance(conversation, dict):
        conversation = conversation.get("id")
    if isinstance(conversation, str) and conversation:
        return _Id("conversation", conversation, "conversation", SESSION_SURE)
    return None


def _session(headers: Mapping[str, str], session: str) -> _Id:
    agent = headers.get(_ORIGINATOR) or headers.get("User-Agent") or ""
    if agent.lower().startswith("codex") or _CODEX_TURN in headers:
        return _Id("codex", session, "codex", SESSION_SURE)
    return _Id("session", session, "session_header", SESSION_SURE)


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


def _rollout(found: _Id, kept: bool) -> Attribution:
    """The id as it is where it can be part of a rollout's id, else a digest of it.

    Of what must not be kept the digest is keyed, for an address can be found out by trying all: it joins
    the calls of a session until this process ends.
    """
    prefix, id_ = found.prefix, found.id
    if not kept or not _PLAIN.fullmatch(id_):
        data = id_.encode("utf-8", "surrogatepass")
        digest = hashlib.sha256(data) if kept else hmac.new(_PEPPER, data, "sha256")
        id_ = digest.hexdigest()[:24]
    return Attribution(f"{prefix}-{id_}" if prefix else id_, 1, None, found.by, found.sure)
