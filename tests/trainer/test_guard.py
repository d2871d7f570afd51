from __future__ import annotations

import pytest

from lightning_proxy.config.train import GuardSettings
from lightning_proxy.errors import CheckpointInvalid
from lightning_proxy.trainer.guard import Look, best_of, check_probe, check_steps, collapse

GUARD = GuardSettings()
ALL = range(100)  # versions whose weights are there
STEP = {"pg_loss": 0.1, "grad_norm": 1.0, "kl": 0.01}


def look(
    version: int, mean: float, *, std: float = 0.5, count: int = 128, entropy: float | None = 0.3
) -> Look:
    return Look(version, {"mean": mean, "std": std, "min": 0.0, "max": 1.0, "count": count}, entropy)


def stopped(
    now: Look, *before: Look, settings: GuardSettings = GUARD, mixed: int = 5, equal: int = 5
) -> bool:
    return collapse(now, before, settings, mixed=mixed, equal=equal, there=ALL) is not None


def test_the_first_run_and_one_that_gets_better_go_on() -> None:
    assert not stopped(look(0, 0.0))
    assert not stopped(look(2, 0.5), look(0, 0.2), look(1, 0.4))


def test_a_collapse_names_the_best_version_and_the_way_back() -> None:
    found = collapse(
        look(3, 0.1), [look(0, 0.3), look(1, 0.8), look(2, 0.7)], GUARD, mixed=5, equal=5, there=ALL
    )
    assert found is not None
    assert found.best == 1
    assert "policies rollback --to 1" in found.message


def test_the_way_back_leads_to_a_version_whose_weights_are_there() -> None:
    before = [look(0, 0.3), look(1, 0.8), look(2, 0.7), look(3, 0.2, entropy=0.3)]
    for now in (look(3, 0.05), look(3, 0.05, entropy=9.0)):
        for there, best in (((0, 2, 3), 2), ((0, 3), 0), ((3,), None), ((), None)):
            found = collapse(now, before, GUARD, mixed=5, equal=5, there=there)
            assert found is not None
            assert found.best == best
            assert ("policies rollback" in found.message) == (best is not None)


def test_a_drop_within_the_allowed_share_of_the_range_goes_on() -> None:
    assert not stopped(look(2, 0.35), look(1, 0.8))
    assert stopped(look(2, 0.35), look(1, 0.8), settings=GuardSettings(max_reward_drop=0.4))


def test_a_drop_of_a_few_unlucky_rollouts_goes_on() -> None:
    assert stopped(look(2, 0.2), look(1, 0.8))
    assert not stopped(look(2, 0.2, count=4), look(1, 0.8))


def test_a_few_lucky_rollouts_hide_no_collapse() -> None:
    usual = [look(version, 0.8) for version in range(5)]
    assert stopped(look(6, 0.05), *usual)
    lucky = look(5, 0.9, std=0.17, count=3)
    found = collapse(look(6, 0.05), [*usual, lucky], GUARD, mixed=5, equal=5, there=ALL)
    assert found is not None
    assert found.best == 4


def test_equal_returns_are_equal_whatever_rounding_makes_of_them() -> None:
    best = look(1, 0.75, count=64)
    for std in (0.0, 1.7e-17):
        rewards = {"mean": 0.1, "std": std, "min": 0.1, "max": 0.1, "count": 3}
        assert not stopped(Look(2, rewards, None), best)


def test_two_rollouts_that_failed_alike_are_no_collapse_and_ten_are() -> None:
    best = look(1, 0.8)
    assert not stopped(look(2, 0.0, std=0.0, count=2), best)
    assert stopped(look(2, 0.0, std=0.0, count=10), best)


def test_the_range_is_that_of_the_rewards_whatever_their_scale() -> None:
    def scaled(version: int, mean: float) -> Look:
        return Look(version, {"mean": mean, "std": 50.0, "min": -500.0, "max": 500.0, "count": 128}, None)

    assert not stopped(scaled(2, -100.0), scaled(1, 300.0))
    assert stopped(scaled(2, -300.0), scaled(1, 300.0))


def test_a_rise_of_entropy_over_the_usual_is_a_collapse_into_noise() -> None:
    before = (look(0, 0.3), look(1, 0.3, entropy=0.2), look(2, 0.3, entropy=0.4))
    assert not stopped(look(3, 0.3, entropy=1.4), *before)
    assert stopped(look(3, 0.3, entropy=1.6), *before)
    assert not stopped(look(3, 0.3, entropy=None), *before)
    assert not stopped(look(3, 0.3, entropy=9.0), look(0, 0.3, entropy=None))


def test_groups_that_agree_stop_a_run_where_that_is_asked_for() -> None:
    assert not stopped(look(0, 1.0), mixed=0, equal=10)
    asked = GuardSettings(min_mixed_groups=0.2)
    assert stopped(look(0, 1.0), settings=asked, mixed=1, equal=9)
    assert not stopped(look(0, 1.0), settings=asked, mixed=2, equal=8)
    assert not stopped(look(0, 1.0), settings=asked, mixed=0, equal=0)
    # Even where next to nothing is known of the present version.
    assert collapse(None, [look(0, 1.0)], asked, mixed=1, equal=9, there=ALL) is not None
    assert collapse(None, [look(0, 1.0)], asked, mixed=2, equal=8, there=ALL) is None


def test_of_equally_good_versions_the_latest_is_the_best() -> None:
    best = best_of([look(0, 0.5), look(1, 0.5), look(2, 0.4)])
    assert best is not None
    assert best.version == 1
    assert best_of([]) is None


def test_a_report_is_looked_at_only_where_it_saw_enough() -> None:
    rewards = {"mean": 0.5, "std": 0.5, "min": 0.0, "max": 1.0, "count": 8}
    assert Look.at({"rewards": rewards, "parent": 3, "entropy": 0.1}) == Look(3, rewards, 0.1)
    assert Look.at({"rewards": None, "parent": 3}) is None
    assert Look.at({}) is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"pg_loss": float("nan")}, "pg_loss"),
        ({"grad_norm": float("inf")}, "grad_norm"),
        ({"kl": 0.6}, "max_kl"),
    ],
)
def test_an_update_that_went_wrong_is_not_published(changes: dict[str, float], why: str) -> None:
    check_steps([STEP, STEP], GUARD)
    with pytest.raises(CheckpointInvalid, match=rf"{why}.*nothing is published"):
        check_steps([STEP, STEP | changes], GUARD)


def test_a_probe_that_is_not_finite_is_not_published() -> None:
    check_probe([-0.5, -1.0])
    with pytest.raises(CheckpointInvalid, match="not finite"):
        check_probe([-0.5, float("nan")])
