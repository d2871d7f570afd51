"""What `lightning-proxy doctor` finds, of a whole installation and of everything that may be amiss in one."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lightning_proxy.cli import app
from lightning_proxy.config import Settings, load_settings
from lightning_proxy.doctor import Finding, Level, examine
from lightning_proxy.store import ErrorClass, Fidelity, Span, Store
from tests.conftest import MakeProxy, ProxyThread
from tests.engine import EngineThread, FakeEngine, Script
from tests.trainer.checkpoints import write_checkpoint

Look = Callable[..., dict[str, list[Finding]]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def look(home: Path) -> Look:
    """Findings by what they are about; keyword arguments are tables of the settings."""

    def looked(proxy: ProxyThread | None = None, **tables: Any) -> dict[str, list[Finding]]:
        given = {"store": {"db": home / "lightning.db"}, **tables}
        url = proxy.url if proxy else "http://127.0.0.1:9"
        given["train"] = {"proxy_url": url, **tables.get("train", {})}
        found: dict[str, list[Finding]] = {}
        for finding in examine(Settings.model_validate(given)):
            found.setdefault(finding.about, []).append(finding)
        return found

    return looked


def only(findings: list[Finding], level: Level, *words: str) -> Finding:
    """The one of this level, which says all of ``words``."""
    (found,) = [finding for finding in findings if finding.level is level]
    for word in words:
        assert word in f"{found.text} {found.to_do}"
    return found


def weights_in(folder: Path) -> Path:
    """A MiB of them."""
    return write_checkpoint(folder, a=np.zeros((2**18,), np.float32))


def call(proxy: ProxyThread, rollout: str, **changes: Any) -> None:
    """A recorded call, and a reward for its rollout."""
    now = time.time()
    plain = Span(
        rollout_id=rollout, attempt=1, wire="chat", started_at=now - 1, ended_at=now, request=b"{}",
        response=b"{}", fidelity=Fidelity.EXACT, model="policy", policy="policy", policy_version=0,
        policy_version_end=0, status=200, attributed_by="path", attribution_confidence=1.0,
    )  # fmt: skip
    with proxy.store() as store:
        store.add_span(replace(plain, **changes))
        store.add_reward(rollout_id=rollout, value=1.0)


# -- all is well -----------------------------------------------------------------------------------------


def test_where_all_is_well_nothing_is_to_be_done(proxy: ProxyThread, look: Look, home: Path) -> None:
    call(proxy, "a")
    found = look(proxy, policy={"model": weights_in(home / "model")})
    wrong = [each for findings in found.values() for each in findings if each.level is Level.PROBLEM]
    assert not wrong
    for about in ("weights of policy", "database", "proxy", "engine of policy", "calls"):
        assert [each.level for each in found[about]] == [Level.OK], about
    assert "OPENAI_BASE_URL=" + proxy.base_url in found["proxy"][0].text


def test_looking_leaves_no_trace(proxy: ProxyThread, engine: EngineThread, look: Look, home: Path) -> None:
    call(proxy, "a")
    with proxy.store() as store:
        before = store.stats()
    look(proxy)
    with proxy.store() as store:
        assert store.stats() == before
    assert not engine.calls
    assert not (home / "lightning-runs").exists()


def test_before_the_first_run_it_says_how_to_begin(look: Look, home: Path) -> None:
    found = look()
    only(found["database"], Level.NOTE, "not there yet", "lightning-proxy serve")
    only(found["proxy"], Level.PROBLEM, "nothing answers", "lightning-proxy serve")
    only(found["weights of policy"], Level.NOTE, "--model DIR")
    assert "calls" not in found
    assert not (home / "lightning.db").exists()


def test_the_command_prints_what_to_do_and_tells_by_its_exit_code(proxy: ProxyThread, home: Path) -> None:
    call(proxy, "a")
    good = CliRunner().invoke(app, ["doctor", "--proxy", proxy.url])
    assert good.exit_code == 0, good.output
    assert "ok       proxy: " in good.output
    bad = CliRunner().invoke(app, ["doctor", "--proxy", "http://127.0.0.1:9", "--json"])
    assert bad.exit_code == 1
    told = json.loads(bad.stdout)
    assert told["problems"] == 1
    assert {"level": "problem", "about": "proxy"}.items() <= next(
        each for each in told["findings"] if each["level"] == "problem"
    ).items()


# -- the machine -----------------------------------------------------------------------------------------


def test_packages_that_training_lacks_are_named(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "verl" else object())
    only(look()["packages"], Level.NOTE, "verl not installed", "lightning-proxy[gpu]")


def test_weights_that_are_none_are_a_problem(look: Look, home: Path) -> None:
    (home / "model").mkdir()
    only(look(policy={"model": home / "model"})["weights of policy"], Level.PROBLEM, "config.json")
    model = weights_in(home / "cut")
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-10])
    only(look(policy={"model": model})["weights of policy"], Level.PROBLEM, "is cut")


def test_too_little_room_is_told_before_a_run_finds_out(
    look: Look, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = weights_in(home / "model")
    free = {"bytes": 3 * 2**20}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free["bytes"]))
    found = look(policy={"model": model})
    # Full float32 weights: a version is these again, their copy and two moments.
    only(found["weights of policy"], Level.PROBLEM, "takes 4.0 MiB", "3.0 MiB are free", "runs_dir")
    only(found["database"], Level.PROBLEM, "only 3.0 MiB free", "prune")
    found = look(policy={"model": model}, train={"lora_rank": 8, "keep_versions": 3})
    only(found["weights of policy"], Level.NOTE, "takes 1.0 MiB", "up to 5", "keep_versions")
    free["bytes"] = 100 * 2**20
    only(look(policy={"model": model})["weights of policy"], Level.OK, "100.0 MiB are free")


def test_the_weights_looked_at_are_those_that_the_next_run_begins_with(look: Look, home: Path) -> None:
    model = weights_in(home / "model")
    with Store.open(home / "lightning.db") as store:
        store.add_base_version("policy", str(model))
    only(look()["weights of policy"], Level.OK, str(model))
    shutil.rmtree(model)
    only(look()["weights of policy"], Level.PROBLEM, str(model))


def test_a_database_that_cannot_be_written_is_a_problem(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may all
    only(look()["database"], Level.PROBLEM, "cannot be written")


def test_a_file_that_is_no_database_is_a_problem(look: Look, home: Path) -> None:
    (home / "lightning.db").write_text("something else " * 100)
    assert any(each.level is Level.PROBLEM for each in look()["database"])


# -- proxy and engine ------------------------------------------------------------------------------------


def test_something_else_at_the_proxys_address(engine: EngineThread, look: Look) -> None:
    found = look(train={"proxy_url": engine.url})
    only(found["proxy"], Level.PROBLEM, "no lightning-proxy")


def test_calls_that_are_held_are_told_with_the_reason(proxy: ProxyThread, look: Look) -> None:
    proxy.hold("weights are being changed")
    only(look(proxy)["proxy"], Level.PROBLEM, "weights are being changed")


def test_a_proxy_that_writes_elsewhere_is_found_out(proxy: ProxyThread, look: Look, home: Path) -> None:
    call(proxy, "a")
    with Store.open(home / "other.db"):
        pass
    found = look(proxy, store={"db": home / "other.db"})
    only(found["database"], Level.PROBLEM, "1 calls and 1 rewards", "has 0 and 0", "[store] db")


def test_a_policy_that_the_engine_does_not_serve(proxy: ProxyThread, look: Look) -> None:
    found = look(proxy, policy={"name": "qwen"})
    only(found["engine of qwen"], Level.PROBLEM, "'qwen'", "there are policy", "--served-model-name qwen")


def test_an_engine_that_is_not_vllm_gives_text_only(
    make_engine: Callable[[FakeEngine], EngineThread], make_proxy: MakeProxy, look: Look
) -> None:
    hosted = make_proxy(make_engine(FakeEngine(owner="openai")).base_url)
    only(look(hosted)["engine of policy"], Level.NOTE, "not vLLM", "token ids")


def test_a_vllm_whose_weights_cannot_be_changed(proxy: ProxyThread, engine: EngineThread, look: Look) -> None:
    paths = json.dumps({"paths": {"/v1/models": {}, "/pause": {}}})
    engine.script(Script(status=200, body=paths), path="/openapi.json")
    only(
        look(proxy)["engine of policy"],
        Level.PROBLEM,
        "no /resume, /collective_rpc",
        "VLLM_SERVER_DEV_MODE=1",
    )
    engine.script(Script(status=404), path="/openapi.json")
    only(look(proxy)["engine of policy"], Level.NOTE, "hides its routes")


def test_an_engine_that_reads_more_than_training_takes(
    proxy: ProxyThread, engine: EngineThread, look: Look
) -> None:
    model = {"id": "policy", "owned_by": "vllm", "max_model_len": 32768}
    engine.script(Script(status=200, body=json.dumps({"data": [model]})), times=2, path="/v1/models")
    found = look(proxy, train={"proxy_url": proxy.url, "max_row_tokens": 4096})
    only(found["engine of policy"], Level.NOTE, "32768", "4096", "max_row_tokens")


def test_without_a_proxy_the_configured_upstreams_are_asked(engine: EngineThread, home: Path) -> None:
    (home / "lightning.toml").write_text(
        f'[proxy]\nupstream = "http://127.0.0.1:9/v1"\n[train]\nproxy_url = "http://127.0.0.1:9"\n'
        f'[[policies]]\nname = "critic"\nupstream = "{engine.base_url}"\n'
    )
    found: dict[str, list[Finding]] = {}
    for each in examine(load_settings(config=home / "lightning.toml")):
        found.setdefault(each.about, []).append(each)
    only(found["engine of policy"], Level.PROBLEM, "nothing answers at http://127.0.0.1:9")
    only(found["engine of critic"], Level.PROBLEM, "no model 'critic'", "there are policy")
    assert "weights of critic" in found


# -- what is recorded ------------------------------------------------------------------------------------


def test_no_call_at_all(proxy: ProxyThread, look: Look) -> None:
    only(look(proxy)["calls"], Level.NOTE, "none is recorded", "OPENAI_BASE_URL")


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({"fidelity": Fidelity.TEXT}, Level.PROBLEM, ("no token ids", "docs/wires.md")),
        ({"policy": None, "model": "gpt-5"}, Level.PROBLEM, ("agents ask for 'gpt-5'", "[policy]")),
        ({"attribution_confidence": 0.3}, Level.NOTE, ("told apart by little", "docs/attribution.md")),
        (
            {"error_class": ErrorClass.UPSTREAM_ERROR, "response": None},
            Level.NOTE,
            ("1 upstream_error", "rollouts --failed"),
        ),
    ],
)
def test_calls_that_training_can_do_little_with(
    proxy: ProxyThread, look: Look, changes: dict[str, Any], level: Level, words: tuple[str, ...]
) -> None:
    call(proxy, "a", **changes)
    only(look(proxy)["calls"], level, *words)


def test_a_few_inexact_calls_among_many_are_only_noted(proxy: ProxyThread, look: Look) -> None:
    call(proxy, "a", fidelity=Fidelity.TEXT)
    call(proxy, "b")
    only(look(proxy)["calls"], Level.NOTE, "1 calls of a policy")


def test_a_run_that_failed_and_one_that_goes_on(proxy: ProxyThread, look: Look) -> None:
    call(proxy, "a")
    with proxy.store() as store:
        run = store.begin_run("policy", owner="test", lease_s=60)
        assert any(
            f"run {run.run_id} is in progress" in each.text for each in look(proxy)["training of policy"]
        )
        store.fail_run(run.run_id, "no memory left")
    only(look(proxy)["training of policy"], Level.PROBLEM, "no memory left")
