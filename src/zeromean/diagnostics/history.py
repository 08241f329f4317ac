"""Numbers of layers, kept for every measured step.

Passes wait as tensors until `WAITING` of them are there, so that summing up costs little a step and waits for a GPU
seldom. The values of single units are kept of the last pass only, and where they were measured until somebody asks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zeromean.diagnostics.averages import Averages, Where, fetched
from zeromean.diagnostics.gradients import Key
from zeromean.diagnostics.light import Pass, Seen
from zeromean.diagnostics.report import LayerReport, Values
from zeromean.diagnostics.slots import Kept, beside, side_by_side
from zeromean.diagnostics.together import Packed, Place, Told

WAITING = 64


@dataclass(frozen=True, slots=True)
class _Waiting:
    """What is kept of a pass until it is summed up.

    Attributes:
        step: when.
        packed: what was measured together.
        seen: the other layers.
        norms: of gradients.
        form: see `_form`, which looks at tensors while a processor has them at hand.
    """

    step: int
    packed: Packed | None
    seen: tuple[Seen, ...]
    norms: tuple[tuple[tuple[Key, ...], Kept], ...]
    form: tuple[Any, ...]

    @property
    def told(self) -> tuple[Told, ...]:
        """The layers that were measured together."""
        return () if self.packed is None else self.packed.layout.told


def _form(measured: Pass) -> tuple[Any, ...]:
    """What passes whose tensors can lie side by side have in common."""
    of_seen = [
        (one.name, one.samples, one.notes, values["mean"].device, *values, *map(Tensor.numel, values.values()))
        for one in measured.seen.values()
        for values in (one.of_units,)
    ]
    return (None if measured.packed is None else measured.packed.layout, *of_seen)


@dataclass(frozen=True, slots=True)
class _Call:
    """A layer in passes that are alike, and where its numbers are found."""

    name: str
    steps: Sequence[int]
    places: Sequence[Where]


class History:
    """Numbers of layers over steps.

    Attributes:
        steps: that were measured, ascending.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._waiting: list[_Waiting] = []
        self._summed_up: list[tuple[list[_Call], dict[Any, dict[str, Tensor]]]] = []
        self._norms: list[tuple[tuple[Key, ...], list[int], Tensor]] = []
        self._series: dict[str, dict[str, dict[int, float]]] = {}
        self._last: dict[str, tuple[int, Seen | Told, Packed | None]] = {}
        self._units: dict[str, dict[str, Values]] = {}

    def add(self, step: int, measured: Pass) -> None:
        """Take in a pass whose gradients have arrived."""
        self.steps.append(step)
        if len(self._waiting) >= WAITING:
            self._sum_up()
        seen, norms = tuple(measured.seen.values()), tuple(measured.gradients.norms)
        self._waiting.append(_Waiting(step, measured.packed, seen, norms, _form(measured)))

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
        return tuple(self._layer(one, of_units) for one, of_units in self._last_values() if "mean" in of_units)

    def _layer(self, seen: Seen | Told, of_units: Mapping[str, Tensor]) -> LayerReport:
        series = {
            quantity: tuple(rounded(values.get(step, math.nan)) for step in self.steps)
            for quantity, values in self._series.get(seen.name, {}).items()
        }
        return LayerReport(
            name=seen.name,
            kind=seen.kind,
            role=seen.role,
            units=of_units["mean"].numel(),
            weights=seen.weights,
            samples=seen.samples,
            notes=seen.notes,
            series=series,
            of_units={name: tuple(numbers(values)) for name, values in _of_units(of_units, seen.samples).items()}
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
        averages, calls = Averages(), []
        for passes in alike.values():
            steps = [one.step for one in passes]
            calls += [_Call(name, steps, averages.add(samples, values)) for name, samples, values in _calls(passes)]
            self._keep_last(passes[-1])
        found, norms = averages.found(), list(_norms(waiting))
        of_layers = [one for of in found.values() for one in of.values()]
        plain = iter(fetched([*of_layers, *(one for *_, portions in norms for one in portions)]))
        self._summed_up.append((calls, {group: {key: next(plain) for key in of} for group, of in found.items()}))
        self._norms += [(keys, steps, torch.cat([next(plain) for _ in portions], 1)) for keys, steps, portions in norms]

    def _keep_last(self, last: _Waiting) -> None:
        """What a report shows of single units."""
        calls: tuple[Seen | Told, ...] = (*last.told, *last.seen)
        for one in calls:
            if one.name not in self._last or self._last[one.name][0] <= last.step:
                self._last[one.name] = last.step, one, last.packed if isinstance(one, Told) else None

    def _last_values(self) -> list[tuple[Seen | Told, dict[str, Tensor]]]:
        """Every layer that was seen, and the values of its units in its last pass, on the CPU."""
        packed = {id(one): one for _, _, one in self._last.values() if one is not None}
        found = {which: _found([one]) for which, one in packed.items()}
        last: list[tuple[Seen | Told, Mapping[str, Tensor]]] = [
            (
                one,
                {key: found[id(of)][place] for key, place in one.places.items()}
                if isinstance(one, Told)
                else one.of_units,
            )
            for _, one, of in self._last.values()
        ]
        plain = iter(fetched([values for _, of_units in last for values in of_units.values()]))
        return [(one, {key: next(plain).flatten() for key in of_units}) for one, of_units in last]

    def _write_down(self) -> None:
        """Sort what was summed up by layers, quantities and steps."""
        summed_up, self._summed_up = self._summed_up, []
        for calls, found in summed_up:
            plain = {group: {key: values.tolist() for key, values in of.items()} for group, of in found.items()}
            for one in calls:
                for prefix, group, start in one.places:
                    for key, values in plain[group].items():
                        if prefix + key != "input_spread":
                            numbers = values[start : start + len(one.steps)]
                            self._of(one.name, prefix + key).update(zip(one.steps, numbers, strict=True))
        norms, self._norms = self._norms, []
        for keys, steps, sizes in norms:
            for (name, quantity), column in _of_all_passes(keys, sizes.T.tolist()).items():
                self._of(name, quantity).update(zip(steps, column, strict=True))


def _of_all_passes(keys: Sequence[Key], norms: Sequence[list[float]]) -> dict[Key, list[float]]:
    """Of several backward passes, the root of the sum of squares."""
    found: dict[Key, list[float]] = {}
    for key, sizes in zip(keys, norms, strict=True):
        found[key] = list(map(math.hypot, found[key], sizes)) if key in found else sizes
    return found


def _norms(waiting: Sequence[_Waiting]) -> Iterator[tuple[tuple[Key, ...], list[int], list[Tensor]]]:
    """Of the same gradients, portions ``[P, norms]``: others where a batch is larger, and one a device at least."""
    alike: dict[Any, list[_Waiting]] = {}
    for one in waiting:
        if one.norms:
            alike.setdefault(tuple((keys, kept.place[0][0].device) for keys, kept in one.norms), []).append(one)
    for passes in alike.values():
        keys = tuple(key for of, _ in passes[0].norms for key in of)
        portions = zip(*([kept for _, kept in one.norms] for one in passes), strict=True)
        yield keys, [one.step for one in passes], [sizes for of in portions for sizes in side_by_side(of)]


def _found(passes: Sequence[Packed]) -> dict[Place, Tensor]:
    """What passes of one layout were measured to, cut at its places ``[P, units]``."""
    layout = passes[0].layout
    results = [one.float() for one in layout.finish(side_by_side([one.kept for one in passes]))]
    places = {place for told in layout.told for place in told.places.values()}
    return {(which, start, stop): results[which][:, start:stop] for which, start, stop in places}


def _calls(passes: Sequence[_Waiting]) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
    """Layers of passes that are alike: names, samples and values ``[P, units]``."""
    packed = [one.packed for one in passes if one.packed is not None]
    found = _found(packed) if packed else {}
    for told in passes[0].told:
        yield told.name, told.samples, {key: found[place] for key, place in told.places.items()}
    known: dict[tuple[int, ...], Tensor] = {}
    for calls in zip(*(one.seen for one in passes), strict=True):
        of_units = {}
        for key in calls[0].of_units:
            rows = [one.of_units[key] for one in calls]
            # An input's are the very tensors of the output that it was.
            same = tuple(map(id, rows))
            if same not in known:
                known[same] = beside(rows, len(rows))
            of_units[key] = known[same]
        yield calls[0].name, calls[0].samples, of_units


def _of_units(found: Mapping[str, Tensor], samples: int) -> dict[str, Tensor]:
    """What a report keeps of every unit."""
    kept = {"mean": found["mean"], "spread": found["variance"].sqrt()}
    if "low" in found:
        kept["saturated"] = (found["low"] + found.get("high", 0)) / samples
    if "off" in found:
        kept["off"] = found["off"] / samples
    return kept


def numbers(values: Tensor) -> list[float | None]:
    """As a report shows them."""
    return [rounded(value) for value in values.tolist()]


def rounded(value: float) -> float | None:
    """To seven digits; None for what is not finite, which JSON cannot say."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
