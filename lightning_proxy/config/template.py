"""What ``init`` writes and ``docs/settings.md`` says, both generated from the Settings classes.

``python -m lightning_proxy.config.template > docs/settings.md`` brings the document up to date.
"""

from __future__ import annotations

import inspect
import json
import sys
import textwrap
from pathlib import Path
from typing import Any, get_origin

from pydantic.fields import FieldInfo

from lightning_proxy.config.load import DEFAULT_FILE, ENV_PREFIX, allowed, lists, tables

_TOML_HEAD = f"""\
# Settings of lightning-proxy. Every line below shows a default: remove the `#` to change it.
# An environment variable {ENV_PREFIX}<TABLE>__<NAME> (e.g. {ENV_PREFIX}PROXY__PORT) beats this file,
# a flag beats both.
# Relative paths are relative to the directory in which the command is started.
"""

_SELF_EVIDENT = ("a text", "a path", "a text that is not empty", "true or false")

_MARKDOWN_HEAD = f"""\
# Settings

<!-- Generated: python -m lightning_proxy.config.template > docs/settings.md -->

Defaults are beaten by `{DEFAULT_FILE}` (in the current directory, or given with `--config`), that by the
environment (`{ENV_PREFIX}<TABLE>__<NAME>`), that by flags. An unknown setting is an error that names the
nearest known one. Relative paths are relative to the directory in which the command is started.
`lightning-proxy init` writes a `{DEFAULT_FILE}` with everything below as comments.

In the environment a list is written as words, split as a shell does it, or as JSON; a table as JSON.
"""


def render_toml() -> str:
    """The commented ``lightning.toml``: every setting, with its meaning and default, switched off."""
    parts = [_TOML_HEAD]
    for table, cls in tables().items():
        parts.append("\n")
        parts += [f"# {line}".rstrip() + "\n" for line in str(inspect.getdoc(cls)).splitlines()]
        parts.append(f"[{table}]\n")
        for name, info in cls.model_fields.items():
            parts += [f"# {line}\n" for line in textwrap.wrap(_meaning(info), 100)]
            value = '""  # not set' if info.default is None else _toml_value(info.default)
            parts.append(f"# {name} = {value}\n\n")
    for name, cls in lists().items():
        parts.append("\n")
        parts += [f"# {line}".rstrip() + "\n" for line in str(inspect.getdoc(cls)).splitlines()]
        parts.append(f"#   [[{name}]]\n")
        for key, info in cls.model_fields.items():
            parts += [f"#   # {line}\n" for line in textwrap.wrap(_meaning(info), 96)]
            parts.append(f"#   {key} = {_example(info)}\n")
    return "".join(parts).rstrip() + "\n"


def _meaning(info: FieldInfo) -> str:
    bounds = allowed(info)
    return f"{info.description} Allowed: {bounds}." if bounds not in _SELF_EVIDENT else str(info.description)


def render_markdown() -> str:
    """The settings reference."""
    parts = [_MARKDOWN_HEAD]
    for table, cls in tables().items():
        parts.append(f"\n## `[{table}]`\n\n{inspect.getdoc(cls)}\n\n")
        parts.append("| setting | default | allowed | meaning |\n|---|---|---|---|\n")
        parts += [_markdown_row(name, info) for name, info in cls.model_fields.items()]
    for name, cls in lists().items():
        parts.append(f"\n## `[[{name}]]`\n\n{inspect.getdoc(cls)}\n\n")
        parts.append("| setting | default | allowed | meaning |\n|---|---|---|---|\n")
        parts += [_markdown_row(key, info) for key, info in cls.model_fields.items()]
    return "".join(parts)


def _markdown_row(name: str, info: FieldInfo) -> str:
    if info.is_required():
        default = "must be given"
    else:
        default = "not set" if info.default is None else f"`{_toml_value(info.default)}`"
    cells = (f"`{name}`", default, allowed(info), info.description or "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _toml_value(value: Any) -> str:
    """A default as TOML; JSON's notation is TOML's for everything that defaults hold."""
    if isinstance(value, dict) and not value:
        return "{}"
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)


def _example(info: FieldInfo) -> str:
    """A default, else something of the setting's form, for an entry that has to be written by hand."""
    if not info.is_required() and (info.default or isinstance(info.default, bool | dict)):
        return _toml_value(info.default)
    return '["..."]' if get_origin(info.annotation) is tuple else '"..."'


if __name__ == "__main__":
    sys.stdout.write(render_markdown())
