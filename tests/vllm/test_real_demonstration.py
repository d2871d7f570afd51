"""What somebody corrected, a model behind real vLLM says afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_proxy.config.settings import PolicySettings, Settings, StoreSettings
from lightning_proxy.trainer.report import Outcome
from lightning_proxy.trainer.run import train_once
from tests.trainer.conftest import RECIPE
from tests.vllm.compare import post
from tests.vllm.conftest import MODEL, WEIGHTS, Served
from tests.vllm.test_real_engine import MESSAGES, TOOLS, promote

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.train,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),  # verl and torch warn about themselves
]


def ask(served: Served, rollout: str) -> dict[str, Any]:
    body = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "temperature": 0, "max_tokens": 64}
    status, _, text = post(f"{served.url}/rollout/{rollout}/v1/chat/completions", body)
    assert status == 200, text
    message: dict[str, Any] = json.loads(text)["choices"][0]["message"]
    return message


def test_a_pass_of_sft_makes_the_served_model_say_what_was_demonstrated(
    served: Served, tmp_path: Path
) -> None:
    with served.store() as store:
        first = store.active_version(MODEL)
        assert first is not None
        arguments = {"query": "SELECT min(stock) FROM items"}
        call = {
            "id": "c",
            "type": "function",
            "function": {"name": "sql", "arguments": json.dumps(arguments)},
        }
        assert arguments != _arguments(ask(served, "to-be-corrected"))
        store.add_reward(
            rollout_id="to-be-corrected",
            demonstration={"role": "assistant", "content": None, "tool_calls": [call]},
        )
        train = RECIPE | {
            "algorithm": "sft",
            "sft_min_return": 1e9,  # what other tests left behind is not for this one
            "proxy_url": served.url,
            "runs_dir": tmp_path / "runs",
            "min_rollouts": 1,
            "learning_rate": 1e-3,
            "epochs": 20,
        }
        settings = Settings.model_validate({"train": train}).model_copy(
            update={
                "store": StoreSettings(db=served.db),
                "policy": PolicySettings(name=MODEL, model=WEIGHTS),
            }
        )
        try:
            report = train_once(settings, store=store, progress=lambda line, done=None: None)
            assert report.outcome is Outcome.TRAINED, report.message
            assert report.counts["rows_by_demonstration"] == 1
            assert report.promotion is not None
            assert report.promotion["verify_max_diff"] < 1e-3
            assert _arguments(ask(served, "corrected")) == arguments
        finally:  # the tests that follow are of what was served before
            assert promote(served, first.version)[0] == 200


def _arguments(message: dict[str, Any]) -> dict[str, Any] | None:
    calls = message.get("tool_calls") or []
    try:
        return dict(json.loads(calls[0]["function"]["arguments"])) if calls else None
    except ValueError:
        return None
