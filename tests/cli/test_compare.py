"""``policies compare`` over a database file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lightning_proxy.cli import app
from lightning_proxy.store import (
    ErrorClass,
    Fidelity,
    PolicyVersion,
    RolloutState,
    Span,
    Store,
    VersionStatus,
)


def add(store: Store, rollout_id: str, version: int, end: int | None, thumb: float | None = None) -> None:
    now = time.time()
    store.add_span(
        Span(rollout_id=rollout_id, attempt=1, wire="chat", started_at=now, ended_at=now, request=b"{}",
             response=b"{}", fidelity=Fidelity.TEXT, policy="policy", policy_version=version,
             policy_version_end=end)
    )  # fmt: skip
    if thumb is not None:
        store.add_reward(rollout_id=rollout_id, value=thumb, name="thumb")


@pytest.fixture(autouse=True)
def db(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Newcombe's published 9/10 - 3/10, on the scale of thumbs, in ``lightning.db`` here."""
    monkeypatch.chdir(tmp_path)
    with Store.open("lightning.db") as store:
        store.add_base_version("policy", "w0")
        with store.transaction():
            store.insert_version(PolicyVersion("policy", 1, "w1", VersionStatus.STAGED, parent=0))
        for number in range(10):
            add(store, f"old-{number}", 0, 0, 1.0 if number < 3 else -1.0)
            add(store, f"new-{number}", 1, 1, 1.0 if number < 9 else -1.0)
            add(store, f"silent-{number}", 1, 1)
        add(store, "between", 0, 1, 1.0)
        add(store, "untold", 1, None)
        add(store, "down", 1, 1, -1.0)
        store.finish_rollout("down", RolloutState.FAILED, None, ErrorClass.UPSTREAM_ERROR)
    return tmp_path / "lightning.db"


def compare(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["policies", "compare", *words])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr
    return result.stderr if code else result.stdout


def as_json(*words: str) -> Any:
    return json.loads(compare(*words, "--json"))


def test_a_table_shows_each_version_with_intervals_and_what_is_no_single_ones() -> None:
    assert compare() == (
        "VERSION  STATUS  ROLLOUTS  REWARDED  SHARE   MEAN  95% INTERVAL     VS 0  95% INTERVAL\n"
        "0        active  10        10        100.0%  -0.4  -0.784 to 0.206  -     -\n"
        "1        staged  20        10        50.0%   0.8   0.192 to 0.964   +1.2  +0.341 to +1.62\n"
        "mixed    -       1         1         100.0%  1     -0.587 to 1      -     -\n"
        "unknown  -       1         0         0.0%    -     -                -     -\n"
        "left out: 1 that failed by a fault of engine, network or proxy\n"
    )


def test_machines_get_the_same_as_numbers() -> None:
    found = as_json("--since", "1h", "--reward", "thumb")
    assert found["since"] == pytest.approx(time.time() - 3600, abs=60)
    assert (found["policy"], found["reward"], found["two_valued"]) == ("policy", "thumb", True)
    old, new = found["versions"]
    assert (old["version"], old["status"], old["difference"]) == (0, "active", None)
    assert (new["rollouts"], new["rewarded"], new["share"], new["against"]) == (20, 10, 0.5, 0)
    assert new["difference"] == {
        "value": pytest.approx(1.2),
        "low": pytest.approx(2 * 0.1705, abs=1e-4),
        "high": pytest.approx(2 * 0.8090, abs=1e-4),
        "method": "newcombe",
    }
    assert (found["mixed"]["rollouts"], found["unknown"]["rollouts"], found["faulty"]) == (1, 1, 1)


def test_another_version_or_the_parent_is_what_it_is_compared_with() -> None:
    assert "VS PARENT" in compare("--against", "parent")
    assert "VS 1" in compare("--against", "1")
    assert as_json("--against", "1")["versions"][0]["difference"]["value"] == pytest.approx(-1.2)


def test_a_correction_changes_what_is_shown(db: Path) -> None:
    with Store.open(db) as store:
        store.add_reward(rollout_id="old-0", value=-1.0, name="thumb")
        store.add_reward(rollout_id="silent-0", value=1.0, name="thumb")
    old, new = as_json()["versions"]
    assert (old["mean"]["value"], old["rewarded"]) == (pytest.approx(-0.6), 10)
    assert (new["mean"]["value"], new["rewarded"]) == (pytest.approx(9 / 11), 11)


def test_rewards_weigh_as_the_settings_say() -> None:
    Path("lightning.toml").write_text('[[rewards]]\nname = "thumb"\nweight = 0.5\ndirection = "minimize"\n')
    assert as_json()["versions"][0]["mean"]["value"] == pytest.approx(0.2)
    assert as_json("--reward", "thumb")["versions"][0]["mean"]["value"] == pytest.approx(-0.4)


def test_what_is_not_understood_is_said() -> None:
    assert "first" in compare("--against", "second", code=2)
    assert "24h" in compare("--since", "yesterday", code=2)
    assert "no version 7" in compare("--against", "7", code=1)
    assert "'chekcer'" in compare("--policy", "chekcer", code=1)
