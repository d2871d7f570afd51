"""The records, frozen: what a row of the store means, in the field's words.

Times are Unix seconds (float, UTC). Token ids are ``array('i')`` (int32) and logprobs
``array('f')`` (float32, natural log), so that a record holds them as packed as the database.
A record read from the store has its primary key; one to be written leaves it at ``None``.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from lightning_proxy.words import Fidelity, RolloutState


class ErrorClass(StrEnum):
    """What went wrong, of a call, of what a call holds, or of a whole attempt.

    A span that ended in an error has one of the first group (or ``MALFORMED_TOOL_CALL``, where the API has
    no way to say the call that the model made). The second group is found in calls that ended well. The
    third says why an attempt or a rollout failed, which may also be one of the others.
    """

    UPSTREAM_UNREACHABLE = "upstream_unreachable"  # no connection, or none that gave an answer
    UPSTREAM_ERROR = "upstream_error"  # it answered 5xx
    UPSTREAM_REFUSED = "upstream_refused"  # it answered 4xx, for none of the reasons below
    RATE_LIMITED = "rate_limited"  # it answered 429
    CONTEXT_OVERFLOW = "context_overflow"  # the prompt does not fit into the model's context
    TIMEOUT = "timeout"  # the upstream, or the attempt, took longer than it may
    ENGINE_ERROR = "engine_error"  # an error in an answer that began well
    CUT_STREAM = "cut_stream"  # the answer ended before it was whole
    CLIENT_DISCONNECT = "client_disconnect"  # the agent left before the answer was whole
    CAPTURE_FAULT = "capture_fault"  # we could not read the answer; the agent got it all the same
    PROXY_FAULT = "proxy_fault"  # an error of our own

    REFUSAL = "refusal"  # the model declined
    TRUNCATED = "truncated"  # the answer ended at its token limit
    MALFORMED_TOOL_CALL = "malformed_tool_call"  # unknown tool, or arguments that are no JSON or do not fit
    TOOL_FAILURE = "tool_failure"  # a tool's result, as the agent sent it back, reports an error

    AGENT_CRASH = "agent_crash"  # its command ended with a code other than 0, or by a signal
    AGENT_LOOP = "agent_loop"  # the agent repeats itself
    SILENT_DEATH = "silent_death"  # neither a call nor a heartbeat for too long


# What nobody can learn from: faults of engine, network or proxy. They never count against the policy.
INFRASTRUCTURE = frozenset(
    (
        ErrorClass.UPSTREAM_UNREACHABLE,
        ErrorClass.UPSTREAM_ERROR,
        ErrorClass.UPSTREAM_REFUSED,
        ErrorClass.RATE_LIMITED,
        ErrorClass.TIMEOUT,
        ErrorClass.ENGINE_ERROR,
        ErrorClass.CUT_STREAM,
        ErrorClass.CLIENT_DISCONNECT,
        ErrorClass.CAPTURE_FAULT,
        ErrorClass.PROXY_FAULT,
    )
)


class VersionStatus(StrEnum):
    """Life of a policy version. At most one version of a policy is ``ACTIVE``."""

    STAGED = "staged"
    CANARY = "canary"
    ACTIVE = "active"
    RETIRED = "retired"
    REJECTED = "rejected"


class RunState(StrEnum):
    """Life of a training run.

    ``RUNNING`` holds a lease on what it drained. ``COMMITTED`` has consumed it, together with
    the version it made. ``FAILED`` gave it all back.
    """

    RUNNING = "running"
    COMMITTED = "committed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Generation:
    """One choice of a call: the tokens the engine read and the tokens it wrote.

    ``logprobs`` has the length of ``response_token_ids``, or is empty where the engine gave none.
    """

    prompt_token_ids: array[int]
    response_token_ids: array[int]
    logprobs: array[float]
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong in a call that is no error of the call itself."""

    error_class: ErrorClass
    detail: str  # what was found, in words
    call_id: str | None = None  # the tool call that it is about: what failed may be an earlier call's doing


@dataclass(frozen=True, slots=True)
class Span:
    """One recorded model call, ending in a response or an error, never both."""

    rollout_id: str
    attempt: int
    wire: str  # "chat", "completions"
    started_at: float
    ended_at: float
    request: bytes  # the agent's own body, without what capture added
    fidelity: Fidelity
    span_id: int | None = None
    role: str | None = None
    model: str | None = None  # as the agent asked for it
    policy: str | None = None  # None: the call did not go to a trainable policy
    policy_version: int | None = None  # when the call was sent to the engine
    policy_version_end: int | None = None  # when its last token was made
    attributed_by: str = "none"  # path, header, key, conversation, none ...: docs/attribution.md has them
    attribution_confidence: float = 0.0
    first_byte_at: float | None = None
    streamed: bool = False
    status: int | None = None  # HTTP status the agent saw; None: no response at all
    response_id: str | None = None
    response: bytes | None = None  # JSON, assembled where it was streamed; None on error
    error_class: ErrorClass | str | None = None  # a text only where the row is of before there were classes
    error: str | None = None
    usage: Mapping[str, Any] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)  # temperature, top_p, ...
    generations: tuple[Generation, ...] = ()
    retry: int = 0  # tries of the same call before this one, as the client's SDK says
    # Digest of messages and reply, where the conversation may be needed to attribute a later call.
    conversation: bytes | None = None
    findings: tuple[Finding, ...] = ()  # beside a response or an error
    redacted: str | None = None  # names of the rules that took something out of it, with commas between
    # Counted by the store: the first generation's prompt, all responses. None: there are no token ids.
    prompt_tokens: int | None = field(default=None, compare=False)
    response_tokens: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Rollout:
    """One task carried out once by an agent."""

    rollout_id: str
    task_id: str | None = None
    state: RolloutState = RolloutState.OPEN
    created_at: float = 0.0
    ended_at: float | None = None
    reason: str | None = None  # why it ended as it did
    error_class: ErrorClass | None = None  # why it failed: the root cause
    presumed: bool = False  # nobody told that it ended: that was concluded from its silence
    incomplete: str | None = None  # why capture is known to have lost a span of it; None: whole
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a rollout; a retry adds one, never overwrites."""

    rollout_id: str
    number: int
    started_at: float
    ended_at: float | None = None
    state: RolloutState = RolloutState.OPEN
    reason: str | None = None
    error_class: ErrorClass | None = None


@dataclass(frozen=True, slots=True)
class Reward:
    """An entry of the ledger, for a rollout, an attempt (``attempt`` set) or a span (``span_id`` set).

    The ledger only grows. Of the values with the same target and name, the last one counts. An entry
    without a value is a comment or a demonstration alone: it leaves the value before it as it is.
    """

    rollout_id: str
    value: float | None  # finite
    reward_id: int | None = None
    attempt: int | None = None
    span_id: int | None = None
    name: str = "reward"
    source: str | None = None
    comment: str | None = None
    idempotency_key: str | None = None
    created_at: float = 0.0
    # What would have been right: a text, or a message as the API has it.
    demonstration: str | Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """One published set of weights of a policy. Version 0 is what the user brought."""

    policy: str
    version: int
    path: str  # directory that the engine and the trainer can read
    status: VersionStatus
    created_at: float = 0.0
    parent: int | None = None
    run_id: int | None = None
    # Fixed prompt and its logprobs under these weights, computed by the trainer:
    # {"prompt_token_ids": [...], "logprobs": [...]} with len(logprobs) == len(ids) - 1.
    probe: Mapping[str, Any] | None = None
    note: str | None = None  # why rejected or retired


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """One pass of the trainer over what it drained."""

    run_id: int
    policy: str
    state: RunState
    owner: str  # host:pid of the trainer
    started_at: float
    lease_expires_at: float
    ended_at: float | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RecordedRollout:
    """A rollout with everything a trainer needs: its last attempt's spans in order of start."""

    rollout: Rollout
    attempt: int
    spans: tuple[Span, ...]
    rewards: tuple[Reward, ...]  # those that count: corrected ones are left out
    value: float | None = None  # its return (returns.py); None: it has none
    again: bool = False  # a committed run has trained on it before, for another return or fewer calls
    # Where again for the same return: the call up to which that run had it.
    trained_until: int | None = None
    # Where again: the rest of its group in those runs, as `Runs.recent_members` has them.
    companions: tuple[RecordedRollout, ...] = ()
    for_return: bool = (
        True  # False: only its demonstrations are this run's, a run has its return or it has none
    )
    demonstrations: tuple[Reward, ...] = ()  # that no run has taken, where the run asked for them


@dataclass(frozen=True, slots=True)
class KeyOwner:
    """What the calls made with an issued key belong to."""

    rollout_id: str
    attempt: int
    role: str | None = None


@dataclass(frozen=True, slots=True)
class ConversationEnd:
    """A call with which a conversation ended, so far: what the next one may go on from."""

    rollout_id: str
    attempt: int
    conversation: bytes | None
    response: bytes
    extended: bool  # a later call of the rollout ended well


@dataclass(frozen=True, slots=True)
class RolloutSummary:
    """A rollout as a list shows it."""

    rollout: Rollout
    attempts: int
    spans: int  # of all attempts
    errors: int  # spans that ended in an error
    reward: float | None  # its return, of its last attempt (returns.py); None: it has none
    last_span_at: float | None  # when its newest span ended


@dataclass(frozen=True, slots=True)
class FailureExample:
    """One call (``span_id`` set) or rollout that failed."""

    at: float
    rollout_id: str
    span_id: int | None
    message: str | None  # the upstream's error, what was found, or the rollout's reason


@dataclass(frozen=True, slots=True)
class FailureSummary:
    """One class of failure over a stretch of time."""

    error_class: str
    part: str | None  # role, model or policy version, where these are told apart
    calls: int  # that ended in it, or hold it
    rollouts: int  # with such a call, or that failed by it
    failed_rollouts: int  # that failed by it
    share: float  # of all calls of that time
    first: FailureExample
    last: FailureExample


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits for the trainer of one policy."""

    rollouts_ready: int  # what a drain would give
    rollouts_unrewarded: int  # the same but for a reward
    spans: int  # of the policy, in the rollouts that are ready
    rollouts_again: int = 0  # of those that are ready, the ones that a run has trained on before
    rollouts_held: int = 0  # rewarded, and not ready until their round of the task pool is over
