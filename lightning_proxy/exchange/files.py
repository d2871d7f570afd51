"""Files that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_proxy.errors import InvalidInput


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write; it takes the place of ``path`` once all of it is written.

    Raises ``InvalidInput`` where the directory does not exist.
    """
    if not path.parent.is_dir():
        raise InvalidInput(f"cannot write {path}: the directory {path.parent} does not exist")
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
