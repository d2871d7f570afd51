"""Conversations and preferences for LLaMA-Factory, in its ``sharegpt`` format.

https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md: what the model reads (``human``,
``observation``) and what it says (``gpt``, ``function_call``) take turns, beginning with the former. Tools
and tool calls are JSON text. What does not fit into that is left out, and counted by its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from lightning_proxy.errors import InvalidInput
from lightning_proxy.store import Store

from .conversations import Conversation, conversations_of
from .files import whole_file
from .messages import ASSISTANT, SYSTEM, TOOL, Json, Message, Tool, same_turn
from .records import RecordedAttempt, Selection, attempts, demonstration_of, spans_of

SFT, PREFERENCES = "lightning_sft", "lightning_preferences"  # names of the datasets
_HUMAN, _GPT, _CALL, _OBSERVATION = "human", "gpt", "function_call", "observation"
_READ = frozenset((_HUMAN, _OBSERVATION))


@dataclass(slots=True)
class LlamaFactoryReport:
    """What was written, and what was left out."""

    conversations: int = 0
    preferences: int = 0
    demonstrations: int = 0  # of both: what somebody said would have been right
    left_out: Counter[str] = field(default_factory=Counter)


class _Unfit(Exception):
    """A conversation that the format does not hold; says why in one word."""


@dataclass(slots=True)
class _Extremes:
    """The best and the worst conversation about a task, so far."""

    best: Conversation
    worst: Conversation


def write(store: Store, selection: Selection, directory: Path, *, min_gap: float = 0.0) -> LlamaFactoryReport:
    """Write both datasets and ``dataset_info.json`` into a directory; one that is there is added to.

    ``min_gap``: how much more than the rejected one the chosen conversation must have been worth.
    """
    directory.mkdir(parents=True, exist_ok=True)
    report = LlamaFactoryReport()
    extremes: dict[tuple[str, str | None], _Extremes] = {}
    with (
        whole_file(directory / f"{SFT}.jsonl") as sft_part,
        whole_file(directory / f"{PREFERENCES}.jsonl") as pairs_part,
        sft_part.open("wb") as sft,
        pairs_part.open("wb") as pairs,
    ):
        for recorded in attempts(store, selection):
            found = conversations_of(recorded, spans_of(store, recorded, selection))
            for conversation in found:
                report.conversations += _written(sft, partial(sft_row, conversation), report)
                _remember(extremes, conversation)
            for right, wrong in _demonstrated(recorded, found):
                report.demonstrations += _written(sft, partial(sft_row, right), report)
                report.preferences += _written(pairs, partial(preference_row, right, wrong), report)
        for each in extremes.values():
            if _gap(each) > max(0.0, min_gap) or (min_gap > 0 and _gap(each) == min_gap):
                report.preferences += _written(pairs, partial(preference_row, each.best, each.worst), report)
    _describe(directory / "dataset_info.json")
    return report


def sft_row(conversation: Conversation) -> Json:
    """A conversation as an example to learn from."""
    return {**_row(conversation, conversation.messages), **_about(conversation)}


def preference_row(best: Conversation, worst: Conversation) -> Json:
    """Two conversations as far as they are the same, and how each went on."""
    length = _common(best.messages, worst.messages)
    if length in (0, len(best.messages), len(worst.messages)):
        raise _Unfit("same_conversation")
    chosen, rejected = best.messages[length], worst.messages[length]
    if chosen.role != ASSISTANT or rejected.role != ASSISTANT:
        raise _Unfit("nothing_in_common")  # another question, or a tool that answered otherwise
    row = _row(best, (*best.messages[:length], chosen))
    *turns, last = row.pop("conversations")
    return {
        "conversations": turns,
        "chosen": last,
        "rejected": _row(worst, (*worst.messages[:length], rejected))["conversations"][-1],
        **row,
        "task_id": best.task_id or "",
        "reward_chosen": best.reward,
        "reward_rejected": worst.reward,
    }


# -- one conversation ---------------------------------------------------------------------------------


def _row(conversation: Conversation, messages: Sequence[Message]) -> Json:
    if conversation.redacted:
        raise _Unfit("redacted")
    if any(message.parts for message in messages):
        raise _Unfit("not_only_text")
    first = next((i for i, message in enumerate(messages) if message.role != SYSTEM), len(messages))
    turns = list(_turns(messages[first:]))
    expected = [_READ, frozenset((_GPT, _CALL))]
    if len(turns) < 2 or any(turn["from"] not in expected[i % 2] for i, turn in enumerate(turns)):
        raise _Unfit("no_turns")
    if not turns[-1]["value"]:
        raise _Unfit("empty")
    return {
        "conversations": turns,
        "system": "\n\n".join(message.content for message in messages[:first]),
        "tools": _tools(conversation.tools),
    }


def _turns(messages: Iterable[Message]) -> Iterator[Json]:
    """Turns that take turns: what several messages said to the model in one go, is one."""
    pending: list[tuple[str, str]] = []
    for message in messages:
        if message.role != ASSISTANT:
            pending.append((_OBSERVATION if message.role == TOOL else _HUMAN, message.content))
            continue
        if pending:
            yield _one(pending)
            pending = []
        if message.tool_calls:
            calls = [{"name": c.name, "arguments": _arguments(c.arguments)} for c in message.tool_calls]
            yield {"from": _CALL, "value": orjson.dumps(calls if len(calls) > 1 else calls[0]).decode()}
        else:
            yield {"from": _GPT, "value": message.content}
    if pending:
        yield _one(pending)


def _one(said: list[tuple[str, str]]) -> Json:
    only_tools = all(kind == _OBSERVATION for kind, _ in said)
    return {"from": _OBSERVATION if only_tools else _HUMAN, "value": "\n".join(text for _, text in said)}


def _tools(tools: Iterable[Tool]) -> str:
    known = [
        {
            "name": tool.name,
            "description": tool.description or "",
            "parameters": orjson.loads(tool.parameters) if tool.parameters else {},
        }
        for tool in tools
    ]
    return orjson.dumps(known).decode() if known else ""


def _arguments(text: str) -> Any:
    try:
        return orjson.loads(text or "{}")
    except orjson.JSONDecodeError as error:
        raise _Unfit("malformed_tool_call") from error


def _about(conversation: Conversation) -> Json:
    return {
        "rollout_id": conversation.rollout_id,
        "task_id": conversation.task_id or "",
        "role": conversation.role or "",
        "reward": conversation.reward,
    }


# -- several ----------------------------------------------------------------------------------------


def _remember(extremes: dict[tuple[str, str | None], _Extremes], conversation: Conversation) -> None:
    if conversation.task_id is None or conversation.reward is None:
        return
    known = extremes.setdefault(
        (conversation.task_id, conversation.role), _Extremes(conversation, conversation)
    )
    if conversation.reward > (known.best.reward or 0.0):
        known.best = conversation
    if conversation.reward < (known.worst.reward or 0.0):
        known.worst = conversation


def _gap(extremes: _Extremes) -> float:
    return (extremes.best.reward or 0.0) - (extremes.worst.reward or 0.0)


def _common(first: Sequence[Message], second: Sequence[Message]) -> int:
    """How many messages both begin with."""
    length = 0
    for ours, theirs in zip(first, second, strict=False):
        if same_turn(ours) != same_turn(theirs):
            break
        length += 1
    return length


def _demonstrated(
    recorded: RecordedAttempt, found: Sequence[Conversation]
) -> Iterator[tuple[Conversation, Conversation]]:
    """A conversation as it should have ended, and as it did: the last one, or the one whose call it is of."""
    given = {reward.span_id: text for reward in recorded.ledger if (text := demonstration_of(reward))}
    for span_id, text in given.items():
        meant = [each for each in found if span_id is None or each.span_ids[-1] == span_id]
        if meant:
            right = replace(meant[-1], messages=(*meant[-1].prompt, Message(ASSISTANT, text)))
            yield right, meant[-1]


def _written(file: BinaryIO, make: Callable[[], Json], report: LlamaFactoryReport) -> int:
    try:
        row = make()
    except _Unfit as why:
        report.left_out[str(why)] += 1
        return 0
    file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    return 1


def _describe(path: Path) -> None:
    """Say in LLaMA-Factory's list of datasets what the files are; what else it lists stays."""
    try:
        known = orjson.loads(path.read_bytes()) if path.exists() else {}
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"{path} is no JSON, and so not LLaMA-Factory's list: {error}") from error
    columns = {"messages": "conversations", "system": "system", "tools": "tools"}
    known[SFT] = {"file_name": f"{SFT}.jsonl", "formatting": "sharegpt", "columns": columns}
    known[PREFERENCES] = {
        "file_name": f"{PREFERENCES}.jsonl",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {**columns, "chosen": "chosen", "rejected": "rejected"},
    }
    path.write_bytes(orjson.dumps(known, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
