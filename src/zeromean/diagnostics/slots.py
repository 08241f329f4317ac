"""Copies of several passes in one memory, measured at once when it is full or when somebody asks.

A small network's pass takes longer to measure than to copy: every operator that is started takes a GPU's host the same
time whether it reads one pass or sixteen, and a CPU is slow at first whenever it turns to an operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MOST, FEWEST = 16, 8
"""How many passes may wait for each other: fewer are not worth it."""
ROOM = 2**22
"""How many numbers may wait as copies (our choice: 16 MiB in float32)."""


def passes(numbers: int) -> int:
    """How many passes of so many numbers may wait; 0 where each is measured at once."""
    count = min(MOST, ROOM // max(1, numbers))
    return count if count >= FEWEST else 0


class Kept:
    """What a pass is measured to, now or later.

    Args:
        found: if it is measured.
        slots: where it waits.
    """

    def __init__(self, found: Sequence[Tensor] = (), slots: Slots | None = None) -> None:
        self._found, self._slots = found, slots
        self._row: int | None = None

    @property
    def place(self) -> tuple[Sequence[Tensor], int | None]:
        """Tensors that hold the results, and in which row; None where no other pass lies beside.

        Measures what waits, if this does.
        """
        if self._slots is not None:
            self._slots.measure()
        return self._found, self._row

    def fill(self, found: Sequence[Tensor], row: int) -> None:
        """Take the results in, which lie in a row of these."""
        self._found, self._row, self._slots = found, row, None


def side_by_side(kept: Sequence[Kept]) -> list[Tensor]:
    """Each result of passes that are alike ``[P, numbers]``; rows of one memory are taken in one piece."""
    pieces: list[tuple[Sequence[Tensor], int, int]] = []
    for one in kept:
        found, row = one.place
        if row is None:
            pieces.append((found, 0, 0))
        elif pieces and pieces[-1][0] is found and pieces[-1][2] == row:
            pieces[-1] = (found, pieces[-1][1], row + 1)
        else:
            pieces.append((found, row, row + 1))
    parts = [[rows[start:stop] for rows in found] if stop else found for found, start, stop in pieces]
    return [beside(of_passes, len(kept)) for of_passes in zip(*parts, strict=True)]


def beside(parts: Sequence[Tensor], count: int) -> Tensor:
    """Numbers of so many passes ``[P, numbers]``, in the order of memory."""
    dimensions = {one.ndim for one in parts}
    if dimensions == {0}:
        return torch.stack(tuple(parts))[:, None]
    if len(dimensions) > 1:  # passes that lie beside others, and passes that do not
        parts = [one.flatten() for one in parts]
    return (parts[0] if len(parts) == 1 else torch.cat(tuple(parts))).reshape(count, -1)


class Slots:
    """Takes turns in a memory for so many passes.

    Args:
        count: of passes.
        measure: the first so many of them, to tensors with a row a pass.
    """

    def __init__(self, count: int, measure: Callable[[int], Sequence[Tensor]]) -> None:
        self._count = count
        self._measure = measure
        self._kept: list[Kept] = []

    def next(self) -> int:
        """The place that the next pass is copied to."""
        if len(self._kept) == self._count:
            self.measure()
        return len(self._kept)

    def keep(self) -> Kept:
        """What the pass that was just copied will be measured to."""
        one = Kept(slots=self)
        self._kept.append(one)
        return one

    def measure(self) -> None:
        """Measure all that wait."""
        kept, self._kept = self._kept, []
        if kept:
            with torch.no_grad():
                found = self._measure(len(kept))
            for row, one in enumerate(kept):
                one.fill(found, row)
