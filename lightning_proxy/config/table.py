"""What every table of settings is made of: the base class, and URLs as they are given."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError


class Table(BaseModel):
    """A table of ``lightning.toml``: immutable, and without settings that are not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def _base_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be a URL that begins with http:// or https://")
    if parts.query or parts.fragment:
        raise ValueError("must be a URL without a query")
    return url.rstrip("/")


def _root_url(url: str) -> str:
    url = _base_url(url)
    if urlsplit(url).path.endswith("/v1"):
        raise ValueError("must be the proxy's own address, without /v1")
    return url


BaseUrl = Annotated[str, AfterValidator(_base_url)]
RootUrl = Annotated[str, AfterValidator(_root_url)]

T = TypeVar("T", bound=BaseModel)


def overridden(table: T, changes: Mapping[str, Any], name: str) -> T:
    """The table with some settings changed. ``name``: of the table, for messages.

    What was given is told from defaults as before (``model_fields_set``). Raises ``ValueError`` with what
    is wrong, in one line.
    """
    if unknown := [key for key in changes if key not in type(table).model_fields]:
        raise ValueError(
            f"unknown setting {name}.{unknown[0]}{_nearest(unknown[0], type(table).model_fields)}"
        )
    given = {key: getattr(table, key) for key in table.model_fields_set}
    try:
        return type(table).model_validate({**given, **changes})
    except ValidationError as error:
        problem = error.errors()[0]
        reason = str(problem.get("ctx", {}).get("error", "")) or problem["msg"]
        if not problem["loc"]:  # a rule over several settings
            raise ValueError(reason) from None
        raise ValueError(f"{name}.{problem['loc'][0]} is {problem['input']!r}: {reason}") from None


def _nearest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
