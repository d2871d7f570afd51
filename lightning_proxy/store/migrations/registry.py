"""Where migrations enter themselves, in the order in which their files are imported."""

from __future__ import annotations

from sqlite_utils.migrations import Migrations

migrations = Migrations("lightning_proxy")


def statements(script: str) -> list[str]:
    """Split a script on ';' at line end, so that it can run inside the migration's transaction."""
    parts = [part.strip() for part in script.split(";\n")]
    return [part for part in parts if part]
