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

from zeromean.diagnostics.gradients import Key
from zeromean.diagnostics.light import Pass, Seen
from zeromean.diagnostics.report import LayerReport, Values
from zeromean.diagnostics.together import Layout, Packed

WAITING = 64
MOST_OF_THE_BATCH = 0.9


class History:
    """Numbers of layers over steps.

    Attributes:
        steps: that were measured, ascending.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._waiting: list[tuple[int, Pass]] = []
        self._series: dict[str, dict[str, dict[int, float]]] = {}
        self._last: dict[str, tuple[int, Seen]] = {}
        self._units: dict[str, dict[str, Values]] = {}

    def add(self, step: int, measured: Pass) -> None:
        """Take in a pass; its gradients may still be on their way."""
        self.steps.append(step)
        if len(self._waiting) >= WAITING:
            self._summarise()
        self._waiting.append((step, measured))

    def add_values(self, step: int, values: Mapping[str, Mapping[str, float]]) -> None:
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
        return tuple(self._layer(seen) for _, seen in self._last.values() if "mean" in seen.of_units)

    def _layer(self, seen: Seen) -> LayerReport:
        series = {
            quantity: tuple(rounded(values.get(step, math.nan)) for step in self.steps)
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
        packed: dict[Layout, list[tuple[int, Packed]]] = {}
        for step, measured in waiting:
            for one in measured.seen.values():
                self._see(step, one)
                alike.setdefault(_form(one), []).append((step, one))
            if measured.packed is not None:
                packed.setdefault(measured.packed.layout, []).append((step, measured.packed))
        for calls in alike.values():
            names = calls[0][1].of_units
            stacked = {name: torch.stack([one.of_units[name] for _, one in calls]) for name in names}
            self._add_layer(calls[0][1].name, [step for step, _ in calls], stacked, [one.samples for _, one in calls])
        for layout, passes in packed.items():
            self._unpack(layout, *zip(*passes, strict=True))
        self._add_norms(waiting)

    def _unpack(self, layout: Layout, steps: Sequence[int], passes: Sequence[Packed]) -> None:
        """Cut the layers' numbers out of the results of passes."""
        results = [torch.stack(same).cpu() for same in zip(*(one.results for one in passes), strict=True)]
        for told in layout.told:
            stacked = {name: results[which][:, start:stop] for name, (which, start, stop) in told.places.items()}
            self._add_layer(told.name, steps, stacked, [told.samples] * len(steps))
            of_units = {name: values[-1] for name, values in stacked.items()}
            seen = Seen(told.name, told.kind, told.role, told.samples, told.weights, told.notes, of_units)
            self._see(steps[-1], seen)

    def _see(self, step: int, seen: Seen) -> None:
        if seen.name not in self._last or self._last[seen.name][0] <= step:
            self._last[seen.name] = step, seen

    def _add_layer(
        self, name: str, steps: Sequence[int], stacked: Mapping[str, Tensor], samples: Sequence[int]
    ) -> None:
        for quantity, values in _of_layer(
            {key: value.cpu().float() for key, value in stacked.items()}, samples
        ).items():
            self._series.setdefault(name, {}).setdefault(quantity, {}).update(zip(steps, values.tolist(), strict=True))

    def _add_norms(self, waiting: Sequence[tuple[int, Pass]]) -> None:
        """Of several backward passes, the root of the sum of squares."""
        alike: dict[tuple[Key, ...], list[tuple[int, Tensor]]] = {}
        for step, measured in waiting:
            for keys, sizes in measured.gradients.norms:
                alike.setdefault(keys, []).append((step, sizes))
        for keys, found in alike.items():
            table = torch.stack([sizes for _, sizes in found]).T.tolist()
            for (name, quantity), sizes_of_one in zip(keys, table, strict=True):
                values = self._series.setdefault(name, {}).setdefault(quantity, {})
                for (step, _), size in zip(found, sizes_of_one, strict=True):
                    values[step] = math.hypot(values[step], size) if step in values else size


def _form(seen: Seen) -> tuple[Any, ...]:
    """What calls must have in common to be summed up together."""
    return seen.name, tuple((name, values.shape, values.device) for name, values in seen.of_units.items())


def _of_layer(stacked: Mapping[str, Tensor], samples: Sequence[int]) -> dict[str, Tensor]:
    """The numbers of a layer, one a pass, from those of its units in several passes."""
    if "mean" not in stacked:
        return {}
    values = _shares(stacked, samples) if "low" in stacked else {}
    for prefix in ("", "input_"):
        if f"{prefix}mean" in stacked:
            mean, variance = stacked[f"{prefix}mean"], stacked[f"{prefix}variance"]
            spread = variance.mean(1).sqrt()
            values |= {f"{prefix}mean": mean.mean(1), f"{prefix}shift": mean.square().mean(1).sqrt() / spread}
            values |= {} if prefix else {"spread": spread}
    return values


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
    """As a report shows them."""
    return [rounded(value) for value in values.tolist()]


def rounded(value: float) -> float | None:
    """To seven digits; None for what is not finite, which JSON cannot say."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
