"""The run directory: what a study leaves on disk, and the only place that reads or writes it.

::

    <study>/plan.json                        what was decided before anything ran
    <study>/<arm>/seed-000/config.json       one run: arm, activation, learning rate, seed
    <study>/<arm>/seed-000/metrics.jsonl     one line an epoch
    <study>/<arm>/seed-000/model.safetensors the trained weights
    <study>/<arm>/seed-000/result.json       the outcome; a run is done when this file is there
    <study>/<arm>/seed-000/probe.json        what a probe finds in the trained network, of one run of an arm
    <study>/tuning/<arm>/lr-0.01/seed-000/   the same files (no model) for the runs of ``--tune``
    <study>/checkpoint-<stage>.safetensors   where a killed stage continues; gone when the stage is done
    <study>/<arm>/seed-000/checkpoint.safetensors      the same of a run that is trained alone

``summary.csv``, ``summary.md`` and ``report.html`` derive from these alone. Every file that must be whole is written
beside its place, flushed to the disk and then renamed; ``result.json`` and ``probe.json`` carry a checksum of their own
content, and a probe that of the result whose network it is of.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

FORMAT = 1
_PLANNED = {"recipe", "arms", "comparisons", "seeds", "tune", "data", "budget", "device", "versions"}
_REPEAT = "run the study again to repeat the run"
_MEASURE = "run the study again to measure anew, or delete the file"
Stage = Literal["tuning", "final"]
Status = Literal["ok", "diverged", "failed"]
Checkpoint = tuple[dict[str, Tensor], dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """One training run of a study.

    Attributes:
        arm: name of the arm, also its folder.
        activation: the activation's text, such as ``leaky_relu:0.1``.
        learning_rate: of SGD.
        seed: fixes initial weights, order of the samples and noise; shared by all arms.
        stage: ``tuning`` runs are judged on validation data, ``final`` ones on the test set.
        norm: the normalization layers, ``none`` or ``batch``.
    """

    arm: str
    activation: str
    learning_rate: float
    seed: int
    stage: Stage = "final"
    norm: str = "none"

    @property
    def folder(self) -> str:
        """Where the run lies, relative to its study."""
        if self.stage == "tuning":
            return f"tuning/{self.arm}/lr-{self.learning_rate:g}/seed-{self.seed:03d}"
        return f"{self.arm}/seed-{self.seed:03d}"


class DamagedFileError(ValueError):
    """A file of the study cannot be trusted; the message names the file, what is wrong and the remedy."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees either the old one or the whole new one, whatever kills us."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _write(beside, content, os.O_TRUNC, flush=True)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _write(path: Path, content: bytes, how: int, *, flush: bool = False) -> None:
    """Write a file anew (``os.O_TRUNC``) or at its end (``os.O_APPEND``).

    By its descriptor: where Ctrl-C comes just after the opening, a file object would warn that nobody closed it.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | how | getattr(os, "O_BINARY", 0), 0o666)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        if flush:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _checksum(result: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


class Study:
    """A study's folder.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def plan(self) -> dict[str, Any] | None:
        """The plan, or None where no study has begun.

        Raises:
            DamagedFileError: the plan is there and cannot be read.
        """
        file = self.path / "plan.json"
        if not file.exists():
            return None
        try:
            plan = json.loads(file.read_text())
            if plan["format"] != FORMAT:
                raise DamagedFileError(
                    f"{file} has format {plan['format']}, this version reads {FORMAT}: use another folder"
                )
            if missing := sorted(_PLANNED - plan.keys()):
                raise DamagedFileError(f"{file} lacks {', '.join(missing)}: restore it, or start in another folder")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DamagedFileError):
                raise
            raise DamagedFileError(f"{file} is damaged ({error}): restore it, or start in another folder") from error
        return dict(plan)

    def write_plan(self, plan: dict[str, Any]) -> None:
        """Write the plan; it is never changed afterwards."""
        write_whole(self.path / "plan.json", _json({"format": FORMAT, **plan}))

    def begin(self, run: Run) -> None:
        """Make the run's folder with its configuration and no metrics."""
        folder = self.path / run.folder
        write_whole(folder / "config.json", _json(asdict(run)))
        (folder / "metrics.jsonl").write_bytes(b"")

    def sweep(self, run: Run) -> None:
        """Remove the files that a kill left half written in the run's folder."""
        for part in (self.path / run.folder).glob(".*.part"):
            part.unlink(missing_ok=True)

    def append_metrics(self, run: Run, row: dict[str, Any]) -> None:
        """Add an epoch's row."""
        line = json.dumps(row, allow_nan=False) + "\n"
        _write(self.path / run.folder / "metrics.jsonl", line.encode(), os.O_APPEND)

    def trim_metrics(self, run: Run, epochs: int) -> None:
        """Drop the rows of epochs that the checkpoint does not hold, and a line cut short by a kill."""
        rows = self._rows(run, epochs)
        write_whole(self.path / run.folder / "metrics.jsonl", "".join(line + "\n" for line in rows).encode())

    def check_metrics(self, run: Run, epochs: int) -> None:
        """Whether the first so many epochs are there, which a checkpoint holds.

        Raises:
            DamagedFileError: they are not, as after a loss of power.
        """
        self._rows(run, epochs)

    def _rows(self, run: Run, epochs: int) -> list[str]:
        """The lines of the first so many epochs."""
        file = self.path / run.folder / "metrics.jsonl"
        lines = file.read_bytes().split(b"\n")[:epochs] if file.exists() else []
        try:
            found = [json.loads(line.decode())["epoch"] for line in lines]
        except (ValueError, KeyError, TypeError):
            found = []
        if found != list(range(1, epochs + 1)):
            raise DamagedFileError(
                f"{file} does not hold the {epochs} epochs of the checkpoint: delete the checkpoint, and what it is "
                "of starts again"
            )
        return [line.decode() for line in lines]

    def metrics(self, run: Run) -> list[dict[str, Any]]:
        """The rows so far, oldest first; none where the run has not begun."""
        file = self.path / run.folder / "metrics.jsonl"
        if not file.exists():
            return []
        try:
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            if [row["epoch"] for row in rows] != list(range(1, len(rows) + 1)):
                raise ValueError("its epochs are not 1, 2, 3, ...")
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedFileError(f"{file} is damaged ({error!r}): {_REPEAT}") from error
        return rows

    def latest(self, run: Run) -> dict[str, Any] | None:
        """The last row so far, without reading the others as :meth:`metrics` does."""
        file = self.path / run.folder / "metrics.jsonl"
        lines = file.read_bytes().splitlines() if file.exists() else []
        return dict(json.loads(lines[-1])) if lines else None

    def finish(self, run: Run, outcome: dict[str, Any], weights: dict[str, Tensor] | None) -> None:
        """Write the weights, then the outcome with the run that it is of, after which the run counts as done."""
        result = {**asdict(run), **outcome}
        folder = self.path / run.folder
        if weights is not None:
            write_whole(folder / "model.safetensors", _serialize(weights, {}))
        write_whole(folder / "result.json", _json({**result, "checksum": _checksum(result)}))

    def result(self, run: Run) -> dict[str, Any] | None:
        """The run's result, or None where it is not done.

        Raises:
            DamagedFileError: the file is there and is not what was written.
        """
        file = self.path / run.folder / "result.json"
        result = _sealed(file, _REPEAT)
        if result is None:
            return None
        for key, value in asdict(run).items():
            if result.get(key) != value and value == value:  # an unknown learning rate is nan
                raise DamagedFileError(
                    f"{file} is of another run ({key} {result.get(key)!r}, not {value!r}): {_REPEAT}"
                )
        return result

    def weights(self, run: Run) -> dict[str, Tensor]:
        """The trained weights of a run that ended well.

        Raises:
            DamagedFileError: they are missing or cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        file = self.path / run.folder / "model.safetensors"
        try:
            return load(file.read_bytes())
        except (FileNotFoundError, SafetensorError) as error:
            raise DamagedFileError(
                f"{file} is missing or damaged ({error}): delete its result.json and {_REPEAT}"
            ) from error

    def write_probe(self, run: Run, content: dict[str, Any]) -> None:
        """Write what a probe found in the run's trained network, bound to the run's result."""
        bound = {**content, "result": _checksum(self.result(run) or {})}
        write_whole(self.path / run.folder / "probe.json", _json({**bound, "checksum": _checksum(bound)}))

    def probe(self, run: Run) -> dict[str, Any] | None:
        """What a probe found in the run's trained network, or None where none was made.

        Raises:
            DamagedFileError: the file is there and is not what was written, or is of another result.
        """
        file = self.path / run.folder / "probe.json"
        content = _sealed(file, _MEASURE)
        if content is not None and content.get("result") != _checksum(self.result(run) or {}):
            raise DamagedFileError(f"{file} is of another network than the result beside it: {_MEASURE}")
        return content

    def finished(self, run: Run) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """The run's result and the metrics of all its epochs, or None where it is not done.

        Raises:
            DamagedFileError: one of them is not what was written, or they do not fit together.
        """
        result = self.result(run)
        if result is None:
            return None
        metrics = self.metrics(run)
        if len(metrics) != result.get("epochs", len(metrics)):  # a failed run need not know its epochs
            file = self.path / run.folder / "metrics.jsonl"
            raise DamagedFileError(f"{file} holds {len(metrics)} epochs, its result {result['epochs']}: {_REPEAT}")
        return result, metrics

    def set_aside(self, run: Run, name: str = "result.json") -> Path:
        """Rename a damaged file, so that what it stood for is repeated and nothing is lost."""
        file = self.path / run.folder / name
        return file.replace(file.with_name(f"{name}.damaged"))

    def _checkpoint(self, owner: Stage | Run) -> Path:
        if isinstance(owner, Run):
            return self.path / owner.folder / "checkpoint.safetensors"
        return self.path / f"checkpoint-{owner}.safetensors"

    def write_checkpoint(self, owner: Stage | Run, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Replace the checkpoint of a stage, or of a run that is trained alone, whose metrics reach the disk before."""
        if isinstance(owner, Run) and (metrics := self.path / owner.folder / "metrics.jsonl").exists():
            _write(metrics, b"", os.O_APPEND, flush=True)
        write_whole(self._checkpoint(owner), _serialize(tensors, {"state": json.dumps(state)}))

    def read_checkpoint(self, owner: Stage | Run) -> Checkpoint | None:
        """The checkpoint of a stage or a run, or None.

        Raises:
            DamagedFileError: it is there and cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        file = self._checkpoint(owner)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                return tensors, json.loads(opened.metadata()["state"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DamagedFileError(
                f"{file} is damaged ({error}): delete it; its unfinished runs start again"
            ) from error

    def drop_checkpoint(self, owner: Stage | Run) -> None:
        """Remove the checkpoint of a stage or a run, if any."""
        self._checkpoint(owner).unlink(missing_ok=True)

    def write_text(self, name: str, text: str) -> Path:
        """Write a derived file into the study's folder and return its path."""
        write_whole(self.path / name, text.encode())
        return self.path / name

    def pending(self, runs: Iterable[Run]) -> list[Run]:
        """The runs without a result; a damaged one raises, as :meth:`result` does."""
        return [run for run in runs if self.result(run) is None]


def _sealed(file: Path, remedy: str) -> dict[str, Any] | None:
    """The content of a file that ends with its own checksum, or None where there is no file."""
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text())
        found = content.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{file} is damaged ({error!r}): {remedy}") from error
    if found != _checksum(content):
        raise DamagedFileError(f"{file} is damaged (its checksum does not fit its content): {remedy}")
    return dict(content)


def _serialize(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, metadata)
