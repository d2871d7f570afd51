"""Records as plain JSON values, for the control routes and the command line."""

from __future__ import annotations

from array import array
from dataclasses import fields, is_dataclass
from typing import Any

import orjson

_JSON_BLOBS = frozenset({"request", "response"})


def as_json(record: Any, *, leave_out: frozenset[str] = frozenset()) -> Any:
    """Turn a record (or a list, tuple or mapping of records) into JSON-able values.

    Token ids and logprobs become lists, a digest its hex digits; the stored JSON bodies of a span
    become values again, or text where they are no JSON. ``leave_out`` names fields to skip at every level.
    """
    if is_dataclass(record) and not isinstance(record, type):
        return {
            f.name: _body(value)
            if f.name in _JSON_BLOBS and isinstance(value, bytes)
            else as_json(value, leave_out=leave_out)
            for f in fields(record)
            if f.name not in leave_out
            for value in (getattr(record, f.name),)
        }
    if isinstance(record, array):
        return record.tolist()
    if isinstance(record, bytes):
        return record.hex()
    if isinstance(record, (list, tuple)):
        return [as_json(item, leave_out=leave_out) for item in record]
    if isinstance(record, dict):
        return {key: as_json(value, leave_out=leave_out) for key, value in record.items()}
    return record


def _body(blob: bytes) -> Any:
    try:
        return orjson.loads(blob)
    except orjson.JSONDecodeError:
        return blob.decode("utf-8", "replace")
