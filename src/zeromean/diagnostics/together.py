"""Measure what went through many layers by few operators, and leave the bookkeeping for later.

A `Layout` says, for a row of calls that look alike in every pass, which tensors are measured side by side and where in
the results each layer's numbers lie. It is worked out once; a pass then runs its operators and keeps their results as
they are, and the numbers of single layers are cut out of many passes at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zeromean.diagnostics.layers import Layer, Role, unit_dimension
from zeromean.diagnostics.moments import count_names, counts, moments
from zeromean.diagnostics.tails import Tails, tails

Place = tuple[int, int, int]
"""Which result, and from which unit to which."""


@dataclass(slots=True)
class Sight:
    """A call of a layer.

    Attributes:
        layer: that was called.
        name: its name, with the number of the call.
        x: first input.
        y: output.
        x_written: how often the input had been written.
        y_written: how often the output had been written.
        before: the unit layer that ran last, and the dimensions of its output.
    """

    layer: Layer
    name: str
    x: Tensor | None
    y: Tensor
    x_written: int
    y_written: int
    before: tuple[Layer, int] | None

    @property
    def unchanged(self) -> bool:
        """Whether input and output still are what they were."""
        return self.x_written == version(self.x) and self.y_written == version(self.y)


@dataclass(frozen=True)
class Told:
    """What a pass says of a layer without looking at a number; see `zeromean.diagnostics.light.Seen`."""

    name: str
    kind: str
    role: Role
    samples: int
    weights: int
    notes: tuple[str, ...]
    places: Mapping[str, Place]


class Rooms(dict[torch.dtype, Tensor]):
    """Memory to work in, used again in every pass: on a CPU, to get fresh one takes longer than to fill it.

    That of comparisons, whose outcome is written as numbers, goes by the name of torch.bool.
    """

    def __missing__(self, dtype: torch.dtype) -> Tensor:
        self[dtype] = torch.empty(0, dtype=torch.float32 if dtype == torch.bool else dtype)
        return self[dtype]


@dataclass(frozen=True)
class _Job:
    """Tensors of calls, measured side by side: moments, or counts where there is an activation."""

    members: tuple[tuple[int, bool], ...]
    dimension: int
    activation: Tails | nn.Module | None
    rooms: Rooms

    def run(self, sights: Sequence[Sight]) -> tuple[Tensor, ...]:
        together = [sights[place].x if of_input else sights[place].y for place, of_input in self.members]
        whole: Any = together[0]
        if len(together) > 1:
            rows = [x if x.ndim == 2 else x.reshape(-1, x.shape[-1]) for x in together if x is not None]
            whole = torch.cat(rows, 1, out=self._room(rows))
        if self.activation is None:
            return moments(whole, self.dimension)
        found = tails(self.activation) if isinstance(self.activation, nn.Module) else self.activation
        return tuple(
            counts(whole, self.dimension, found, room=self.rooms[torch.bool] if whole.is_cpu else None).values()
        )

    def _room(self, rows: Sequence[Tensor]) -> Tensor | None:
        if rows[0].is_cuda:
            return None
        return self.rooms[rows[0].dtype].resize_(len(rows[0]), sum(x.shape[1] for x in rows))


@dataclass(frozen=True)
class Packed:
    """The numbers of a pass, as its operators left them."""

    layout: Layout
    results: list[Tensor]


class Layout:
    """Which operators measure a row of calls, and where each layer's numbers are found.

    Attributes:
        told: of each call.

    Args:
        sights: of the pass that it is worked out on.
        known_tails: of activations without parameters, by name.
        grouped: kinds of devices on which tensors are copied side by side.
        rooms: to work in.
    """

    def __init__(
        self, sights: Sequence[Sight], known_tails: Mapping[str, Tails], grouped: frozenset[str], rooms: Rooms
    ) -> None:
        self._rooms = rooms
        self._grouped = grouped
        self._wanted: dict[Any, list[tuple[int, bool, Tensor, int, Tails | nn.Module | None]]] = {}
        asked = [self._ask(place, sight, known_tails) for place, sight in enumerate(sights)]
        self._jobs: list[_Job] = []
        self._place: dict[Any, tuple[tuple[str, Place], ...]] = {}
        self._width = 0
        for members in self._wanted.values():
            self._plan(members)
        self.told = tuple(self._tell(sight, keys) for sight, keys in zip(sights, asked, strict=True))
        del self._wanted

    def run(self, sights: Sequence[Sight]) -> Packed:
        """Measure calls that look like those it was worked out on."""
        results: list[Tensor] = []
        with torch.no_grad():
            for job in self._jobs:
                results += job.run(sights)
        return Packed(self, results)

    def _ask(self, place: int, sight: Sight, known: Mapping[str, Tails]) -> list[tuple[str, Any]]:
        """What is to be measured of a call: the prefix of its quantities, and the key of the measurement."""
        layer, x = sight.layer, sight.x
        wanted = [("", self._want(place, False, sight.y, unit_dimension(layer, sight.y, sight.before), None))]
        if x is None or x.numel() == 0 or x.ndim == 0:
            return wanted
        if layer.role == "unit":
            wanted.append(("input_", self._want(place, True, x, unit_dimension(layer, x, None), None)))
        elif layer.role == "activation":
            activation = known.get(layer.name, layer.module)
            wanted.append(("", self._want(place, True, x, unit_dimension(layer, x, sight.before), activation)))
        return wanted

    def _want(self, place: int, of_input: bool, x: Tensor, dimension: int, activation: Tails | nn.Module | None) -> Any:
        """One measurement, in the group of those that can lie side by side."""
        key = (id(x), dimension, activation)
        joins = x.device.type in self._grouped and dimension == x.ndim - 1 and x.ndim > 1
        joins = joins and not isinstance(activation, nn.Module)
        rows = x.numel() // x.shape[-1] if joins else 0
        group = self._wanted.setdefault((activation, rows, x.dtype, x.device) if joins else key, [])
        if all((id(y), at, what) != key for _, _, y, at, what in group):
            group.append((place, of_input, x, dimension, activation))
        return key

    def _plan(self, members: Sequence[tuple[int, bool, Tensor, int, Tails | nn.Module | None]]) -> None:
        dimension, activation = members[0][3:] if len(members) == 1 else (1, members[0][4])
        self._jobs.append(_Job(tuple(one[:2] for one in members), dimension, activation, self._rooms))
        found = tails(activation) if isinstance(activation, nn.Module) else activation
        names = ("mean", "variance") if found is None else count_names(found)
        start = 0
        for _, _, x, at, what in members:
            stop = start + x.shape[at]
            spans = tuple((name, (self._width + which, start, stop)) for which, name in enumerate(names))
            self._place[id(x), at, what] = spans
            start = stop
        self._width += len(names)

    def _tell(self, sight: Sight, asked: Sequence[tuple[str, Any]]) -> Told:
        places = {f"{prefix}{name}": place for prefix, key in asked for name, place in self._place[key]}
        samples = sight.y.numel() // sight.y.shape[unit_dimension(sight.layer, sight.y, sight.before)]
        weights, notes = facts(sight.layer)
        return Told(sight.name, sight.layer.kind, sight.layer.role, samples, weights, notes, places)


def form(sights: Sequence[Sight]) -> Any:
    """What calls must have in common with others for one layout to serve both."""
    known: dict[int, int] = {}
    parts: list[Any] = []
    for one in sights:
        x, y, module = one.x, one.y, one.layer.module
        weight = module._parameters.get("weight")
        parts += (
            *(one.name, module.training, None if weight is None else weight.requires_grad),
            *(y.shape, y.dtype, y.device, None if x is None else x.shape),
            *(known.setdefault(id(y), len(known)), known.setdefault(id(x), len(known))),
            *((None, 0) if one.before is None else (one.before[0].name, one.before[1])),
        )
    return tuple(parts)


def facts(layer: Layer) -> tuple[int, tuple[str, ...]]:
    """How many numbers its weight has, and what a reader must know.

    A weight that is computed from others (weight norm) is no parameter, and not asked for: asking computes.
    """
    weight = layer.module._parameters.get("weight")
    notes: tuple[str, ...] = () if layer.module.training else ("in evaluation mode",)
    if layer.role == "unit" and weight is None:
        notes += ("weights are computed from other parameters",)
    elif weight is not None and not weight.requires_grad:
        notes += ("weights are frozen",)
    return 0 if weight is None else weight.numel(), notes


def version(x: Tensor | None) -> int:
    """How often it was written; -1 where nobody counts."""
    if x is None:
        return 0
    return -1 if x.is_inference() else x._version
