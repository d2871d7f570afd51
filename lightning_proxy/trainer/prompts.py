"""The first prompt of a rollout, without what changes from run to run of the same task."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import orjson

_PROMPT = ("system", "instructions", "messages", "input", "prompt")  # of the APIs, in the order of a prompt
_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*\.?"
# Short numbers and plain words stay: "2 + 2" and "3 + 5" are two tasks.
_VOLATILE = re.compile(
    r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"  # UUIDs
    r"|\b\d{4}-\d{2}-\d{2}(?:[T ]\d{2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?:Z|[+-]\d{2}:?\d{2})?)?\b"  # ISO 8601
    r"|\b\d{1,2}[./]\d{1,2}[./](?:\d{4}|\d{2})\b"
    rf"|\b{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?,? \d{{4}}\b|\b\d{{1,2}}\.? {_MONTH} \d{{4}}\b"
    r"|\b\d{1,2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?: ?[ap]m)?\b"  # times of day
    r"|\b(?=[\w-]*\d)(?=[\w-]*[a-z_])[\w-]{16,}\b"  # ids: long words of letters and digits
    r"|\b\d{9,}\b",  # timestamps, ids
    re.IGNORECASE,
)


def normalised_prompt(request: bytes) -> str | None:
    """A hash of a request's prompt without dates, times, ids, long numbers and runs of white space.

    ``None`` where the body is no JSON object or holds no prompt: it is as good as no other.
    """
    try:
        body = orjson.loads(request)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(body, dict):
        return None
    texts = [text for name in _PROMPT for text in (name, *_texts(body.get(name)))]
    if len(texts) == len(_PROMPT):
        return None
    masked = "\n".join(" ".join(_VOLATILE.sub("#", text).split()) for text in texts)
    return hashlib.sha256(masked.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _texts(value: Any) -> list[str]:
    """All texts in a JSON value, in its order."""
    found: list[str] = []
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            found.append(each)
        elif isinstance(each, dict):
            waiting += reversed(each.values())
        elif isinstance(each, list):
            waiting += reversed(each)
    return found
