"""How often the intervals cover, the tests err and the plans hold: prints tables, writes one row a measurement.

python benchmarks/coverage.py --replications 10000 --out records/2026-11-22_interval-coverage/results.jsonl
"""

import argparse
import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from zeromean.lab.inference import (
    Array,
    holm,
    mean_interval,
    seeds_needed,
    sign_flip_test,
    smallest_detectable_difference,
)

Draw = Callable[[np.random.Generator, tuple[int, int]], Array]
SEEDS = (5, 6, 7, 8, 10, 20, 30)
LEVEL = 0.95
RESAMPLES = 1999
BOOTSTRAP_REPLICATIONS = 2000


def discrete(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Difference of test errors of 2 % and 3 % on 360 images, in percentage points."""
    wrong = rng.binomial(360, 0.02, shape) - rng.binomial(360, 0.03, shape)
    return np.asarray(wrong * 100 / 360)


def outliers(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """One difference in ten has five times the standard deviation."""
    return rng.normal(size=shape) * np.where(rng.random(shape) < 0.1, 5, 1)


CLAIMED: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, shape: rng.normal(size=shape), 0),
    "skewness 0.7: exponential - normal": (lambda rng, shape: rng.exponential(size=shape) - rng.normal(size=shape), 1),
    "heavy tails: t, 3 degrees": (lambda rng, shape: rng.standard_t(3, shape), 0),
    "outliers: 1 in 10, 5 sd": (outliers, 0),
    "discrete: multiples of 1/360": (discrete, -1),
}
BEYOND: dict[str, tuple[Draw, float]] = {
    "skewness 1: gamma(4)": (lambda rng, shape: rng.gamma(4, size=shape), 4),
    "skewness 2: exponential": (lambda rng, shape: rng.exponential(size=shape), 1),
}
NULLS: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "exponential": lambda rng, shape: rng.exponential(size=shape),
    "discrete": lambda rng, shape: rng.binomial(360, 0.02, shape) * 100 / 360,
}


@dataclass(frozen=True)
class Row:
    """`value` is a rate; `claimed` says whether the product promises it here."""

    quantity: str
    distribution: str
    n: int
    method: str
    level: float
    comparisons: int
    replications: int
    value: float
    standard_error: float
    mean_width: float | None
    claimed: bool


def rate(hits: NDArray[np.bool_]) -> tuple[int, float, float]:
    value = float(np.mean(hits))
    return hits.size, round(value, 5), round(math.sqrt(value * (1 - value) / hits.size), 5)


def coverage(replications: int) -> Iterator[Row]:
    for index, (name, (draw, mean)) in enumerate({**CLAIMED, **BEYOND}.items()):
        for n in SEEDS:
            samples = draw(np.random.default_rng([0, index, n]), (replications, n))
            for method, limits in intervals(samples).items():
                # An interval that ends at the mean covers it, whatever the last bit says.
                covered = (limits[:, 0] <= mean + 1e-9) & (limits[:, 1] >= mean - 1e-9)
                width = np.diff(limits).mean()
                mean_width = round(float(width), 4) if np.isfinite(width) else None
                claimed = name in CLAIMED and method.startswith("zeromean")
                yield Row("coverage", name, n, method, LEVEL, 1, *rate(covered), mean_width, claimed)


def intervals(samples: Array) -> dict[str, Array]:
    found = [mean_interval(sample, level=LEVEL) for sample in samples]
    few = samples[:BOOTSTRAP_REPLICATIONS]
    return {
        f"zeromean ({found[0].method})": np.array([(one.low, one.high) for one in found]),
        "Student t (all n)": student(samples),
        **bootstrap(few),
    }


def student(samples: Array) -> Array:
    n = samples.shape[1]
    half = scipy_stats.t.ppf((1 + LEVEL) / 2, n - 1) * samples.std(axis=1, ddof=1) / math.sqrt(n)
    return np.stack([samples.mean(axis=1) - half, samples.mean(axis=1) + half], axis=1)


def bootstrap(samples: Array) -> dict[str, Array]:
    """BCa at the nominal level and at the level that makes a normal percentile interval as wide as Student's.

    Hesterberg 2015, "What teachers should know about the bootstrap", American Statistician 69.
    """
    n = samples.shape[1]
    t = scipy_stats.t.ppf((1 + LEVEL) / 2, n - 1)
    expanded = 1 - 2 * float(scipy_stats.norm.cdf(-math.sqrt(n / (n - 1)) * t))
    found: dict[str, list[Array]] = {"BCa": [], "BCa, expanded": []}
    for chunk in np.array_split(samples, max(1, len(samples) // 50)):
        drawn = None
        for (_, limits), level in zip(found.items(), (LEVEL, expanded), strict=True):
            drawn = bca(chunk, level, drawn)
            limits.append(np.stack(drawn.confidence_interval, axis=1))
    return {method: np.concatenate(limits) for method, limits in found.items()}


def bca(samples: Array, level: float, drawn: Any) -> Any:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # Samples of equal values have no BCa interval; they come back as nan and count as not covered.
        warnings.simplefilter("ignore")
        return scipy_stats.bootstrap(
            (samples,),
            np.mean,
            axis=-1,
            confidence_level=level,
            n_resamples=0 if drawn else RESAMPLES,
            bootstrap_result=drawn,
            method="BCa",
            rng=np.random.default_rng(0),
        )


def errors_of_tests(replications: int) -> Iterator[Row]:
    """Arms that do not differ: how often one comparison, or any of seven under Holm, is called significant."""
    alpha = 1 - LEVEL
    for index, (name, draw) in enumerate(NULLS.items()):
        for n in (6, 8, 10, 20, 30):
            rng = np.random.default_rng([1, index, n])
            differences = draw(rng, (replications, n)) - draw(rng, (replications, n))
            wrong = np.array([sign_flip_test(one) <= alpha for one in differences])
            yield Row("type I rate", name, n, "sign-flip", LEVEL, 1, *rate(wrong), None, True)
        for n in (9, 10):
            rng = np.random.default_rng([2, index, n])
            arms = [draw(rng, (replications, n)) for _ in range(8)]
            p = [[sign_flip_test(arm[i] - arms[0][i]) for arm in arms[1:]] for i in range(replications)]
            any_wrong = np.array([holm(one).min() <= alpha for one in p])
            yield Row("family-wise error", name, n, "sign-flip, Holm", LEVEL, 7, *rate(any_wrong), None, True)


def power(replications: int) -> Iterator[Row]:
    """How often the planned smallest detectable difference is found between normal runs; 0.8 is planned."""
    alpha = 1 - LEVEL
    for comparisons in (1, 3, 9):
        fewest = seeds_needed(comparisons, alpha=alpha)
        for n in (fewest, fewest + 1, fewest + 2, fewest + 4, 20):
            shift = smallest_detectable_difference(n, 1, comparisons=comparisons, alpha=alpha)
            rng = np.random.default_rng([3, comparisons, n])
            differences = rng.normal(shift, math.sqrt(2), (replications, n))
            found = np.array([sign_flip_test(one) <= alpha / comparisons for one in differences])
            yield Row("power at the plan", "normal", n, "sign-flip", LEVEL, comparisons, *rate(found), None, False)


def show(row: Row) -> None:
    width = "" if row.mean_width is None else f"mean width {row.mean_width:8.3f}"
    print(
        f"{row.quantity:18s} {row.distribution:35s} n {row.n:2d} of {row.comparisons} {row.method:24s} "
        f"{100 * row.value:6.2f} % +- {100 * row.standard_error:.2f}  {width}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replications", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for measure in (coverage, errors_of_tests, power):
        for row in measure(arguments.replications):
            show(row)
            rows.append(row)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


if __name__ == "__main__":
    main()
