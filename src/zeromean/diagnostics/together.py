"""Measure what went through many layers by few operators, and leave the bookkeeping for later.

A `Layout` says, for a row of calls that look alike in every pass, which tensors are measured side by side and where in
the results each layer's numbers lie. It is worked out once; a pass then runs its operators and keeps their results as
they are, and the numbers of single layers are cut out of many passes at once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from zeromean.diagnostics.layers import Layer, Role, unit_dimension
from zeromean.diagnostics.moments import OF_PASSES, count_names, counts, moments, moments_of_passes
from zeromean.diagnostics.slots import Kept, Slots, passes
from zeromean.diagnostics.tails import Tails, tails

Place = tuple[int, int, int]
"""Which result, and from which of its numbers to which."""

WAIT_ON_CPU, WAIT_ON_CUDA = (2**15, 2**20), (2**25, 2**26)
"""How many numbers a call may have to wait for the end of the forward pass, and how many all that wait."""
JOIN, JOIN_TOGETHER = 2**21, 2**25
"""How many numbers a tensor may have to be copied beside others, and how many all that are copied."""
FOLDS = sys.platform != "win32"
"""Whether torch.segment_reduce is there: some builds for CUDA on Windows leave it out."""


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


Tensors = Sequence[Tensor | None]
"""What went through a row of calls: each one's input and output, one call after the other."""


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

    Attributes:
        copies: that wait, of the layout that ran last.
    """

    copies: _Copies | None = None

    def __missing__(self, dtype: torch.dtype) -> Tensor:
        self[dtype] = torch.empty(0, dtype=torch.float32 if dtype == torch.bool else dtype)
        return self[dtype]


@dataclass(frozen=True)
class _Member:
    """A tensor of a call, and how it is seen as ``[rows, units x positions]`` beside others.

    Attributes:
        place: among `Tensors`.
        dimension: of the units.
        rows: in front of them.
        units: how many.
        positions: behind each unit, as in the maps of a convolution.
        turned: whether the units run fastest in memory, though they are dimension 1.
        plain: whether that is what it is.
    """

    place: int
    dimension: int
    rows: int
    units: int
    positions: int
    turned: bool
    plain: bool

    def flat(self, tensors: Tensors) -> Tensor:
        """The tensor as it is seen beside others."""
        x = tensors[self.place]
        assert x is not None
        if self.plain:
            return x
        return (x.movedim(1, -1) if self.turned else x).reshape(self.rows, -1)


def _member(place: int, x: Tensor, dimension: int) -> _Member:
    before, units, behind = math.prod(x.shape[:dimension]), x.shape[dimension], math.prod(x.shape[dimension + 1 :])
    turned = dimension == 1 and behind > 1 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    rows, positions = (before * behind, 1) if turned else (before, behind)
    return _Member(place, dimension, rows, units, positions, turned, plain=x.ndim == 2 and dimension == 1)


@dataclass(frozen=True)
class _Fold:
    """Adds up, for each unit, what was found at each of its positions, in one operator for all.

    Attributes:
        offsets: where the positions of each unit begin, in rows of results that lie one behind the other.
        share: of one position, for each unit, in float64.
    """

    offsets: Tensor
    share: Tensor

    @classmethod
    def over(cls, members: Sequence[_Member], rows: int, device: torch.device) -> _Fold:
        """That of members side by side and so many rows of results."""
        positions = torch.tensor([one.positions for one in members for _ in range(one.units)])
        offsets = torch.cat((torch.zeros(1, dtype=torch.long), positions.repeat(rows).cumsum(0)))
        return cls(offsets.to(device), (1 / positions.double()).to(device))

    def sums(self, rows: Tensor) -> Tensor:
        """From ``[K, positions of all units]`` to ``[K, units]``."""
        return torch.segment_reduce(rows.reshape(-1), "sum", offsets=self.offsets, unsafe=True).view(len(rows), -1)

    def moments(self, mean: Tensor, variance: Tensor) -> Tensor:
        """First and second moments ``[2, units]``, times positions: float64, since `finish` subtracts them."""
        both = torch.stack((mean, variance)).double()
        first, second = both.unbind()
        second.addcmul_(first, first)
        return self.sums(both)

    def finish(self, found: Tensor) -> Tensor:
        """From what `moments` gave in several passes ``[P, 2 x units]`` to means and variances."""
        both = found.view(len(found), 2, -1) * self.share
        both[:, 1].addcmul_(both[:, 0], both[:, 0], value=-1).clamp_(min=0)
        return both.flatten(1)


class _Job:
    """Tensors of calls, measured side by side: moments, or counts where there is an activation.

    Args:
        members: the tensors.
        activation: whose counts.
        fold: where there are several positions a unit.
        rooms: to work in.
        within: jobs on some of these tensors, with the first and last column of those, which lie side by side.
    """

    def __init__(
        self,
        members: Sequence[_Member],
        activation: Tails | nn.Module | None,
        fold: _Fold | None,
        rooms: Rooms,
        within: Sequence[tuple[int, int, _Job]] = (),
    ) -> None:
        self._members = members
        self._activation = activation
        self._fold = fold
        self._rooms = rooms
        self._within = within
        self._picked = itemgetter(*(one.place for one in members))
        self._plain = all(one.plain for one in members)
        self.shape = (members[0].rows, sum(one.units * one.positions for one in members))

    @property
    def can_wait(self) -> bool:
        """Whether copies can be measured later as the tensors would be now."""
        fixed = not isinstance(self._activation, nn.Module)
        flat = self._fold is None and all(one.positions == 1 for one in self._members)
        return fixed and flat and all(job.can_wait for _, _, job in self._within)

    def run(self, tensors: Tensors) -> list[Tensor]:
        if len(self._members) == 1:
            return self._measure(self._picked(tensors), self._members[0].dimension)
        rows = self._rows(tensors)
        whole = torch.cat(rows, 1, out=None if rows[0].is_cuda else self._rooms[rows[0].dtype].resize_(self.shape))
        return self._of_one(whole)

    def memory(self, tensors: Tensors, count: int) -> Tensor:
        """For copies of so many passes, ``[P, N, C]``."""
        like = self._rows(tensors)[0]
        return like.new_empty(count, *self.shape)

    def copy(self, tensors: Tensors, place: Tensor) -> None:
        torch.cat(self._rows(tensors), 1, out=place)

    def measure_copies(self, whole: Tensor) -> list[Tensor]:
        """As `run`, with a row for each pass in every result."""
        if whole.is_cpu:
            return [torch.stack(rows) for rows in zip(*map(self._of_one, whole.unbind()), strict=True)]
        if isinstance(self._activation, Tails):
            return [counts(whole, OF_PASSES, self._activation).transpose(0, 1).contiguous()]
        found = list(moments_of_passes(whole))
        for start, stop, job in self._within:
            found += job.measure_copies(whole[:, :, start:stop])
        return found

    def _of_one(self, whole: Tensor) -> list[Tensor]:
        found = self._measure(whole, 1)
        for start, stop, job in self._within:
            found += job._measure(whole[:, start:stop], 1)
        return found

    def _rows(self, tensors: Tensors) -> tuple[Tensor, ...] | list[Tensor]:
        if self._plain and len(self._members) > 1:
            picked: tuple[Tensor, ...] = self._picked(tensors)
            return picked
        return [one.flat(tensors) for one in self._members]

    def _measure(self, whole: Tensor, dimension: int) -> list[Tensor]:
        if self._activation is None:
            mean, variance = moments(whole, dimension)
            return [mean, variance] if self._fold is None else [self._fold.moments(mean, variance)]
        limits = tails(self._activation) if isinstance(self._activation, nn.Module) else self._activation
        numbers = counts(whole, dimension, limits, room=self._rooms[torch.bool] if whole.is_cpu else None)
        return [numbers if self._fold is None else self._fold.sums(numbers)]


_Group = dict[tuple[int, int, "Tails | nn.Module | None"], tuple[_Member, torch.device]]
"""Measurements, by tensor, dimension of the units and activation."""


class _Copies:
    """Tensors of several passes, each job's in one memory.

    Args:
        owner: whose.
        jobs: of the owner.
        tensors: of a pass.
        count: of passes.
    """

    def __init__(self, owner: Layout, jobs: Sequence[_Job], tensors: Tensors, count: int) -> None:
        self.owner = owner
        self._jobs = jobs
        self._memory = [job.memory(tensors, count) for job in jobs]
        self._places = list(zip(*(one.unbind() for one in self._memory), strict=True))
        self.slots = Slots(count, self._measure)

    def take(self, tensors: Tensors) -> Kept:
        for job, place in zip(self._jobs, self._places[self.slots.next()], strict=True):
            job.copy(tensors, place)
        return self.slots.keep()

    def _measure(self, count: int) -> list[Tensor]:
        both = zip(self._jobs, self._memory, strict=True)
        return [found for job, memory in both for found in job.measure_copies(memory[:count])]


@dataclass(frozen=True)
class Packed:
    """The numbers of a pass, as its operators leave them."""

    layout: Layout
    kept: Kept


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
        self._wanted: dict[Any, _Group] = {}
        self._left_to_join = JOIN_TOGETHER
        asked = [self._ask(place, sight, known_tails) for place, sight in enumerate(sights)]
        self._place: dict[Any, tuple[tuple[str, Place], ...]] = {}
        self._folds: dict[int, _Fold] = {}
        self._results = 0
        devices = {device for group in self._wanted.values() for _, device in group.values()}
        self._jobs = [self._plan(group, within) for group, within in self._arranged()]
        numbers = sum(math.prod(job.shape) for job in self._jobs)
        can_wait = len(devices) == 1 and all(job.can_wait for job in self._jobs)
        self._passes = passes(numbers) if can_wait else 0
        self.told = tuple(self._tell(sight, keys) for sight, keys in zip(sights, asked, strict=True))
        del self._wanted

    def run(self, tensors: Tensors) -> Packed:
        """Measure calls that look like those it was worked out on."""
        results: list[Tensor] = []
        with torch.set_grad_enabled(False):
            if self._passes:
                return Packed(self, self._copies(tensors).take(tensors))
            for job in self._jobs:
                results += job.run(tensors)
        return Packed(self, Kept(results))

    def _copies(self, tensors: Tensors) -> _Copies:
        """Its own; those of another layout are measured first, so that only one has memory for them."""
        copies = self._rooms.copies
        if copies is None or copies.owner is not self:
            if copies is not None:
                copies.slots.measure()
            copies = self._rooms.copies = _Copies(self, self._jobs, tensors, self._passes)
        return copies

    def finish(self, results: Sequence[Tensor]) -> list[Tensor]:
        """From results of several passes, each ``[P, numbers]``, to those in which `told` has its places."""
        return [self._folds[which].finish(one) if which in self._folds else one for which, one in enumerate(results)]

    def _ask(self, place: int, sight: Sight, known: Mapping[str, Tails]) -> list[tuple[str, Any]]:
        """What is to be measured of a call: the prefix of its quantities, and the key of the measurement."""
        layer, x = sight.layer, sight.x
        wanted = [("", self._want(2 * place + 1, sight.y, unit_dimension(layer, sight.y, sight.before), None))]
        if x is None or x.numel() == 0 or x.ndim == 0:
            return wanted
        if layer.role == "unit":
            wanted.append(("input_", self._want(2 * place, x, unit_dimension(layer, x, None), None)))
        elif layer.role == "activation":
            activation = known.get(layer.name, layer.module)
            wanted.append(("", self._want(2 * place, x, unit_dimension(layer, x, sight.before), activation)))
        return wanted

    def _want(self, place: int, x: Tensor, dimension: int, activation: Tails | nn.Module | None) -> Any:
        """One measurement, in the group of those that can lie side by side."""
        key = (id(x), dimension, activation)
        member = _member(place, x, dimension)
        joins = x.device.type in self._grouped and x.ndim > 1 and x.numel() <= min(JOIN, self._left_to_join)
        joins = joins and not isinstance(activation, nn.Module) and (member.positions == 1 or FOLDS)
        self._left_to_join -= x.numel() if joins else 0
        group = self._wanted.setdefault((activation, member.rows, x.dtype, x.device) if joins else key, {})
        group.setdefault(key, (member, x.device))
        return key

    def _arranged(self) -> Iterator[tuple[_Group, list[_Group]]]:
        """Groups, those of moments with the counts of tensors that they hold, which come first in them."""
        alone = [group for group in self._wanted.values() if next(iter(group))[2] is not None]
        for group in self._wanted.values():
            if next(iter(group))[2] is None:
                front: _Group = {}
                within = []
                for other in list(alone):
                    keys = [(tensor, dimension, None) for tensor, dimension, _ in other]
                    if len(group) > 1 and all(key in group and key not in front for key in keys):
                        front |= {key: group[key] for key in keys}
                        within.append(other)
                        alone.remove(other)
                yield front | group, within
        yield from ((group, []) for group in alone)

    def _plan(self, group: _Group, within: Sequence[_Group], *, inside: bool = False) -> _Job:
        """Make a job of a group, and note where the numbers of each measurement lie in its results."""
        (_, _, activation), (_, device) = next(iter(group.items()))
        row = tuple(one for one, _ in group.values())
        found = tails(activation) if isinstance(activation, nn.Module) else activation
        names = ("mean", "variance") if found is None else count_names(found)
        fold = None
        if (inside or len(row) > 1) and any(one.positions > 1 for one in row):
            fold = _Fold.over(row, len(names), device)
        self._note(group, names, apart=found is None and fold is None)
        if found is None and fold is not None:
            self._folds[self._results - 1] = fold
        inner, column = [], 0
        for other in within:
            stop = column + sum(one.units * one.positions for one, _ in other.values())
            inner.append((column, stop, self._plan(other, (), inside=True)))
            column = stop
        return _Job(row, activation, fold, self._rooms, inner)

    def _note(self, group: _Group, names: Sequence[str], *, apart: bool) -> None:
        """Results are one for each name, or one with a row for each name."""
        width, start = sum(one.units for one, _ in group.values()), 0
        for key, (one, _) in group.items():
            spans = [(which, 0) if apart else (0, which * width) for which in range(len(names))]
            self._place[key] = tuple(
                (name, (self._results + which, row + start, row + start + one.units))
                for name, (which, row) in zip(names, spans, strict=True)
            )
            start += one.units
        self._results += len(names) if apart else 1

    def _tell(self, sight: Sight, asked: Sequence[tuple[str, Any]]) -> Told:
        places = {f"{prefix}{name}": place for prefix, key in asked for name, place in self._place[key]}
        samples = sight.y.numel() // sight.y.shape[unit_dimension(sight.layer, sight.y, sight.before)]
        weights, notes = facts(sight.layer)
        return Told(sight.name, sight.layer.kind, sight.layer.role, samples, weights, notes, places)


def flat(sights: Sequence[Sight]) -> list[Tensor | None]:
    """Each call's input and output, one call after the other."""
    return [tensor for one in sights for tensor in (one.x, one.y)]


def form(sights: Sequence[Sight]) -> Any:
    """What calls must have in common with others for one layout to serve both."""
    known: dict[int, int] = {}
    parts: list[Any] = []
    for one in sights:
        x, y, module = one.x, one.y, one.layer.module
        weight = module._parameters.get("weight")
        parts += (
            *(one.name, module.training, None if weight is None else weight.requires_grad),
            *(y.shape, y.dtype, y.device, *((None, None) if x is None else (x.shape, x.dtype))),
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
