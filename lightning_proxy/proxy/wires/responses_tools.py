"""The tools of a Responses request: which of them the model sees, by which names, and how they come back.

vLLM 0.31 shows the model plain functions, and those of a namespace by one name for both
(``namespace__function``); a call comes back by the two again. Tools that OpenAI's servers run
themselves it lists in its echo only, where it has no tool server that runs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .base import Json

NOT_A_REQUEST = (KeyError, TypeError, ValueError, AttributeError, IndexError)  # what reading one may raise
_FIELDS = frozenset(("type", "name", "description", "parameters", "strict"))
# Not there: what a tool server may run (code_interpreter, mcp, web_search_preview).
_UNSEEN = frozenset(
    ("apply_patch", "custom", "file_search", "image_generation", "local_shell", "shell", "tool_search",
     "web_search")
)  # fmt: skip


class Different(Exception):
    """A request that may not mean the same in Chat Completions."""


def need(condition: object) -> None:
    """Raises Different where ``condition`` does not hold."""
    if not condition:
        raise Different


@dataclass(frozen=True, slots=True)
class Tools:
    """What a request offers."""

    functions: list[Json] = field(default_factory=list)  # that the model sees, in the words of Chat
    names: dict[str, Json] = field(default_factory=dict)  # by the model's name: `name` and `namespace`
    special: list[Json] = field(default_factory=list)  # as given; all but plain functions


def flat_name(name: str, namespace: str | None) -> str:
    """What the model calls a function."""
    return f"{namespace}__{name}" if namespace else name


def special_tools(request: Json) -> list[Json]:
    """The tools whose echo only the engine knows; [] where the request cannot be translated anyway."""
    try:
        return _read(request["tools"]).special
    except (Different, *NOT_A_REQUEST):
        return []


def tools_of(request: Json, *, forces: bool) -> Tools:
    """The tools of a request. ``forces``: a forced call has a grammar. Raises Different."""
    tools = _read(request["tools"])
    choice = request.get("tool_choice", "auto")
    need(choice in ("auto", "none") or forces)
    if tools.special:  # a grammar would be made of other tools here than there
        need(choice in ("auto", "none") and not any(tool.get("strict") for tool in tools.functions))
    return tools


def echoed_tools(request: Json, shape: Json, special: Sequence[Json]) -> list[Json]:
    """The tools as the engine repeats them.

    ``shape``: a plain function's fields, with what stands there by default. ``special``: its echo of
    the others, in their order. Raises Different where that is not known.
    """
    rest = iter(special)
    need(sum(tool["type"] != "function" for tool in request["tools"]) == len(special))
    return [
        {key: tool.get(key, default) for key, default in shape.items()}
        if tool["type"] == "function"
        else next(rest)
        for tool in request["tools"]
    ]


def _read(given: Any) -> Tools:
    need(isinstance(given, list))
    tools = Tools()
    for tool in given:
        if tool["type"] == "function":
            tools.functions.append(_function(tool))
            continue
        tools.special.append(tool)
        if tool["type"] == "namespace":
            _read_namespace(tool, tools)
        else:
            need(tool["type"] in _UNSEEN)
    need(tools.functions)  # without any, Chat Completions does not look for calls in the answer
    return tools


def _read_namespace(namespace: Json, tools: Tools) -> None:
    need(isinstance(namespace["name"], str) and namespace["name"])
    for tool in namespace["tools"]:
        if tool["type"] == "function":
            function = _function(tool)
            names = {"name": function["name"], "namespace": namespace["name"]}
            function["name"] = flat_name(**names)
            tools.functions.append(function)
            tools.names[function["name"]] = names
        else:
            need(tool["type"] in _UNSEEN)


def _function(tool: Json) -> Json:
    need(tool.keys() <= _FIELDS and isinstance(tool["name"], str))
    need(isinstance(tool.get("description"), str | None) and isinstance(tool.get("strict"), bool | None))
    need(isinstance(tool.get("parameters"), dict | None))
    return {key: value for key, value in tool.items() if key != "type"}
