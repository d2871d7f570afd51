"""Which agent calls, by its system prompt and its tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from lightning_proxy.config.settings import RoleSettings
from lightning_proxy.proxy.roles import Roles, fingerprint

WRITER = "You are a writer. Today is Monday, 3 March 2025, 10:42 AM. Files are in /home/ann/project."


def request(system: str, *tools: str) -> dict[str, Any]:
    return {
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": "go"}],
        "tools": [{"type": "function", "function": {"name": name}} for name in tools],
    }


def role(name: str, **values: Any) -> RoleSettings:
    return RoleSettings(name=name, **values)


@pytest.mark.parametrize(
    "system",
    [
        "You are a writer. Today is Friday, 14 November 2026, 9:05 PM. Files are in /tmp/x9.",
        "you are a WRITER.\n\n Today is\tMonday, 3 March 2025, 10:42 am. Files are in C:\\work.",
    ],
)
def test_dates_numbers_paths_case_and_space_do_not_change_a_fingerprint(system: str) -> None:
    assert fingerprint(system, ("a", "b")) == fingerprint(WRITER, ("b", "a"))


@pytest.mark.parametrize(
    ("system", "tools"),
    [(WRITER, ("a",)), (WRITER, ()), (WRITER.replace("writer", "critic"), ("a", "b")), ("", ("a", "b"))],
)
def test_other_words_and_other_tools_do(system: str, tools: Sequence[str]) -> None:
    assert fingerprint(system, tools) != fingerprint(WRITER, ("a", "b"))


def test_the_first_role_that_fits_in_all_that_it_says_is_the_calls() -> None:
    roles = Roles(
        [
            role("by-mark", fingerprint=fingerprint("You plan.", ("search",))),
            role("both", system_contains="You write", tools=("save",)),
            role("by-words", system_contains="You write"),
            role("by-tools", tools=("search", "open")),
        ]
    )
    found = [
        roles.role_of("chat", request(*words))
        for words in (
            ("You plan.", "search"),
            ("You write.", "save", "open"),
            ("You write.",),
            ("You plan.", "open", "search", "save"),
            ("You plan.", "open"),
        )
    ]
    assert found == ["by-mark", "both", "by-words", "by-tools", None]
    assert roles.role_of("chat", request("You plan.", "search")) == "by-mark"  # known by now


@pytest.mark.parametrize("request_", [{}, {"messages": [3]}, {"messages": 3}, {"tools": [3]}])
def test_an_odd_request_has_no_role(request_: dict[str, Any]) -> None:
    assert Roles([role("x", system_contains="y")]).role_of("chat", request_) is None


def test_prompts_that_differ_each_time_do_not_fill_the_memory() -> None:
    roles = Roles([role("x", system_contains="y")])
    for number in range(3000):
        roles.role_of("chat", request(f"prompt {number}"))
    assert len(roles._known) == 1000
