"""What becomes of a span: its texts, its tokens, its digest."""

from __future__ import annotations

import json
from array import array
from dataclasses import replace
from typing import Any

import pytest

from lightning_proxy.config import RedactionSettings
from lightning_proxy.errors import InvalidInput
from lightning_proxy.redaction import Redactor
from lightning_proxy.store import Fidelity, Generation, Span
from tests.store.support import make_span


def redactor(*rules: dict[str, Any]) -> Redactor:
    made = Redactor.of(
        [RedactionSettings.model_validate({"name": f"rule-{i}", **r}) for i, r in enumerate(rules)]
    )
    assert made is not None
    return made


def span(request: Any, response: Any = None, **changes: Any) -> Span:
    ended = {"error_class": "timeout"} if response is None else {"response": json.dumps(response).encode()}
    given: dict[str, Any] = {
        "response": None,
        "request": json.dumps(request).encode(),
        "conversation": b"d" * 16,
    }
    return make_span(**{**given, **ended, **changes})


def test_no_rules_no_redactor() -> None:
    assert Redactor.of(()) is None


def test_a_span_that_holds_nothing_stays_the_same_object() -> None:
    clean = span({"messages": ["x"]}, {"choices": []})
    assert redactor({"builtin": "email"}).span(clean) is clean


def test_a_span_that_lost_something_says_why_and_has_no_tokens() -> None:
    made = redactor({"pattern": "s3cret"}, {"path": "metadata.name"}).span(
        span({"metadata": {"name": "Ann"}, "prompt": "s3cret"}, {"id": "x"}, usage=None)
    )
    assert made.redacted == "rule-1,rule-0"  # paths first
    assert json.loads(made.request) == {"metadata": {"name": "[redacted]"}, "prompt": "[redacted]"}
    nothing = (array("i"), array("i"), array("f"))
    assert made.generations == (Generation(*nothing, "stop"), Generation(*nothing, "length"))
    assert made.usage == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert (made.fidelity, made.conversation) == (Fidelity.TEXT, None)


def test_an_incomplete_span_stays_incomplete() -> None:
    made = redactor({"pattern": "x"}).span(span({"a": "x"}, {}, fidelity=Fidelity.INCOMPLETE))
    assert made.fidelity is Fidelity.INCOMPLETE


def test_numbers_are_looked_at_where_people_write_them() -> None:
    ssn = redactor({"pattern": r"\d{9}"})
    answer = {"created": 1700000000, "usage": {"prompt_tokens": 123456789}}
    clean = span({"seed": 123456789}, answer, sampling={"seed": 123456789})
    assert ssn.span(clean) is clean
    made = ssn.span(span({"tools": [{"input": {"ssn": 123456789}}]}, {}))
    assert json.loads(made.request) == {"tools": [{"input": {"ssn": "[redacted]"}}]}


def test_two_rules_of_one_name_are_two_rules() -> None:
    made = redactor({"name": "x", "pattern": "aaaa"}, {"name": "x", "pattern": "bbbb"}).span(
        span({"a": "aaaa bbbb"}, {})
    )
    assert json.loads(made.request) == {"a": "[redacted] [redacted]"}


def test_a_pattern_at_a_path_looks_nowhere_else() -> None:
    made = redactor({"pattern": r"\d+", "path": "**.note"}).span(span({"note": "no. 77", "size": "77"}, {}))
    assert json.loads(made.request) == {"note": "no. [redacted]", "size": "77"}


def test_a_text_is_looked_at_again_by_a_rule_that_has_not_seen_it() -> None:
    """What one rule found clean says nothing of another."""
    both = redactor({"pattern": "aaaa", "where": "request"}, {"pattern": "bbbb", "where": "response"})
    assert both.span(span({"t": "bbbb"}, {"t": "x"})).redacted is None
    assert both.span(span({"t": "x"}, {"t": "bbbb"})).redacted == "rule-1"


def test_what_was_taken_out_before_is_taken_out_again() -> None:
    one = redactor({"pattern": r"(?<=password: )\S+"})
    one.span(span({"m": "password: hunter2"}, {}))
    made = one.span(span({"m": "Is hunter2 good?"}, {"m": {"hunter2": 1}}))
    assert made.redacted == "repeated"
    assert json.loads(made.request) == {"m": "Is [redacted] good?"}
    other = span({"m": "Is hunter2 good?"}, {}, rollout_id="r2")
    assert one.span(other) is other


def test_a_long_text_that_was_taken_out_does_not_crowd_out_a_short_one() -> None:
    one = redactor({"path": "document"}, {"pattern": "hunter2(?=!)"})
    long = "word " * 50_000
    first = one.span(span({"document": long, "m": "hunter2!"}, {"m": f"{long} hunter2"}))
    assert first.response is not None
    assert json.loads(first.response) == {"m": "[redacted]  [redacted]"}
    assert json.loads(one.span(span({"m": "hunter2?"}, {})).request) == {"m": "[redacted]?"}


def test_each_text_gets_its_own_replacement_when_it_comes_again() -> None:
    one = redactor(
        {"pattern": "Ann[a-z]+(?=!)", "replacement": "<name>"}, {"pattern": "Rome!", "replacement": "<city>"}
    )
    one.span(span({"m": "Annabel! Rome!"}, {}))
    assert json.loads(one.span(span({"m": "Annabel in Rome!"}, {})).request) == {"m": "<name> in <city>"}


@pytest.mark.parametrize(
    "asked",
    [
        {"previous_response_id": "resp_1"},
        {"input": [{"type": "item_reference", "id": "x"}]},
        {"prompt": [1, 2]},
    ],
)
def test_a_prompt_that_cannot_be_read_has_no_tokens(asked: dict[str, Any]) -> None:
    made = redactor({"builtin": "email"}).span(span(asked, {}))
    assert made.redacted == "unread"
    only_answers = redactor({"builtin": "email", "where": "response"}).span(span(asked, {}))
    assert only_answers.redacted is None


def test_what_cannot_be_looked_through_keeps_only_its_numbers() -> None:
    deep = b'{"a":' * 900 + b'"s3cret"' + b"}" * 900
    made = redactor({"pattern": "s3cret"}).span(replace(span({}, {}), request=deep))
    assert (made.request, made.response, made.redacted) == (b"{}", b"{}", "unread")
    assert made.generations[0].prompt_token_ids == array("i")


def test_an_answer_that_is_no_json_is_a_text() -> None:
    made = redactor({"pattern": "s3cret"}).span(
        replace(span({}, {}, error="oh s3cret"), response=b"a s3cret")
    )
    assert (made.response, made.error) == (b"a [redacted]", "oh [redacted]")
    empty = replace(span({}, {}), request=b"", response=b"")
    assert redactor({"pattern": "s3cret"}).span(empty) is empty


@pytest.mark.parametrize(
    "body",
    [
        rb'{"m": "s\u0033cret", "x": "\ud83d"}',
        rb'{"metadata": {"name": "Ann"}, "temperature": NaN}',
        b"(\xb5/\xfd\x04\x00s3cret",
        b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\ns3cret\r\n--b--',
    ],
)
def test_a_request_that_is_no_json_keeps_only_its_numbers(body: bytes) -> None:
    rules = redactor({"pattern": "s3cret", "roles": ["a"]}, {"path": "metadata.name", "roles": ["a"]})
    made = rules.span(replace(span({}, {}, role="a"), request=body))
    assert (made.request, made.response, made.redacted) == (b"{}", b"{}", "unread")
    other = replace(span({}, {}, role="b"), request=body)
    assert rules.span(other) is other


@pytest.mark.parametrize("body", [rb'{"m": "s\u0033cret", "x": "\ud83d"}', b"(\xb5/\xfds3cret"])
def test_an_answer_that_cannot_be_read_keeps_only_its_numbers(body: bytes) -> None:
    made = redactor({"pattern": "s3cret"}).span(replace(span({}, {}), response=body))
    assert (made.request, made.response, made.redacted) == (b"{}", b"{}", "unread")


def test_the_id_of_an_answer_goes_where_rules_find_something_in_it() -> None:
    one = redactor({"pattern": "s3cret"})
    made = one.span(span({}, {"id": "r-s3cret"}, response_id="r-s3cret"))
    assert (made.response_id, made.redacted) == (None, "rule-0")
    assert one.span(span({"m": "s3cret"}, {"id": "r-1"}, response_id="r-1")).response_id == "r-1"
    by_path = redactor({"path": "id", "where": "response"})
    assert by_path.span(span({}, {"id": "Ann Lee"}, response_id="Ann Lee")).response_id is None


@pytest.mark.parametrize(("given", "kept"), [("r-1", "r-1"), ("r-s3cret", None)])
def test_the_names_of_a_span_that_cannot_be_read(given: str, kept: str | None) -> None:
    asked = replace(span({}, {}), request=b"NaN", response_id=given, model="s3cret")
    made = redactor({"pattern": "s3cret"}).span(asked)
    assert (made.redacted, made.response_id, made.model) == ("unread", kept, None)


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({"s3cret": 1}, {"[redacted]": 1}),
        ({"seed": "s3cret"}, {"seed": "[redacted]"}),
        ({"usage": {"by": ["s3cret"], "n": 123456789}}, {"usage": {"by": ["[redacted]"], "n": 123456789}}),
        ({"created": {"s3cret": 1}}, {"created": {"[redacted]": 1}}),
    ],
)
def test_names_at_the_top_and_texts_among_counts_are_searched(
    asked: dict[str, Any], kept: dict[str, Any]
) -> None:
    one = redactor({"pattern": "s3cret"}, {"pattern": r"\d{9}"})
    made = one.span(span(asked, asked))
    assert made.response is not None
    assert (json.loads(made.request), json.loads(made.response)) == (kept, kept)


def test_texts_in_the_usage_are_searched() -> None:
    made = redactor({"pattern": "s3cret"}).span(span({}, {}, usage={"by": "s3cret", "prompt_tokens": 3}))
    assert (made.usage, made.redacted) == ({"by": "[redacted]", "prompt_tokens": 3}, "rule-0")


def test_a_text_that_cannot_be_searched_is_not_kept() -> None:
    one = redactor({"pattern": "s3cret"})
    deep = '{"a":' * 900 + '"s3cret"' + "}" * 900
    assert one.text(deep) == "[redacted]"
    assert one.text("a s3cret") == "a [redacted]"
    with pytest.raises(InvalidInput, match="nested too deeply"):
        one.value({"m": deep})


@pytest.mark.parametrize("deep", [300, 400])
def test_a_text_nested_deeper_than_orjson_writes_is_searched(deep: int) -> None:
    one = redactor({"pattern": "s3cret"})
    assert one.value('{"a":' * deep + r'"s\u0033cret"' + "}" * deep).count("[redacted]") == 1


@pytest.mark.parametrize(
    "text",
    [
        r'{"to": "s\u0033cret", "smile": "\ud83d"}',
        r'{"to": "s\u0033cret", "n": NaN}',
        r'{"to": "s\u0033cret", "to": "you"}',
        r'{"to": "s\u0033cret',
        r'{"to": "s\u0033cret"}' + '\n{"to": "you"}',
        r'it says {"to": "s\u0033cret"}',
        r'{"of": "{\"to\": \"s\\u0033cret',
        r'{"of": "{\"to\": \"s\\u0033cret\", \"to\": 1}"}',
    ],
    ids=["half a pair", "NaN", "twice", "cut", "lines", "amid words", "cut in a text", "twice in a text"],
)
def test_what_is_escaped_in_a_text_that_is_not_strict_json_is_found(text: str) -> None:
    made = redactor({"pattern": "s3cret"}).span(span({"m": text}, {}))
    assert "3cret" not in made.request.decode()
    assert made.redacted is not None
    again = redactor({"pattern": "(?<=the )s3cret"})
    again.span(span({"m": "the s3cret"}, {}))
    assert "3cret" not in again.span(span({"m": text}, {})).request.decode()


def test_a_path_leads_into_a_text_with_half_a_surrogate_pair() -> None:
    made = redactor({"path": "**.to"}).span(span({"m": r'{"to": "Ann", "smile": "\ud83d"}'}, {}))
    assert json.loads(json.loads(made.request)["m"]) == {"to": "[redacted]", "smile": "\ud83d"}


@pytest.mark.parametrize("path", ["**.to", "a.to", "m.a.to"])
def test_of_a_name_that_stands_twice_only_the_last_value_is_kept(path: str) -> None:
    twice = '{"a": {"to": "Ann"}, "a": {"by": "Bob"}}'
    rule = redactor({"path": path})
    made = rule.span(replace(span({}, {}), request=twice.encode()))
    assert (made.redacted, json.loads(made.request)) == ("unread", {"a": {"by": "Bob"}})
    made = rule.span(replace(span({}, {}), response=twice.encode()))
    assert (made.redacted, json.loads(made.response or b"")) == ("unread", {"a": {"by": "Bob"}})
    inside = span({"m": twice}, {})
    if path == "a.to":  # which does not lead there
        assert rule.span(inside) is inside
    else:
        made = rule.span(inside)
        assert made.redacted == "unread"
        assert json.loads(json.loads(made.request)["m"]) == {"a": {"by": "Bob"}}
    assert not made.generations[0].prompt_token_ids


def test_the_side_that_no_rule_is_for_may_hold_a_name_twice() -> None:
    asked = replace(span({}, {}), request=b'{"a": 1, "a": 2}')
    assert redactor({"pattern": "s3cret", "where": "response"}).span(asked) is asked


def test_a_secret_that_stands_under_a_name_twice_is_in_no_body() -> None:
    one = redactor({"pattern": "s3cret"})
    for body in (rb'{"m": "s3cret", "m": "x"}', rb'{"m": "s\u0033cret", "m": "x"}'):
        made = one.span(replace(span({}, {}), request=body, response=body))
        assert (made.request, made.response, made.redacted) == (b'{"m":"x"}', b'{"m":"x"}', "unread")
