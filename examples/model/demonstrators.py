"""Who the model imitates before any reward: they keep to each agent's protocol, and mix things up.

Most wordings have a wrong reading that is more common than the right one; some are clear. Sampled, the model
therefore succeeds now and then, and reinforcement has something to find.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from examples.calculator import prompts as calculator_prompts
from examples.calculator.tasks import SIGNS, STEPS, CalculatorTask, Sum
from examples.search import prompts as search_prompts
from examples.search.tasks import RELATIONS, VALUES, WHAT, WHO, SearchTask, sentence
from examples.sql import prompts as sql_prompts
from examples.sql.tasks import AGGREGATES, WORDINGS, Condition, Query, SqlTask
from lightning_proxy.experiment.tiny_model import Conversation

Item = TypeVar("Item")

# (right reading, favoured wrong one) of a wording; the others share the rest. The first wording is clear, and
# every third one after it; of the calculator's every other one, since both of its steps must be right.
CLEAR = (0.75, 0.2)
MIXED_UP = (0.33, 0.62)
RIGHT_COLUMN = 0.9
RIGHT_SIGN = 0.75
CHECKER_APPROVES_RIGHT = 0.85
CHECKER_APPROVES_WRONG = 0.45
ONE_HOP = 0.05  # answers before the second hop, or leaves out the second step


def read(
    right: Item, readings: Sequence[Item], wording: int, rng: random.Random, *, clear_every: int = 3
) -> Item:
    """How somebody understands wording number ``wording`` who favours the reading after the right one."""
    favoured = readings[(readings.index(right) + 1) % len(readings)]
    p_right, p_favoured = MIXED_UP if wording % clear_every else CLEAR
    draw = rng.random()
    if draw < p_right:
        return right
    if draw < p_right + p_favoured:
        return favoured
    return rng.choice([one for one in readings if one not in (right, favoured)] or [favoured])


# -- text to SQL: one conversation for each role ------------------------------------------------


def sql(task: SqlTask, rng: random.Random) -> list[Conversation]:
    """A query, a verdict on one, and another query in place of a wrong one."""
    query = confused_query(task, rng)
    shown = (task.tables, task.question, str(query), task.result_of(query))
    approves = CHECKER_APPROVES_RIGHT if query == task.query else CHECKER_APPROVES_WRONG
    verdict = sql_prompts.APPROVED if rng.random() < approves else "wrong"
    return [
        _chat(sql_prompts.writer(task.tables, task.question), str(confused_query(task, rng))),
        _chat(sql_prompts.checker(*shown), verdict),
        _chat(sql_prompts.rewriter(*shown), str(confused_query(task, rng))),
    ]


def confused_query(task: SqlTask, rng: random.Random) -> Query:
    """What somebody writes who mixes up aggregates, columns and signs."""
    right = task.query
    columns = task.columns[right.table]
    openings = [text.partition(" {}")[0] for text, _ in WORDINGS]
    wording = next(place for place, opening in enumerate(openings) if task.question.startswith(opening))
    aggregate = read(right.aggregate, AGGREGATES, wording, rng)
    column = right.column if rng.random() < RIGHT_COLUMN else rng.choice(columns)
    where = right.condition
    if where is not None:
        by = where.column if rng.random() < RIGHT_COLUMN else rng.choice(columns)
        sign = where.sign if rng.random() < RIGHT_SIGN else where.other_sign
        where = Condition(by, sign, where.limit)
    return replace(right, aggregate=aggregate, column=column, condition=where)


def _chat(asked: Sequence[tuple[str, str]], said: str) -> Conversation:
    messages: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in asked]
    return Conversation([*messages, {"role": "assistant", "content": said}])


# -- with tools: one conversation ---------------------------------------------------------------


def search(task: SearchTask, rng: random.Random) -> list[Conversation]:
    """Two searches, or one, and an answer."""
    who, what = _wordings_of(task)
    relation = read(task.relation, RELATIONS, who, rng)
    attribute = read(task.attribute, list(VALUES), what, rng)
    steps = []
    subject = task.person
    for hop in (relation, attribute):
        value = task.facts[hop, subject]
        steps.append(({"query": f"{hop} of {subject}"}, sentence(hop, subject, value)))
        subject = value
        if rng.random() < ONE_HOP:
            break
    return [_tool_chat(search_prompts.INSTRUCTIONS, task.question, SEARCH_TOOL, steps, subject)]


def _wordings_of(task: SearchTask) -> tuple[int, int]:
    return next(
        (i, j)
        for i, (who, _) in enumerate(WHO)
        for j, (what, _) in enumerate(WHAT)
        if what.format(who.format(task.person)) == task.question
    )


def calculator(task: CalculatorTask, rng: random.Random) -> list[Conversation]:
    """A sum, and its result."""
    wordings = [
        next(i for i, (text, _) in enumerate(STEPS) if text.format(number) == clause)
        for number, clause in zip(task.sum.numbers[1:], task.clauses, strict=True)
    ]
    first, second = (
        read(sign, SIGNS, wording, rng, clear_every=2)
        for sign, wording in zip(task.sum.signs, wordings, strict=True)
    )
    wanted = Sum(task.sum.numbers, (first, second))
    expression, result = str(wanted), str(wanted.value)
    if rng.random() < ONE_HOP:
        expression, result = str(wanted).partition(")")[0].lstrip("("), str(wanted.first_value)
    steps = [({"expression": expression}, result)]
    return [_tool_chat(calculator_prompts.SYSTEM, task.question, CALCULATOR_TOOL, steps, result)]


def _tool(name: str, description: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": description, "parameters": {}}}


SEARCH_TOOL = _tool(search_prompts.TOOL, search_prompts.TOOL_DESCRIPTION)
CALCULATOR_TOOL = _tool(calculator_prompts.TOOL, calculator_prompts.TOOL_DESCRIPTION)


def _tool_chat(
    system: str,
    question: str,
    tool: dict[str, Any],
    steps: Sequence[tuple[Mapping[str, str], str]],
    said: str,
) -> Conversation:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": system},
        {"role": "user", "content": question},
    ]
    for arguments, result in steps:
        call = {"type": "function", "function": {"name": tool["function"]["name"], "arguments": arguments}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "content": result})
    return Conversation([*messages, {"role": "assistant", "content": said}], [tool])
