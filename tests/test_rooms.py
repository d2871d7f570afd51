"""The house rules: who may import whom, what the proxy must never load, how long things may get."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lightning_proxy"
SOURCES = sorted(PACKAGE.rglob("*.py"))
BESIDE = [  # programs that stand beside the package, without the environments that they make
    path
    for name in ("benchmarks", "conformance", "examples", "scripts")
    for path in sorted((ROOT / name).rglob("*.py"))
    if ".venv" not in path.parts
]
TREES = [*SOURCES, *BESIDE, *sorted((ROOT / "tests").rglob("*.py"))]

MAY_IMPORT = {
    "": {"client"},
    "errors": set(),
    "words": set(),
    "config": {"errors"},
    "store": {"errors", "words"},
    "redaction": {"errors", "config", "store"},
    "proxy": {"errors", "config", "store", "redaction"},
    "trainer": {"errors", "config", "store"},
    "client": {"errors"},
    "runner": {"errors", "config", "store", "client"},
    "exchange": {"", "errors", "words", "config", "store", "redaction"},
    "experiment": {"errors", "config", "client"},
    "demo": {"experiment"},
    "doctor": {"errors", "config", "store", "client", "trainer"},
    "cli": {
        "",
        "errors",
        "words",
        "config",
        "store",
        "redaction",
        "proxy",
        "trainer",
        "client",
        "runner",
        "exchange",
        "experiment",
        "demo",
        "doctor",
    },
}
# Distribution -> the places (paths below the package) that may import it, lazily or not.
ONLY_IN = {
    "verl": ("trainer/backend/",),
    "ray": ("trainer/backend/",),
    "tensordict": ("trainer/backend/",),
    "torch": ("trainer/backend/", "experiment/tiny_model.py"),
    "transformers": ("trainer/backend/", "experiment/tiny_model.py"),
    "vllm": (),
    "pyarrow": ("exchange/parquet.py",),
    "opentelemetry": ("exchange/otel.py", "exchange/otlp.py", "exchange/otel_import.py"),
    "aiohttp.web": ("proxy/",),
    "uvloop": ("proxy/",),
    "typer": ("cli/",),
}
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 600
HEAVY = ("torch", "vllm", "verl", "ray", "litellm", "transformers", "pandas", "numpy", "pyarrow")


@functools.cache
def imports(path: Path) -> Sequence[tuple[int, str]]:
    """(line, absolute module) of every import in a file, those inside functions included.

    ``from package import name`` counts as an import of ``package.name``: it may be a module. Imports
    for type checkers only do not count, because they never run.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    never_run = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if id(node) in never_run:
            continue
        if isinstance(node, ast.Import):
            found += ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            found += ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
    return found


def room_of(module: str) -> str:
    """The room of one of our modules; the package itself (its version) is the room ``""``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else ""


def test_rooms_import_only_what_lies_before_them() -> None:
    wrong = []
    for path in SOURCES:
        room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for line, module in imports(path):
            other = room_of(module)
            if module.split(".")[0] == "lightning_proxy" and other != room and other not in MAY_IMPORT[room]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} ({room or 'the package'}) imports {module}")
    assert not wrong, "\n".join(wrong)


def test_every_room_is_known_to_this_test() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert rooms <= set(MAY_IMPORT)


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_libraries_stay_in_their_rooms(library: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in SOURCES
        if not str(path.relative_to(PACKAGE)).startswith(ONLY_IN[library])
        for line, module in imports(path)
        if f"{module}.".startswith(f"{library}.")
    ]
    assert not wrong, "\n".join(wrong)


def test_the_demos_agent_knows_nothing_of_us() -> None:
    agent = PACKAGE / "demo" / "agent.py"
    assert [module for _, module in imports(agent) if module.split(".")[0] == "lightning_proxy"] == []


@pytest.mark.parametrize(
    "module",
    ["lightning_proxy.proxy.app", "lightning_proxy.cli", "lightning_proxy.runner", "lightning_proxy.client"],
)
def test_no_heavy_library_is_loaded(module: str) -> None:
    program = f"import sys, {module}; print(' '.join(name for name in {HEAVY!r} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_files_are_short() -> None:
    long = {str(path.relative_to(ROOT)): count for path in TREES if (count := _lines(path)) > MAX_FILE_LINES}
    assert not long, f"more than {MAX_FILE_LINES} lines: {long}"


def test_functions_are_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {length} lines"
        for path in (*SOURCES, *BESIDE)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_every_room_says_what_is_in_it() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if path.name == "__init__.py"
        and ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) is None
    ]
    assert not silent
