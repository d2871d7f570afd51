"""JSON paths: what they lead to, and that nothing else changes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lightning_proxy.redaction.paths import Every, changed_at, parse_path

BODY: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "a", "ssn": "1"},
        {"role": "user", "content": [{"type": "text", "text": "b", "ssn": "2"}]},
    ],
    "metadata": {"email": "e", "odd name": "o"},
    "tool": {"arguments": '{"password": "p", "list": [1, {"ssn": "3"}]}'},
}


def taken(path: str) -> list[Any]:
    found: list[Any] = []

    def change(value: Any) -> Any:
        found.append(value)
        return "X"

    changed_at(BODY, parse_path(path), change)
    return found


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("metadata.email", ["e"]),
        ("$.metadata.email", ["e"]),
        ('metadata["odd name"]', ["o"]),
        ("metadata['odd name']", ["o"]),
        ("metadata.*", ["e", "o"]),
        ("messages[*].content", ["a", [{"type": "text", "text": "b", "ssn": "2"}]]),
        ("messages[1].content[0].text", ["b"]),
        ("messages[7].content", []),
        ("**.ssn", ["1", "2", "3"]),
        ("messages.**.text", ["b"]),
        ("tool.arguments.password", ["p"]),
        ("nothing.at.all", []),
    ],
)
def test_a_path_leads_to(path: str, values: list[Any]) -> None:
    assert taken(path) == values


def test_what_a_path_does_not_lead_to_stays_the_same_object() -> None:
    assert changed_at(BODY, parse_path("nothing.here"), lambda _: "X") is BODY
    made = changed_at(BODY, parse_path("metadata.email"), lambda _: "X")
    assert made["messages"] is BODY["messages"]
    assert BODY["metadata"]["email"] == "e"


def test_a_text_that_is_json_is_written_again_as_json() -> None:
    made = changed_at(BODY, parse_path("**.password"), lambda _: "X")
    assert json.loads(made["tool"]["arguments"]) == {"password": "X", "list": [1, {"ssn": "3"}]}


def test_steps() -> None:
    assert parse_path('$.a[*].**.*["b c"][3]') == ("a", Every.ITEM, Every.DEPTH, Every.FIELD, "b c", 3)


@pytest.mark.parametrize("path", ["", "$", "a[", "a[*", "a..b", "a b", "**", "a.**", "[x]"])
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"step|end"):
        parse_path(path)
