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

from zeromean.diagnostics.gradients import Key
from zeromean.diagnostics.light import Pass, Seen
from zeromean.diagnostics.report import LayerReport, Values
from zeromean.diagnostics.slots import Kept
from zeromean.diagnostics.together import Layout, Packed

WAITING = 64
MOST_OF_THE_BATCH = 0.9


@dataclass(frozen=True, slots=True)
class _Waiting:
    """What is kept of a pass until it is summed up.

    Attributes:
        step: when.
        packed: what was measured together.
        seen: the other layers.
        gradients: whose norms are found.
        norms: those norms.
    """

    step: int
    packed: Packed | None
    seen: tuple[Seen, ...]
    gradients: tuple[Key, ...]
    norms: list[Kept]

    @property
    def layout(self) -> Layout | None:
        """By which layers were measured together."""
        return None if self.packed is None else self.packed.layout

    @property
    def tensors(self) -> list[Tensor]:
        """Results of the layout, and the values of the other layers."""
        together = () if self.packed is None else self.packed.kept.results
        return [*together, *(values for one in self.seen for values in one.of_units.values())]

    @property
    def form(self) -> tuple[Any, ...]:
        """What passes whose tensors can lie side by side have in common."""
        of_seen = (
            (one.name, one.samples, one.notes, *((key, x.shape, x.dtype, x.device) for key, x in one.of_units.items()))
            for one in self.seen
        )
        return (self.layout, *of_seen)


@dataclass(frozen=True)
class _Calls:
    """What a layer showed in some passes: values ``[passes, units]`` of each quantity, and its last call."""

    seen: Seen
    steps: Sequence[int]
    of_units: Mapping[str, Tensor]


_Rows = list[tuple[str, Sequence[int]]]
"""Names of layers, and the steps for which there are values."""


class History:
    """Numbers of layers over steps.

    Attributes:
        steps: that were measured, ascending.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._waiting: list[_Waiting] = []
        self._summed_up: list[tuple[_Rows, dict[str, Tensor]]] = []
        self._norms: list[tuple[tuple[Key, ...], list[int], Tensor]] = []
        self._series: dict[str, dict[str, dict[int, float]]] = {}
        self._last: dict[str, tuple[int, Seen]] = {}
        self._units: dict[str, dict[str, Values]] = {}

    def add(self, step: int, measured: Pass) -> None:
        """Take in a pass whose gradients have arrived."""
        self.steps.append(step)
        if len(self._waiting) >= WAITING:
            self._sum_up()
        seen, found = tuple(measured.seen.values()), measured.gradients.norms
        gradients = tuple(key for keys, _ in found for key in keys)
        self._waiting.append(_Waiting(step, measured.packed, seen, gradients, [sizes for _, sizes in found]))

    def add_values(self, step: int, values: Mapping[str, Mapping[str, float]]) -> None:
        """Take in numbers of layers that were found otherwise."""
        for name, numbers in values.items():
            for quantity, value in numbers.items():
                self._of(name, quantity)[step] = value

    def add_units(self, values: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take in values of single units, of the last pass."""
        self._units = {name: {key: tuple(numbers(one)) for key, one in of.items()} for name, of in values.items()}

    def layers(self) -> tuple[LayerReport, ...]:
        """Every layer that was seen, in the order of the first pass."""
        self._sum_up()
        self._write_down()
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

    def _of(self, name: str, quantity: str) -> dict[int, float]:
        return self._series.setdefault(name, {}).setdefault(quantity, {})

    def _sum_up(self) -> None:
        """Keep a few numbers of each layer, and let the tensors go."""
        waiting, self._waiting = self._waiting, []
        alike: dict[Any, list[_Waiting]] = {}
        for one in waiting:
            alike.setdefault(one.form, []).append(one)
        self._sum_up_calls([one for passes in alike.values() for one in _calls(passes)])
        with_norms: dict[tuple[tuple[Key, ...], Any], list[tuple[int, list[Tensor]]]] = {}
        for one in waiting:
            if one.gradients:
                # The same gradients may be found in other portions where a batch is larger.
                norms = [sizes for kept in one.norms for sizes in kept.results]
                portions = tuple((sizes.numel(), sizes.device) for sizes in norms)
                with_norms.setdefault((one.gradients, portions), []).append((one.step, norms))
        for (gradients, _), passes in with_norms.items():
            found = torch.cat(_fetched([norms for _, norms in passes]), 1)
            self._norms.append((gradients, [step for step, _ in passes], found))

    def _sum_up_calls(self, calls: Sequence[_Calls]) -> None:
        """Those with as many units of the same quantities together."""
        alike: dict[tuple[Any, ...], list[_Calls]] = {}
        for one in calls:
            name, step = one.seen.name, one.steps[-1]
            if name not in self._last or self._last[name][0] <= step:
                self._last[name] = step, one.seen
            alike.setdefault(tuple((key, values.shape[1]) for key, values in one.of_units.items()), []).append(one)
        for group in alike.values():
            stacked = {key: torch.cat([one.of_units[key] for one in group]) for key in group[0].of_units}
            samples = [one.seen.samples for one in group for _ in one.steps]
            self._summed_up.append(([(one.seen.name, one.steps) for one in group], _of_layer(stacked, samples)))

    def _write_down(self) -> None:
        """Sort what was summed up by layers, quantities and steps."""
        summed_up, self._summed_up = self._summed_up, []
        for rows, found in summed_up:
            for quantity, values in found.items():
                plain = iter(values.tolist())
                for name, steps in rows:
                    self._of(name, quantity).update({step: next(plain) for step in steps})
        norms, self._norms = self._norms, []
        for gradients, steps, sizes in norms:
            for step, row in zip(steps, sizes.tolist(), strict=True):
                for (name, quantity), size in _of_all_passes(gradients, row).items():
                    self._of(name, quantity)[step] = size


def _of_all_passes(gradients: Sequence[Key], norms: Sequence[float]) -> dict[Key, float]:
    """Of several backward passes, the root of the sum of squares."""
    found: dict[Key, float] = {}
    for key, size in zip(gradients, norms, strict=True):
        found[key] = math.hypot(found[key], size) if key in found else size
    return found


def _calls(passes: Sequence[_Waiting]) -> Iterator[_Calls]:
    """Cut the layers' numbers out of the tensors of passes that are alike."""
    first, steps = passes[0], [one.step for one in passes]
    columns = _fetched([one.tensors for one in passes])
    layout = first.layout
    if layout is not None:
        results, columns = columns[: layout.results], columns[layout.results :]
        results = [one.float() for one in layout.finish(results)]
        last = [one[-1].clone() for one in results]
        for told in layout.told:
            of_last = {name: last[which][start:stop] for name, (which, start, stop) in told.places.items()}
            seen = Seen(told.name, told.kind, told.role, told.samples, told.weights, told.notes, of_last)
            of_all = {name: results[which][:, start:stop] for name, (which, start, stop) in told.places.items()}
            yield _Calls(seen, steps, of_all)
    found = iter(columns)
    for one in passes[-1].seen:
        of_units = {name: next(found) for name in one.of_units}
        one.of_units = {name: values[-1].clone() for name, values in of_units.items()}
        yield _Calls(one, steps, of_units)


def _fetched(passes: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Bring the tensors of passes that are alike to the CPU, each ``[P, numbers]``.

    Those of one type and device come in one transfer.
    """
    alike: dict[Any, list[int]] = {}
    for place, one in enumerate(passes[0]):
        alike.setdefault((one.dtype, one.device), []).append(place)
    found: dict[int, Tensor] = {}
    for places in alike.values():
        sizes = [passes[0][place].numel() for place in places]
        together = torch.cat([of[place].flatten() for of in passes for place in places]).cpu()
        found |= zip(places, together.view(len(passes), -1).split(sizes, 1), strict=True)
    return [found[place] for place in range(len(passes[0]))]


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
