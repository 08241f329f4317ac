"""Search the schedule of a ``-fast`` recipe by successive halving, on training images that are held out.

    PYTHONPATH=src python -m benchmarks.tune_fast RECIPE [field=value ...] --gpus 2 --seconds 500 --out DIR

Candidates are the recipe itself and points of the grid below, drawn from a fixed seed. All are trained for a quarter of
the steps, the best quarter of them for half, and the best three of those in full; the test set is never read. DIR gets
``results.jsonl``, a row a run, and ``table.md``. The same command continues where the time was over.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from itertools import product
from typing import Any

from benchmarks.trials import Row, Trial, parser, run

from zeromean.lab import data
from zeromean.lab.recipes import find
from zeromean.lab.recipes.images import ImageRecipe, override

# Each pair of dropout and smoothing costs a compilation.
GRID: dict[str, tuple[str, ...]] = {
    "rate_factor": ("0.5", "1", "2"),
    "weight_decay": ("0.0005", "0.001", "0.002"),
    "dropout_factor": ("0.5", "1", "1.5"),
    "label_smoothing": ("0", "0.1"),
    "ema": ("0", "0.998"),
    "cutout": ("0", "8"),
}
# Share of the steps, and how many candidates are trained for it: a share of all.
RUNGS = ((0.25, 1.0), (0.5, 0.25), (1.0, 0.1))
_AT_LEAST = 3
Point = tuple[str, ...]


def candidates(recipe: ImageRecipe, count: int) -> list[Point]:
    """The recipe itself and others of the grid, as overrides of what they change; the same ones every time."""
    texts = [[f"{field}={value}" for value in values] for field, values in GRID.items()]
    changing = [[text if override(recipe, [text]) != recipe else "" for text in field] for field in texts]
    points = [tuple(filter(None, point)) for point in product(*changing)]
    others = [point for point in dict.fromkeys(points) if point]
    return [(), *random.Random(0).sample(others, min(count - 1, len(others)))]


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
        known = [row["train_error"] for row in rows if row["train_error"] is not None]
        training = f"{sum(known) / len(known):.1f}" if known else ""
        seconds = sum(row["seconds"] for row in rows) / len(rows)
        settings = " ".join(point) or "as it is"
        lines.append(f"| {length:g} | {found:.2f} | {training} | {seconds:.0f} | {settings} |")
    return "\n".join(lines) + "\n"


def halve(recipe: ImageRecipe, dataset: data.Dataset, options: Any, ends: float) -> str:
    """Train rung after rung while there is time; returns the table of what is complete."""
    points, ranked = candidates(recipe, options.candidates), list[tuple[float, Point, float, Sequence[Row]]]()
    for length, share in RUNGS:
        points = points[: max(_AT_LEAST, round(share * options.candidates))]
        rows = run(trials(recipe, points, length, options.seeds), dataset, options, ends)
        own = [rows[first : first + options.seeds] for first in range(0, len(rows), options.seeds)]
        errors = [(error(of_point), point) for of_point, point in zip(own, points, strict=True)]
        ranked += [
            (length, point, found, [row for row in of_point if row is not None])
            for (found, point), of_point in zip(errors, own, strict=True)
            if found is not None
        ]
        if any(found is None for found, _ in errors):
            break
        points = [point for _, point in sorted(errors, key=lambda entry: entry[0] or 0.0)]
    return table(ranked)


def main(words: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--candidates", type=int, default=16)
    made.add_argument("--seeds", type=int, default=1, help="runs of each candidate and length")
    options = made.parse_args(words)
    ends = time.time() + options.seconds
    recipe = find(options.recipe)
    assert isinstance(recipe, ImageRecipe), "a convolutional recipe, such as cifar100-elu18-fast"
    recipe = override(recipe, [*options.overrides, f"validation={options.validation}"])
    found = halve(recipe, data.load(recipe.data), options, ends)
    (options.out / "table.md").write_text(found)
    print(found, flush=True)


if __name__ == "__main__":
    main()
