"""What an update must not depend on, with verl and a real model: rows, order, a run that failed before."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lightning_proxy.config import Settings
from lightning_proxy.store import Payment, Store
from lightning_proxy.trainer import steps
from lightning_proxy.trainer.advantages import Returns, assign
from lightning_proxy.trainer.backend import Backend, estimator, open_backend
from lightning_proxy.trainer.batches import Rows, pack, split_mini_batches, weigh
from lightning_proxy.trainer.credit import IDENTICAL, Credit
from lightning_proxy.trainer.groups import form_groups
from lightning_proxy.trainer.report import Outcome
from lightning_proxy.trainer.run import train_once
from lightning_proxy.trainer.trajectories import merge
from lightning_proxy.trainer.transitions import LeftOut, Step, TrainableRollout, Transition
from tests.trainer.conftest import RECIPE, recipe
from tests.trainer.fake_proxy import fake_proxy
from tests.trainer.gradients import assert_same_gradients, gradients
from tests.trainer.paper import silent
from tests.trainer.recording import POLICY, Logprobs, record_group

if TYPE_CHECKING:
    from tests.trainer.plain import PlainModel

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # verl and torch warn about themselves

CREDITS = [IDENTICAL, Credit("discounted", 0.9), Credit("return_to_go", 0.9)]
BY_NAME = pytest.mark.parametrize("credit", CREDITS, ids=lambda credit: credit.method)


@pytest.fixture(scope="module")
def backend(tiny_model: Path) -> Iterator[Backend]:
    """An engine whose weights no test changes."""
    opened = open_backend(recipe(micro_batch_tokens=256), tiny_model)
    yield opened
    opened.close()


def rollout(plain: PlainModel, name: str, task: str, calls: int, generator: Any) -> TrainableRollout:
    """Calls that extend one another, each with a reward and all with a role, with true logprobs."""
    context = generator.integers(2, 64, 4).tolist()
    made: list[Transition] = []
    for number in range(calls):
        response = generator.integers(2, 64, generator.integers(1, 5)).tolist()
        logprobs = plain.logprobs([*context, *response])[len(context) - 1 :]
        made.append(
            Transition(
                name, 1, number + 1, 0, f"role {number % 2}", 0,
                array("i", context), array("i", response), array("f", logprobs), step=number,
            )
        )  # fmt: skip
        context = [*context, *response, *generator.integers(2, 64, 2).tolist()]
    paid = tuple(Payment(float(generator.normal()), number + 1) for number in range(calls))
    step = tuple(Step(each.span_id, each.role) for each in made)
    value = sum(each.value for each in paid)
    return TrainableRollout(name, task, value, tuple(made), steps=step, payments=paid)


def batch_of(plain: PlainModel) -> list[TrainableRollout]:
    """Three groups; in each one rollout of ten calls."""
    generator = np.random.default_rng(0)
    return [
        rollout(plain, f"{task}-{number}", f"task {task}", calls, generator)
        for task in range(3)
        for number, calls in enumerate((10, 3, 1))
    ]


def assigned(
    rollouts: Sequence[TrainableRollout], credit: Credit, name: str = "grpo"
) -> list[TrainableRollout]:
    grouping = form_groups(rollouts, min_size=2, may_wait=True, left_out=LeftOut(), credit=credit)
    return assign(grouping.groups, credit=credit, estimator=estimator(recipe(estimator=name)))


def rows_of(rollouts: Sequence[TrainableRollout], *, merged: bool = True) -> Rows:
    parts = [one.transitions for one in rollouts]
    if not merged:
        parts = [(each,) for transitions in parts for each in transitions]
    return weigh(pack([row for part in parts for row in merge(part)]), mini_batches=1)


@BY_NAME
def test_a_rollout_cut_into_ten_rows_moves_the_weights_as_much_as_in_one(
    backend: Backend, plain: PlainModel, credit: Credit
) -> None:
    done = assigned(batch_of(plain), credit)
    whole, cut = rows_of(done), rows_of(done, merged=False)
    assert (len(whole), len(cut)) == (9, 42)
    assert_same_gradients(gradients(backend, whole)[1], gradients(backend, cut)[1])
    if credit.by_step:  # within the one row tokens have advantages of their own
        first = whole.advantages[: whole.offsets[1]][whole.mask[: whole.offsets[1]]]
        assert len(np.unique(first)) > 2


@BY_NAME
def test_a_permuted_batch_has_the_same_advantages_exactly_and_gives_the_same_update(
    tiny_model: Path, plain: PlainModel, credit: Credit
) -> None:
    members = batch_of(plain)
    order = np.random.default_rng(7).permutation(len(members))
    straight = assigned(members, credit)
    shuffled = assigned([members[number] for number in order], credit)
    by_name = {each.rollout_id: [one.advantage for one in each.transitions] for each in straight}
    assert {each.rollout_id: [one.advantage for one in each.transitions] for each in shuffled} == by_name
    weights = []
    for done in (straight, shuffled):
        rows = rows_of(done)
        [chosen] = split_mini_batches(rows.rollouts, len(rows), np.random.default_rng(0))
        engine = open_backend(recipe(learning_rate=1e-3), tiny_model)
        engine.update(rows.select(chosen))
        weights.append(engine.logprobs(rows_of(straight)))
        engine.close()
    before = rows_of(straight).logprobs
    mask = rows_of(straight).mask
    assert np.abs(weights[0] - before)[mask].max() > 1e-3  # it did move
    np.testing.assert_allclose(weights[0], weights[1], atol=1e-5)


ONCE_PER_STEP = ["grpo", "grpo_vectorized", "rloo", "rloo_vectorized", "opo", "gpg", "grpo_passk",
                 "reinforce_plus_plus", "reinforce_plus_plus_baseline"]  # fmt: skip


@pytest.mark.parametrize("name", ONCE_PER_STEP)
@pytest.mark.parametrize("credit", [*CREDITS, Credit("return_to_go", 0.9, by_role=True)], ids=str)
def test_every_estimator_that_works_once_per_rollout_works_once_per_step(
    plain: PlainModel, name: str, credit: Credit
) -> None:
    done = assigned(batch_of(plain), credit, name)
    assert len(done) == 9
    found = [each.advantage for one in done for each in one.transitions]
    assert np.isfinite(np.array(found, dtype=float)).all()
    assert any(found)


def test_grpo_by_step_is_its_formula_over_each_step(plain: PlainModel) -> None:
    credit = CREDITS[2]
    generator = np.random.default_rng(2)
    members = [rollout(plain, str(number), "t", 3, generator) for number in range(4)]
    rewards_R_T = np.array([[each.value for each in one.payments] for one in members])
    gammas = 0.9 ** np.arange(3)
    to_go_R_T = np.stack([(rewards_R_T[:, t:] * gammas[: 3 - t]).sum(axis=1) for t in range(3)], axis=1)
    expected = (to_go_R_T - to_go_R_T.mean(axis=0)) / (to_go_R_T.std(axis=0, ddof=1) + 1e-6)
    found = [[each.advantage for each in one.transitions] for one in assigned(members, credit)]
    np.testing.assert_allclose(np.array(found, dtype=float), expected, atol=1e-6)


@BY_NAME
def test_with_norm_by_std_a_groups_scale_changes_nothing_at_all(plain: PlainModel, credit: Credit) -> None:
    members = batch_of(plain)

    def scaled(one: TrainableRollout) -> TrainableRollout:
        paid = tuple(replace(each, value=1024 * each.value) for each in one.payments)
        return replace(one, value=1024 * one.value, payments=paid)

    before = assigned(members, credit)
    after = assigned([scaled(one) if one.task_id == "task 1" else one for one in members], credit)
    for one, other in zip(before, after, strict=True):
        own = [each.advantage for each in one.transitions]
        if one.task_id == "task 1":  # but for the 1e-6 beside the deviation
            assert [each.advantage for each in other.transitions] == pytest.approx(own, abs=1e-4)
        else:
            assert [each.advantage for each in other.transitions] == own


def test_what_is_drained_again_after_a_failed_run_gives_the_same_update_bit_for_bit(
    tmp_path: Path, tiny_model: Path, sampler_logprobs: Logprobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.numpy import load_file

    found = []
    for fails_first in (False, True):
        with Store.open(tmp_path / f"{fails_first}.db") as store, fake_proxy(store.path) as proxy:
            for task in ("one", "two"):
                record_group(store, task, [0.0, 1.0, 1.0, 0.0], logprobs=sampler_logprobs)
            train = RECIPE | {
                "proxy_url": proxy.url,
                "runs_dir": tmp_path / f"runs {fails_first}",
                "min_rollouts": 4,
                "mini_batch_rows": 3,
                "learning_rate": 1e-3,
                "credit": "return_to_go",
                "discount": 0.9,
            }
            settings = Settings.model_validate(
                {"store": {"db": store.path}, "policy": {"name": POLICY, "model": tiny_model}, "train": train}
            )
            if fails_first:
                with monkeypatch.context() as patch:
                    patch.setattr(steps.Pass, "export", _fail)
                    with pytest.raises(RuntimeError, match="in the middle"):
                        train_once(settings, store=store, progress=silent)
            assert train_once(settings, store=store, progress=silent).outcome is Outcome.TRAINED
            active = store.active_version(POLICY)
            assert active is not None
            found.append(load_file(Path(active.path) / "model.safetensors"))
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        np.testing.assert_array_equal(found[0][name], found[1][name], err_msg=name)


def _fail(*_: object) -> Returns:
    raise RuntimeError("the machine went away in the middle")
