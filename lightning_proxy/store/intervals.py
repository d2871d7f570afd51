"""Confidence intervals of mean returns, and of the difference of two means. No I/O, no numpy.

Which formula applies is told by the returns of all versions together, so that a version whose returns are
all equal is not taken for certain:

- *Two values* (thumbs; right or wrong): a mean is a proportion, mapped linearly. Its interval is Wilson's
  score interval (E. B. Wilson, JASA 22, 1927), sound at few returns and at proportions of 0 and 1, where
  the textbook one has no width; a difference has Newcombe's hybrid of two of them (R. G. Newcombe,
  Statistics in Medicine 17, 1998, 873-890, method 10).
- *More values*: Student's t (1908); a difference has Welch's, which does not take the two spreads for equal
  (B. L. Welch, Biometrika 34, 1947).
- *More values, but a version has a single return, or equal ones only*: its own spread says nothing. Wilson's
  interval over the range of all returns stands in: between two bounds nothing spreads wider than two values.
  A difference with it is Newcombe's formula with these intervals (G. Y. Zou, A. Donner, Statistics in
  Medicine 27, 2008).

They hold for independent returns. Student's and Welch's are approximate where returns are few and skewed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

CONFIDENCE = 0.95
_SAME = 1e-9  # largest difference, as a share of the numbers from 1 on, of returns that are equal
_LARGEST = 1e150  # beyond it, a square is beyond a float


class Method(StrEnum):
    """How an interval was made."""

    WILSON = "wilson"
    STUDENT = "student"
    NEWCOMBE = "newcombe"
    WELCH = "welch"
    RANGE = "range"  # by the range of all returns, where a version's own have no spread


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, or a difference of means, with its interval; ``None`` where nothing tells the spread."""

    value: float
    low: float | None = None
    high: float | None = None
    method: Method | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """Returns of one version: how many, their mean, their variance (over n - 1; 0 if they are equal)."""

    count: int
    mean: float
    variance: float

    @classmethod
    def of(cls, counts: Mapping[float, int]) -> Sample | None:
        """``counts``: how often there is each return. ``None`` where there is none."""
        clipped = [(max(-_LARGEST, min(_LARGEST, value)), times) for value, times in counts.items() if times]
        if not clipped:
            return None
        count = sum(times for _, times in clipped)
        mean = math.fsum(value * times for value, times in clipped) / count
        if _equal(min(clipped)[0], max(clipped)[0]):
            return cls(count, mean, 0.0)
        squares = math.fsum((value - mean) * (value - mean) * times for value, times in clipped)
        return cls(count, mean, squares / (count - 1))

    @classmethod
    def told(cls, count: int, mean: float, std: float, low: float, high: float) -> Sample:
        """Of what a report kept: its standard deviation, lowest and highest. Rounding is no spread."""
        return cls(count, mean, 0.0 if _equal(low, high) else std * std)


@dataclass(frozen=True, slots=True)
class Returns:
    """What returns there are, with all versions: lowest, highest, and whether there is none between."""

    low: float
    high: float
    two_valued: bool

    @classmethod
    def of(cls, values: Iterable[float]) -> Returns:
        """Returns that differ by rounding only are equal."""
        seen = [max(-_LARGEST, min(_LARGEST, value)) for value in values]
        low, high = min(seen, default=0.0), max(seen, default=0.0)
        return cls(low, high, all(_equal(value, low) or _equal(value, high) for value in seen))

    @property
    def differ(self) -> bool:
        """Whether there are two returns at all: else nothing tells how they spread."""
        return not _equal(self.low, self.high)


def mean_of(sample: Sample, returns: Returns, confidence: float = CONFIDENCE) -> Estimate:
    """The mean with its interval."""
    if not returns.differ:
        return Estimate(sample.mean)
    if returns.two_valued or not sample.variance:
        width = returns.high - returns.low
        low, high = wilson((sample.mean - returns.low) / width, sample.count, confidence)
        method = Method.WILSON if returns.two_valued else Method.RANGE
        return Estimate(sample.mean, returns.low + width * low, returns.low + width * high, method)
    half = t_quantile(sample.count - 1, confidence) * math.sqrt(sample.variance / sample.count)
    return Estimate(sample.mean, sample.mean - half, sample.mean + half, Method.STUDENT)


def difference_of(sample: Sample, base: Sample, returns: Returns, confidence: float = CONFIDENCE) -> Estimate:
    """By how much the mean of ``sample`` is above that of ``base``, with the interval of that."""
    value = sample.mean - base.mean
    one, other = mean_of(sample, returns, confidence), mean_of(base, returns, confidence)
    if one.method is other.method is Method.STUDENT:
        half = _welch(sample, base, confidence)
        return Estimate(value, value - half, value + half, Method.WELCH)
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return Estimate(value)
    below = math.hypot(one.value - one.low, other.high - other.value)
    above = math.hypot(one.high - one.value, other.value - other.low)
    method = Method.NEWCOMBE if returns.two_valued else Method.RANGE
    return Estimate(value, value - below, value + above, method)


def wilson(proportion: float, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The proportions p that are no further than z standard errors, of p itself, from the one observed."""
    proportion = max(0.0, min(1.0, proportion))
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    z2 = z * z
    middle = (proportion + z2 / (2 * count)) / (1 + z2 / count)
    half = z / (1 + z2 / count) * math.sqrt((proportion * (1 - proportion) + z2 / (4 * count)) / count)
    # At 0 and 1 the interval ends there; what rounding adds is taken off.
    low = 0.0 if proportion == 0 else middle - half
    return low, 1.0 if proportion == 1 else middle + half


def _welch(sample: Sample, base: Sample, confidence: float) -> float:
    """Half the width of Welch's interval, with his and Satterthwaite's degrees of freedom."""
    one, other = sample.variance / sample.count, base.variance / base.count
    share = one / (one + other)  # in shares, for squares of small variances are 0
    freedom = 1 / (share * share / (sample.count - 1) + (1 - share) * (1 - share) / (base.count - 1))
    return t_quantile(freedom, confidence) * math.sqrt(one + other)


def t_quantile(freedom: float, confidence: float = CONFIDENCE) -> float:
    """The t that Student's distribution exceeds in size with probability 1 - ``confidence``.

    By Newton's method. The tail is convex, and the normal quantile lies below the root: so each step goes up
    and none too far. Within 1e-9, as a share, of SciPy 1.17's from 1 to ten million degrees of freedom.
    """
    tail = (1 - confidence) / 2
    t = NormalDist().inv_cdf(1 - tail)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    for _ in range(100):
        density = math.exp(log_scale - (freedom + 1) / 2 * math.log1p(t * t / freedom))
        step = (_t_tail(t, freedom) - tail) / density
        t += step
        if step <= 1e-12 * t:
            break
    return t


def _t_tail(t: float, freedom: float) -> float:
    """Probability beyond ``t`` > 0, on one side (Abramowitz and Stegun, 26.7.1 and 26.5.27)."""
    return 0.5 * _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t), t * t / (freedom + t * t))


def _incomplete_beta(a: float, b: float, x: float, y: float) -> float:
    """Regularised, I_x(a, b); ``y`` is 1 - x, given apart since rounding may leave nothing of it."""
    if x > (a + 1) / (a + b + 2):  # there the fraction converges slowly
        return 1.0 - _incomplete_beta(b, a, y, x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(y)
    return math.exp(log_front) / (a * _fraction(a, b, x))


def _fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of A&S 26.5.8, from the front on by Lentz's method: 1 + d1/(1 + d2/(1 + ...)."""
    value, above, below = 1.0, 1.0, 0.0
    for number in range(1, 100_000):
        m, odd = divmod(number, 2)
        if odd:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        below = 1.0 / (1.0 + term * below)
        above = 1.0 + term / above
        value *= above * below
        if abs(above * below - 1.0) < 1e-15:
            break
    return value


def _equal(one: float, other: float) -> bool:
    return abs(one - other) <= _SAME * max(1.0, abs(one), abs(other))
