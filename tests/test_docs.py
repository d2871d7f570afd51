"""What the documentation shows is there: commands, flags, files and settings."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.core import TyperGroup

from lightning_proxy.cli import app
from lightning_proxy.config import Settings, for_policy

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:^|[`&|] ?|^\$ |&& )(lightning-proxy(?: [^`#|&\n]*)?)", re.MULTILINE)


def shown_commands() -> list[tuple[str, str]]:
    """(page, command line) of each `lightning-proxy ...` that a page shows."""
    return [
        (page.name, line.strip())
        for page in PAGES
        for line in COMMAND.findall(page.read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize(("page", "line"), shown_commands())
def test_every_command_that_the_documentation_shows_exists_with_its_flags(page: str, line: str) -> None:
    words = shlex.split(line)[1:]
    command: Any = typer.main.get_command(app)
    while isinstance(command, TyperGroup) and words and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    assert command.name != "lightning-proxy" or not words or words[0].startswith("-"), (
        f"no command {words[0]!r}"
    )
    own_words = words[: words.index("--")] if "--" in words else words
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    flags = {word.split("=")[0] for word in own_words if word.startswith("--")}
    assert flags <= known | {"--help", "--version"}


def test_every_command_is_in_the_documentation() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    shown = " ".join(line for _, line in shown_commands())
    assert [name for name in group.commands if f"lightning-proxy {name}" not in shown] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_of_ours_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_that_is_named_exists(page: Path) -> None:
    tables = Settings.model_fields
    named = re.findall(
        r"`(proxy|store|policy|engine|train|automatic_rewards)\.([a-z_]+)`", page.read_text(encoding="utf-8")
    )
    unknown = [
        f"{table}.{name}"
        for table, name in named
        if name not in getattr(tables[table].annotation, "model_fields", {}) and name != "py"
    ]
    assert unknown == []


def test_the_reward_function_that_the_documentation_shows_works() -> None:
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    [shown] = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def judge" in block]
    names: dict[str, Any] = {}
    exec(shown, names)
    rollout = {"metadata": {"answer": "42"}, "reply": "It is 42.", "calls": [{}, {}]}
    assert names["judge"](rollout) == {"right": 1.0, "calls": -0.02}


def test_the_settings_that_the_page_about_rewards_shows_are_taken() -> None:
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    for block in re.findall(r"```toml\n(.*?)```", page, re.DOTALL):
        Settings.model_validate(tomllib.loads(block))


def test_the_policies_that_the_page_about_training_shows_are_taken() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    [shown] = [
        block for block in re.findall(r"```toml\n(.*?)```", page, re.DOTALL) if "[[policies]]" in block
    ]
    settings = Settings.model_validate(tomllib.loads(shown))
    own = for_policy(settings, "critic").train
    assert (own.roles, own.learning_rate, settings.train.learning_rate) == (("checker",), 5e-6, 1e-6)
