"""Two policies, three roles, two real vLLMs: only what is trained behaves differently afterwards.

Writer, rewriter and checker are one unmodified agent that asks for one model; their system prompts tell
them apart. The first two are answered by one policy, the checker by another. All three learn from the
same recorded rollouts and the same rewards, each policy in its own run.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from lightning_proxy.config import Settings, for_policy, load_settings
from lightning_proxy.experiment.workdir import free_port
from lightning_proxy.store import Fidelity, Store
from lightning_proxy.trainer.report import Outcome, TrainReport
from tests.conftest import COMMIT_TIMEOUT_S, wait_until
from tests.vllm.compare import post
from tests.vllm.conftest import START_S, WEIGHTS, command_of, is_ready

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.train,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore"),  # verl and torch warn about themselves
]

AUTHOR, CRITIC = "author", "critic"  # the policies
POLICY_OF = {"writer": AUTHOR, "rewriter": AUTHOR, "checker": CRITIC}
SYSTEM = {"writer": "You write.", "rewriter": "You rewrite.", "checker": "You check."}
# The reply that earns a point: none of them is what the model says most of the time.
REWARDED = {"writer": "8", "rewriter": "6", "checker": "8"}
TASKS, GROUP = 12, 8

CONFIG = """
[proxy]
port = {port}
commit_timeout_s = {commit_timeout_s}

[policy]
name = "author"
model = {model}

[engine]
args = ["--max-model-len", "512", "--distributed-executor-backend", "uni"]

[engine.env]
VLLM_ENABLE_V1_MULTIPROCESSING = "0"
VLLM_CPU_OMP_THREADS_BIND = "nobind"
OMP_NUM_THREADS = "1"

[train]
roles = ["writer", "rewriter"]
learning_rate = 2e-5
adam_eps = 1e-5
mini_batch_rows = 32
threads = 1
device = "cpu"

[[policies]]
name = "critic"
model = {model}
roles = ["checker"]
route = true

[[roles]]
name = "writer"
system_contains = "You write."
[[roles]]
name = "rewriter"
system_contains = "You rewrite."
[[roles]]
name = "checker"
system_contains = "You check."
"""


@dataclass(slots=True)
class System:
    """The proxy with both engines below it, and the settings that all of it runs with."""

    url: str
    process: subprocess.Popen[str]
    settings: Settings

    def store(self) -> Store:
        return Store.open(self.settings.store.db)

    def engine_url(self, policy: str) -> str:
        for child in psutil.Process(self.process.pid).children(recursive=True):
            words = command_of(child)
            if policy in words and "--port" in words:
                return f"http://127.0.0.1:{words[words.index('--port') + 1]}"
        raise AssertionError(f"no vLLM that serves {policy}")

    def train(self, policy: str) -> TrainReport:
        from lightning_proxy.trainer.run import train_once

        with self.store() as store:
            own = for_policy(self.settings, policy)
            return train_once(own, store=store, progress=lambda line, done=None: None)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    directory = tmp_path_factory.mktemp("two-policies")
    config = directory / "lightning.toml"
    config.write_text(
        CONFIG.format(port=free_port(), model=json.dumps(str(WEIGHTS)), commit_timeout_s=COMMIT_TIMEOUT_S)
    )
    settings = load_settings(config=config, env={}, overrides=_inside(directory))
    command = [str(Path(sys.executable).with_name("lightning-proxy")), "serve", "--config", str(config)]
    log = directory / "proxy.log"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, cwd=directory, stdout=subprocess.PIPE, stderr=errors, text=True, env=environ
        )
    assert process.stdout is not None
    try:
        found = re.search(r"http://[^\s/]+", process.stdout.readline())
        assert found is not None, log.read_text()
        wait_until(lambda: process.poll() is not None or is_ready(found.group()), START_S)
        assert process.poll() is None, log.read_text()
        yield System(found.group(), process, settings)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)
        process.stdout.close()


def _inside(directory: Path) -> Mapping[str, Any]:
    """Paths that the trainer, which runs elsewhere, finds too."""
    return {"store.db": directory / "lightning.db", "train.runs_dir": directory / "runs"}


def call(system: System, role: str, rollout: str, seed: int = 0) -> str:
    """One call of the agent's: the model's name is the same for all roles."""
    messages = [{"role": "system", "content": SYSTEM[role]}, {"role": "user", "content": "items"}]
    body = {"model": AUTHOR, "messages": messages, "max_tokens": 1, "seed": seed}
    status, _, text = post(f"{system.url}/rollout/{rollout}/v1/chat/completions", body)
    assert status == 200, text
    answer = json.loads(text)
    assert answer["model"] == AUTHOR
    return str(answer["choices"][0]["message"]["content"])


def carry_out(system: System, task: int, member: int) -> None:
    """One rollout: each role calls once; its reward is how many of the three said the right thing."""
    rollout = f"r-{task}-{member}"
    post(f"{system.url}/api/rollouts", {"rollout_id": rollout, "task_id": f"task-{task}"})
    seed = task * GROUP + member
    points = sum(call(system, role, rollout, seed) == right for role, right in REWARDED.items())
    status, _, text = post(f"{system.url}/reward", {"rollout_id": rollout, "value": float(points)})
    assert status == 201, text


def logprobs(system: System, ids: Mapping[str, list[int]]) -> dict[str, float]:
    """Of the rewarded reply, by role, as the engine of the role's policy has it now."""
    found = {}
    for role, with_reply in ids.items():
        policy = POLICY_OF[role]
        body = {"model": policy, "prompt": with_reply, "max_tokens": 1, "prompt_logprobs": 0}
        answer = json.loads(post(f"{system.engine_url(policy)}/v1/completions", body)[2])
        found[role] = answer["choices"][0]["prompt_logprobs"][-1][str(with_reply[-1])]["logprob"]
    return found


def versions(system: System) -> dict[str, int]:
    with urllib.request.urlopen(f"{system.url}/api/stats", timeout=120) as answer:
        stats = json.load(answer)
    return {each["policy"]: each["serving_version"] for each in stats["policies"]}


def test_only_the_roles_of_the_policy_that_is_trained_behave_differently(system: System) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: carry_out(system, *divmod(n, GROUP)), range(TASKS * GROUP)))
    ids = {role: ids_of(system, role, reply) for role, reply in REWARDED.items()}
    with system.store() as store:
        spans = store.list_spans(limit=10_000)
        assert len(spans) == 3 * TASKS * GROUP
        assert {(span.role, span.policy) for span in spans} == set(POLICY_OF.items())
        assert {(span.model, span.policy_version, span.fidelity) for span in spans} == {
            (AUTHOR, 0, Fidelity.EXACT)
        }
    assert versions(system) == {AUTHOR: 0, CRITIC: 0}
    began = logprobs(system, ids)

    first = system.train(AUTHOR)
    assert (first.outcome, first.policy, first.version) == (Outcome.TRAINED, AUTHOR, 1), first.message
    assert first.left_out["calls"] == {"other_policy": TASKS * GROUP}
    assert versions(system) == {AUTHOR: 1, CRITIC: 0}
    after_author = logprobs(system, ids)
    show("author trained", began, after_author)
    assert after_author["writer"] > began["writer"] + 0.05
    assert after_author["rewriter"] > began["rewriter"] + 0.05
    assert after_author["checker"] == pytest.approx(began["checker"], abs=1e-6)
    with system.store() as store:
        assert store.backlog(AUTHOR).rollouts_ready == 0
        assert store.backlog(CRITIC).rollouts_ready == TASKS * GROUP, "consumption is each policy's own"

    second = system.train(CRITIC)
    assert (second.outcome, second.policy, second.version) == (Outcome.TRAINED, CRITIC, 1), second.message
    assert versions(system) == {AUTHOR: 1, CRITIC: 1}
    after_critic = logprobs(system, ids)
    show("critic trained", after_author, after_critic)
    assert after_critic["checker"] > after_author["checker"] + 0.05
    for role in ("writer", "rewriter"):
        assert after_critic[role] == pytest.approx(after_author[role], abs=1e-6)

    call(system, "checker", "later")
    call(system, "writer", "later")
    with system.store() as store:
        later = {span.role: span for span in store.list_spans(rollout_id="later")}
        assert {role: (span.policy, span.policy_version) for role, span in later.items()} == {
            "checker": (CRITIC, 1),
            "writer": (AUTHOR, 1),
        }
        paths = {each.path for each in store.list_versions() if each.version == 1}
    assert len(paths) == 2
    for report in (first, second):
        assert report.logprob_difference is not None
        assert report.logprob_difference["max"] < 1e-4


def ids_of(system: System, role: str, reply: str) -> list[int]:
    """The role's prompt, as it was recorded, with the token of the rewarded reply."""
    with system.store() as store:
        generation = next(
            span.generations[0]
            for span in store.list_spans(limit=10_000)
            if span.role == role
            and json.loads(span.response or b"")["choices"][0]["message"]["content"] == reply
        )
    return [*generation.prompt_token_ids, *generation.response_token_ids]


def show(what: str, before: Mapping[str, float], after: Mapping[str, float]) -> None:
    moved = ", ".join(f"{role} {before[role]:.4f} -> {after[role]:.4f}" for role in before)
    print(f"{what}: {moved}")
