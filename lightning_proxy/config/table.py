"""What every table of the settings is: read-only, and closed to names that it does not have."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Table(BaseModel):
    """A table of ``lightning.toml``."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
