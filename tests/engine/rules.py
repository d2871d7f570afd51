"""Replies chosen by what a request says, so that several conversations can go on at once.

A rules file is a JSON list, the first rule that fits a request wins::

    [{"when": "(?P<who>ann|bob)-1", "text": "Hello, \\g<who>."},
     {"when": "(?P<who>ann|bob)", "tool_calls": [["greet", "{\"name\": \"\\g<who>\"}"]]}]

``when`` is a regular expression that is looked for in the request's body, as it was sent. All other
keys are those of :class:`Script`; ``text`` and ``tool_calls`` may refer to groups of the match.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engine.script import Script


@dataclass(frozen=True, slots=True)
class Rule:
    """What becomes of each request in whose body a pattern is found."""

    when: re.Pattern[str]
    changes: Mapping[str, Any]

    def script(self, body: str, default: Script) -> Script | None:
        """The script for a request, or ``None`` where the rule does not fit it."""
        found = self.when.search(body)
        if found is None:
            return None
        changes = dict(self.changes)
        if "text" in changes:
            changes["text"] = found.expand(changes["text"])
        if "tool_calls" in changes:
            changes["tool_calls"] = [(name, found.expand(args)) for name, args in changes["tool_calls"]]
        return default.with_(changes)


def read_rules(file: Path) -> tuple[Rule, ...]:
    """The rules of a file. Raises ``ValueError`` for what cannot be a rule."""
    rules = []
    for entry in json.loads(file.read_text(encoding="utf-8")):
        changes = dict(entry)
        rules.append(Rule(re.compile(changes.pop("when")), changes))
        Script().with_(changes)  # an unknown key is found at the start, not at the first request
    return tuple(rules)
