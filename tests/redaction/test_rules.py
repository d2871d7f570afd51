"""The patterns that come with us: what they find, and what only looks like it."""

from __future__ import annotations

import time

import pytest

from lightning_proxy.config import RedactionSettings
from lightning_proxy.redaction.rules import BUILT_IN, Rule

FOUND = {
    "email": [
        "ann@example.com", "a.b+c@mail.example.co.uk", "<ann@example.com>", "mailto:ann@example.com",
        "zoë@example.org",
    ],
    "credit_card": ["4111111111111111", "4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005"],
    "iban": ["DE89370400440532013000", "GB29 NWBK 6016 1331 9268 19", "NL91ABNA0417164300"],
    "phone": ["+49 30 901820", "+1 (415) 555-2671", "(415) 555-2671", "415-555-2671", "+442079460018"],
    "api_key": [
        "sk-proj-abcdefghijklmnop", "ghp_" + "a1B2" * 9, "AKIAIOSFODNN7EXAMPLE", "xoxb-1234567890-abc",
        "hf_" + "aB" * 17, "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmN",
        "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----",
    ],
}  # fmt: skip
# What engines, SDKs and people write that is none of it.
INNOCENT = [
    "chatcmpl-4111111111111111", "call_4111111111111111", "chatcmpl-tool-00000000a1b2c3d4",
    "msg_01XFDUDYJgAACzvnptvVoYEL", "4111111111111112", "0000000000000000", "2024-05-01 10:00:00",
    "claude-sonnet-4-20250514", "gpt-4-0613", "3.14159265358979", "1 2 3 4 5 6 7 8 9", "@decorator", "a@b",
    "b8f1c2d3-0000-4000-8000-123456789012", "SELECT 1", "127.0.0.1:8080", "12.345.678",
    "toolu_01A09q90qw90lq917835lq9", "DE00370400440532013000",
]  # fmt: skip


def rule(name: str) -> Rule:
    return Rule.of(RedactionSettings.model_validate({"name": name, "builtin": name}))


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in FOUND.items() for text in texts])
def test_a_built_in_pattern_finds(name: str, text: str) -> None:
    found: list[str] = []
    made = rule(name).replaced(f"It is {text}, I think", found)
    assert found
    assert "[redacted]" in made
    assert text.removeprefix("mailto:").strip("<>") not in made


@pytest.mark.parametrize("text", INNOCENT)
def test_no_built_in_pattern_finds(text: str) -> None:
    found: list[str] = []
    for name in BUILT_IN:
        rule(name).replaced(f"see {text} there", found)
    assert found == []


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize(
    "filler", ["A" * 400_000, "1 " * 200_000, "a.b-c@" * 60_000, "+1" * 200_000, "-" * 400_000]
)
def test_no_text_takes_a_built_in_pattern_long(name: str, filler: str) -> None:
    began = time.process_time()
    rule(name).replaced(filler, [])
    assert time.process_time() - began < 2.0  # 400 KB: some 0.02 s as a rule, minutes where it backtracks


@pytest.mark.parametrize(
    "beginning", ["-----BEGIN PRIVATE KEY-----\n", "eyJabcdefgh-", "eyJabcdefgh_", "eyJabcdefgh.eyJabcdefgh-"]
)
def test_beginnings_without_an_end_take_time_in_proportion(beginning: str) -> None:
    def seconds(length: int) -> float:
        text = beginning * (length // len(beginning))
        began = time.process_time()
        rule("api_key").replaced(text, [])
        return time.process_time() - began

    assert seconds(400_000) < 8 * max(seconds(100_000), 0.05)  # 0.01 s; 25 s where each is read to the end


@pytest.mark.parametrize(
    "key",
    [
        "eyJ" + "aB_-9" * 2_000 + ".eyJ" + "aB_-9-eyJ" * 2_000 + "." + "aB_-9" * 200,
        "-----BEGIN OPENSSH PRIVATE KEY-----\n" + "ab+/=-\n" * 2_000 + "-----END OPENSSH PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\n-----BEGIN X-----\n-----END X-----\n-----END PRIVATE KEY-----",
    ],
    ids=["token", "key", "key with a block inside"],
)
def test_a_long_key_is_found_whole(key: str) -> None:
    found: list[str] = []
    assert rule("api_key").replaced(f"-----BEGIN PRIVATE KEY----- <{key}> eyJ", found) == (
        "-----BEGIN PRIVATE KEY----- <[redacted]> eyJ"
    )
    assert found == [key]


def test_a_replacement_is_taken_to_the_letter() -> None:
    settings = RedactionSettings(name="x", pattern="(a)(b)", replacement=r"\1\g<2>")
    assert Rule.of(settings).replaced("ab", []) == r"\1\g<2>"
