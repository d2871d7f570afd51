"""Intervals against published values, against what they are defined by, and by how often they are right."""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_proxy.store.intervals import (
    CONFIDENCE,
    Method,
    Returns,
    Sample,
    difference_of,
    mean_of,
    t_quantile,
    wilson,
)

Z = 1.959963984540054
RIGHT_OR_WRONG = Returns(0.0, 1.0, two_valued=True)
THUMBS = Returns(-1.0, 1.0, two_valued=True)


def sample(values: Sequence[float]) -> Sample:
    made = Sample.of(Counter(values))
    assert made is not None
    return made


def of(right: int, count: int) -> Sample:
    return sample([1.0] * right + [0.0] * (count - right))


# -- Student's t -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freedom", "published"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (6, 2.447), (7, 2.365), (8, 2.306),
     (9, 2.262), (10, 2.228), (15, 2.131), (20, 2.086), (30, 2.042), (40, 2.021), (60, 2.000), (120, 1.980)],
)  # fmt: skip
def test_quantiles_of_t_are_those_of_the_tables(freedom: int, published: float) -> None:
    assert round(t_quantile(freedom), 3) == published


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.9, 0.95, 0.99, 0.999])
def test_quantiles_of_t_are_the_closed_forms_where_there_are_some(confidence: float) -> None:
    cauchy = math.tan(math.pi * confidence / 2)
    two = confidence * math.sqrt(2 / (1 - confidence * confidence))
    assert t_quantile(1, confidence) == pytest.approx(cauchy, rel=1e-12)
    assert t_quantile(2, confidence) == pytest.approx(two, rel=1e-12)


@pytest.mark.parametrize("freedom", [1.3, 2.5, 7.77, 24.5, 333.3, 5000.0])
def test_beyond_a_quantile_of_t_lies_what_the_density_has_there(freedom: float) -> None:
    """Simpson's rule over the density from 0 to the quantile."""
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2

    def density(t: float) -> float:
        return math.exp(scale - (freedom + 1) / 2 * math.log1p(t * t / freedom))

    step = t_quantile(freedom) / 2000
    inside = [density(number * step) * (4 if number % 2 else 2) for number in range(1, 2000)]
    half = (density(0.0) + math.fsum(inside) + density(2000 * step)) * step / 3
    assert 2 * half == pytest.approx(CONFIDENCE, abs=1e-9)


def test_with_many_returns_t_is_normal() -> None:
    assert t_quantile(1e7) == pytest.approx(Z + (Z**3 + Z) / 4e7, rel=1e-9)
    falling = [t_quantile(freedom) for freedom in (1, 1.5, 3, 10, 100, 1e4, 1e6)]
    assert all(one > next_ > Z for one, next_ in pairwise(falling))


# -- two values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_a_proportion_has_the_interval_that_newcombe_published(
    right: int, count: int, low: float, high: float
) -> None:
    """R. G. Newcombe, Statistics in Medicine 17, 1998, 857-872, table I, method 3."""
    found = mean_of(of(right, count), RIGHT_OR_WRONG)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert found.method is Method.WILSON


@pytest.mark.parametrize(
    ("one", "other", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((0, 10), (0, 20), -0.1611, 0.2775),
        ((0, 10), (0, 10), -0.2775, 0.2775),
        ((10, 10), (0, 20), 0.6791, 1.0),
        ((10, 10), (0, 10), 0.6075, 1.0),
    ],
)
def test_a_difference_has_the_interval_that_newcombe_published(
    one: tuple[int, int], other: tuple[int, int], low: float, high: float
) -> None:
    """The paper in the module's docstring, table II, method 10."""
    found = difference_of(of(*one), of(*other), RIGHT_OR_WRONG)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert found.method is Method.NEWCOMBE


@given(st.integers(1, 500), st.data())
def test_the_bounds_of_a_proportion_are_those_that_a_score_test_just_takes(
    count: int, data: st.DataObject
) -> None:
    observed = data.draw(st.integers(0, count)) / count
    low, high = wilson(observed, count)
    assert 0 <= low <= observed <= high <= 1

    def rejects(p: float) -> bool:
        return (observed - p) ** 2 > Z * Z * p * (1 - p) / count

    assert low == 0 or (rejects(low - 1e-7) and not rejects(low + 1e-7))
    assert high == 1 or (rejects(high + 1e-7) and not rejects(high - 1e-7))


def chances(count: int, p: float) -> list[float]:
    return [math.comb(count, k) * p**k * (1 - p) ** (count - k) for k in range(count + 1)]


@pytest.mark.parametrize("count", [5, 10, 20, 50])
def test_the_interval_of_a_proportion_is_right_about_95_times_in_100(count: int) -> None:
    intervals = [wilson(k / count, count) for k in range(count + 1)]
    right = [
        sum(
            chance
            for chance, (low, high) in zip(chances(count, p), intervals, strict=True)
            if low <= p <= high
        )
        for p in (number / 200 for number in range(1, 200))
    ]
    assert 0.945 < statistics.fmean(right) < 0.965
    assert min(right) > 0.83  # at the ends; what is known of it (Brown, Cai, DasGupta 2001)


@pytest.mark.parametrize(("count", "other"), [(8, 8), (10, 25)])
def test_the_interval_of_a_difference_is_right_about_95_times_in_100(count: int, other: int) -> None:
    found = {
        (k, m): difference_of(of(k, count), of(m, other), RIGHT_OR_WRONG)
        for k in range(count + 1)
        for m in range(other + 1)
    }
    right = []
    for p in (number / 20 for number in range(1, 20)):
        for q in (number / 20 for number in range(1, 20)):
            one, two = chances(count, p), chances(other, q)
            inside = [
                one[k] * two[m]
                for (k, m), each in found.items()
                if each.low is not None and each.high is not None and each.low <= p - q <= each.high
            ]
            right.append(sum(inside))
    assert 0.945 < statistics.fmean(right) < 0.97
    assert min(right) > 0.87


@given(st.integers(1, 60), st.integers(1, 60), st.data())
def test_thumbs_are_proportions_on_another_scale(count: int, other: int, data: st.DataObject) -> None:
    k, m = data.draw(st.integers(0, count)), data.draw(st.integers(0, other))
    up = sample([1.0] * k + [-1.0] * (count - k))
    base = sample([1.0] * m + [-1.0] * (other - m))
    thumbs, plain = mean_of(up, THUMBS), mean_of(of(k, count), RIGHT_OR_WRONG)
    assert plain.low is not None
    assert plain.high is not None
    assert thumbs.low == pytest.approx(2 * plain.low - 1, abs=1e-12)
    assert thumbs.high == pytest.approx(2 * plain.high - 1, abs=1e-12)
    apart, there = difference_of(up, base, THUMBS), difference_of(base, up, THUMBS)
    assert (apart.value, apart.low, apart.high) == pytest.approx(
        (-there.value, -(there.high or 0), -(there.low or 0)), abs=1e-12
    )


# -- more values -----------------------------------------------------------------------------------

FEW = [0.5, 1.5, 2.0, 3.5]
MORE = [1.0, 2.5, 2.5, 4.0, 6.5, 9.0]


def test_a_mean_and_a_difference_have_the_intervals_that_scipy_gives() -> None:
    """SciPy 1.17.1: ``stats.t.interval``, ``stats.ttest_ind(MORE, FEW, equal_var=False)``."""
    returns = Returns.of(FEW + MORE)
    mean = mean_of(sample(FEW), returns)
    assert (mean.low, mean.high) == pytest.approx((-0.1140289408023174, 3.864028940802317), rel=1e-12)
    assert mean.method is Method.STUDENT
    difference = difference_of(sample(MORE), sample(FEW), returns)
    assert (difference.low, difference.high) == pytest.approx(
        (-0.8440191599996227, 5.594019159999623), rel=1e-12
    )
    assert difference.method is Method.WELCH


@pytest.mark.parametrize(("count", "other"), [(3, 3), (5, 20), (30, 30)])
def test_intervals_over_many_values_are_right_about_95_times_in_100(count: int, other: int) -> None:
    """Skewed returns, where versions of few often have equal ones only."""
    values, often, seldom = [-1.2, -1.0, -0.1, 0.5, 1.0], [1, 3, 1, 1, 9], [1, 1, 0, 1, 30]
    returns, draw = Returns.of(values), random.Random(7)
    one, two = (
        sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights) for weights in (often, seldom)
    )
    right = []
    for _ in range(2000):
        better, base = draw.choices(values, seldom, k=other), draw.choices(values, often, k=count)
        found = difference_of(sample(better), sample(base), returns)
        assert found.low is not None
        assert found.high is not None
        right.append(found.low <= two - one <= found.high)
    assert statistics.fmean(right) > 0.93


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.1, 0.25, 1.0, 7.5]), min_size=2, max_size=40))
def test_mean_and_variance_are_those_of_the_standard_library(values: list[float]) -> None:
    made = sample(values)
    assert made.count == len(values)
    assert made.mean == pytest.approx(statistics.fmean(values), rel=1e-12, abs=1e-15)
    assert made.variance == pytest.approx(statistics.variance(values), rel=1e-12, abs=1e-15)


def test_a_large_offset_takes_nothing_from_the_variance() -> None:
    assert sample([1e9 + 1, 1e9 + 2, 1e9 + 4]).variance == pytest.approx(7 / 3, rel=1e-9)


@pytest.mark.parametrize("values", [[1.0] * 30, [1.0]])
def test_equal_returns_among_others_are_not_taken_for_certain(values: list[float]) -> None:
    returns = Returns.of([0.0, 0.5, 1.0])
    found = mean_of(sample(values), returns)
    assert (found.value, found.high, found.method) == (1.0, 1.0, Method.RANGE)
    assert found.low == pytest.approx(len(values) / (len(values) + Z * Z))  # Wilson at p = 1
    apart = difference_of(sample(values), sample([0.0, 0.5, 0.5, 1.0]), returns)
    assert apart.method is Method.RANGE
    assert apart.low is not None
    assert apart.high is not None
    assert apart.low < apart.value < apart.high


def test_where_all_returns_are_equal_nothing_tells_an_interval() -> None:
    returns = Returns.of([1.0, 1.0, 1.0])
    assert not returns.differ
    for found in (
        mean_of(sample([1.0, 1.0]), returns),
        difference_of(sample([1.0]), sample([1.0]), returns),
    ):
        assert (found.low, found.high, found.method) == (None, None, None)


def test_returns_that_differ_by_rounding_only_are_equal() -> None:
    assert Returns.of([0.1 + 0.2, 0.3, 1.0]).two_valued
    assert not Returns.of([0.1 + 0.2, 0.3]).differ
    assert sample([0.1 + 0.2, 0.3]).variance == 0
    assert not Returns.of([0.0, 0.5, 1.0]).two_valued


def test_returns_at_the_end_of_a_float_break_nothing() -> None:
    values = [1e308, -1e308, 0.0, 1e308]
    found = mean_of(sample(values), Returns.of(values))
    assert found.low is not None
    assert math.isfinite(found.low)
    assert Sample.of({}) is None
    assert Sample.of({1.0: 0}) is None
