"""Whether a tool call fits the tools that its request offers. No I/O.

A small part of JSON Schema, for it runs while an agent waits: the tool's name, required keys, and the
primitive types of the arguments at the top level.
"""

from __future__ import annotations

from typing import Any

import orjson

from .conversation import Json

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def misfit(request: Json, name: Any, arguments: Any) -> str | None:
    """What is wrong with a call of the tool ``name``; ``None`` where nothing is.

    ``arguments`` as the API has them: JSON as text, or a value; ``None`` for a tool of free text.
    """
    tool = next((tool for tool in _tools(request) if _inner(tool).get("name") == name), None)
    if tool is None:
        return _unknown(request, name)
    if arguments is None:
        return None
    if isinstance(arguments, str):
        if not arguments.strip():
            arguments = "{}"  # how some models call a tool that takes nothing
        try:
            arguments = orjson.loads(arguments)
        except orjson.JSONDecodeError as error:
            return f"the arguments of {name} are no JSON: {error}"
    if not isinstance(arguments, dict):
        return f"the arguments of {name} are no JSON object"
    schema = _inner(tool).get("parameters", _inner(tool).get("input_schema"))
    return _against(name, arguments, schema) if isinstance(schema, dict) else None


def _against(name: str, arguments: Json, schema: Json) -> str | None:
    required = schema.get("required")
    missing = [key for key in (required if isinstance(required, list) else ()) if key not in arguments]
    if missing:
        return f"{name} lacks {', '.join(map(str, missing))}"
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return None
    for key, value in arguments.items():
        wanted = properties.get(key)
        given = wanted.get("type") if isinstance(wanted, dict) else None
        kinds = [given] if isinstance(given, str) else given
        if kinds and not any(_is(value, kind) for kind in kinds):
            return f"{name}: {key} is {orjson.dumps(value).decode():.80}, and should be of type {kinds[0]}"
    if schema.get("additionalProperties") is False:
        unknown = [key for key in arguments if key not in properties]
        if unknown:
            return f"{name} has no argument {unknown[0]!r:.80}"
    return None


def _is(value: Any, kind: str) -> bool:
    types = _TYPES.get(kind)
    if types is None:
        return True  # of a later JSON Schema
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, types)


def _unknown(request: Json, name: Any) -> str | None:
    """What is wrong with a name that no tool has; ``None`` where the request does not tell all names."""
    if request.get("mcp_servers") or isinstance(request.get("prompt"), dict):
        return None
    tools = _tools(request)
    if not all("name" in _inner(tool) and tool.get("type") != "namespace" for tool in tools):
        return None  # a tool that brings others, or has a name of its own
    names = ", ".join(sorted(str(_inner(tool)["name"]) for tool in tools)) or "none"
    return f"there is no tool {str(name)!r:.80}; offered are {names}"


def _tools(request: Json) -> list[Json]:
    return [*(request.get("tools") or ()), *(request.get("functions") or ())]


def _inner(tool: Json) -> Json:
    """The description of a tool, on any wire."""
    inner: Json = tool.get("function") or tool.get("custom") or tool
    return inner
