"""One session of a study on images: its processes, the runs that share a device, what it tells, and how it ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from zeromean.lab.data import AnyDataset
from zeromean.lab.images import material
from zeromean.lab.pauses import OnEpoch
from zeromean.lab.plan import epochs_of
from zeromean.lab.recipes.images import ImageRecipe
from zeromean.lab.schedule import Teller
from zeromean.lab.sharing import ALONE, Share
from zeromean.lab.store import Run, Study
from zeromean.lab.tensorboard import Board
from zeromean.lab.train import Stopped, train

if TYPE_CHECKING:
    from zeromean.lab.compare import Progress

_SAME_REQUEST_SECONDS = 5.0
_QUIET_SECONDS = 10.0


@dataclass(frozen=True)
class Session:
    """How a study on images runs this time, which leaves its numbers as they are.

    Attributes:
        device: where to train.
        share: this process's part of every batch.
        together: runs that share the device; None takes the recipe's number on one GPU, else one.
        tensorboard: whether to write event files.
        devices: over which the runs are spread, a process for each; none keeps them in this one.
        workers: processes that decode the images of a folder; None takes those that the processors allow.
    """

    device: torch.device
    share: Share = ALONE
    together: int | None = None
    tensorboard: bool = False
    devices: tuple[torch.device, ...] = ()
    workers: int | None = None

    @property
    def decoding(self) -> int:
        """Processes that decode images for this one: its part of the processors, at most 16."""
        if self.workers is not None:
            return self.workers
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(16, processors // self.share.processes))

    def at_once(self, recipe: ImageRecipe) -> int:
        """Runs that share the device."""
        alone = self.device.type == "cuda" and self.share.processes == 1
        return self.together or (recipe.together if alone else 1)

    def any(self, flag: bool) -> bool:
        """Whether one of the processes says so; all of them wait for the answer."""
        if self.share.processes == 1:
            return flag
        votes = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes)


def train_images(
    recipe: ImageRecipe, runs: Sequence[Run], dataset: AnyDataset, study: Study, session: Session, progress: Progress
) -> None:
    """Train the runs, a group after the other; on SIGTERM end after the step, with a checkpoint.

    Raises:
        DamagedFileError: a result or a checkpoint cannot be read.
        Stopped: SIGTERM came to this process or to one that it trains with.
    """
    board = Board(study.path) if session.tensorboard and session.share.writes else None
    try:
        images = material(
            recipe, dataset, session.device, workers=session.decoding, share=session.share, tell=_mean(progress)
        )
        epochs, together = epochs_of(recipe, images.samples), session.at_once(recipe)
        tell = progress.stage("final", epochs * len(runs))
        with sigterm() as asked:
            for first in range(0, len(runs), together):
                group = runs[first : first + together]
                train(
                    recipe,
                    group,
                    images,
                    study,
                    device=session.device,
                    share=session.share,
                    together=len(group),
                    on_epoch=_follow(study, group, first * epochs, tell, progress.note, board)
                    if session.share.writes
                    else lambda epoch, runs: None,
                    stop=lambda: session.any(asked()),
                )
    finally:
        if board is not None:
            board.close()


def _mean(progress: Progress) -> Callable[[int, int], None]:
    """Tells now and then how far the mean of all training images is."""
    teller = Teller(progress.say, _QUIET_SECONDS)
    return lambda done, of: teller.tell(done / of, f"mean of the training images: {done:,} of {of:,} read")


def _follow(
    study: Study, group: Sequence[Run], before: int, tell: OnEpoch, note: Callable[[str], None], board: Board | None
) -> OnEpoch:
    """Tell of a group in epochs of all runs, the earlier groups' included, with the last row of each of its runs."""

    def on_epoch(epoch: float, runs: int) -> None:
        if board is not None:
            for run in group:
                board.show(run, study.metrics(run))
        note(words([row for run in group if (row := study.latest(run)) is not None]))
        tell(before + epoch * len(group), runs)

    return on_epoch


def words(rows: Sequence[dict[str, Any]]) -> str:
    """What the last rows of runs that share a device say: images a second on all of it, the mean training error.

    And how many steps changed nothing as their gradient overflowed in float16, if any.
    """
    if not rows:
        return ""
    rate = sum(row["images_per_second"] for row in rows) / len(rows)
    errors = [row["train_error"] for row in rows]
    known = [error for error in errors if error is not None]
    said = f"training error {sum(known) / len(known):.3g} %" if known else "diverged"
    lost = f", {len(errors) - len(known)} diverged" if known and len(known) < len(errors) else ""
    overflows = sum(row.get("overflows", 0) for row in rows)
    without = f", {overflows} steps overflowed" if overflows else ""
    return f"{float(f'{rate:.3g}'):,.{0 if rate >= 100 else 1}f} images/s, {said}{lost}{without}"


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Within, SIGTERM raises `Stopped`, but where `sigterm` is asked for it."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Stopped

    with _sigterm_to(handle):
        yield


@contextmanager
def sigterm() -> Iterator[Callable[[], bool]]:
    """Gives what says whether SIGTERM has come; another one ends the process at once, if it is not the same request.

    Whoever stops all processes of a job, as schedulers and service managers do, reaches those that we start or that
    torchrun started twice: by itself, and by their parent, which passes on what it was told.
    """
    came: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(time.monotonic())
        if came[-1] - came[0] > _SAME_REQUEST_SECONDS:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    with _sigterm_to(handle):
        yield lambda: bool(came)


@contextmanager
def _sigterm_to(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
