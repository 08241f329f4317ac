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
    """What a pass is measured to, now or later."""

    def __init__(self, found: Sequence[Tensor] = (), slots: Slots | None = None) -> None:
        self._found, self._slots = found, slots

    @property
    def results(self) -> Sequence[Tensor]:
        """Measures what waits, if this does."""
        if self._slots is not None:
            self._slots.measure()
        return self._found

    def fill(self, found: Sequence[Tensor]) -> None:
        """Take the results in."""
        self._found, self._slots = found, None


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
                found = [rows.unbind() for rows in self._measure(len(kept))]
            for one, results in zip(kept, zip(*found, strict=True), strict=True):
                one.fill(results)
