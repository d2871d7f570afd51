"""Whole passes of SFT and DPO: a real store, real weights, verl, a promote route on a real socket."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import lightning_proxy.demo
from lightning_proxy.config.settings import PolicySettings, ProxySettings, Settings, StoreSettings
from lightning_proxy.store import Fidelity, Generation, Store
from lightning_proxy.trainer.report import Outcome, TrainReport
from lightning_proxy.trainer.run import train_once
from tests.trainer.conftest import RECIPE
from tests.trainer.fake_proxy import FakeProxy
from tests.trainer.recording import POLICY, record_group, span

if TYPE_CHECKING:
    from tests.trainer.plain import PlainModel

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # verl and torch warn about themselves

MODEL = Path(lightning_proxy.demo.__file__).with_name("weights")  # it has a chat template
ASKED = [
    {"role": "system", "content": "items(price, stock)"},
    {"role": "user", "content": "What is the highest price?"},
]
WRONG, RIGHT = "min stock", "max price"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


class Conversation:
    """The one prompt of these tests, in the model's tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        text = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False)
        self.prompt: list[int] = tokenizer.encode(text)

    def answer(self, text: str) -> list[int]:
        return [*self._tokenizer.encode(text), self._tokenizer.eos_token_id]

    def record(self, store: Store, rollout_id: str, text: str, reward: float | None = None) -> None:
        """A rollout of one greedy call whose logprobs nobody told."""
        store.create_rollout(rollout_id=rollout_id, task_id="prices")
        made = Generation(array("i", self.prompt), array("i", self.answer(text)), array("f"))
        body = {"model": POLICY, "messages": ASKED, "temperature": 0}
        store.add_span(
            span(
                rollout_id,
                made,
                request=json.dumps(body).encode(),
                sampling={"temperature": 0},
                fidelity=Fidelity.RETOKENIZED,
            )
        )
        if reward is not None:
            store.add_reward(value=reward, rollout_id=rollout_id)

    def likelihood(self, model: PlainModel, text: str) -> float:
        """Log-probability of an answer."""
        answer = self.answer(text)
        return sum(model.logprobs([*self.prompt, *answer])[-len(answer) :])


@pytest.fixture(scope="module")
def conversation(tokenizer: Any) -> Conversation:
    return Conversation(tokenizer)


def plain(path: str | Path) -> PlainModel:
    from tests.trainer.plain import PlainModel

    return PlainModel(Path(path))


def serving(store: Store) -> PlainModel:
    active = store.active_version(POLICY)
    assert active is not None
    return plain(active.path)


def run(store: Store, proxy: FakeProxy, algorithm: str, model: Path = MODEL, **train: object) -> TrainReport:
    values = RECIPE | {
        "algorithm": algorithm,
        "proxy_url": proxy.url,
        "runs_dir": store.path.parent / "runs",
        "min_rollouts": 1,
        "learning_rate": 1e-3,
        "epochs": 4,
    }
    settings = Settings(
        proxy=ProxySettings(token="secret"),
        store=StoreSettings(db=store.path),
        policy=PolicySettings(name=POLICY, model=model),
        train=Settings.model_validate({"train": values | train}).train,
    )
    report = train_once(settings, store=store, progress=lambda line, done=None: None)
    json.dumps(report.as_dict(), allow_nan=False)
    return report


def test_sft_makes_the_best_and_the_demonstrated_answers_likelier(
    store: Store, proxy: FakeProxy, conversation: Conversation
) -> None:
    conversation.record(store, "good", "max stock", 1.0)
    conversation.record(store, "bad", "min price", 0.0)
    conversation.record(store, "corrected", WRONG)
    store.add_reward(rollout_id="corrected", demonstration=RIGHT)
    report = run(store, proxy, "sft")
    assert (report.outcome, report.algorithm, report.version) == (Outcome.TRAINED, "sft", 1)
    assert report.counts["rows_by_reward"] == report.counts["rows_by_demonstration"] == 1
    assert report.counts["rollouts"] == 2
    assert report.left_out == {"rollouts": {"below_best": 1}, "calls": {}}
    assert report.reward_mean == 0.5
    assert report.metrics["steps"] == 4
    assert report.metrics["nll"] < report.metrics["first"]["nll"]
    before, after = plain(MODEL), serving(store)
    for text in ("max stock", RIGHT):
        assert conversation.likelihood(after, text) > conversation.likelihood(before, text) + 0.5
    active = store.active_version(POLICY)
    assert active is not None
    assert active.probe is not None  # the proxy verifies such a version as any other


def test_dpo_prefers_what_was_demonstrated_and_the_best_of_a_group(
    store: Store, proxy: FakeProxy, conversation: Conversation
) -> None:
    conversation.record(store, "good", "max stock", 1.0)
    conversation.record(store, "middling", "stock", 0.5)
    conversation.record(store, "bad", "min price", 0.0)
    conversation.record(store, "corrected", WRONG)
    store.add_reward(rollout_id="corrected", demonstration=RIGHT)
    report = run(store, proxy, "dpo", mini_batch_rows=2)
    assert (report.outcome, report.algorithm) == (Outcome.TRAINED, "dpo")
    assert report.counts["pairs_by_group"] == report.counts["pairs_by_demonstration"] == 1
    assert (report.counts["rows"], report.counts["rollouts"]) == (4, 3)
    assert report.left_out["rollouts"] == {"no_pair": 1}
    assert report.metrics["steps"] == 8
    assert report.metrics["after"]["accuracy"] == 1.0
    assert report.metrics["after"]["margin"] > 0
    before, after = plain(MODEL), serving(store)
    for right, wrong in ((RIGHT, WRONG), ("max stock", "min price")):
        gain = conversation.likelihood(after, right) - conversation.likelihood(before, right)
        loss = conversation.likelihood(after, wrong) - conversation.likelihood(before, wrong)
        assert gain > loss


def test_dpo_can_be_held_near_version_0_instead_of_the_one_before(
    store: Store, proxy: FakeProxy, conversation: Conversation
) -> None:
    for turn, expected in enumerate((0.0, 1.0)):
        conversation.record(store, f"corrected-{turn}", WRONG)
        store.add_reward(rollout_id=f"corrected-{turn}", demonstration=RIGHT)
        report = run(store, proxy, "dpo", dpo_reference="base")
        assert report.metrics["first"]["accuracy"] == expected  # the second begins where the first ended


def test_a_demonstration_is_trained_on_once_by_whichever_run_comes_first_unless_corrected(
    store: Store, proxy: FakeProxy, conversation: Conversation
) -> None:
    conversation.record(store, "corrected", WRONG)
    store.add_reward(rollout_id="corrected", demonstration="min price")
    assert run(store, proxy, "sft").outcome is Outcome.TRAINED
    assert run(store, proxy, "dpo").outcome is Outcome.NOTHING
    store.add_reward(rollout_id="corrected", demonstration=RIGHT)
    report = run(store, proxy, "dpo")
    assert report.counts["pairs_by_demonstration"] == 1
    assert run(store, proxy, "sft").outcome is Outcome.NOTHING
    assert store.backlog(POLICY, demonstrated=True).rollouts_ready == 0


def test_a_version_that_the_proxy_rejects_gives_its_demonstrations_back(
    store: Store, proxy: FakeProxy, conversation: Conversation
) -> None:
    conversation.record(store, "corrected", WRONG)
    store.add_reward(rollout_id="corrected", demonstration=RIGHT)
    proxy.mode = "rejects"
    assert run(store, proxy, "sft").outcome is Outcome.REJECTED
    assert store.backlog(POLICY, demonstrated=True).rollouts_ready == 1


def test_a_demonstration_whose_prompt_the_template_does_not_make_is_used_up_and_counted(
    store: Store, proxy: FakeProxy, conversation: Conversation
) -> None:
    record_group(store, "other", [0.5], turns=1)  # its request has no messages
    store.add_reward(rollout_id="other-0-0", demonstration=RIGHT)
    report = run(store, proxy, "sft")
    assert report.outcome is Outcome.NOTHING
    assert report.left_out["demonstrations"] == {"unrenderable": 1}
    assert report.left_out["rollouts"] == {"below_min_return": 1}
    assert store.backlog(POLICY, demonstrated=True).rollouts_ready == 0


def test_another_algorithm_takes_over_the_weights_and_begins_the_optimiser_anew(
    store: Store, proxy: FakeProxy, tiny_model: Path, sampler_logprobs: Any
) -> None:
    said: list[str | None] = []
    algorithms: Sequence[str] = ("rl", "sft", "sft", "dpo", "rl")
    for version, algorithm in enumerate(algorithms):
        record_group(store, "one", [0.0, 1.0], logprobs=sampler_logprobs, version=version, turns=1)
        report = run(store, proxy, algorithm, tiny_model, learning_rate=1e-4, epochs=1)
        assert report.outcome is Outcome.TRAINED, report.message
        said.append(report.optimizer)
    assert said == [
        "began anew: there is no saved state",
        "began anew: the last pass was rl",
        "carried over",
        "began anew: the last pass was sft",
        "began anew: the last pass was dpo",
    ]
