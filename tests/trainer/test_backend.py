"""verl's update against plain torch, transformers and NumPy."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from lightning_proxy.errors import TrainingError
from lightning_proxy.trainer.backend import Backend, open_backend
from lightning_proxy.trainer.batches import Rows, pack, weigh
from lightning_proxy.trainer.checkpoint import validate
from lightning_proxy.trainer.trajectories import merge
from lightning_proxy.trainer.transitions import Transition
from tests.trainer.conftest import recipe
from tests.trainer.gradients import assert_same_gradients, gradients, worker_of

if TYPE_CHECKING:
    from tests.trainer.plain import PlainModel

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # verl and torch warn about themselves


@pytest.fixture(scope="module")
def backend(tiny_model: Path) -> Iterator[Backend]:
    """An engine whose weights no test changes."""
    opened = open_backend(recipe(micro_batch_tokens=256), tiny_model)
    yield opened
    opened.close()


@pytest.fixture
def fresh(tiny_model: Path) -> Iterator[Backend]:
    """An engine for one test, to be trained."""
    opened = open_backend(recipe(), tiny_model)
    yield opened
    opened.close()


def conversations(plain: PlainModel, count: int = 7, seed: int = 0) -> list[list[Transition]]:
    """Per rollout three calls that extend one another and one that branches off, with true logprobs."""
    generator = np.random.default_rng(seed)

    def call(name: str, prompt: Sequence[int], advantage: float) -> Transition:
        response = generator.integers(2, 64, generator.integers(1, 9)).tolist()
        logprobs = plain.logprobs([*prompt, *response])[len(prompt) - 1 :]
        return Transition(
            name,
            1,
            1,
            0,
            None,
            0,
            array("i", prompt),
            array("i", response),
            array("f", logprobs),
            advantage=advantage,
        )

    rollouts = []
    for number in range(count):
        name, advantage = str(number), float(generator.normal())
        calls = [call(name, generator.integers(2, 64, 4).tolist(), advantage)]
        for parent in (0, 1, 0):
            earlier = calls[parent]
            more = generator.integers(2, 64, 3).tolist()
            calls.append(call(name, [*earlier.prompt_ids, *earlier.response_ids, *more], advantage))
        rollouts.append(calls)
    return rollouts


def to_rows(rollouts: list[list[Transition]], *, merged: bool = True) -> Rows:
    parts = rollouts if merged else [[each] for calls in rollouts for each in calls]
    return weigh(pack([row for calls in parts for row in merge(calls)]), mini_batches=1)


def perturbed(rows: Rows, by: float) -> Rows:
    """Old logprobs as of another policy, so that ratios differ from 1 and some are clipped."""
    noise = np.random.default_rng(1).normal(scale=by, size=len(rows.tokens)).astype(np.float32)
    return replace(rows, logprobs=np.where(rows.mask, rows.logprobs + noise, 0).astype(np.float32))


@pytest.mark.parametrize("name", ["sapo", "vanila"])
def test_a_policy_loss_that_cannot_be_used_is_refused(name: str, tiny_model: Path) -> None:
    with pytest.raises(TrainingError, match=f"policy_loss = '{name}'"):
        open_backend(recipe(policy_loss=name), tiny_model)


def test_logprobs_are_those_of_a_plain_forward_pass(backend: Backend, plain: PlainModel) -> None:
    rows = to_rows(conversations(plain))
    found = backend.logprobs(rows)
    for start, end in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
        assert found[start] == 0
        np.testing.assert_allclose(
            found[start + 1 : end], plain.logprobs(rows.tokens[start:end].tolist()), atol=1e-5
        )


def test_the_first_step_on_fresh_data_has_ratio_one_and_clips_nothing(
    backend: Backend, plain: PlainModel
) -> None:
    metrics, _ = gradients(backend, to_rows(conversations(plain)))
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert metrics["clip_frac"] == 0
    assert metrics["kl"] == pytest.approx(0, abs=1e-5)


def test_loss_and_gradient_are_those_of_the_clipped_objective_written_out(
    backend: Backend, plain: PlainModel
) -> None:
    rows = perturbed(to_rows(conversations(plain)), by=0.2)
    metrics, found = gradients(backend, rows)
    loss, expected = plain.clipped_loss_gradients(rows, clip=0.2)
    assert metrics["clip_frac"] > 0.05
    assert metrics["pg_loss"] == pytest.approx(loss, abs=1e-5)
    assert_same_gradients(found, expected)


def test_the_divergence_is_no_less_where_all_that_was_sampled_became_likelier(
    backend: Backend, plain: PlainModel
) -> None:
    rows = to_rows(conversations(plain))
    rows = replace(rows, logprobs=np.where(rows.mask, rows.logprobs - 0.5, 0).astype(np.float32))
    metrics, _ = gradients(backend, rows)
    assert metrics["kl"] == pytest.approx(np.exp(0.5) - 1 - 0.5, abs=1e-4)


def test_merged_and_unmerged_rows_give_the_same_gradient(backend: Backend, plain: PlainModel) -> None:
    rollouts = conversations(plain)
    merged, unmerged = (perturbed_alike(to_rows(rollouts, merged=each)) for each in (True, False))
    assert len(merged) < len(unmerged)
    (one, some), (other, others) = gradients(backend, merged), gradients(backend, unmerged)
    assert one["pg_loss"] == pytest.approx(other["pg_loss"], abs=1e-6)
    assert_same_gradients(some, others)


def perturbed_alike(rows: Rows) -> Rows:
    """As ``perturbed``, by an amount that depends on the token alone and not on its place in the batch."""
    by = (0.2 * np.sin(1000 * rows.logprobs)).astype(np.float32)
    return replace(rows, logprobs=np.where(rows.mask, rows.logprobs + by, 0).astype(np.float32))


def test_a_rollout_cut_into_several_rows_pulls_as_much_as_in_one(backend: Backend, plain: PlainModel) -> None:
    rollouts = conversations(plain, count=2)
    whole = to_rows(rollouts)
    cut = weigh(
        pack([*merge(rollouts[0]), *(row for each in rollouts[1] for row in merge([each]))]), mini_batches=1
    )
    assert_same_gradients(gradients(backend, whole)[1], gradients(backend, cut)[1])


def test_micro_batches_of_any_size_give_the_same_gradient(backend: Backend, plain: PlainModel) -> None:
    rows = to_rows(conversations(plain, count=5))
    worker = worker_of(backend)
    found = []
    usual = worker.own
    for tokens in (1, 100, 100_000):
        worker.own = replace(usual, micro_batch_tokens=tokens)
        found.append(gradients(backend, rows)[1])
    worker.own = usual
    assert_same_gradients(found[0], found[1])
    assert_same_gradients(found[0], found[2])


def test_an_update_raises_the_probability_of_what_had_a_positive_advantage(
    fresh: Backend, plain: PlainModel
) -> None:
    rows = to_rows(conversations(plain))
    before = fresh.logprobs(rows)
    metrics = fresh.update(rows)
    gain = ((fresh.logprobs(rows) - before) * rows.advantages)[rows.mask]
    assert metrics["grad_norm"] > 0
    assert gain.sum() > 0


def test_a_step_that_is_not_finite_leaves_the_weights_as_they_were(fresh: Backend, plain: PlainModel) -> None:
    rows = to_rows(conversations(plain))
    before = fresh.logprobs(rows)
    metrics = fresh.update(replace(rows, advantages=rows.advantages * np.float32(np.inf)))
    assert not np.isfinite(metrics["grad_norm"])
    np.testing.assert_array_equal(fresh.logprobs(rows), before)


def test_exported_weights_are_a_valid_checkpoint_with_the_same_logprobs(
    fresh: Backend, plain: PlainModel, tiny_model: Path, tmp_path: Path
) -> None:
    from tests.trainer.plain import PlainModel as Plain

    rows = to_rows(conversations(plain))
    fresh.update(rows)
    export(fresh, tiny_model, tmp_path)
    again = Plain(tmp_path)
    ids = rows.tokens[: rows.offsets[1]].tolist()
    np.testing.assert_allclose(fresh.logprobs(rows)[1 : len(ids)], again.logprobs(ids), atol=1e-5)
    assert not np.allclose(plain.logprobs(ids), again.logprobs(ids), atol=1e-4)


def export(backend: Backend, base: Path, directory: Path) -> None:
    for entry in base.iterdir():
        if entry.suffix != ".safetensors":
            (directory / entry.name).write_bytes(entry.read_bytes())
    backend.export(directory, base)
    validate(directory, base)


def test_a_bfloat16_model_is_trained_in_full_precision_and_exported_in_its_own(
    plain: PlainModel, tmp_path: Path
) -> None:
    from tests.trainer.tiny_model import write_tiny_model

    base = write_tiny_model(tmp_path / "base", dtype="bfloat16")
    (tmp_path / "new").mkdir()
    backend = open_backend(recipe(learning_rate=1e-6), base)
    rows = to_rows(conversations(plain))
    before = backend.logprobs(rows)
    backend.update(rows)
    after = backend.logprobs(rows)
    assert not np.array_equal(before, after)  # steps too small for bfloat16 are not lost
    export(backend, base, tmp_path / "new")
    (tmp_path / "state").mkdir()
    backend.save_state(tmp_path / "state")
    backend.close()
    again = open_backend(recipe(learning_rate=1e-6), tmp_path / "new")
    again.load_state(tmp_path / "state")
    np.testing.assert_array_equal(again.logprobs(rows), after)
    again.close()


def test_a_loaded_optimiser_takes_the_learning_rate_of_the_settings(
    tiny_model: Path, plain: PlainModel, tmp_path: Path
) -> None:
    first = open_backend(recipe(learning_rate=1e-3), tiny_model)
    first.update(to_rows(conversations(plain)))
    first.save_state(tmp_path)
    first.close()
    second = open_backend(recipe(learning_rate=1e-5, adam_eps=1e-6), tiny_model)
    second.load_state(tmp_path)
    [group] = worker_of(second).engine.optimizer.param_groups
    assert (group["lr"], group["eps"]) == (1e-5, 1e-6)
    assert len(group["params"]) == len(worker_of(second).engine.optimizer.state)
    second.close()


def test_a_lora_adapter_and_the_weights_that_contain_it_are_the_same_policy(
    tiny_model: Path, plain: PlainModel, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tests.trainer.plain import PlainModel as Plain

    for part in ("merged", "adapter"):
        (tmp_path / part).mkdir()
    backend = open_backend(recipe(lora_rank=4, lora_alpha=8, learning_rate=1e-2), tiny_model)
    rows = to_rows(conversations(plain))
    backend.update(rows)
    export(backend, tiny_model, tmp_path / "merged")
    backend.export_adapter(tmp_path / "adapter", tiny_model)
    found = backend.logprobs(rows)
    backend.close()
    ids = rows.tokens[: rows.offsets[1]].tolist()
    merged = Plain(tmp_path / "merged")
    adapted = Plain(tiny_model)
    adapted.model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "adapter"
    )
    np.testing.assert_allclose(found[1 : len(ids)], merged.logprobs(ids), atol=1e-5)
    np.testing.assert_allclose(found[1 : len(ids)], adapted.logprobs(ids), atol=1e-5)
    assert not np.allclose(plain.logprobs(ids), adapted.logprobs(ids), atol=1e-3)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, str(tiny_model))


def test_verl_does_not_write_to_our_standard_output(
    tiny_model: Path, plain: PlainModel, capfd: pytest.CaptureFixture[str]
) -> None:
    backend = open_backend(recipe(), tiny_model)
    backend.update(to_rows(conversations(plain)))
    print("ours")
    backend.close()
    assert capfd.readouterr().out == "ours\n"
