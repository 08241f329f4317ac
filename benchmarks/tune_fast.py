"""Tune the schedule of a ``-fast`` recipe, one coordinate at a time, on training images that are held out.

    PYTHONPATH=src python -m benchmarks.tune_fast RECIPE [field=value ...] --gpus 2 --seconds 500 --out DIR

The recipe itself and every single change below are trained for half of the steps (shorter trainings favour too little
regularization). In full: the recipe, the best change, the best two and all of those that were better than the recipe
together, one of each field. The test set is never read. DIR gets ``results.jsonl``, a row a run, ``table.md`` and, once
all are trained, ``choice.txt``: the overrides of the one of the lowest error in full, if it is lower by 0.3 points than
the recipe's, else none. The same command continues where the time was over.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.trials import Row, Trial, mean_told, parser, run

from zeromean.lab import data
from zeromean.lab.recipes import find
from zeromean.lab.recipes.images import ImageRecipe, override

# Each dropout costs a compilation.
CHANGES: dict[str, tuple[str, ...]] = {
    "rate_factor": ("0.5", "2"),
    "weight_decay": (),  # of the recipe's own, `DECAYS`
    "dropout_factor": ("0.5", "1.5"),
    "dropout_curve": ("linear",),
    "everywhere": ("true",),
    "cutout": ("8",),
    "mixup": ("0.2",),
    "label_smoothing": ("0.2",),
    "momentum": ("0.9",),
    "alternate_flip": ("true",),
}
DECAYS = (0.5, 2.0)
SHORT = 0.5
MARGIN = 0.3
Point = tuple[str, ...]


def candidates(recipe: ImageRecipe) -> list[Point]:
    """The recipe itself and every single change that is one, as overrides."""
    changes = CHANGES | {"weight_decay": tuple(f"{factor * recipe.weight_decay:g}" for factor in DECAYS)}
    singles = [(f"{field}={value}",) for field, values in changes.items() for value in values]
    return [(), *(single for single in singles if override(recipe, single) != recipe)]


def finalists(errors: Mapping[Point, float]) -> list[Point]:
    """Who is trained in full, given the errors of the candidates."""
    better: dict[str, str] = {}
    for point in sorted(errors, key=errors.__getitem__):
        if point and errors[point] < errors[()]:
            better.setdefault(point[0].partition("=")[0], point[0])
    ranked = tuple(better.values())
    return list(dict.fromkeys([(), ranked[:1], ranked[:2], ranked]))


def choice(errors: Mapping[Point, float]) -> Point:
    """What the recipe takes, given the errors of the finalists."""
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] <= errors[()] - MARGIN else ()


def trials(recipe: ImageRecipe, points: Sequence[Point], length: float, seeds: int) -> list[Trial]:
    """The points in so much of the recipe's steps, each with every seed."""
    shorter = override(recipe, [f"length={length}"])
    activation = recipe.activations[0]
    return [
        Trial(" ".join(point) or "as it is", override(shorter, point), activation, seed)
        for point in points
        for seed in range(seeds)
    ]


def error(rows: Sequence[Row | None]) -> float | None:
    """The mean validation error of a point, infinite if a run diverged, None if one is missing."""
    found = [row for row in rows if row is not None]
    if not rows or len(found) < len(rows):
        return None
    errors = [float("inf") if row["status"] != "ok" else float(row["validation_error"]) for row in found]
    return sum(errors) / len(errors)


def table(ranked: Sequence[tuple[float, Point, float, Sequence[Row]]]) -> str:
    """Best first among those of the most steps."""
    lines = ["| steps | validation error, % | training error, % | seconds | settings |", "|---|---|---|---|---|"]
    for length, point, found, rows in sorted(ranked, key=lambda entry: (-entry[0], entry[2])):
        training = mean_told((row["train_error"] for row in rows), 1)
        seconds = mean_told((row["seconds"] for row in rows), 0)
        settings = " ".join(point) or "as it is"
        lines.append(f"| {length:g} | {found:.2f} | {training} | {seconds} | {settings} |")
    return "\n".join(lines) + "\n"


def search(recipe: ImageRecipe, dataset: data.Dataset, options: Any, ends: float) -> tuple[str, Point | None]:
    """Train the candidates, then the finalists, while there is time.

    Returns:
        The table of what is complete, and the choice, or None where a finalist is missing.
    """
    ranked = list[tuple[float, Point, float, Sequence[Row]]]()
    points = candidates(recipe)
    for length in (SHORT, 1.0):
        rows = run(trials(recipe, points, length, options.seeds), dataset, options, ends)
        own = [rows[first : first + options.seeds] for first in range(0, len(rows), options.seeds)]
        errors = [(error(of_point), point) for of_point, point in zip(own, points, strict=True)]
        ranked += [
            (length, point, found, [row for row in of_point if row is not None])
            for (found, point), of_point in zip(errors, own, strict=True)
            if found is not None
        ]
        known = {point: found for found, point in errors if found is not None}
        if len(known) < len(points):
            return table(ranked), None
        points = finalists(known)
    return table(ranked), choice(known)


def main(words: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--seeds", type=int, default=1, help="runs of each candidate and length")
    options = made.parse_args(words)
    ends = time.time() + options.seconds
    recipe = find(options.recipe)
    assert isinstance(recipe, ImageRecipe), "a convolutional recipe, such as cifar100-elu18-fast"
    recipe = override(recipe, [*options.overrides, f"validation={options.validation}"])
    found, chosen = search(recipe, data.load(recipe.data), options, ends)
    (options.out / "table.md").write_text(found)
    print(found, flush=True)
    if chosen is not None:
        (options.out / "choice.txt").write_text(" ".join(chosen) + "\n")


if __name__ == "__main__":
    main()
