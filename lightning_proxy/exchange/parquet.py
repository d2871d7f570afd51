"""Rows as Parquet, written in row groups as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_proxy.errors import MissingExtra

from .files import whole_file
from .messages import Json
from .rows import Columns, Type

if TYPE_CHECKING:
    import pyarrow as pa

_ROW_GROUP = 1024  # rows
_ROW_GROUP_VALUES = 4_000_000  # numbers and characters, so that rows of long sessions stay few


def write(path: Path, rows: Iterable[Json], columns: Columns) -> int:
    """Write a file of these columns; returns the rows. Raises ``MissingExtra`` without pyarrow."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtra(
            "Parquet needs pyarrow: pip install 'lightning-proxy[export]', or take --format jsonl"
        ) from error
    schema = arrow_schema(columns)
    count = 0
    with whole_file(path) as part, pq.ParquetWriter(part, schema, compression="zstd") as writer:
        for group in _groups(rows):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            count += len(group)
    return count


def arrow_schema(columns: Columns) -> pa.Schema:
    """The columns as Arrow has them."""
    import pyarrow as pa

    return pa.schema([(name, _arrow(kind)) for name, kind in columns.items()])


def _arrow(kind: Type) -> pa.DataType:
    import pyarrow as pa

    if isinstance(kind, str):
        value = pa.type_for_alias(kind.removesuffix("[]"))
        return pa.list_(value) if kind.endswith("[]") else value
    if isinstance(kind, list):
        return pa.list_(_arrow(kind[0]))
    return pa.struct([(name, _arrow(of)) for name, of in kind.items()])


def _groups(rows: Iterable[Json]) -> Iterator[list[Json]]:
    rows = iter(rows)
    while group := list(islice(rows, 1)):
        values = _size(group[0])
        while (
            values < _ROW_GROUP_VALUES and len(group) < _ROW_GROUP and (more := next(rows, None)) is not None
        ):
            group.append(more)
            values += _size(more)
        yield group


def _size(value: Any) -> int:
    """About how much there is of it."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list):
        return len(value) if not value or isinstance(value[0], int | float) else sum(map(_size, value))
    return 1
