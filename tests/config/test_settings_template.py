"""The commented lightning.toml and the settings reference are made from the Settings classes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from lightning_proxy.config import Settings, load_settings
from lightning_proxy.config.load import fields
from lightning_proxy.config.template import render_markdown, render_toml

ROOT = Path(__file__).resolve().parents[2]


def test_the_settings_reference_is_up_to_date() -> None:
    written = (ROOT / "docs" / "settings.md").read_text()
    assert written == render_markdown(), "run: python -m lightning_proxy.config.template > docs/settings.md"


def test_the_written_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lightning.toml"
    path.write_text(render_toml())
    assert load_settings(config=path, env={}) == Settings()


def test_uncommenting_every_line_gives_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "lightning.toml"
    set_ones = [line for line in render_toml().splitlines() if "# not set" not in line]
    path.write_text("\n".join(re.sub(r"^# (?=\w+ = )", "", line) for line in set_ones))
    assert load_settings(config=path, env={}) == Settings()
    tables = tomllib.loads(path.read_text())
    named = {f"{table}.{name}" for table, content in tables.items() for name in content}
    assert named == {key for key, info in fields().items() if info.default is not None}


def test_every_setting_says_what_it_means() -> None:
    assert all(info.description for info in fields().values())
    reference = render_markdown()
    assert all(f"| `{key.partition('.')[2]}` |" in reference for key in fields())


def test_lines_fit() -> None:
    assert max(len(line) for line in render_toml().splitlines()) <= 110
