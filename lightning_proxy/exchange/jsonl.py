"""Rows as JSON lines."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import orjson

from .files import whole_file
from .messages import Json
from .rows import Columns, huggingface_features


def write(path: Path, rows: Iterable[Json], columns: Columns) -> int:
    """Write one line per row, and the columns' types beside it (``features_path``); returns the rows.

    The types are for Hugging Face's ``datasets``, which else takes them from the first 10 MB and
    stumbles where a column held nothing until then.
    """
    count = 0
    with whole_file(path) as part, part.open("wb") as file:
        for row in rows:
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            count += 1
    features_path(path).write_bytes(
        orjson.dumps(huggingface_features(columns), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    )
    return count


def features_path(path: Path) -> Path:
    """``spans.jsonl`` -> ``spans.features.json``."""
    return path.with_suffix(".features.json")
