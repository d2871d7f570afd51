r"""What the model says, by what it is asked: rules for the fake engine (``tests/engine/rules.py``).

The task is to ride a line to its end: ``amber-0`` is given, the tool says that ``amber-1`` comes next,
and after ``amber-2`` the model answers. So each run makes three calls, its final answer depends on what
its tool said, and the line's name tells every call's run, whatever part of the history is in it.
"""

from __future__ import annotations

import json
from typing import Any

Replies = tuple[dict[str, Any], ...]

WHOLE = ("amber", "birch")  # the lines of runs without streaming
STREAMED = ("cedar", "dahlia")
LINE = rf"(?P<line>{'|'.join(WHOLE + STREAMED)})"
LAST = 2  # number of the last station


def rules(own: Replies = ()) -> str:
    """A rules file: a client's own replies, then those that suit any agent with a ``next_station`` tool."""
    return json.dumps([*own, *_COMMON], indent=1)


def _ride(name: str, arguments: str) -> Replies:
    """Call a tool at stations 0 and 1; the second call comes with a word beside it, as models do."""
    first, second = ([[name, arguments.replace("N", number)]] for number in "01")
    return (
        {"when": rf"{LINE}-1\b", "text": "One more.", "tool_calls": second},
        {"when": rf"{LINE}-0\b", "tool_calls": first},
    )


_END = rf"{LINE}-{LAST}\b"
_ARRIVE: Replies = ({"when": _END, "text": r"The terminus is \g<0>."},)
_COMMON: Replies = (*_ARRIVE, *_ride("next_station", r'{"station": "\g<line>-N"}'))

# Structured output: text is JSON or is not there.
PARSED: Replies = (
    {"when": _END, "text": r'{"terminus": "\g<0>"}'},
    {"when": rf"{LINE}-1\b", "tool_calls": [["next_station", r'{"station": "\g<0>"}']]},
)

# smolagents answers by a tool.
SMOLAGENTS: Replies = (
    {"when": _END, "tool_calls": [["final_answer", r'{"answer": "The terminus is \g<0>."}']]},
)

# DSPy has its own way to write a call, and a last call that makes the answer of what happened.
_FIELD = "[[ ## {} ## ]]\n{}\n\n"


def _dspy(**fields: str) -> str:
    return "".join(_FIELD.format(name, value) for name, value in fields.items()) + "[[ ## completed ## ]]"


def _dspy_step(tool: str, arguments: str) -> str:
    return _dspy(next_thought="Go on.", next_tool_name=tool, next_tool_args=arguments)


DSPY: Replies = (
    {"when": rf"(?s)`next_tool_name`.*{_END}", "text": _dspy_step("finish", "{}")},
    {"when": rf"(?s){_END}", "text": _dspy(reasoning="It ended.", answer=r"The terminus is \g<line>-2.")},
    {"when": rf"{LINE}-1\b", "text": _dspy_step("next_station", r'{"station": "\g<line>-1"}')},
    {"when": rf"{LINE}-0\b", "text": _dspy_step("next_station", r'{"station": "\g<line>-0"}')},
)

# Coding agents have a shell for a tool: the next station is what it computes.
_ECHO = r"echo \g<line>-$((N + 1))"
CODEX: Replies = (*_ARRIVE, *_ride("exec_command", f'{{"cmd": "{_ECHO}"}}'))
CLAUDE_CODE: Replies = (*_ARRIVE, *_ride("Bash", f'{{"command": "{_ECHO}"}}'))
