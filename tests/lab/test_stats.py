"""Intervals cover, tests keep their level, plans hold, and verdicts say what the data can say."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from zeromean.lab import inference, stats
from zeromean.lab.inference import EXACT_SEEDS, Array

RELU = [2.8, 3.1, 2.5, 2.9, 3.3, 2.6, 2.7, 3.0, 3.2, 2.4]
NOISE = [0.1, -0.2, 0.3, 0.0, -0.1, 0.2, -0.3, 0.15, -0.05, -0.1]


def shifted(by: float, noise: float = 1.0) -> list[float]:
    return [error + by + noise * extra for error, extra in zip(RELU, NOISE, strict=True)]


def limits(values: list[float]) -> tuple[float, float]:
    interval = stats.mean_interval(values)
    return interval.low, interval.high


def brute_force_p(differences: list[float]) -> float:
    observed = abs(math.fsum(differences))
    sums = [
        abs(math.fsum(sign * d for sign, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(total >= observed - 1e-9 for total in sums) / len(sums)


Draw = Callable[[np.random.Generator, tuple[int, int]], Array]
DRAWS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, shape: rng.normal(size=shape), 0.0),
    "skewed": (lambda rng, shape: rng.exponential(size=shape) - rng.normal(size=shape), 1.0),
    "heavy": (lambda rng, shape: rng.standard_t(3, shape), 0.0),
    "discrete": (lambda rng, shape: (rng.binomial(360, 0.02, shape) - rng.binomial(360, 0.03, shape)) / 3.6, -1.0),
}

few_differences = st.lists(st.integers(-5, 5).map(lambda step: step * 100 / 360), min_size=1, max_size=9)


class TestSignFlipTest:
    @given(few_differences)
    @settings(max_examples=200, deadline=None)
    def test_agrees_with_every_sign_pattern_counted(self, differences: list[float]) -> None:
        assert stats.sign_flip_test(differences) == pytest.approx(brute_force_p(differences), abs=1e-12)

    def test_agrees_with_scipy(self) -> None:
        differences = np.random.default_rng(0).normal(0.4, 1, 12)
        expected = scipy_stats.permutation_test(
            (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=True
        )
        assert stats.sign_flip_test(differences) == pytest.approx(expected.pvalue, abs=1e-12)

    def test_above_the_exact_size_agrees_with_enumeration(self) -> None:
        differences = np.random.default_rng(5).normal(0.7, 1, 18)
        expected = scipy_stats.permutation_test(
            (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=True, batch=2**14
        )
        assert 0.01 < expected.pvalue < 0.2
        standard_error = math.sqrt(expected.pvalue / 2**EXACT_SEEDS) * math.sqrt(2)
        assert stats.sign_flip_test(differences) == pytest.approx(expected.pvalue, abs=4 * standard_error)

    def test_one_sign_gives_the_smallest_p(self) -> None:
        for n in range(1, EXACT_SEEDS + 3):
            assert stats.sign_flip_test(np.linspace(1, 2, n)) == stats.smallest_p(n)

    @pytest.mark.parametrize("differences", [[], [0.0], [0.0] * 10, [1.0, -1.0]])
    def test_nothing_to_find_gives_one(self, differences: list[float]) -> None:
        assert stats.sign_flip_test(differences) == 1

    @pytest.mark.parametrize("n", [6, 8, 20])
    @pytest.mark.parametrize("test_size", [None, 360])
    def test_keeps_its_level(self, n: int, test_size: int | None) -> None:
        rng = np.random.default_rng([n, test_size or 0])
        draw = (
            (lambda: rng.exponential(size=(1000, n)))
            if test_size is None
            else (lambda: rng.binomial(360, 0.02, (1000, n)))
        )
        rejected = np.mean([stats.sign_flip_test(one) <= 0.05 for one in draw() - draw()])
        assert 0.01 < rejected <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


class TestMeanInterval:
    @pytest.mark.parametrize("name", DRAWS)
    @pytest.mark.parametrize("n", [5, 6, 10])
    def test_covers(self, name: str, n: int) -> None:
        draw, mean = DRAWS[name]
        samples = draw(np.random.default_rng([7, n]), (1000, n))
        covered = np.mean([not stats.mean_interval(sample).excludes(mean) for sample in samples])
        error = 3 * math.sqrt(0.05 * 0.95 / 1000)
        assert 0.93 - error < covered < 0.97 + error

    @given(st.lists(st.integers(-4, 9).map(lambda step: step * 100 / 360), min_size=6, max_size=11))
    @settings(max_examples=300, deadline=None)
    def test_excludes_zero_exactly_where_the_test_rejects(self, differences: list[float]) -> None:
        interval = stats.mean_interval(differences)
        assert interval.method == "sign-flip"
        assert interval.excludes(0) == (stats.sign_flip_test(differences) <= 0.05)

    def test_excludes_zero_exactly_where_the_test_rejects_for_many_seeds(self) -> None:
        samples = np.random.default_rng(3).normal(0.4, 1, (200, 20))
        outcomes = [(stats.mean_interval(one).excludes(0), stats.sign_flip_test(one) <= 0.05) for one in samples]
        assert {excludes for excludes, _ in outcomes} == {True, False}
        assert all(excludes == rejects for excludes, rejects in outcomes)

    def test_six_values_give_their_range(self) -> None:
        values = [0.3, -0.1, 0.9, 0.4, 0.2, 0.5]
        assert limits(values) == pytest.approx((-0.1, 0.9))

    @given(few_differences.filter(lambda values: len(values) >= 6), st.integers(-20, 20), st.integers(1, 9))
    @settings(max_examples=100, deadline=None)
    def test_moves_and_scales_with_the_values(self, values: list[float], shift: int, scale: int) -> None:
        interval, moved = stats.mean_interval(values), stats.mean_interval(scale * np.array(values) + shift)
        assert moved.low == pytest.approx(scale * interval.low + shift, abs=1e-9)
        assert moved.high == pytest.approx(scale * interval.high + shift, abs=1e-9)

    def test_grows_with_the_level(self) -> None:
        widths = [i.high - i.low for i in (stats.mean_interval(RELU, level=level) for level in (0.5, 0.8, 0.95, 0.99))]
        assert widths == sorted(widths)
        assert widths[0] < widths[-1]

    @pytest.mark.parametrize("n", [7, 30])
    def test_same_values_give_the_same_bits(self, n: int) -> None:
        values = np.random.default_rng(n).normal(size=n)
        first = stats.mean_interval(values)
        inference._subset_weights.cache_clear()
        assert stats.mean_interval(values.copy()) == first

    def test_too_few_for_a_sign_flip_interval_take_student(self) -> None:
        expected = scipy_stats.t.interval(0.95, 2, np.mean([1, 2, 4]), scipy_stats.sem([1, 2, 4]))
        assert limits([1.0, 2.0, 4.0]) == pytest.approx(expected)
        assert stats.mean_interval([1.0, 2.0, 4.0]).method == "Student t"

    @pytest.mark.parametrize("values", [[], [2.5], [2.5, 2.5], [0.1 + 0.2, 0.3, 0.3]])
    def test_no_spread_known_excludes_nothing(self, values: list[float]) -> None:
        assert stats.mean_interval(values) == stats.Interval(-math.inf, math.inf, 0.95, "none")

    def test_equal_values_differ_by_rounding_only(self) -> None:
        interval = stats.mean_interval([0.3, 0.1 + 0.2] * 4)
        assert interval.low == interval.high == pytest.approx(0.3)

    @pytest.mark.parametrize("values", [[1.0, math.nan], [math.inf, 1.0], [[1.0, 2.0]]])
    def test_rejects_what_is_no_list_of_numbers(self, values: list[float]) -> None:
        with pytest.raises(ValueError, match=r"finite numbers.*pass None"):
            stats.mean_interval(values)

    def test_rejects_percent_as_a_level(self) -> None:
        with pytest.raises(ValueError, match=r"level must lie in \(0, 1\), got 95"):
            stats.mean_interval(RELU, level=95)


class TestHolm:
    def test_by_hand(self) -> None:
        assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])

    def test_capped_at_one_and_empty(self) -> None:
        assert stats.holm([0.6, 0.9]) == pytest.approx([1, 1])
        assert stats.holm([]).size == 0

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.2))
    def test_rejects_as_the_stepwise_rule_does(self, p_values: list[float], alpha: float) -> None:
        adjusted = stats.holm(p_values)
        rejected = set()
        for step, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
            if p_values[index] * (len(p_values) - step) > alpha:
                break
            rejected.add(index)
        assert set(np.flatnonzero(adjusted <= alpha)) == rejected

    def test_keeps_the_family_wise_level(self) -> None:
        arms = np.random.default_rng(0).exponential(size=(8, 1000, 10))
        p = [[stats.sign_flip_test(arm - base) for arm in arms[1:, i]] for i, base in enumerate(arms[0])]
        any_rejected = np.mean([stats.holm(one).min() <= 0.05 for one in p])
        assert 0.005 < any_rejected <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)

    @pytest.mark.parametrize("p_values", [[1.2], [-0.1, 0.5]])
    def test_rejects_no_p_values(self, p_values: list[float]) -> None:
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            stats.holm(p_values)


class TestPlans:
    @pytest.mark.parametrize(("n", "p"), [(0, 1), (1, 1), (3, 0.25), (5, 0.0625), (6, 0.03125), (9, 0.00390625)])
    def test_smallest_p(self, n: int, p: float) -> None:
        assert stats.smallest_p(n) == p

    @pytest.mark.parametrize(("comparisons", "seeds"), [(1, 6), (2, 7), (3, 7), (7, 9), (9, 9), (45, 11)])
    def test_seeds_needed(self, comparisons: int, seeds: int) -> None:
        assert stats.seeds_needed(comparisons) == seeds
        assert math.isinf(stats.smallest_detectable_difference(seeds - 1, 1, comparisons=comparisons))
        assert math.isfinite(stats.smallest_detectable_difference(seeds, 1, comparisons=comparisons))

    def test_too_many_comparisons(self) -> None:
        with pytest.raises(ValueError, match=r"at most 819 at alpha = 0\.05, got 1000"):
            stats.seeds_needed(1000)

    def test_agrees_with_the_normal_approximation_for_many_seeds(self) -> None:
        expected = (scipy_stats.norm.isf(0.025) + scipy_stats.norm.isf(0.2)) * 0.3 * math.sqrt(2 / 142)
        assert stats.smallest_detectable_difference(142, 0.3) == pytest.approx(expected, rel=0.02)

    @pytest.mark.parametrize(("n", "comparisons", "lowest"), [(6, 1, 0.8), (10, 1, 0.8), (9, 7, 0.8), (10, 9, 0.72)])
    def test_the_planned_difference_is_found_as_often_as_planned(self, n: int, comparisons: int, lowest: float) -> None:
        delta = stats.smallest_detectable_difference(n, 2.0, comparisons=comparisons)
        rng = np.random.default_rng([n, comparisons])
        runs = rng.normal(0, 2.0, (2, 6000, n))
        found = np.mean([stats.sign_flip_test(one) <= 0.05 / comparisons for one in runs[0] + delta - runs[1]])
        error = 3 * math.sqrt(0.8 * 0.2 / 6000)
        assert lowest - error < found < 0.8 + error

    def test_rises_with_power_and_falls_with_seeds(self) -> None:
        by_power = [stats.smallest_detectable_difference(10, 0.3, power=power) for power in (0.5, 0.8, 0.95)]
        by_seeds = [stats.smallest_detectable_difference(n, 0.3) for n in range(6, 40)]
        assert by_power == sorted(by_power)
        assert by_seeds == sorted(by_seeds, reverse=True)
        assert stats.smallest_detectable_difference(10, 0.0) == 0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"sd": -1.0}, "sd must be finite and at least 0, got -1.0"),
            ({"power": 0.01}, "power must exceed alpha"),
            ({"power": 80}, r"power must lie in \(0, 1\)"),
            ({"comparisons": 0}, "comparisons must be at least 1"),
        ],
    )
    def test_rejects(self, arguments: dict[str, float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            stats.smallest_detectable_difference(**{"n": 10, "sd": 1.0} | arguments)  # type: ignore[arg-type]

    @pytest.mark.parametrize(("error", "size", "sd"), [(6, 10_000, 0.2375), (24, 10_000, 0.4271), (0, 10, 0)])
    def test_binomial_sd(self, error: float, size: int, sd: float) -> None:
        assert stats.binomial_sd(error, size) == pytest.approx(sd, abs=1e-4)

    def test_binomial_sd_rejects(self) -> None:
        with pytest.raises(ValueError, match="pass percent"):
            stats.binomial_sd(101, 10)
        with pytest.raises(ValueError, match="test_size must be at least 1"):
            stats.binomial_sd(3, 0)


class TestSummarize:
    def test_counts_what_did_not_finish(self) -> None:
        summary = stats.summarize([2.0, None, 4.0, 3.0])
        assert (summary.n, summary.excluded, summary.mean, summary.sd) == (3, 1, 3.0, 1.0)
        assert summary.interval == stats.mean_interval([2.0, 4.0, 3.0])

    def test_nothing_and_one(self) -> None:
        nothing, one = stats.summarize([None]), stats.summarize([2.5])
        assert (nothing.n, nothing.excluded) == (0, 1)
        assert math.isnan(nothing.mean)
        assert one.mean == 2.5
        assert math.isnan(one.sd)


class TestCompare:
    def test_better(self) -> None:
        (found,) = stats.compare({"relu": RELU, "elu": shifted(-0.8)}, "relu")
        assert (found.verdict, found.n_pairs, found.excluded_arm) == ("better", 10, 0)
        assert found.difference == pytest.approx(found.mean_arm - found.mean_baseline) == pytest.approx(-0.8)
        assert found.interval == stats.mean_interval(np.array(shifted(-0.8)) - RELU)
        assert found.sentence == (
            "elu: lower test error than relu by 0.80 points (95 % interval 0.66 to 0.94, adjusted p = 0.002, 10 seeds)."
        )

    def test_worse_is_the_mirror_image(self) -> None:
        (better,) = stats.compare({"relu": RELU, "elu": shifted(-0.8)}, "relu")
        (worse,) = stats.compare({"relu": RELU, "elu": shifted(-0.8)}, "elu")
        assert worse.verdict == "worse"
        assert (worse.interval.low, worse.interval.high) == (-better.interval.high, -better.interval.low)
        assert worse.p_value == better.p_value
        assert worse.probability_better == pytest.approx(1 - better.probability_better)
        assert worse.sentence.startswith("relu: higher test error than elu by 0.80 points")

    def test_no_evidence_says_what_could_be_detected(self) -> None:
        (found,) = stats.compare({"relu": RELU, "elu": shifted(-0.05)}, "relu")
        differences = np.array(shifted(-0.05)) - RELU
        expected = stats.smallest_detectable_difference(10, differences.std(ddof=1) / math.sqrt(2))
        assert found.verdict == "no evidence"
        assert found.detectable == pytest.approx(expected)
        assert found.sentence == (
            "No evidence of a difference in test error between elu and relu: -0.05 points "
            "(95 % interval -0.19 to 0.09, "
            f"adjusted p = {found.p_adjusted:.2g}, 10 seeds); this design could detect {expected:.2f} points."
        )

    def test_no_minus_before_a_rounded_zero(self) -> None:
        (found,) = stats.compare({"relu": RELU, "elu": shifted(-0.001)}, "relu")
        assert found.difference < 0
        assert "between elu and relu: 0.00 points (" in found.sentence

    def test_three_seeds_cannot_support_a_verdict(self) -> None:
        (found,) = stats.compare({"relu": RELU[:3], "elu": shifted(-5)[:3]}, "relu")
        assert found.verdict == "cannot support"
        assert math.isinf(found.detectable)
        assert found.sentence == (
            "3 seeds cannot support a verdict on elu against relu: the smallest possible p-value is 0.25; "
            "use at least 6 seeds."
        )

    def test_more_comparisons_need_more_seeds(self) -> None:
        arms = {"relu": RELU[:8], **{f"arm{i}": shifted(-2 - i)[:8] for i in range(7)}}
        found = stats.compare(arms, "relu")
        assert {one.verdict for one in found} == {"cannot support"}
        assert "0.00781 and 7 comparisons need 0.0071 or less; use at least 9 seeds." in found[0].sentence

    def test_fewer_pairs_are_refused_only_where_no_data_could_support_them(self) -> None:
        """Holm asks less of the second comparison: six pairs can be enough beside seven."""
        arms: dict[str, list[float | None]] = {"relu": [*RELU[:7]], "a": [*shifted(-1)[:7]]}
        clear, mixed = [*shifted(-1)[:6], None], [*(value + (-1) ** i for i, value in enumerate(RELU[:6])), None]
        assert [one.verdict for one in stats.compare({**arms, "b": clear}, "relu")] == ["better", "better"]
        found = stats.compare({**arms, "b": mixed}, "relu")[1]
        assert (found.n_pairs, found.verdict) == (6, "no evidence")
        assert "6 seeds); this design could detect one only if other comparisons are significant." in found.sentence
        both = stats.compare({**arms, "a": [*shifted(-1)[:6], None], "b": clear}, "relu")
        assert [one.verdict for one in both] == ["cannot support", "cannot support"]

    def test_differences_that_do_not_vary_are_told_as_they_are(self) -> None:
        (found,) = stats.compare({"relu": [99.99] * 7, "elu": [0.01] * 7}, "relu")
        assert "by 99.98 points (95 % interval 99.98 to 99.98, adjusted p = 0.016, 7 seeds)" in found.sentence

    def test_holm_is_over_the_comparisons(self) -> None:
        arms = {"relu": RELU, "a": shifted(-0.8), "b": shifted(0.02), "c": shifted(-0.1)}
        found = stats.compare(arms, "relu")
        assert [one.arm for one in found] == ["a", "b", "c"]
        assert [one.p_adjusted for one in found] == pytest.approx(list(stats.holm([one.p_value for one in found])))
        sd = (np.array(arms["c"]) - RELU).std(ddof=1) / math.sqrt(2)
        assert found[2].detectable == stats.smallest_detectable_difference(10, sd, comparisons=3)

    def test_adjustment_can_take_a_verdict_away(self) -> None:
        arm = shifted(-0.14)
        (alone,) = stats.compare({"relu": RELU, "elu": arm}, "relu")
        among = stats.compare({"relu": RELU, "elu": arm, "b": shifted(0.01), "c": shifted(0.02)}, "relu")[0]
        assert (alone.verdict, among.verdict) == ("better", "no evidence")
        assert alone.interval == among.interval

    def test_diverged_runs_are_counted(self) -> None:
        arm: list[float | None] = [None, None, *shifted(-0.8)[2:]]
        (found,) = stats.compare({"relu": RELU, "elu": arm}, "relu")
        assert (found.verdict, found.n_pairs, found.excluded_arm, found.excluded_baseline) == ("better", 8, 2, 0)
        assert found.mean_baseline == pytest.approx(np.mean(RELU[2:]))
        assert "points among runs that did not diverge (" in found.sentence
        assert found.sentence.endswith("8 seeds). Left out because they diverged or failed: 2 of 10 elu runs.")

    def test_diverged_runs_of_both(self) -> None:
        (found,) = stats.compare({"relu": [None, *RELU[1:]], "elu": [*shifted(0)[:9], None]}, "relu")
        assert found.n_pairs == 8
        assert found.sentence.endswith("failed: 1 of 10 elu runs and 1 of 10 relu runs.")

    def test_an_arm_that_never_finished(self) -> None:
        (found,) = stats.compare({"relu": RELU, "elu": [None] * 10}, "relu")
        assert (found.verdict, found.p_value, found.probability_better) == ("cannot support", 1, 0)
        assert math.isnan(found.difference)
        assert "nan" not in found.sentence
        assert "use at least 6 seeds that both finish. Left out" in found.sentence

    def test_probability_better_counts_ties_half_and_divergence_as_lost(self) -> None:
        (found,) = stats.compare({"relu": [1.0, 3.0, None], "elu": [1.0, 2.0, None]}, "relu")
        # Against 1, 3 and diverged: 1.0 scores 1/2, 1, 1; 2.0 scores 0, 1, 1; diverged scores 0, 0, 1/2.
        assert found.probability_better == pytest.approx(5 / 9)
        (higher,) = stats.compare({"relu": [1.0, 3.0, None], "elu": [1.0, 2.0, None]}, "relu", lower_is_better=False)
        assert higher.probability_better == pytest.approx((0.5 + 1 + 1 + 1 + 0.5) / 9)

    def test_higher_is_better(self) -> None:
        accuracy = {"relu": [1 - e / 100 for e in RELU], "elu": [1 - e / 100 for e in shifted(-0.8)]}
        (found,) = stats.compare(accuracy, "relu", metric="accuracy", unit="", lower_is_better=False)
        assert found.verdict == "better"
        assert found.probability_better > 0.9
        assert found.sentence.startswith("elu: higher accuracy than relu by 0.0080 (95 % interval 0.0066 to 0.0094,")

    def test_identical_arms(self) -> None:
        (found,) = stats.compare({"relu": RELU, "elu": RELU}, "relu")
        assert (found.verdict, found.p_value, found.probability_better) == ("no evidence", 1, 0.5)
        assert math.isnan(found.detectable)
        assert "do not vary, so what this design could detect is unknown" in found.sentence

    def test_level(self) -> None:
        arms = {"relu": RELU, "elu": shifted(-0.14)}
        (strict,) = stats.compare(arms, "relu", level=0.99)
        assert (stats.compare(arms, "relu")[0].verdict, strict.verdict) == ("better", "no evidence")
        assert "99 % interval" in strict.sentence

    def test_pairs(self) -> None:
        arms = {"relu": RELU, "a": shifted(-0.8), "b": shifted(0.5)}
        found = stats.compare_pairs(arms, list(itertools.combinations(arms, 2)))
        assert [(one.arm, one.baseline) for one in found] == [("relu", "a"), ("relu", "b"), ("a", "b")]
        (alone,) = stats.compare_pairs(arms, [("a", "b")])
        assert alone == replace(
            found[2], p_adjusted=alone.p_value, detectable=alone.detectable, sentence=alone.sentence
        )

    def test_one_arm_leaves_nothing_to_compare(self) -> None:
        assert stats.compare({"relu": RELU}, "relu") == []

    @pytest.mark.parametrize(
        ("arms", "message"),
        [
            ({"relu": RELU, "elu": RELU[:9]}, "one entry a seed, got {'relu': 10, 'elu': 9}: use None"),
            ({"elu": RELU}, "baseline must be one of elu, got relu"),
            ({"relu": RELU, "elu": [math.nan, *RELU[1:]]}, "pass None"),
        ],
    )
    def test_rejects(self, arms: dict[str, list[float]], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            stats.compare(arms, "relu")

    def test_rejects_an_unknown_arm_in_a_pair(self) -> None:
        with pytest.raises(ValueError, match=r"arms of the study \(relu\), got elu"):
            stats.compare_pairs({"relu": RELU}, [("relu", "elu")])

    def test_wrong_verdicts_are_rare(self) -> None:
        rng = np.random.default_rng(11)
        wrong = 0
        for _ in range(300):
            runs: Array = rng.gamma(4, 0.1, (6, 10))
            found = stats.compare({str(i): list(row) for i, row in enumerate(runs)}, "0")
            wrong += any(one.verdict in ("better", "worse") for one in found)
        assert 0 < wrong / 300 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
