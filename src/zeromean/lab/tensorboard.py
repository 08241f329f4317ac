"""Event files for TensorBoard, made from the rows of ``metrics.jsonl`` while runs train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zeromean.lab.store import Run

SCALARS = ("train_loss", "train_error", "validation_error", "learning_rate", "images_per_second")
LAYERS = ("mean_activation", "mean_activation_spread")


def summary_writer() -> Callable[..., Any]:
    """What makes a writer of event files.

    Raises:
        ValueError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"--tensorboard needs the package tensorboard ({error}): pip install 'zeromean[tensorboard]'"
        ) from error
    return SummaryWriter


class Board:
    """The event files of a study: ``<study>/tensorboard/<arm>/seed-000``, the epoch as the step.

    A run that continues is written anew from its first epoch, and TensorBoard hides what was there before.

    Args:
        folder: of the study.

    Raises:
        ValueError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._new = folder / "tensorboard", summary_writer()
        self._writers: dict[str, Any] = {}
        self._written: dict[str, int] = {}

    def show(self, run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add those of the run's rows that are new."""
        if run.folder not in self._writers:
            self._writers[run.folder] = self._new(log_dir=str(self._folder / run.folder), purge_step=0)
        writer = self._writers[run.folder]
        for row in rows[self._written.get(run.folder, 0) :]:
            for name, value in _scalars(row).items():
                writer.add_scalar(name, value, row["epoch"])
        self._written[run.folder] = len(rows)
        writer.flush()

    def close(self) -> None:
        """Close all files."""
        for writer in self._writers.values():
            writer.close()


def _scalars(row: Mapping[str, Any]) -> dict[str, float]:
    found = {name: row.get(name) for name in SCALARS}
    found |= {f"{name}/layer-{place:02d}": value for name in LAYERS for place, value in enumerate(row[name], 1)}
    return {name: value for name, value in found.items() if value is not None}
