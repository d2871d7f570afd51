"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    NOTE = "note"  # works; might be meant otherwise
    PROBLEM = "problem"  # keeps the agent from being answered, or the policy from learning


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: ``about`` what, what there is, and what to do about it."""

    level: Level
    about: str
    text: str
    to_do: str | None = None


def ok(about: str, text: str) -> Finding:
    """All is well."""
    return Finding(Level.OK, about, text)


def note(about: str, text: str, to_do: str | None = None) -> Finding:
    """Works; might be meant otherwise."""
    return Finding(Level.NOTE, about, text, to_do)


def problem(about: str, text: str, to_do: str | None = None) -> Finding:
    """Keeps the agent from being answered, or the policy from learning."""
    return Finding(Level.PROBLEM, about, text, to_do)
