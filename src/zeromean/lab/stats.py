"""Verdicts on the arms of a study, in plain words, from few runs of each.

A verdict needs both the Holm-adjusted p-value of the sign-flip test and the interval of the difference, and is refused
where no outcome of the study could have supported one. What an interval, a test or a plan is stands in `inference`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from zeromean.lab.inference import Array as Array
from zeromean.lab.inference import Interval as Interval
from zeromean.lab.inference import all_equal, finite_values, mean_or_nan, proper_fraction
from zeromean.lab.inference import binomial_sd as binomial_sd
from zeromean.lab.inference import holm as holm
from zeromean.lab.inference import mean_interval as mean_interval
from zeromean.lab.inference import seeds_needed as seeds_needed
from zeromean.lab.inference import sign_flip_test as sign_flip_test
from zeromean.lab.inference import smallest_detectable_difference as smallest_detectable_difference
from zeromean.lab.inference import smallest_p as smallest_p

Verdict = Literal["better", "worse", "no evidence", "cannot support"]


@dataclass(frozen=True)
class Summary:
    """One arm's finished runs: `mean` and `sd` are nan where there are too few to have one."""

    n: int
    excluded: int
    mean: float
    sd: float
    interval: Interval


@dataclass(frozen=True)
class Comparison:
    """An arm against a baseline over the seeds that both finished.

    Attributes:
        arm: the arm judged.
        baseline: the arm it is judged against.
        n_pairs: seeds that both arms finished; the means, difference, interval and p-values are over these.
        excluded_arm: runs of the arm that diverged or failed.
        excluded_baseline: runs of the baseline that diverged or failed.
        mean_arm: mean of the arm, nan without pairs.
        mean_baseline: mean of the baseline, nan without pairs.
        difference: mean_arm - mean_baseline, nan without pairs; negative is better where lower is better.
        interval: of the difference, not adjusted for the number of comparisons.
        p_value: of the sign-flip test.
        p_adjusted: by Holm, over all comparisons of the call.
        probability_better: chance that a run of the arm beats a run of the baseline, over all pairs of runs. Ties count
            half. A run that did not finish loses to one that did.
        detectable: smallest difference found with power 0.8 in one comparison of this family, given the spread of the
            differences, whatever the others find; inf if none can be, nan if the differences do not vary.
        verdict: "better" or "worse" if `p_adjusted` is at most 1 - level and the interval excludes 0; "cannot support"
            if no data from this many seeds could; else "no evidence".
        sentence: the verdict in plain words.
    """

    arm: str
    baseline: str
    n_pairs: int
    excluded_arm: int
    excluded_baseline: int
    mean_arm: float
    mean_baseline: float
    difference: float
    interval: Interval
    p_value: float
    p_adjusted: float
    probability_better: float
    detectable: float
    verdict: Verdict
    sentence: str


def summarize(values: Sequence[float | None], *, level: float = 0.95) -> Summary:
    """Mean, standard deviation (n - 1) and interval of the mean of one arm; None marks a run that did not finish.

    Raises:
        ValueError: a value is not finite, or `level` is not in (0, 1).
    """
    x = finite_values([value for value in values if value is not None])
    sd = float(x.std(ddof=1)) if x.size > 1 else math.nan
    return Summary(x.size, len(values) - x.size, mean_or_nan(x), sd, mean_interval(x, level=level))


def compare(
    errors: Mapping[str, Sequence[float | None]],
    baseline: str,
    *,
    level: float = 0.95,
    metric: str = "test error",
    unit: str = "points",
    lower_is_better: bool = True,
) -> list[Comparison]:
    """Judge every arm against one baseline; see `compare_pairs`.

    Raises:
        ValueError: an unknown baseline, arms of different length, or a number that is not finite.
    """
    pairs = [(arm, baseline) for arm in errors if arm != baseline]
    if baseline not in errors:
        raise ValueError(f"the baseline must be one of {', '.join(errors)}, got {baseline}: name an arm of the study")
    return compare_pairs(errors, pairs, level=level, metric=metric, unit=unit, lower_is_better=lower_is_better)


def compare_pairs(
    errors: Mapping[str, Sequence[float | None]],
    pairs: Sequence[tuple[str, str]],
    *,
    level: float = 0.95,
    metric: str = "test error",
    unit: str = "points",
    lower_is_better: bool = True,
) -> list[Comparison]:
    """Judge the first arm of every pair against the second, with Holm's adjustment over all the pairs.

    Args:
        errors: one number a run for every arm, in the same order of seeds; None marks a run that diverged or failed.
        pairs: (arm, baseline) names; `itertools.combinations(errors, 2)` compares all with all.
        level: confidence of the intervals; verdicts hold at a family-wise error rate of 1 - level.
        metric: what the numbers are, for the sentence.
        unit: unit of a difference, for the sentence; may be empty.
        lower_is_better: False for an accuracy.

    Returns:
        One comparison for every pair, in the order given.

    Raises:
        ValueError: an unknown arm, arms of different length, or a number that is not finite.
    """
    runs = _runs(errors, {arm for pair in pairs for arm in pair})
    family = _Family(len(pairs), level, 1 - proper_fraction("level", level), metric, unit, lower_is_better)
    differences = [_paired_differences(runs[arm], runs[other]) for arm, other in pairs]
    p_values = [sign_flip_test(one) for one in differences]
    attainable = holm([smallest_p(one.size) for one in differences])
    return [
        family.judge((arm, other), runs[arm], runs[other], p_value, float(p_adjusted), float(least))
        for (arm, other), p_value, p_adjusted, least in zip(pairs, p_values, holm(p_values), attainable, strict=True)
    ]


@dataclass(frozen=True)
class _Family:
    """What the comparisons of one call have in common."""

    comparisons: int
    level: float
    alpha: float
    metric: str
    unit: str
    lower_is_better: bool

    def judge(
        self,
        names: tuple[str, str],
        arm_runs: Array,
        baseline_runs: Array,
        p_value: float,
        p_adjusted: float,
        attainable: float,
    ) -> Comparison:
        differences = _paired_differences(arm_runs, baseline_runs)
        both = ~np.isnan(arm_runs - baseline_runs)
        interval = mean_interval(differences, level=self.level)
        found = Comparison(
            arm=names[0],
            baseline=names[1],
            n_pairs=differences.size,
            excluded_arm=int(np.isnan(arm_runs).sum()),
            excluded_baseline=int(np.isnan(baseline_runs).sum()),
            mean_arm=mean_or_nan(arm_runs[both]),
            mean_baseline=mean_or_nan(baseline_runs[both]),
            difference=mean_or_nan(differences),
            interval=interval,
            p_value=p_value,
            p_adjusted=p_adjusted,
            probability_better=_probability_better(arm_runs, baseline_runs, self.lower_is_better),
            detectable=self.detectable(differences),
            verdict=self.verdict(differences, interval, p_adjusted, attainable),
            sentence="",
        )
        return replace(found, sentence=self.sentence(found) + _exclusions(found, arm_runs.size))

    def verdict(self, differences: Array, interval: Interval, p_adjusted: float, attainable: float) -> Verdict:
        """``attainable`` is the adjusted p-value where every comparison has the smallest that its seeds can give."""
        if p_adjusted <= self.alpha and interval.excludes(0):
            return "better" if (mean_or_nan(differences) < 0) == self.lower_is_better else "worse"
        if attainable > self.alpha:
            return "cannot support"
        return "no evidence"

    def detectable(self, differences: Array) -> float:
        if differences.size < 2:
            return math.inf
        if all_equal(differences):
            return math.nan
        sd = float(differences.std(ddof=1)) / math.sqrt(2)
        return smallest_detectable_difference(differences.size, sd, comparisons=self.comparisons, alpha=self.alpha)

    def sentence(self, found: Comparison) -> str:
        match found.verdict:
            case "cannot support":
                return self.refusal(found)
            case "no evidence":
                return self.no_evidence(found)
            case _:
                return self.finding(found)

    def finding(self, found: Comparison) -> str:
        direction = "lower" if found.difference < 0 else "higher"
        among = " among runs that did not diverge" if found.excluded_arm + found.excluded_baseline else ""
        ends = sorted((abs(found.interval.low), abs(found.interval.high)))
        size, low, high = _rounded([abs(found.difference), *ends])
        return (
            f"{found.arm}: {direction} {self.metric} than {found.baseline} by {self.with_unit(size)}{among} "
            f"({self.evidence(found, low, high)})."
        )

    def no_evidence(self, found: Comparison) -> str:
        size, low, high, detectable = _rounded(
            [found.difference, found.interval.low, found.interval.high, found.detectable]
        )
        could = f"this design could detect {self.with_unit(detectable)}"
        if found.interval.low == found.interval.high:
            could = "the differences do not vary, so what this design could detect is unknown"
        elif math.isinf(found.detectable):
            could = "this design could detect one only if other comparisons are significant"
        return (
            f"No evidence of a difference in {self.metric} between {found.arm} and {found.baseline}: "
            f"{self.with_unit(size)} ({self.evidence(found, low, high)}); {could}."
        )

    def refusal(self, found: Comparison) -> str:
        needed = f"at least {seeds_needed(self.comparisons, alpha=self.alpha)} seeds"
        finished = " that both finish" if found.excluded_arm + found.excluded_baseline else ""
        several = f" and {self.comparisons} comparisons need {self.alpha / self.comparisons:.2g} or less"
        return (
            f"{_count(found.n_pairs, 'seed')} cannot support a verdict on {found.arm} against {found.baseline}: "
            f"the smallest possible p-value is {smallest_p(found.n_pairs):.3g}"
            f"{several if self.comparisons > 1 else ''}; use {needed}{finished}."
        )

    def evidence(self, found: Comparison, low: str, high: str) -> str:
        return (
            f"{100 * self.level:g} % interval {low} to {high}, adjusted p {_p_text(found.p_adjusted)}, "
            f"{_count(found.n_pairs, 'seed')}"
        )

    def with_unit(self, number: str) -> str:
        return f"{number} {self.unit}".rstrip()


def _exclusions(found: Comparison, runs: int) -> str:
    lost = [(found.excluded_arm, found.arm), (found.excluded_baseline, found.baseline)]
    counts = " and ".join(f"{count} of {runs} {name} runs" for count, name in lost if count)
    return f" Left out because they diverged or failed: {counts}." if counts else ""


def _rounded(numbers: Sequence[float]) -> list[str]:
    """All to the same decimals: two significant digits of the span of an interval's ends, four where it has none."""
    span = np.ptp(numbers[1:3]) / 2 or max(map(abs, numbers)) / 100 or 1.0
    decimals = min(8, max(0, 1 - math.floor(math.log10(span))))
    # Adding 0.0 turns -0.0 into 0.0.
    return [f"{round(number, decimals) + 0.0:.{decimals}f}" for number in numbers]


def _p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _runs(errors: Mapping[str, Sequence[float | None]], named: set[str]) -> dict[str, Array]:
    unknown = sorted(named - errors.keys())
    if unknown:
        raise ValueError(f"comparisons must name arms of the study ({', '.join(errors)}), got {', '.join(unknown)}")
    lengths = {arm: len(values) for arm, values in errors.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"arms must have one entry a seed, got {lengths}: use None for a run that did not finish")
    for values in errors.values():
        finite_values([value for value in values if value is not None])
    return {arm: np.array([math.nan if v is None else v for v in values]) for arm, values in errors.items()}


def _paired_differences(arm_runs: Array, baseline_runs: Array) -> Array:
    differences = arm_runs - baseline_runs
    return differences[~np.isnan(differences)]


def _probability_better(arm_runs: Array, baseline_runs: Array, lower_is_better: bool) -> float:
    sign = 1 if lower_is_better else -1
    arm, baseline = (np.nan_to_num(sign * runs, nan=np.inf) for runs in (arm_runs, baseline_runs))
    wins = (arm[:, None] < baseline) + 0.5 * (arm[:, None] == baseline)
    return float(wins.mean()) if wins.size else math.nan
