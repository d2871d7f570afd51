"""JSON in texts, names that stand twice, escapes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_proxy.redaction.inside import changed_inside, json_inside, names_twice, unescaped

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


@pytest.mark.parametrize("text", ["", "{", "a {}", '"{}"', "1", "{]", "{} {}", '{"a": 1', "[" * 2000])
def test_a_text_that_is_no_json_holds_none(text: str) -> None:
    assert json_inside(text) is None


def test_json_too_deep_to_be_read_is_not_taken_for_a_text() -> None:
    with pytest.raises(RecursionError):
        json_inside("[" * 5000 + "]" * 5000)


@given(VALUES, st.sampled_from([None, (",", ":"), (" ,", " : ")]), st.booleans())
def test_what_was_written_from_a_value_names_nothing_twice(value: Any, spelt: Any, ascii_only: bool) -> None:
    text = json.dumps({"a": value}, separators=spelt, ensure_ascii=ascii_only)
    assert json_inside(text) == {"a": json.loads(text)["a"]}
    assert changed_inside(text, lambda inner: inner) is text
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        return
    assert not names_twice(raw, json_inside(text))


@pytest.mark.parametrize(
    "text", ['{"a":1,"a":1}', r'{"a":1,"\u0061":2}', '[{"b":{"a":1, "a":2}}]', '{"a":{},"x":NaN,"a":{}}']
)
def test_a_name_that_stands_twice_is_seen(text: str) -> None:
    inner = json_inside(text)
    assert names_twice(text, inner)
    assert names_twice(text.encode(), inner)
    made = changed_inside(text, lambda inner: inner)
    assert not names_twice(made, json_inside(made))


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (r"a\u0040b", "a@b"),
        (r"a\\\\u0040b", "a@b"),
        (r"\ud83d\ude00", "😀"),
        (r"\ud83d!", "\ufffd!"),
        (r"\u00e9t\u00E9\n", r"été\n"),
        (r"\u004", r"\u004"),
        ("plain", "plain"),
    ],
)
def test_escapes_are_undone(text: str, read: str) -> None:
    assert unescaped(text) == read
