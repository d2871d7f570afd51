"""When two first prompts are of the same task though they differ."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lightning_proxy.trainer.prompts import normalised_prompt


def chat(text: str, system: str = "You help.") -> bytes:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    return json.dumps({"model": "policy", "messages": messages}).encode()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("It is 2025-03-01. Go.", "It is 2024-12-24. Go."),
        ("at 2025-03-01T10:00:00Z", "at 2025-03-02T11:30:05.123Z"),
        ("March 3, 2025", "Dec 24, 2024"),
        ("3 March 2025", "24. December 2024"),
        ("now: 09:15 AM", "now: 23:59:01"),
        ("id 0f8fad5b-d9cb-469f-a165-70867728950e", "id 7c9e6679-7425-40de-944b-e07fc1f90ae7"),
        ("session ab12cd34ef56ab78cd", "session 99zz88yy77xx66ww55"),
        ("seed 1712345678", "seed 1812345999"),
        ("two  words\n", "two words"),
    ],
)
def test_dates_times_ids_long_numbers_and_white_space_make_no_difference(one: str, other: str) -> None:
    assert normalised_prompt(chat(one)) == normalised_prompt(chat(other)) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 2 + 2?", "What is 3 + 5?"),
        ("the 3rd largest", "the 4th largest"),
        ("in table orders_2", "in table orders_3"),
        ("Sum the column", "Average the column"),
        ("version 1.2.3", "version 1.2.4"),
    ],
)
def test_what_tells_tasks_apart_stays(one: str, other: str) -> None:
    assert normalised_prompt(chat(one)) != normalised_prompt(chat(other))


def test_the_system_prompt_is_part_of_it_and_settings_of_the_call_are_not() -> None:
    assert normalised_prompt(chat("Go.", "You write.")) != normalised_prompt(chat("Go.", "You check."))
    body = json.loads(chat("Go.")) | {"temperature": 0.5, "metadata": {"run": "r-17"}}
    assert normalised_prompt(json.dumps(body).encode()) == normalised_prompt(chat("Go."))


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "Go on 2025-03-01"},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Go on 2025-03-01"}]}]},
        {"system": "s", "messages": [{"role": "user", "content": [{"type": "text", "text": "2025-03-01"}]}]},
    ],
)
def test_every_api_has_its_prompt_somewhere(body: dict[str, Any]) -> None:
    other = json.dumps(body).replace("2025-03-01", "2024-12-24").encode()
    assert normalised_prompt(json.dumps(body).encode()) == normalised_prompt(other) is not None


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"{", b'{"messages": []}', b'{"messages": 7}'])
def test_a_body_without_a_prompt_is_like_no_other(body: bytes) -> None:
    assert normalised_prompt(body) is None
