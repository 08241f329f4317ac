"""Train convolutional networks on images: one loop over epochs that reads from top to bottom.

A step is a batch of augmented images, gathered on the device or streamed to it, and one `Update` by it. On CUDA its
forward and backward passes are compiled and the whole step is recorded as one graph and replayed, so that the host
launches one thing a step; several runs may share a GPU, each on a stream of its own. On a CPU the same step runs as it
is written.

All that a run is (weights, momentum, average, counters) goes into its checkpoint, and random numbers are functions of
seed and step, so that a killed run continues; on a CPU with the same bits. A step whose loss or gradient is not finite
changes nothing, and neither does any after it: the run is marked diverged, with the step and the layer. Only in float16
may a gradient overflow, at the price of one step and half the scale of the loss.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from zeromean.lab.activation import parse
from zeromean.lab.altered import Altered
from zeromean.lab.chance import Chance
from zeromean.lab.data.augment import Source, whole_batches
from zeromean.lab.images import AnyMaterial
from zeromean.lab.nets import NETWORKS, ConvolutionalNetwork
from zeromean.lab.observe import AT_ONCE, UNKNOWN, Judgement, blame, finite, judge, mean_activations, mean_size
from zeromean.lab.pauses import OnEpoch, Pauses
from zeromean.lab.recipes.images import ImageRecipe, Phase
from zeromean.lab.recording import arithmetic, half_of, record
from zeromean.lab.sharing import ALONE, Share
from zeromean.lab.store import DamagedFileError, Run, Study
from zeromean.lab.update import Update, loss_of


def train(
    recipe: ImageRecipe,
    runs: Sequence[Run],
    material: AnyMaterial,
    study: Study,
    *,
    device: torch.device,
    share: Share = ALONE,
    together: int = 1,
    on_epoch: OnEpoch = lambda epoch, runs: None,
    checkpoint_seconds: float = 60.0,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train every run that has no result yet, and leave its files in the study's folder.

    Args:
        recipe: network, data and schedule.
        runs: of one stage.
        material: the images to train on and to judge by.
        study: where results and checkpoints lie; read by every process, written by the first alone.
        device: where to train.
        share: this process's part of every batch.
        together: runs that share the device at a time, by turns; on CUDA their steps overlap.
        on_epoch: called with the epochs done and the runs in training, at the start and after each epoch, and every
            ten seconds within one, with a fraction.
        checkpoint_seconds: time between checkpoints; a killed training loses at most as much. It is longer where
            writing would take more than a fiftieth of it; 0 writes them after every epoch, and only then.
        stop: asked before each group of runs, after every epoch and every step, of several processes after every
            50th; it must tell all processes the same. True writes a checkpoint and ends the training with `Stopped`.

    Raises:
        DamagedFileError: a result or a checkpoint cannot be read.
        Stopped: as asked.
        ValueError: several runs together in several processes, or the recipe does not fit the processes.
    """
    if together > 1 and share.processes > 1:
        raise ValueError(
            f"together must be 1 where {share.processes} processes train one network, got {together}: the exchanges "
            "of runs that overlap could wait for each other"
        )
    pending = study.pending(runs)
    with arithmetic(recipe.precision, device):
        for first in range(0, len(pending), together):
            if stop():
                raise Stopped
            trainings = (Training(recipe, run, material, device, share) for run in pending[first : first + together])
            _train_group(trainings, study, on_epoch, checkpoint_seconds, stop)


class Stopped(Exception):  # noqa: N818
    """The training was asked to stop, and wrote its checkpoint."""


def _train_group(
    group: Iterable[Training],
    study: Study,
    on_epoch: OnEpoch,
    checkpoint_seconds: float,
    stop: Callable[[], bool],
) -> None:
    """An epoch of each training that is furthest behind, until all are done."""
    trainings = list(group)
    for training in trainings:
        _resume(training, study)
        if training.done and training.share.writes:
            _finish(training, study, study.metrics(training.run)[-1])
    pauses = Pauses(checkpoint_seconds, stop, on_epoch)
    on_epoch(min(training.epochs_done for training in trainings), len(trainings))
    while running := [training for training in trainings if not training.done]:
        behind = min(training.epoch for training in running)
        turn = [training for training in running if training.epoch == behind]
        rows = _epoch(turn, functools.partial(pauses.due, turn))
        whole = any(row is not None for row in rows)
        if whole:
            pauses.ask()
        with pauses.writing() as due:
            for training, row in zip(turn, rows, strict=True):
                if training.share.writes:
                    _write(training, study, row, checkpoint=due)
        if whole:
            on_epoch(behind + 1, len(turn))
        if pauses.stopping and any(not training.done for training in trainings):
            raise Stopped


def _resume(training: Training, study: Study) -> None:
    checkpoint = study.read_checkpoint(training.run)
    if checkpoint is not None:
        try:
            training.load(*checkpoint)
        except (ValueError, KeyError, TypeError) as error:
            file = study.path / training.run.folder / "checkpoint.safetensors"
            raise DamagedFileError(f"{file} does not fit ({error}): delete it, and the run starts again") from error
    if not training.share.writes:
        return
    study.sweep(training.run)
    if checkpoint is None:
        study.begin(training.run)
    else:
        study.trim_metrics(training.run, training.epoch)


def take_epoch(trainings: Sequence[Training], started: float, pause: Callable[[], bool] = lambda: False) -> float:
    """Train each to the end of its epoch; their steps are queued in turns, so that none waits for another's host.

    Args:
        trainings: of one device.
        started: a reading of `time.perf_counter`.
        pause: asked before each round of steps; True leaves the rest of the epoch to the next call.

    Returns:
        The seconds since ``started``, those of compiling and recording left out.
    """
    recording = sum(training.spent.recording for training in trainings)
    for training in trainings:
        training.begin_epoch()
    while any(training.steps_left for training in trainings) and not pause():
        for training in trainings:
            if training.steps_left:
                training.advance()
    for training in trainings:
        if training.steps_left:
            training.wait()
        else:
            training.finish_epoch()
    recording = sum(training.spent.recording for training in trainings) - recording
    return time.perf_counter() - started - recording


def _epoch(trainings: Sequence[Training], pause: Callable[[], bool]) -> list[dict[str, Any] | None]:
    """Train each to the end of its epoch, and find out what it came to; None if it paused before."""
    started = time.perf_counter()
    stepping = take_epoch(trainings, started, pause) / len(trainings)
    rows = [None if training.steps_left else training.watch() for training in trainings]
    cost = (time.perf_counter() - started) / len(trainings)
    spent = [training.spend(cost, stepping, len(trainings)) for training in trainings]
    return [row and row | own for row, own in zip(rows, spent, strict=True)]


def _write(training: Training, study: Study, row: dict[str, Any] | None, *, checkpoint: bool) -> None:
    if row is not None:
        study.append_metrics(training.run, row)
    if checkpoint or (training.done and training.diverged is None):
        study.write_checkpoint(training.run, *training.state())
    if training.done and row is not None:
        _finish(training, study, row)


def _finish(training: Training, study: Study, row: dict[str, Any]) -> None:
    """Judge a training that is over, with the row of its last epoch; what stops that leaves its checkpoint."""
    outcome = training.outcome(row)
    study.finish(training.run, outcome, training.weights() if outcome["status"] == "ok" else None)
    study.drop_checkpoint(training.run)


@dataclass
class Spent:
    """The wall time of a run.

    Attributes:
        seconds: what the run cost: the time of its epochs, evaluation, compilation and recording included, divided by
            the runs that shared the device, and that of its test. Those of all runs add up to the time that all took.
        stepping: the part of it in which steps were taken.
        recording: in which steps were compiled and recorded, not divided.
        together: the most runs that shared the device.
    """

    seconds: float = 0.0
    stepping: float = 0.0
    recording: float = 0.0
    together: int = 1


class Training:
    """One run: its network, its updates and its place in the schedule.

    Args:
        recipe: network, data and schedule.
        run: gives activation, norm and seed.
        material: the images.
        device: where to train.
        share: this process's part of every batch.

    Attributes:
        network: in training mode between the calls.
        epoch: epochs done.
        steps_done: of all.
        steps_left: of the epoch that was begun.
        diverged: the epoch, the step and the layer, once a step was not finite.
        spent: time.

    Raises:
        ValueError: the batch cannot be divided as the recipe and the processes ask.
    """

    def __init__(
        self, recipe: ImageRecipe, run: Run, material: AnyMaterial, device: torch.device, share: Share = ALONE
    ) -> None:
        self.recipe, self.run, self.material, self.share = recipe, run, material, share
        self.network = build(recipe, run, material.classes).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        half = half_of(recipe.precision) if device.type == "cuda" else None
        self.dtype = half or torch.float32
        self._batches: Source = material.source(recipe, seed=run.seed, dtype=self.dtype, share=share)
        if recipe.cutout or recipe.mixup:
            self._batches = Altered(self._batches, recipe, material.classes, seed=run.seed, share=share, device=device)
        self._update = Update(recipe, self.network, self._batches, seed=run.seed, share=share, dtype=self.dtype)
        self._chance = Chance(device, run.seed, share.rank)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._step: Callable[[], None] = self._update.take
        self._phase: Phase | None = None
        self.epoch, self.steps_done, self.steps_left, self.spent = 0, 0, 0, Spent()
        self._unpaid, self._drawn = 0, -1
        self.diverged: dict[str, Any] | None = None

    @property
    def epochs(self) -> int:
        """Of the whole training; the last one may be cut short."""
        return -(-self.recipe.steps // self._batches.steps)

    @property
    def done(self) -> bool:
        """Whether all steps were taken, or one was not finite."""
        return self.epoch == self.epochs or self.diverged is not None

    @property
    def epochs_done(self) -> float:
        """With the part of the one that was begun."""
        before = self.epoch * self._batches.steps
        return self.epoch + max(0, self.steps_done - before) / max(1, self._steps_after(before))

    @property
    def overflows(self) -> int:
        """Steps that changed nothing as their gradient overflowed in float16."""
        return int(self._update.overflows)

    def begin_epoch(self) -> None:
        """Draw the order and the crops of the next epoch, or of the one that was left, and go on with it."""
        before = self.epoch * self._batches.steps
        taken = self.steps_done - before
        self._steps_of_epoch = self._steps_after(before)
        self.steps_left = self._steps_of_epoch - taken
        if self._drawn == self.epoch:
            return
        self._drawn = self.epoch
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with self._on_stream():
            self._batches.set_epoch(self.epoch)
            self._update.place.fill_(taken)
            if not taken:
                self._update.loss_sum.zero_()

    def _steps_after(self, before: int) -> int:
        """Steps of the epoch that begins after so many."""
        return min(self._batches.steps, self.recipe.steps - before)

    def advance(self) -> None:
        """Queue the next step."""
        with self._on_stream():
            self._batches.ready(self.steps_done % self._batches.steps)
            phase = self.recipe.phase(self.steps_done)
            if phase != self._phase:
                self._enter(phase)
            with self._chance.of_step(self.steps_done):
                self._step()
        self.steps_done += 1
        self.steps_left -= 1
        self._unpaid += 1

    def _enter(self, phase: Phase) -> None:
        """Begin a phase; on CUDA its step is another program."""
        self._phase = phase
        self.network.set_dropout(phase.dropout, everywhere=phase.everywhere)
        if self._stream is not None:
            started = time.perf_counter()
            self._step = self._update.take  # lets go of the last recording's memory
            with self._chance.of_step(self.steps_done):
                self._step = record(self._update, self._stream)
            self.spent.recording += time.perf_counter() - started

    def wait(self) -> None:
        """For the steps that are queued."""
        if self._stream is not None:
            self._stream.synchronize()

    def finish_epoch(self) -> None:
        """Wait for the steps; find out whether one was not finite."""
        self.wait()
        self.epoch += 1
        void = int(self._update.first_void)
        if void < self.recipe.steps:
            self.diverged = {"epoch": self.epoch, "step": void + 1, "layer": self._blame(void)}

    def _blame(self, step: int) -> str:
        """The layer in which a step's numbers stopped being finite; nothing was changed since."""
        update, phase = self._update, self.recipe.phase(step)
        self.network.set_dropout(phase.dropout, everywhere=phase.everywhere)
        update.place.fill_(step % self._batches.steps)
        update.number.fill_(step)
        self._batches.ready(step % self._batches.steps)

        def losses() -> Iterator[Tensor]:
            for x, labels in update.parts():
                yield loss_of(self.network, x, labels, self.dtype, self.recipe.label_smoothing)

        with self._chance.of_step(step):
            found = blame(self.network, losses)
        return self.share.first(found) or "unknown: the step is finite when it is taken again"

    def watch(self) -> dict[str, Any]:
        """What the epoch that ended leaves in ``metrics.jsonl``, without its time."""
        images, labels = self.material.probe, self.material.probe_labels
        held_out = self.material.validation_batches(self.dtype) if self.share.writes else None
        with self._update.evaluated() as network:
            train_error = judge(network, whole_batches(images, labels, AT_ONCE, dtype=self.dtype), self.dtype).error
            validation = judge(network, held_out, self.dtype).error if held_out else math.nan
            medians, spreads = mean_activations(network, images, self.dtype)
        ok = self.diverged is None
        return {
            "epoch": self.epoch,
            "train_loss": finite(float(self._update.loss_sum) / self._steps_of_epoch) if ok else None,
            "train_error": finite(train_error) if ok else None,
            "validation_error": finite(validation) if ok else None,
            "mean_activation": [finite(value) for value in medians],
            "mean_activation_spread": [finite(value) for value in spreads],
            "learning_rate": float(f"{self.recipe.rate(self.steps_done - 1):.6g}"),
            "overflows": self.overflows,
        }

    def spend(self, seconds: float, stepping: float, together: int) -> dict[str, float]:
        """Add the time of the steps since the last call, and say what ``metrics.jsonl`` tells of it."""
        self.spent.seconds += seconds
        self.spent.stepping += stepping
        self.spent.together = max(together, self.spent.together)
        rate = self.recipe.batch_size * self._unpaid / stepping
        self._unpaid = 0
        return {"images_per_second": round(rate, 1), "seconds": round(self.spent.seconds, 3)}

    def outcome(self, last: dict[str, Any]) -> dict[str, Any]:
        """What the run leaves in ``result.json``, given its last row; a run that did not diverge reads the test set.

        ``images_per_second`` is that of the device while steps were taken, all runs on it counted.
        """
        started = time.perf_counter()
        test = UNKNOWN if self.diverged else self._test()
        self.spent.seconds += time.perf_counter() - started
        ok = math.isfinite(test.loss)
        known = {
            "train_loss": last["train_loss"],
            "train_error": last["train_error"],
            "validation_error": last["validation_error"],
            "test_loss": finite(test.loss),
            "test_error": finite(test.error),
            "test_top5_error": finite(test.top5_error),
            "median_mean_activation": mean_size(last["mean_activation"]) if ok else None,
        }
        diverged = None if ok else self.diverged or self._in_evaluation()
        return {
            "status": "ok" if ok else "diverged",
            "diverged_at": diverged and diverged["epoch"],
            "diverged": diverged,
            "epochs": self.epoch,
            "overflows": last["overflows"],
            **(known if ok else dict.fromkeys(known)),
            "seconds": round(self.spent.seconds, 3),
            "seconds_recording": round(self.spent.recording, 3),
            "images_per_second": round(self.recipe.batch_size * self.steps_done / self.spent.stepping, 1),
            "together": self.spent.together,
        }

    def _test(self) -> Judgement:
        """How the network does on the images that the run is judged on."""
        with self._update.evaluated() as network:
            return judge(network, self.material.test_batches(self.dtype), self.dtype)

    def _in_evaluation(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "step": self.steps_done, "layer": "output in evaluation mode"}

    def weights(self) -> dict[str, Tensor]:
        """The state of the network as it is evaluated."""
        with self._update.evaluated() as network:
            return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the rest of the training depends on, between any two steps."""
        return self._update.tensors(), {"epoch": self.epoch, "steps": self.steps_done, "spent": asdict(self.spent)}

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from such a state.

        Raises:
            ValueError: it is of another network or recipe.
        """
        self._update.load(tensors)
        self._drawn = -1
        self.epoch, self.steps_done, self.spent = state["epoch"], state["steps"], Spent(**state["spent"])

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def build(recipe: ImageRecipe, run: Run, classes: int) -> ConvolutionalNetwork:
    """The network of a run, freshly initialised."""
    padding = {} if recipe.network == "elu15" else {"padding": recipe.padding}
    network = NETWORKS[recipe.network](
        classes, parse(run.activation), run.norm, seed=run.seed, initialization=recipe.initialization, **padding
    )
    if recipe.drop_before_pooling:
        network.set_dropout([max(rates) for rates in zip(*(phase.dropout for phase in recipe.phases), strict=True)])
        network.drop_before_pooling()
    return network
