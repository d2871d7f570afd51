"""Keys that came with a request, taken out of what is stored of its answer.

An upstream's error may repeat the key that it did not like; a prompt is the agent's own and is
stored as it is. No I/O.
"""

from __future__ import annotations

from collections.abc import Mapping

REDACTED = "[redacted]"
_HEADERS = ("Authorization", "Proxy-Authorization", "x-api-key", "api-key", "x-goog-api-key")
_SHORTEST = 8  # characters: what agents send where no key is needed ("EMPTY", "none") is no secret
# An answer is what is learnt from: a stand-in of a key that is a word ("placeholder") may well be in it.
_SHORTEST_IN_ANSWERS = 16


def secrets_of(headers: Mapping[str, str], *more: str | None) -> tuple[str, ...]:
    """The keys and cookies that ``headers`` hold, and ``more``."""
    found = [value.rpartition(" ")[2] for name in _HEADERS if (value := headers.get(name))]
    if cookies := headers.get("Cookie"):
        found += [pair.partition("=")[2].strip() for pair in cookies.split(";")]
    found += [secret for secret in more if secret]
    return tuple([secret for secret in found if len(secret) >= _SHORTEST])


def without_secrets(text: str, secrets: tuple[str, ...]) -> str:
    """``text`` of an error without them."""
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    return text


def answer_without_secrets(answer: bytes, secrets: tuple[str, ...]) -> bytes:
    """A response without them."""
    for secret in secrets:
        if len(secret) >= _SHORTEST_IN_ANSWERS and (raw := secret.encode("utf-8", "replace")) in answer:
            answer = answer.replace(raw, REDACTED.encode())
    return answer
