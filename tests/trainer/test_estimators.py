"""verl's advantage estimators, once per rollout, against their formulas in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lightning_proxy.errors import TrainingError
from lightning_proxy.trainer.backend import estimator
from tests.trainer.conftest import recipe

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # verl and torch warn about themselves

Floats = np.ndarray[Any, Any]


def rollouts() -> tuple[Floats, Floats, Floats]:
    """Credits, groups of at least two, and lengths of a few hundred rollouts."""
    generator = np.random.default_rng(3)
    groups = np.sort(generator.integers(0, 40, 300))
    groups = np.array([group for group in groups if (groups == group).sum() > 1])
    return generator.normal(size=len(groups)), groups, generator.integers(1, 500, len(groups))


FORMULAS: dict[str, Callable[[Floats, Floats], Floats]] = {  # of the credits and the lengths of a group
    "grpo": lambda of, _: (of - of.mean()) / (of.std(ddof=1) + 1e-6),
    "dr_grpo": lambda of, _: of - of.mean(),
    "rloo": lambda of, _: of - (of.sum() - of) / (len(of) - 1),
    "opo": lambda of, lengths: of - (of * lengths).sum() / lengths.sum(),
}


def by_group(credits_R: Floats, groups_R: Floats, lengths_R: Floats, name: str) -> Floats:
    found = np.zeros_like(credits_R)
    for group in set(groups_R.tolist()):
        own = groups_R == group
        found[own] = FORMULAS[name](credits_R[own], lengths_R[own])
    return found


def whitened(values: Floats) -> Floats:
    centred: Floats = (values - values.mean()) / np.sqrt(values.var(ddof=1) + 1e-8)
    return centred


@pytest.mark.parametrize(
    ("name", "norm_by_std", "formula"),
    [
        ("grpo", True, "grpo"),
        ("grpo", False, "dr_grpo"),
        ("grpo_vectorized", True, "grpo"),
        ("rloo", True, "rloo"),
        ("rloo_vectorized", True, "rloo"),
        ("opo", True, "opo"),
    ],
)
def test_advantages_within_a_group_are_those_of_the_formula(
    name: str, norm_by_std: bool, formula: str
) -> None:
    credits_R, groups_R, lengths_R = rollouts()
    estimate = estimator(recipe(estimator=name, norm_by_std=norm_by_std))
    found = estimate(credits_R, groups_R.tolist(), lengths_R.tolist())
    np.testing.assert_allclose(found, by_group(credits_R, groups_R, lengths_R, formula), atol=1e-6)


def test_reinforce_plus_plus_whitens_over_all_rollouts() -> None:
    credits_R, groups_R, lengths_R = rollouts()
    plain = estimator(recipe(estimator="reinforce_plus_plus"))
    found = plain(credits_R, groups_R.tolist(), lengths_R.tolist())
    np.testing.assert_allclose(found, whitened(credits_R), atol=1e-6)
    baseline = estimator(recipe(estimator="reinforce_plus_plus_baseline"))
    found = baseline(credits_R, groups_R.tolist(), lengths_R.tolist())
    centred = by_group(credits_R, groups_R, lengths_R, "dr_grpo")
    np.testing.assert_allclose(found, whitened(centred), atol=1e-6)


def test_one_groups_scale_does_not_leak_into_anothers() -> None:
    credits_R, groups_R, lengths_R = rollouts()
    estimate = estimator(recipe())
    before = estimate(credits_R, groups_R.tolist(), lengths_R.tolist())
    others = groups_R != groups_R[0]
    scaled = np.where(others, credits_R, 1e6 * credits_R + 5)
    after = estimate(scaled, groups_R.tolist(), lengths_R.tolist())
    np.testing.assert_array_equal(before[others], after[others])


def test_every_name_that_an_error_offers_can_be_used() -> None:
    with pytest.raises(TrainingError, match="verl has") as refused:
        estimator(recipe(estimator="grop"))
    names = str(refused.value).partition("verl has ")[2].split(", ")
    assert {"grpo", "rloo", "opo", "reinforce_plus_plus", "gpg"} <= set(names)
    for name in names:
        advantages = estimator(recipe(estimator=name))(
            np.array([0.0, 1.0, 1.0, 3.0]), [0, 0, 1, 1], [3, 4, 5, 6]
        )
        assert np.isfinite(advantages).all()
        assert advantages.shape == (4,)


def test_an_estimator_that_cannot_be_used_says_what_it_lacks() -> None:
    with pytest.raises(TrainingError, match="needs values of a critic"):
        estimator(recipe(estimator="gae"))
