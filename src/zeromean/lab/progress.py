"""Progress bars: of a study (epochs done, how fast it trains, time left), and of natural gradients by layer."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable
from types import FrameType, TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.table import Column
from rich.text import Text

from zeromean.lab import compare
from zeromean.lab.pauses import OnEpoch
from zeromean.lab.schedule import duration
from zeromean.lab.store import Stage

_QUIET_SECONDS = 10


class _Below(Progress):
    """The bars, and below them how fast the last one advances: beside it, a narrow terminal would have no room."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.tasks:
            yield Text(self.tasks[-1].fields["rate"])


class Bar:
    """A context in which :attr:`progress` draws on the console; a line every so often where that is no terminal.

    Ctrl-C raises ``KeyboardInterrupt`` at once, and again after the epoch where a destructor has swallowed the first.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("epochs{task.fields[left]}"),
        )
        self._bar = _Below(*columns, console=console, disable=not console.is_terminal)
        self.progress = compare.Progress(say=self._say, stage=self._stage, note=self._note)
        self._noted = ""

    def __enter__(self) -> Bar:
        self._interrupted = False
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False)

    def _note(self, text: str) -> None:
        self._noted = text

    def _stage(self, stage: Stage, epochs: int) -> OnEpoch:
        task = self._bar.add_task("tuning" if stage == "tuning" else "training", total=epochs, rate="", left="")
        clock = _Clock()

        def on_epoch(epoch: float, runs: int) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            pace = clock.rate(epoch, runs)
            together = "1 run" if runs == 1 else f"{runs} runs together"
            rate = ", ".join(part for part in (together, self._noted or pace) if part)
            left = clock.left(epoch, epochs)
            self._bar.update(task, completed=epoch, rate=rate, left=left)
            if not self._console.is_terminal and clock.due(epoch, epochs):
                place = f"{epoch:.0f}" if epoch == int(epoch) else f"{epoch:.2f}"
                self._say(f"{stage}: epoch {place} of {epochs}, {rate}{left}")

        return on_epoch


class LayerBar:
    """A context in which `on_layer` shows how far the solves of all layers are; a line every so often without terminal.

    The bar is taken away at the end.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("done{task.fields[left]}"),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = TaskID(0)
        self._clock = _Clock()

    def __enter__(self) -> LayerBar:
        self._bar.start()
        self._task = self._bar.add_task("natural gradients", total=1.0, visible=False, left="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def on_layer(self, name: str, share: float) -> None:
        """Show the layer that is next, and the share of the work that is done; 0 begins anew."""
        if share == 0:
            self._clock = _Clock()
            self._bar.reset(self._task, visible=True)
        left = self._clock.left(share, 1)
        self._bar.update(self._task, completed=share, left=left, description=f"natural gradients: {name}")
        if not self._console.is_terminal and share and self._clock.due(share, 1):
            self._console.print(f"natural gradients: {share:.0%} done, {name} is next{left}", markup=False)


class _Clock:
    """When to say something, and how long it will take; of epochs, or of a share of 1."""

    def __init__(self) -> None:
        self.started = self.spoken = time.monotonic()
        self.first: float | None = None

    def rate(self, epoch: float, runs: int) -> str:
        if self.first is None:
            self.started, self.first = time.monotonic(), epoch
        done, spent = epoch - self.first, time.monotonic() - self.started
        return f"{done * runs / spent:.3g} run-epochs/s" if done and spent else ""

    def due(self, epoch: float, epochs: int) -> bool:
        now = time.monotonic()
        if now - self.spoken < _QUIET_SECONDS and epoch < epochs:
            return False
        self.spoken = now
        return True

    def left(self, epoch: float, epochs: int) -> str:
        done, spent = epoch - (self.first or 0), time.monotonic() - self.started
        if epoch >= epochs:
            return f", took {duration(spent)}"
        return f", {duration(spent / done * (epochs - epoch))} left" if done else ""
