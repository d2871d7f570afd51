"""Whole conversations: what one agent said in a rollout, each once, however many calls it took. No I/O.

A call whose messages begin with an earlier call's messages and its reply goes on with it. What nobody
goes on from is a conversation of its own, so a rollout of several agents, or one that branched, has several.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lightning_proxy.store import Span

from .messages import ASSISTANT, Message, Tool, exchange_of, same_turn
from .records import RecordedAttempt


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of the last call, with its reply at their end.

    ``redacted``: something was taken out of it before it was recorded.
    """

    rollout_id: str
    attempt: int
    task_id: str | None
    role: str | None
    reward: float | None
    span_ids: tuple[int, ...]
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    redacted: bool = False

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All but the last reply."""
        return self.messages[:-1]

    @property
    def reply(self) -> Message:
        """The last reply."""
        return self.messages[-1]


def conversations_of(recorded: RecordedAttempt, spans: Iterable[Span]) -> list[Conversation]:
    """The conversations of an attempt, in the order in which they ended; of several choices the first.

    Calls that failed, and answers that the agent's SDK did not get and asked for again, are none.
    """
    open_ones: dict[int, Conversation] = {}  # by the hash of their role and messages
    tried: dict[bytes, int] = {}
    for span in spans:
        said = exchange_of(span)
        if span.error_class is not None or not said.replies or not said.messages:
            continue
        if span.retry and span.request in tried:
            open_ones.pop(tried[span.request], None)
        prefixes = _prefix_hashes(span.role, said.messages)
        before = next((p for p in reversed(prefixes) if p in open_ones), None)
        earlier = open_ones.pop(before).span_ids if before is not None else ()
        messages = (*said.messages, said.replies[0].message)
        end = _prefix_hashes(span.role, messages)[-1]
        tried[span.request] = end
        open_ones.pop(end, None)  # the same said again: the later one stands, at its place in the order
        open_ones[end] = Conversation(
            span.rollout_id,
            span.attempt,
            recorded.rollout.task_id,
            span.role,
            recorded.reward,
            (*earlier, span.span_id or 0),
            messages,
            said.tools,
            span.redacted is not None,
        )
    return list(open_ones.values())


def _prefix_hashes(role: str | None, messages: Iterable[Message]) -> list[int]:
    """One number for each beginning that ends in a reply; the last one for all of it, whatever its end."""
    hashes, so_far = [], hash(role)
    for message in messages:
        so_far = hash((so_far, same_turn(message)))
        if message.role == ASSISTANT:
            hashes.append(so_far)
    return [*hashes, so_far]
