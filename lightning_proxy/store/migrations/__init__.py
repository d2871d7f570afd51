"""The tables, as migrations of sqlite-utils: one file per change, never edited once landed.

``m01_first_schema`` is where to begin reading; each later file says in its first line what it adds, and
enters its function in ``registry``. They are applied in the order of their names. ``connection.py`` has
their number as ``SCHEMA_VERSION``, so that a database that is up to date is opened without importing
this (and sqlite-utils).
"""

import pkgutil
from importlib import import_module

from lightning_proxy.store.migrations.registry import migrations

for _name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    if _name.startswith("m"):
        import_module(f"{__name__}.{_name}")

__all__ = ["migrations"]
