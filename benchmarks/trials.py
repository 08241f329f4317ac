"""Trials of recipes on a validation split: several runs a GPU, a process for each GPU, until a time is over.

A trial is a recipe, an activation and a seed. It is judged after its last step on training images that were held out;
the test set is never read. ``results.jsonl`` gets a row a finished trial, with every setting of its recipe, so that a
trial with a row is not repeated. One that the time cut off continues from its checkpoint below ``unfinished``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from zeromean.lab import data
from zeromean.lab.images import AnyMaterial, material
from zeromean.lab.recipes.images import ImageRecipe
from zeromean.lab.recording import arithmetic
from zeromean.lab.spread import first_gpus
from zeromean.lab.store import Run, Study
from zeromean.lab.train import Training, take_epoch

VALIDATION = 5000
# Of the time: what is begun later would hardly get beyond its compilation.
_BEGINNING = 0.9
Row = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        variant: its name in tables.
        recipe: with images held out for validation.
        activation: its text.
        seed: of weights, order and noise.
    """

    variant: str
    recipe: ImageRecipe
    activation: str
    seed: int

    def settings(self) -> Row:
        """All that its error depends on, as json gives it back."""
        told = {key: value for key, value in asdict(self.recipe).items() if key not in ("title", "source")}
        return dict(json.loads(json.dumps({"activation": self.activation, "seed": self.seed, "recipe": told})))

    def run(self) -> Run:
        """What trains it, with a folder of its own."""
        name = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:16]
        return Run(name, self.activation, self.recipe.learning_rates[0], self.seed)


@dataclass(frozen=True)
class Work:
    """What the processes share.

    Attributes:
        trials: without a row, in the order in which they begin.
        dataset: of all of them.
        out: gets rows and checkpoints.
        devices: a process for each.
        together: trials that share a device.
        begins_until: no trial begins after it; seconds since the epoch, as is ``ends``.
        ends: the epoch in which it lies is the last.
    """

    trials: tuple[Trial, ...]
    dataset: data.Dataset
    out: Path
    devices: tuple[torch.device, ...]
    together: int
    begins_until: float
    ends: float


class Results:
    """The rows of finished trials.

    Args:
        out: the folder; it need not exist yet.
    """

    def __init__(self, out: Path) -> None:
        self.file = out / "results.jsonl"
        out.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[Row]:
        """All of them, oldest first."""
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    def of(self, trials: Sequence[Trial]) -> list[Row | None]:
        """The row of each, or None."""
        known = {json.dumps(row["settings"], sort_keys=True): row for row in self.rows()}
        return [known.get(json.dumps(trial.settings(), sort_keys=True)) for trial in trials]

    def add(self, row: Row) -> None:
        """Append a row."""
        with self.file.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def run(trials: Sequence[Trial], dataset: data.Dataset, options: argparse.Namespace, ends: float) -> list[Row | None]:
    """Train the trials that have no row, and return the rows of all; None where the time was over.

    Args:
        trials: likely the same ones in each session.
        dataset: of all of them.
        options: of `parser`.
        ends: seconds since the epoch.
    """
    results = Results(options.out)
    left = tuple(trial for trial, row in zip(trials, results.of(trials), strict=True) if row is None)
    devices = first_gpus(options.gpus) if options.gpus else (torch.device("cpu"),)
    begins_until = ends - (1 - _BEGINNING) * options.seconds
    together = options.together or (trials[0].recipe.together if options.gpus else 1)
    work = Work(left, dataset, options.out, devices, together, begins_until, ends)
    context = multiprocessing.get_context("spawn")
    next_trial = context.Value("i", 0)
    if len(devices) == 1:
        _train(0, work, next_trial)
    else:
        processes = [context.Process(target=_train, args=(i, work, next_trial)) for i in range(len(devices))]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"the processes ended with {[process.exitcode for process in processes]}: see above")
    return results.of(trials)


def _train(place: int, work: Work, next_trial: Any) -> None:
    """Train on one device: whenever a trial ends, the next one takes its place."""
    device = work.devices[place]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    images: dict[str, AnyMaterial] = {}
    active: list[tuple[Trial, Training]] = []
    beginning = _beginning(work, next_trial)
    with arithmetic("tf32", device):  # as any recipe that is not in float32 asks for
        while True:
            while len(active) < work.together and (trial := next(beginning, None)) is not None:
                active.append((trial, _begin(trial, work, device, images)))
            if not active:
                return
            _epoch([training for _, training in active])
            for trial, training in active:
                if training.done:
                    with next_trial.get_lock():
                        Results(work.out).add(_row(trial, training))
                    Study(work.out / "unfinished").drop_checkpoint(trial.run())
            active = [(trial, training) for trial, training in active if not training.done]
            if time.time() > work.ends:
                for trial, training in active:
                    Study(work.out / "unfinished").write_checkpoint(trial.run(), *training.state())
                return


def _beginning(work: Work, next_trial: Any) -> Iterator[Trial]:
    """The trials that this process begins, while there is time."""
    while time.time() < work.begins_until:
        with next_trial.get_lock():
            index, next_trial.value = next_trial.value, next_trial.value + 1
        if index >= len(work.trials):
            return
        yield work.trials[index]


def _begin(trial: Trial, work: Work, device: torch.device, images: dict[str, AnyMaterial]) -> Training:
    how = trial.recipe.normalization
    if how not in images:
        images[how] = material(trial.recipe, work.dataset, device)
    training = Training(trial.recipe, trial.run(), images[how], device)
    checkpoint = Study(work.out / "unfinished").read_checkpoint(trial.run())
    if checkpoint is not None:
        training.load(*checkpoint)
    return training


def _epoch(trainings: Sequence[Training]) -> None:
    """Train each for an epoch; what it cost is told when the trial ends."""
    started = time.perf_counter()
    stepping = take_epoch(trainings, started)
    cost = time.perf_counter() - started
    for training in trainings:
        training.spend(cost / len(trainings), stepping / len(trainings), len(trainings))


def _row(trial: Trial, training: Training) -> Row:
    """What a trial leaves; errors in percent, None if it diverged, and seconds without evaluation."""
    seen, spent = training.watch(), training.spent
    ok = training.diverged is None and seen["validation_error"] is not None
    row = {
        "recipe": trial.recipe.name,
        "variant": trial.variant,
        "activation": trial.activation,
        "seed": trial.seed,
        "status": "ok" if ok else "diverged",
        "validation_error": seen["validation_error"],
        "train_error": seen["train_error"],
        "train_loss": seen["train_loss"],
        "steps": training.steps_done,
        "seconds": round(spent.seconds, 1),
        "seconds_recording": round(spent.recording, 1),
        "images_per_second": round(trial.recipe.batch_size * training.steps_done / spent.stepping),
        "together": spent.together,
        "settings": trial.settings(),
    }
    print(f"{trial.variant}, {trial.activation}, seed {trial.seed}: {told(row)}", flush=True)
    return row


def told(row: Row) -> str:
    """A finished trial in a line."""
    if row["status"] != "ok":
        return f"diverged after {row['steps']} steps"
    return f"validation error {row['validation_error']:.2f} %, training {row['train_error']:.1f} %, {row['seconds']} s"


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all trials share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("recipe")
    made.add_argument("overrides", nargs="*", help="field=value, as for zeromean compare, of every trial")
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--seconds", type=float, default=500.0, help="after which the epoch in training is the last one")
    made.add_argument("--gpus", type=int, default=0, help="0 trains on the CPU")
    made.add_argument("--together", type=int, help="trials that share a GPU; by default the recipe's number")
    made.add_argument("--validation", type=int, default=VALIDATION, help="training images held out")
    return made
