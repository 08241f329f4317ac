"""When trainings interrupt their steps: to write checkpoints, to tell of themselves, or to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zeromean.lab.train import Training

OnEpoch = Callable[[float, int], None]
# Of the time, at most, for checkpoints.
_WRITING = 0.02
# Within an epoch, a sign of life.
_QUIET_SECONDS = 10.0
# Processes that train one network agree whether to stop once in so many steps, as they wait for each other there.
_AGREED_STEPS = 50


class Pauses:
    """Those of a group of trainings that share a device.

    Args:
        seconds: between checkpoints; 0 writes them at the end of each epoch.
        stop: whether to stop; all processes ask at the same steps.
        tell: of epochs done and runs in training.

    Attributes:
        stopping: whether to stop was answered with yes.
    """

    def __init__(self, seconds: float, stop: Callable[[], bool], tell: OnEpoch) -> None:
        self._seconds = self._pause = seconds
        self._stop, self._tell = stop, tell
        self._written = self._told = time.monotonic()
        self._asked = -1
        self.stopping = False

    def ask(self) -> None:
        """Ask whether to stop, unless the answer was yes before."""
        self.stopping = self.stopping or self._stop()

    def due(self, turn: Sequence[Training]) -> bool:
        """Whether the trainings, before their next step, are to pause."""
        first, now = turn[0], time.monotonic()
        several = first.share.processes > 1
        if first.steps_done != self._asked and first.steps_done % (_AGREED_STEPS if several else 1) == 0:
            self._asked = first.steps_done
            if several:
                first.wait()  # while they ask each other, the processes exchange nothing else
            self.ask()
        if now - self._told > _QUIET_SECONDS:
            self._told = now
            self._tell(min(training.epochs_done for training in turn), len(turn))
        return self.stopping or (first.share.writes and 0 < self._pause < now - self._written)

    @contextmanager
    def writing(self) -> Iterator[bool]:
        """Within, what is due is written; gives whether checkpoints are."""
        began = time.monotonic()
        due = self.stopping or began - self._written > self._pause
        yield due
        if due:
            self._written = self._told = time.monotonic()
            self._pause = self._seconds and max(self._seconds, (self._written - began) / _WRITING)
