"""From tensors of one value a unit to numbers of a layer, kept for every measured step.

Passes wait as tensors until `WAITING` of them are there, so that summing up costs little a step and waits for a GPU
seldom. The values of single units are kept of the last pass only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zeromean.diagnostics.light import Seen
from zeromean.diagnostics.report import LayerReport, Values

WAITING = 64
MOST_OF_THE_BATCH = 0.9


class History:
    """Numbers of layers over steps.

    Attributes:
        steps: that were measured, ascending.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._waiting: list[tuple[int, dict[str, Seen]]] = []
        self._series: dict[str, dict[str, dict[int, float | None]]] = {}
        self._last: dict[str, Seen] = {}
        self._units: dict[str, dict[str, Values]] = {}

    def add(self, step: int, seen: Mapping[str, Seen]) -> None:
        """Take in a pass; its gradients may still be on their way."""
        self.steps.append(step)
        if len(self._waiting) >= WAITING:
            self._summarise()
        self._waiting.append((step, dict(seen)))

    def add_values(self, step: int, values: Mapping[str, Mapping[str, float | None]]) -> None:
        """Take in numbers of layers that were found otherwise."""
        for name, numbers in values.items():
            for quantity, value in numbers.items():
                self._series.setdefault(name, {}).setdefault(quantity, {})[step] = value

    def add_units(self, values: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take in values of single units, of the last pass."""
        self._units = {name: {key: tuple(numbers(one)) for key, one in of.items()} for name, of in values.items()}

    def layers(self) -> tuple[LayerReport, ...]:
        """Every layer that was seen, in the order of the first pass."""
        self._summarise()
        return tuple(self._layer(seen) for seen in self._last.values() if "mean" in seen.of_units)

    def _layer(self, seen: Seen) -> LayerReport:
        series = {
            quantity: tuple(values.get(step) for step in self.steps)
            for quantity, values in self._series.get(seen.name, {}).items()
        }
        return LayerReport(
            name=seen.name,
            kind=seen.kind,
            role=seen.role,
            units=seen.of_units["mean"].numel(),
            weights=seen.weights,
            samples=seen.samples,
            notes=seen.notes,
            series=series,
            of_units={name: tuple(numbers(values)) for name, values in _of_units(seen).items()}
            | self._units.get(seen.name, {}),
        )

    def _summarise(self) -> None:
        waiting, self._waiting = self._waiting, []
        alike: dict[tuple[Any, ...], list[tuple[int, Seen]]] = {}
        for step, seen in waiting:
            for one in seen.values():
                self._last[one.name] = one
                alike.setdefault(_form(one), []).append((step, one))
        for calls in alike.values():
            found = _of_layer([one for _, one in calls])
            for place, (step, one) in enumerate(calls):
                self.add_values(step, {one.name: {quantity: values[place] for quantity, values in found.items()}})


def _form(seen: Seen) -> tuple[Any, ...]:
    """What calls must have in common to be summed up together."""
    shapes = tuple((name, values.shape, values.device) for name, values in seen.of_units.items())
    return seen.name, shapes, tuple(seen.norms)


def _of_layer(calls: Sequence[Seen]) -> dict[str, list[float | None]]:
    """The numbers of a layer in several passes."""
    if "mean" not in calls[0].of_units:
        return {}
    stacked = {name: torch.stack([one.of_units[name] for one in calls]).float() for name in calls[0].of_units}
    values = _shares(stacked, [one.samples for one in calls]) if "low" in stacked else {}
    for prefix in ("", "input_"):
        if f"{prefix}mean" in stacked:
            mean, variance = stacked[f"{prefix}mean"], stacked[f"{prefix}variance"]
            spread = variance.mean(1).sqrt()
            values |= {f"{prefix}mean": mean.mean(1), f"{prefix}shift": mean.square().mean(1).sqrt() / spread}
            values |= {} if prefix else {"spread": spread}
    values |= {name: torch.stack([one.norms[name] for one in calls]) for name in calls[0].norms}
    return {name: numbers(value) for name, value in values.items()}


def _shares(stacked: Mapping[str, Tensor], samples: Sequence[int]) -> dict[str, Tensor]:
    """Of an activation: which part of its units is saturated, and of a rectifier's is dead or never off."""
    count = torch.tensor(samples, device=stacked["low"].device)[:, None]
    tail = stacked["low"] + stacked.get("high", 0)
    shares = {"saturated": (tail >= MOST_OF_THE_BATCH * count).float().mean(1)}
    if "off" in stacked:
        shares["dead"] = (stacked["low"] >= count).float().mean(1)
        shares["never_off"] = (stacked["off"] == 0).float().mean(1)
    return shares


def _of_units(seen: Seen) -> dict[str, Tensor]:
    """What a report keeps of every unit."""
    kept = {"mean": seen.of_units["mean"], "spread": seen.of_units["variance"].sqrt()}
    if "low" in seen.of_units:
        kept["saturated"] = (seen.of_units["low"] + seen.of_units.get("high", 0)) / seen.samples
    if "off" in seen.of_units:
        kept["off"] = seen.of_units["off"] / seen.samples
    return kept


def numbers(values: Tensor) -> list[float | None]:
    """To seven digits; None for what is not finite, which JSON cannot say."""
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in values.tolist()]
