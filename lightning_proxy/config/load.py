"""Put settings together: defaults < ``lightning.toml`` < environment < flags.

Whatever is wrong becomes one ``ConfigError`` line that names the setting, where it was given, the
value (unless it is a secret) and what is allowed. Relative paths are relative to the current
directory, wherever the file that names them lies.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lightning_proxy.config.settings import Settings
from lightning_proxy.errors import ConfigError

DEFAULT_FILE = "lightning.toml"
ENV_PREFIX = "LIGHTNING_"


@functools.cache
def tables() -> Mapping[str, type[BaseModel]]:
    """The settings' tables by name, in the order in which they are declared."""
    return {name: type(table) for name, table in Settings() if isinstance(table, BaseModel)}


@functools.cache
def lists() -> Mapping[str, type[BaseModel]]:
    """What is written as ``[[name]]``, as often as one likes: the class of one entry, by name."""
    return {
        name: get_args(info.annotation)[0]
        for name, info in Settings.model_fields.items()
        if name not in tables()
    }


@functools.cache
def fields() -> Mapping[str, FieldInfo]:
    """Every setting by its dotted name, e.g. ``proxy.port``."""
    return {
        f"{table}.{name}": info for table, cls in tables().items() for name, info in cls.model_fields.items()
    }


def load_settings(
    *,
    config: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
) -> Settings:
    """Settings from all sources.

    ``config`` is a file that must exist; None takes ``./lightning.toml`` where there is one.
    ``overrides`` are the flags, by dotted name (``{"proxy.port": 9000}``); None in it means
    "not set" and beats the other sources. ``env`` is the process's environment by default.
    Raises ConfigError.
    """
    given: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for key, value, where in (
        *_from_file(config),
        *_from_environment(os.environ if env is None else env),
        *(
            (key, value, f"--{key.rpartition('.')[2].replace('_', '-')}")
            for key, value in (overrides or {}).items()
        ),
    ):
        if key not in fields() and key not in lists():
            raise ConfigError(f"unknown setting {key} in {where}{_suggestion(key)}")
        given[key], origin[key] = value, where
    return _follow_proxy(_validate(given, origin))


def _validate(given: Mapping[str, Any], origin: Mapping[str, str]) -> Settings:
    nested: dict[str, Any] = {table: {} for table in tables()}
    for key, value in given.items():
        table, _, name = key.partition(".")
        if name:
            nested[table][name] = value
        else:
            nested[table] = value
    try:
        return Settings.model_validate(nested)
    except ValidationError as error:
        raise ConfigError(_explain(error, given, origin)) from None


def _follow_proxy(settings: Settings) -> Settings:
    """Unless told otherwise, the trainer looks for the proxy where this file says it listens."""
    proxy = settings.proxy
    if "proxy_url" in settings.train.model_fields_set or proxy.port == 0:
        return settings
    host = "127.0.0.1" if proxy.host in ("0.0.0.0", "::", "localhost") else proxy.host
    url = f"http://{f'[{host}]' if ':' in host else host}:{proxy.port}"
    return settings.model_copy(update={"train": settings.train.model_copy(update={"proxy_url": url})})


# --- sources: (dotted name, value, where it was given) ------------------------------------------


def _from_file(config: Path | None) -> list[tuple[str, Any, str]]:
    path = config or Path(DEFAULT_FILE)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if config is None:
            return []
        raise ConfigError(
            f"no configuration file at {path}; `lightning-proxy init {path}` writes one"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    found: list[tuple[str, Any, str]] = []
    for table, content in document.items():
        where = f"{path}, line {_line_of(text, table, None)}"
        if table in lists():
            if not isinstance(content, list):
                raise ConfigError(f"{table} in {where} is a list: write [[{table}]] and its settings below")
            found.append((table, content, where))
            continue
        if table not in tables():
            raise ConfigError(f"unknown setting {table} in {where}{_suggestion(table)}")
        if not isinstance(content, dict):
            raise ConfigError(f"{table} in {where} must be a table: write [{table}] and its settings below")
        found += [(f"{table}.{k}", v, f"{path}, line {_line_of(text, table, k)}") for k, v in content.items()]
    return found


def _line_of(text: str, table: str, name: str | None) -> int:
    """Line of a key for messages; tomllib keeps none. Odd spellings get the table's line, or 1."""
    current, table_line = "", 1
    for number, line in enumerate(text.splitlines(), 1):
        key = re.match(r"\s*([\w.-]+)\s*=", line)
        if header := re.match(r"\s*\[{1,2}\s*([\w.-]+)\s*\]", line):
            current = header[1]
        elif not key:
            continue
        dotted = ".".join(part for part in (current, key[1] if key else "") if part)
        if dotted == (f"{table}.{name}" if name else table):
            return number
        if dotted == table:
            table_line = number
    return table_line


def _from_environment(env: Mapping[str, str]) -> list[tuple[str, Any, str]]:
    """Ours are LIGHTNING_<TABLE>__<NAME>; other programs use the prefix too, without a double underscore."""
    mistyped = {ENV_PREFIX + key.replace(".", "_").upper(): key for key in fields()}
    found: list[tuple[str, Any, str]] = []
    for variable, text in env.items():
        if not variable.startswith(ENV_PREFIX):
            continue
        table, double, name = variable.removeprefix(ENV_PREFIX).lower().partition("__")
        key = f"{table}.{name}"
        if double:
            info = fields().get(key)
            found.append((key, _parse_text(text, info, variable) if info else text, variable))
        elif variable in mistyped:
            right = ENV_PREFIX + mistyped[variable].replace(".", "__").upper()
            raise ConfigError(f"unknown variable {variable}; did you mean {right} (two underscores)?")
    return found


def _parse_text(text: str, info: FieldInfo, variable: str) -> Any:
    """A list is JSON or words as a shell splits them, a table is JSON; the rest is for pydantic."""
    container = get_origin(info.annotation)
    if container not in (tuple, dict):
        return text
    try:
        if container is tuple and not text.lstrip().startswith("["):
            return shlex.split(text)
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{variable} is {text!r} ({error}); allowed: {allowed(info)}") from error


# --- words for what is wrong --------------------------------------------------------------------


def allowed(info: FieldInfo) -> str:
    """What a setting may be, in words, from its type and range."""
    text = str(info.annotation)
    kind = next((each for each in get_args(info.annotation) if each in (int, float)), info.annotation)
    if "Literal" in text:
        words = "one of " + ", ".join(re.findall(r"'([^']*)'", text))
    elif info.annotation is bool:
        words = "true or false"
    elif get_origin(info.annotation) is tuple:
        words = "a list of texts"
    elif get_origin(info.annotation) is dict:
        words = "a table of texts" if get_args(info.annotation)[1] is str else "a table of settings"
    elif kind in (int, float):
        words = "a whole number" if kind is int else "a number"
    else:
        words = "a path" if "Path" in text else "a text"
    rules = [(name, getattr(rule, name, None)) for rule in info.metadata for name in _LIMITS]
    limits = {name: value for name, value in rules if value is not None}
    if set(limits) == {"ge", "le"}:
        return f"{words} from {limits['ge']} to {limits['le']}"
    return " ".join([words, *(_LIMITS[name].format(value) for name, value in limits.items())])


_LIMITS = {
    "ge": "of at least {}", "gt": "above {}", "le": "of at most {}", "lt": "below {}",
    "pattern": "matching {}", "min_length": "that is not empty",
}  # fmt: skip


def _suggestion(key: str) -> str:
    """What the user may have meant, by the whole name, else by its last part; else what there is."""
    known = fields()
    names = {**{name: f"[{name}]" for name in tables()}, **{name: f"[[{name}]]" for name in lists()}}
    if "." not in key and (near := difflib.get_close_matches(key, names, n=1, cutoff=0.75)):
        return f"; did you mean the table {names[near[0]]}?"
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.75):
        return f"; did you mean {near[0]}?"
    by_name = {dotted.rpartition(".")[2]: dotted for dotted in known}
    if near := difflib.get_close_matches(key.rpartition(".")[2], by_name, n=1, cutoff=0.7):
        return f"; did you mean {by_name[near[0]]}?"
    table = key.partition(".")[0]
    there = [name for name in known if name.startswith(f"{table}.")] or [f"[{name}]" for name in tables()]
    return f"; there are {', '.join(there)}"


def _explain(error: ValidationError, given: Mapping[str, Any], origin: Mapping[str, str]) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"][:2])
        reason = str(problem.get("ctx", {}).get("error", ""))
        if problem["loc"][0] in lists():
            lines.append(_explain_entry(problem, origin))
            continue
        if key not in given:  # a rule over several settings of one table
            lines.append(reason or f"{key}: {problem['msg']}")
            continue
        info = fields()[key]
        value = f"is {given[key]!r}" if info.repr else "is not what it may be"
        lines.append(
            f"{key} in {origin[key]} {value}; allowed: {allowed(info)}{f' ({reason})' if reason else ''}"
        )
    return "; ".join(dict.fromkeys(lines))


def _explain_entry(problem: Any, origin: Mapping[str, str]) -> str:
    """What is wrong with an entry of a list."""
    name, *place = problem["loc"]
    entry = f"[[{name}]]" + (f" number {place[0] + 1}" if place else "") + f" in {origin[name]}"
    reason = str(problem.get("ctx", {}).get("error", "")) or problem["msg"]
    if len(place) < 2:
        return f"{entry}: {reason}"
    settings = lists()[name].model_fields
    if place[1] not in settings:
        return f"{entry}: unknown setting {place[1]}; there are {', '.join(settings)}"
    if problem["type"] == "missing":
        return f"{entry}: {place[1]} is missing"
    return f"{entry}: {place[1]} is {problem['input']!r}; allowed: {allowed(settings[place[1]])}"
