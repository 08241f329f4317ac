"""Vary what the ELU paper leaves open about its 11-layer network, on training images held out.

    PYTHONPATH=src python -m benchmarks.open_points cifar100-elu11 length=0.25 --gpus 2 --together 8 --out DIR

Trains ELU and ReLU in every combination of the likely points, and with each of the others alone, or in the variants
that are asked for, as in ``--variants "" "padding=ceil batch_size=50"``, over all steps or the ``--first`` so many; the
test set is never read. DIR gets ``results.jsonl``, a row a run, and ``table.md``: what each variant differs from the
recipe, paired by seed, and the effect of each likely point over all combinations of the rest, with 95 % intervals. The
same command continues where the time was over.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from benchmarks.trials import Row, Trial, cut, mean_told, parser, run
from scipy import stats

from zeromean.lab import data
from zeromean.lab.recipes import find
from zeromean.lab.recipes.images import ImageRecipe, override

BASE = "as it is"
ACTIVATIONS = ("elu", "relu")
Variant = tuple[str, ...]
# What could harm one activation more than another comes first: a first gradient of norm 100 at the full rate, after
# which units can stay off; how much dropout takes away; the size of the maps. They may depend on each other, so all
# combinations are tried.
CROSSED = ("initialization=he", "drop_before_pooling=true", "padding=one_ceil")
# What the framework of the time would have done by itself, and what moves all errors alike.
ALONE = (
    "batch_size=128",
    "decay_biases=false",
    "precision=tf32",
    "normalization=mean-std",
    "padding=one",
    "padding=ceil",
    "initialization=activation",
    "batch_size=64",
)


def variants(crossed: Sequence[str] = CROSSED, alone: Sequence[str] = ALONE) -> tuple[Variant, ...]:
    """The recipe as it is, all combinations, and the others."""
    chosen = [zip(crossed, taken, strict=True) for taken in product((False, True), repeat=len(crossed))]
    return (*(tuple(text for text, taken in one if taken) for one in chosen), *((text,) for text in alone))


VARIANTS = variants()


def variant_of(text: str) -> Variant:
    """Overrides with blanks between; none is the recipe as it is."""
    return tuple(text.split())


def name_of(variant: Variant) -> str:
    """For tables."""
    return " ".join(variant) or BASE


Errors = Mapping[tuple[str, str], Sequence[float | None]]


def trials(
    recipe: ImageRecipe, seeds: int, chosen: Sequence[Variant] = (), activations: Sequence[str] = ACTIVATIONS
) -> list[Trial]:
    """The chosen variants, or all; the combinations first, so that the time cuts off the least likely ones."""
    return [
        Trial(name_of(variant), override(recipe, variant), activation, seed)
        for variant in chosen or VARIANTS
        for activation in activations
        for seed in range(seeds)
    ]


def of_groups(
    planned: Sequence[Trial], rows: Sequence[Row | None], key: str
) -> dict[tuple[str, str], list[float | None]]:
    """A number of every trial's row, by variant and activation, in the order of the seeds; None where there is none."""
    groups: dict[tuple[str, str], list[float | None]] = {}
    for trial, row in zip(planned, rows, strict=True):
        groups.setdefault((trial.variant, trial.activation), []).append(None if row is None else row[key])
    return groups


def differences(errors: Errors, variant: str, activation: str, base: str = BASE) -> list[float]:
    """To the recipe as it is, or to another variant, of the seeds that have both."""
    if (base, activation) not in errors or (variant, activation) not in errors:
        return []
    pairs = zip(errors[variant, activation], errors[base, activation], strict=True)
    return [own - other for own, other in pairs if own is not None and other is not None]


def residual_squares(errors: Errors) -> tuple[float, int]:
    """What variants and seeds leave unexplained: the sum of squares and its degrees of freedom.

    An activation's error is that of its variant plus that of its seed, by least squares over the runs there are. The
    degrees of freedom are the runs less the rank of this model: (variants - 1) (seeds - 1) for every activation that
    lacks no run. A variant with a single run adds nothing.
    """
    cells = [
        (value, (activation, variant), (activation, seed))
        for (variant, activation), values in errors.items()
        for seed, value in enumerate(values)
        if value is not None
    ]
    terms = dict.fromkeys(term for _, *own in cells for term in own)
    design = np.array([[float(term in own) for term in terms] for _, *own in cells])
    observed = np.array([value for value, *_ in cells])
    fitted, _, rank, _ = np.linalg.lstsq(design, observed, rcond=None)
    return float(np.square(observed - design @ fitted).sum()), len(cells) - int(rank)


def half_width(errors: Errors, count: int, level: float = 0.95) -> float:
    """Of the interval of a mean of so many differences between two runs of one seed, no run in two of them.

    t sqrt(2 s^2 / count), where s^2 is the residual variance of variants and seeds and t Student's quantile for its
    degrees of freedom; NaN where there are none. All variants and activations share s^2, as two seeds of one variant
    say next to nothing. It comes from the runs, since the differences to the recipe have the recipe's runs in common.
    The level is exact, for one interval, where no run is missing and the noise beyond variant and seed is normal and
    of one variance. Where runs are missing a paired difference is not the fitted one, and the interval is a bit wide.
    """
    if not count:
        return math.nan
    squares, freedom = residual_squares(errors)
    if not freedom:
        return math.nan
    return float(stats.t.ppf((1 + level) / 2, freedom)) * math.sqrt(2 * squares / freedom / count)


def table(planned: Sequence[Trial], rows: Sequence[Row | None]) -> str:
    """A row a variant that has a finished run."""
    errors, training = (of_groups(planned, rows, key) for key in ("validation_error", "train_error"))
    shown = [f"{name}, % | training, % | difference" for name in ("ELU", "ReLU")]
    lines = [f"| variant | {' | '.join(shown)} |", "|---" * 7 + "|"]
    for variant in dict.fromkeys(trial.variant for trial in planned):
        if any(value is not None for activation in ACTIVATIONS for value in errors.get((variant, activation), ())):
            cells = [_cells(errors, training, variant, activation) for activation in ACTIVATIONS]
            lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def effects(planned: Sequence[Trial], rows: Sequence[Row | None]) -> str:
    """What each of the crossed points does, as a mean over the combinations of the others.

    A run that got stuck counts with its error. If it is the only one of its variant, the interval does not tell.
    """
    errors = of_groups(planned, rows, "validation_error")
    lines = ["| point | ELU | ReLU |", "|---|---|---|"]
    for text in CROSSED:
        told = [_mean_with_interval(errors, activation, effect(errors, text, activation)) for activation in ACTIVATIONS]
        lines.append(f"| {text} | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def effect(errors: Errors, text: str, activation: str) -> list[float]:
    """Differences that an override makes, one for each combination of the others and each seed that have both."""
    found: list[float] = []
    for variant in variants(CROSSED, ()):
        if text in variant:
            without = name_of(tuple(other for other in variant if other != text))
            found += differences(errors, name_of(variant), activation, without)
    return found


def _mean_with_interval(errors: Errors, activation: str, found: Sequence[float]) -> str:
    """With the variance of that activation's runs: one can be much more even than the other."""
    width = half_width({key: values for key, values in errors.items() if key[1] == activation}, len(found))
    return f"{sum(found) / len(found):+.2f} ± {width:.2f} (n = {len(found)})" if found else ""


def _cells(errors: Errors, training: Errors, variant: str, activation: str) -> str:
    own = differences(errors, variant, activation) if variant != BASE else []
    return " | ".join(
        [
            *(
                mean_told(found.get((variant, activation), ()), digits)
                for found, digits in ((errors, 2), (training, 1))
            ),
            _mean_with_interval(errors, activation, own),
        ]
    )


def main(words: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--seeds", type=int, default=2)
    made.add_argument("--variants", nargs="+", type=variant_of, default=(), help="instead of all")
    made.add_argument(
        "--first", type=int, help="of the steps, with dropout and rates as they are there; all if not given"
    )
    made.add_argument("--activations", nargs="+", choices=ACTIVATIONS, default=ACTIVATIONS)
    options = made.parse_args(words)
    ends = time.time() + options.seconds
    recipe = find(options.recipe)
    assert isinstance(recipe, ImageRecipe), "a convolutional recipe, such as cifar100-elu11"
    recipe = override(recipe, [*options.overrides, f"validation={options.validation}"])
    recipe = recipe if options.first is None else cut(recipe, options.first)
    planned = trials(recipe, options.seeds, options.variants, options.activations)
    rows = run(planned, data.load(recipe.data), options, ends)
    found = table(planned, rows) if options.variants else f"{table(planned, rows)}\n{effects(planned, rows)}"
    (options.out / "table.md").write_text(found)
    print(found, flush=True)


if __name__ == "__main__":
    main()
