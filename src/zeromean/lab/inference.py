"""Intervals, tests and plans for few runs.

Two arms are compared by the differences d_1 .. d_n of runs that share a seed. If the arms were the same, every d_i
could as well have had the other sign, which gives 2^n equally likely data sets: the sign-flip test. Its inversion is
the interval, the means the test does not reject, whose limits are order statistics of the means of all subsets of d
(Hartigan 1969, "Using subsample values as typical values", JASA 64). So interval and test never disagree. Bootstrap
intervals (BCa, also at Hesterberg's expanded level) cover too seldom for 5 to 10 seeds: `benchmarks/coverage.py`.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

Array = NDArray[np.float64]

EXACT_SEEDS = 15
"""Up to this many differences every sign pattern is enumerated; above, 2^15 patterns stand for all."""

ROUNDING = 1e-12
"""Relative to the largest value, what counts as equal: tied differences must not be told apart by their last bit."""


@dataclass(frozen=True)
class Interval:
    """Confidence interval of a mean.

    Attributes:
        low: lower limit, -inf if the data exclude nothing below.
        high: upper limit, inf if the data exclude nothing above.
        level: nominal confidence, such as 0.95.
        method: "sign-flip"; "Student t" where there are too few values for a sign-flip interval of this level (fewer
            than 6 at 0.95); "none" where fewer than 2 values, or a few equal ones, say nothing about the spread.
    """

    low: float
    high: float
    level: float
    method: Literal["sign-flip", "Student t", "none"]

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside the interval."""
        return not self.low <= value <= self.high


def mean_interval(values: ArrayLike, *, level: float = 0.95) -> Interval:
    """Confidence interval of the mean of `values`: paired differences, or the runs of one arm.

    With P = 2^n sign patterns and k = floor(P (1 - level) / 2), the limits are the k-th smallest and k-th largest of
    the P - 1 means of non-empty subsets. For values symmetric about their mean, of any shape and tails, it covers with
    probability 1 - 2k/P: 0.969 for 6 values, 0.950 to 0.953 for more. Skewness costs coverage, most with 5 to 8
    values. The same values in the same order give the same interval; no random state is involved.

    Args:
        values: n finite numbers, in any unit.
        level: nominal confidence, in (0, 1).

    Returns:
        The interval; `Interval.method` names what was used when n is too small for k >= 1.

    Raises:
        ValueError: a value is not finite, or `level` is not in (0, 1).
    """
    x = finite_values(values)
    tail_patterns = _tail_patterns(x.size, 1 - proper_fraction("level", level))
    if tail_patterns == 0:
        return _student_interval(x, level)
    if all_equal(x):
        return Interval(mean_or_nan(x), mean_or_nan(x), level, "sign-flip")
    means = np.partition(_subset_means(x), [tail_patterns - 1, -tail_patterns])
    return Interval(float(means[tail_patterns - 1]), float(means[-tail_patterns]), level, "sign-flip")


def sign_flip_test(differences: ArrayLike) -> float:
    """Two-sided p-value of the sign-flip test that paired differences are symmetric about zero.

    p = (number of sign patterns s with |sum s_i d_i| >= |sum d_i|) / 2^n, exact up to 15 differences. Above, 2^15
    patterns drawn once from a fixed seed stand for all (standard error 0.0012 at p = 0.05), so p is reproducible.

    Raises:
        ValueError: a difference is not finite.
    """
    x = finite_values(differences)
    means = _subset_means(x)
    # The pattern with no flip is the data themselves and always counts.
    at_least_as_extreme = 1 + min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    return min(1.0, 2 * at_least_as_extreme / _patterns(x.size))


def holm(p_values: ArrayLike) -> Array:
    """P-values adjusted so that rejecting those <= alpha errs anywhere in the family with probability <= alpha.

    The i-th smallest of m becomes max over j <= i of (m - j + 1) p_(j), at most 1 (Holm 1979, Scand. J. Statist. 6).

    Args:
        p_values: shape [m].

    Returns:
        Adjusted p-values, shape [m], in the order given.

    Raises:
        ValueError: a p-value lies outside [0, 1].
    """
    p = finite_values(p_values)
    if np.any((p < 0) | (p > 1)):
        raise ValueError(f"p-values must lie in [0, 1], got {p.tolist()}: pass them unadjusted, one a comparison")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    return adjusted


def smallest_p(n: int) -> float:
    """Smallest p-value that `sign_flip_test` can give for n differences: 2 / 2^n, not below 2 / 2^15."""
    return min(1.0, 2 / _patterns(n))


def seeds_needed(comparisons: int = 1, *, alpha: float = 0.05) -> int:
    """Fewest seeds for which a Holm-adjusted p-value can reach `alpha`: smallest n with 2 / 2^n <= alpha / comparisons.

    Raises:
        ValueError: so many comparisons that no number of seeds is enough.
    """
    threshold = proper_fraction("alpha", alpha) / _positive("comparisons", comparisons)
    enough = [n for n in range(1, EXACT_SEEDS + 1) if smallest_p(n) <= threshold]
    if not enough:
        raise ValueError(
            f"comparisons must be at most {int(alpha / smallest_p(EXACT_SEEDS))} at alpha = {alpha:g}, "
            f"got {comparisons}: the smallest p-value is {smallest_p(EXACT_SEEDS):.2g}; compare fewer arms"
        )
    return enough[0]


def smallest_detectable_difference(
    n: int, sd: float, *, comparisons: int = 1, alpha: float = 0.05, power: float = 0.8
) -> float:
    """Smallest true difference between two arms that the sign-flip test finds with probability `power`.

    The difference of two runs is taken to have standard deviation sd sqrt(2): sharing a seed makes arms comparable, but
    trajectories part at once, so it is not planned to reduce variance. The result is the delta with P(T > t) = power,
    T noncentral t with n - 1 degrees of freedom and noncentrality delta sqrt(n) / (sd sqrt(2)), t the two-sided
    critical value at the level the test attains, which is at most alpha / comparisons. Where only n differences of one
    sign are significant, Phi(delta / (sd sqrt(2)))^n = power is used instead, exact for normal runs. The t form is
    optimistic where few patterns are significant: a simulated power of 0.72 to 0.80 for 0.8.

    Args:
        n: seeds an arm.
        sd: standard deviation between the runs of one arm, in the metric's unit.
        comparisons: number of comparisons that Holm adjusts for; the least favourable step is planned for.
        alpha: family-wise error rate.
        power: probability of finding the difference, above alpha.

    Returns:
        The difference in the unit of `sd`; inf if n seeds cannot reach significance whatever the data.

    Raises:
        ValueError: an argument is out of its range.
    """
    if sd < 0 or not math.isfinite(sd):
        raise ValueError(f"sd must be finite and at least 0, got {sd}: pass the standard deviation between seeds")
    if not proper_fraction("alpha", alpha) < proper_fraction("power", power):
        raise ValueError(f"power must exceed alpha = {alpha}, got {power}: 0.8 is usual")
    tail_patterns = _tail_patterns(n, alpha / _positive("comparisons", comparisons))
    if tail_patterns == 0:
        return math.inf
    return sd * math.sqrt(2) * _detectable_effect(n, tail_patterns, power)


def binomial_sd(error_percent: float, test_size: int) -> float:
    """Standard deviation of a test error that comes from the finite test set alone, in percentage points.

    100 sqrt(p (1 - p) / test_size) with p = error_percent / 100; a reference for the spread between seeds.

    Raises:
        ValueError: the error is not in [0, 100] or the test set is empty.
    """
    if not 0 <= error_percent <= 100:
        raise ValueError(f"error_percent must lie in [0, 100], got {error_percent}: pass percent, not a fraction")
    p = error_percent / 100
    return 100 * math.sqrt(p * (1 - p) / _positive("test_size", test_size))


def _patterns(n: int) -> int:
    return int(2 ** min(n, EXACT_SEEDS))


def _tail_patterns(n: int, alpha: float) -> int:
    return math.floor(_patterns(n) * alpha / 2)


def _subset_means(values: Array) -> Array:
    """Means of the non-empty subsets of `values`; those that are zero but for rounding are exactly zero."""
    if values.size == 0:
        return values
    means = _subset_weights(values.size) @ values
    means[np.abs(means) <= ROUNDING * np.abs(values).max()] = 0
    return np.asarray(means, dtype=np.float64)


@lru_cache(maxsize=4)
def _subset_weights(n: int) -> Array:
    if n <= EXACT_SEEDS:
        members = (np.arange(1, 2**n)[:, None] >> np.arange(n)) & 1
    else:
        members = np.random.default_rng(n).integers(0, 2, (_patterns(n) - 1, n))
        members[~members.any(axis=1)] = 1
    return np.asarray(members / members.sum(axis=1, keepdims=True), dtype=np.float64)


def _student_interval(x: Array, level: float) -> Interval:
    if x.size < 2 or all_equal(x):
        return Interval(-math.inf, math.inf, level, "none")
    half = float(stats.t.ppf((1 + level) / 2, x.size - 1) * x.std(ddof=1) / math.sqrt(x.size))
    return Interval(mean_or_nan(x) - half, mean_or_nan(x) + half, level, "Student t")


def _detectable_effect(n: int, tail_patterns: int, power: float) -> float:
    if tail_patterns == 1:
        return float(stats.norm.ppf(power ** (1 / n)))
    critical = stats.t.isf(tail_patterns / _patterns(n), n - 1)

    def excess_power(noncentrality: float) -> float:
        return float(stats.nct.sf(critical, n - 1, noncentrality)) - power

    return float(optimize.brentq(excess_power, 0, 10 + 3 * critical)) / math.sqrt(n)


def all_equal(x: Array) -> bool:
    """Whether the values, at least one, differ by no more than rounding."""
    return bool(np.ptp(x) <= ROUNDING * np.abs(x).max())


def mean_or_nan(x: Array) -> float:
    """Mean; nan of nothing."""
    return float(x.mean()) if x.size else math.nan


def finite_values(values: ArrayLike) -> Array:
    """`values` as float64, shape [n].

    Raises:
        ValueError: they are not a list of finite numbers.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not np.isfinite(x).all():
        raise ValueError(
            f"values must be a list of finite numbers, got {x.tolist()}: pass None to compare and summarize for a run "
            "that did not finish"
        )
    return x


def proper_fraction(name: str, value: float) -> float:
    """`value` itself.

    Raises:
        ValueError: it is not in (0, 1).
    """
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie in (0, 1), got {value}: 95 % is 0.95")
    return value


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
