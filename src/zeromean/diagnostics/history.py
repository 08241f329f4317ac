"""From tensors of one value a unit to numbers of a layer, kept for every measured step.

Passes wait as tensors until `WAITING` of them are there, so that summing up costs little a step and waits for a GPU
seldom. The values of single units are kept of the last pass only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zeromean.diagnostics.light import Pass, Seen
from zeromean.diagnostics.report import LayerReport, Values
from zeromean.diagnostics.together import Layout

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
        if not waiting:
            return
        found = iter(_fetched([one for _, measured in waiting for one in _tensors(measured)]))
        calls: list[_Calls] = []
        packed: dict[Layout, list[tuple[int, list[Tensor]]]] = {}
        for step, measured in waiting:
            for one in measured.seen.values():
                one.of_units = {name: next(found) for name in one.of_units}
                calls.append(_Calls(one, [step], {name: values[None] for name, values in one.of_units.items()}))
            if measured.packed is not None:
                of_pass = [next(found) for _ in measured.packed.results]
                packed.setdefault(measured.packed.layout, []).append((step, of_pass))
        for layout, passes in packed.items():
            calls += _unpacked(layout, *zip(*passes, strict=True))
        self._add_calls(calls)
        self._add_norms(waiting)
        for name in {one.seen.name for one in calls}:  # so that the numbers of all passes are let go
            last = self._last[name][1]
            last.of_units = {key: values.clone() for key, values in last.of_units.items()}

    def _add_calls(self, calls: Sequence[_Calls]) -> None:
        """Sum up calls, those with as many units of the same quantities together."""
        alike: dict[tuple[Any, ...], list[_Calls]] = {}
        for one in calls:
            name, step = one.seen.name, one.steps[-1]
            if name not in self._last or self._last[name][0] <= step:
                self._last[name] = step, one.seen
            alike.setdefault(tuple((key, values.shape[1]) for key, values in one.of_units.items()), []).append(one)
        for group in alike.values():
            stacked = {key: torch.cat([one.of_units[key] for one in group]) for key in group[0].of_units}
            samples = [one.seen.samples for one in group for _ in one.steps]
            for quantity, values in _of_layer(stacked, samples).items():
                plain, start = values.tolist(), 0
                for one in group:
                    stop = start + len(one.steps)
                    series = self._series.setdefault(one.seen.name, {}).setdefault(quantity, {})
                    series.update(zip(one.steps, plain[start:stop], strict=True))
                    start = stop

    def _add_norms(self, waiting: Sequence[tuple[int, Pass]]) -> None:
        """Of several backward passes, the root of the sum of squares."""
        found = [(step, keys, sizes) for step, measured in waiting for keys, sizes in measured.gradients.norms]
        keys = [(step, *key) for step, of, _ in found for key in of]
        together = _brought([one for _, _, sizes in found for one in sizes])
        for (step, name, quantity), size in zip(keys, together, strict=True):
            values = self._series.setdefault(name, {}).setdefault(quantity, {})
            values[step] = math.hypot(values[step], size) if step in values else size


@dataclass(frozen=True)
class _Calls:
    """What a layer showed in some passes: values ``[passes, units]`` of each quantity, and its last call."""

    seen: Seen
    steps: Sequence[int]
    of_units: Mapping[str, Tensor]


def _tensors(measured: Pass) -> Iterator[Tensor]:
    """All that a pass left on its device."""
    for one in measured.seen.values():
        yield from one.of_units.values()
    if measured.packed is not None:
        yield from measured.packed.results


def _brought(numbers: Sequence[Tensor]) -> list[float]:
    """Bring float32 tensors without dimensions to the CPU, those of one device in one transfer."""
    places: dict[torch.device, list[int]] = {}
    for place, one in enumerate(numbers):
        places.setdefault(one.device, []).append(place)
    found: dict[int, float] = {}
    for of in places.values():
        found |= zip(of, torch.stack([numbers[place] for place in of]).tolist(), strict=True)
    return [found[place] for place in range(len(numbers))]


def _fetched(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Bring tensors to the CPU as vectors, those of one type and device in one transfer."""
    alike: dict[Any, list[int]] = {}
    for place, one in enumerate(tensors):
        alike.setdefault((one.dtype, one.device), []).append(place)
    found: dict[int, Tensor] = {}
    for places in alike.values():
        rows = [tensors[place].flatten() for place in places]
        found |= zip(places, torch.cat(rows).cpu().split([len(row) for row in rows]), strict=True)
    return [found[place] for place in range(len(tensors))]


def _unpacked(layout: Layout, steps: Sequence[int], passes: Sequence[Sequence[Tensor]]) -> Iterator[_Calls]:
    """Cut the layers' numbers out of the results of passes."""
    results = layout.finish([torch.stack(same) for same in zip(*passes, strict=True)])
    for told in layout.told:
        stacked = {name: results[which][:, start:stop].float() for name, (which, start, stop) in told.places.items()}
        last = {name: values[-1] for name, values in stacked.items()}
        seen = Seen(told.name, told.kind, told.role, told.samples, told.weights, told.notes, last)
        yield _Calls(seen, steps, stacked)


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
