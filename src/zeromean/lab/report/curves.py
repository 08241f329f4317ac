"""Learning curves of an arm as one line and one band, computed over every seed that did not diverge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from zeromean.lab.summary import Arm, Epoch

Quantity = Callable[[Epoch], float | None]


@dataclass(frozen=True)
class Point:
    """One epoch of an arm, or one layer of its networks: mean over its runs, and the lowest and highest of them."""

    epoch: int
    mean: float
    low: float
    high: float


def scalar(name: str) -> Quantity:
    """A number of the epoch's row, such as ``train_loss``."""
    return lambda row: row[name]


def of_layer(name: str, layer: int) -> Quantity:
    """One layer's number of the epoch's row."""
    return lambda row: row[name][layer]


def over_layers(name: str) -> Quantity:
    """The median over the layers; None where a layer's number is missing."""
    return lambda row: None if None in row[name] else median(row[name])


def band(arm: Arm, quantity: Quantity, *, most: int) -> list[Point]:
    """Mean, lowest and highest over the arm's runs that ended well, at up to ``most`` epochs.

    Epochs are thinned evenly, the first and the last always kept; runs are never thinned. An epoch at which a run
    has no number is left out.
    """
    rows = [[quantity(row) for row in run.metrics] for run in arm.runs if run.status == "ok"]
    if not rows:
        return []
    values = np.array(rows, dtype=float)
    kept = [epoch for epoch in thinned(values.shape[1], most) if np.isfinite(values[:, epoch]).all()]
    return [
        Point(epoch + 1, float(values[:, epoch].mean()), float(values[:, epoch].min()), float(values[:, epoch].max()))
        for epoch in kept
    ]


def thinned(count: int, most: int) -> list[int]:
    """Up to ``most`` of the positions 0 .. count - 1, evenly, with the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(position) for position in np.linspace(0, count - 1, most).tolist()})


def layers(arm: Arm) -> int:
    """Layers whose mean activation was tracked; 0 where no run has begun."""
    return max((len(row["mean_activation"]) for run in arm.runs for row in run.metrics[:1]), default=0)


def profile(arm: Arm, name: str) -> list[Point]:
    """The last epoch's number of every layer, input to output, over the runs that ended well; places for epochs."""
    ends = [band(arm, of_layer(name, layer), most=2)[-1:] for layer in range(layers(arm))]
    return [replace(point, epoch=place) for place, points in enumerate(ends, 1) for point in points]


def losses(arm: Arm) -> Sequence[int]:
    """The epochs at which runs of the arm diverged."""
    return [run.result["diverged_at"] for run in arm.runs if run.status == "diverged" and run.result["diverged_at"]]
