"""Trials of recipes on a validation split: several runs a GPU, a process for each GPU, until a time is over.

A trial is a recipe, an activation and a seed. It is judged after its last step on training images that were held out;
the test set is never read. ``results.jsonl`` gets a row a finished trial, with every setting of its recipe, so that a
trial with a row is not repeated. One that the time cut off continues from its checkpoint below ``unfinished``.

With ``--share STEP``, trials that agree until STEP train those steps once: the state at the last end of an epoch until
then is kept below ``stems``, and the others wait for it and continue there, on a CPU with the same bits. Their seconds
include the stem's, so that a sum over rows counts those more than once.

A row's ``course`` lists (steps, validation error, train error, train loss) at the last end of an epoch until each
twentieth of the training, end of a phase and shared step; a stem's part is that of the trial that left it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.multiprocessing as multiprocessing

from zeromean.lab import data
from zeromean.lab.images import AnyMaterial, material
from zeromean.lab.recipes.images import ImageRecipe
from zeromean.lab.recipes.recipe import unset
from zeromean.lab.recording import arithmetic
from zeromean.lab.spread import first_gpus
from zeromean.lab.store import Run, Study
from zeromean.lab.train import Training, take_epoch

VALIDATION = 5000
# Of the time: what is begun later would hardly get beyond its compilation.
_BEGINNING = 0.9
_NOT_BEGUN = -1
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
        return self._run(self.settings())

    def ends_of_epochs(self, until: Iterable[int], dataset: data.Dataset) -> set[int]:
        """The steps after the last whole epoch until each of those."""
        epoch = (len(dataset.train_labels) - self.recipe.validation) // self.recipe.batch_size
        return {step - step % epoch for step in until}

    def stems(self, share: Sequence[int], dataset: data.Dataset) -> dict[int, Run]:
        """Names its states to be shared, by their steps; trials with a name in common are the same until then."""
        ends = sorted(self.ends_of_epochs(share, dataset), reverse=True)
        return {end: self._stem(end) for end in ends if 0 < end < self.recipe.steps}

    def _stem(self, steps: int) -> Run:
        recipe = self.recipe
        shorter = replace(self, recipe=replace(cut(recipe, steps), name=""))
        # Where a stack pools may depend on whether it ever drops.
        drops = [any(rates) for rates in zip(*(phase.dropout for phase in recipe.phases), strict=True)]
        return shorter._run({**shorter.settings(), "drops": recipe.drop_before_pooling and drops})

    def _run(self, settings: Row) -> Run:
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        return Run(name, self.activation, self.recipe.learning_rates[0], self.seed)


def _key(settings: Row) -> str:
    """Settings in one spelling; fields that recipes did not have yet, when a row was written, are as they are unset."""
    return json.dumps({**settings, "recipe": {**unset(ImageRecipe), **settings["recipe"]}}, sort_keys=True)


@dataclass(frozen=True)
class Work:
    """What the processes share.

    Attributes:
        trials: without a row, in the order in which they begin unless they wait for a stem.
        stems: of each, by their steps, longest first.
        dataset: of all of them.
        out: gets rows and checkpoints.
        devices: a process for each.
        together: trials that share a device.
        begins_until: no trial begins after it; seconds since the epoch, as is ``ends``.
        ends: the epoch in which it lies is the last.
    """

    trials: tuple[Trial, ...]
    stems: tuple[Mapping[int, Run], ...]
    dataset: data.Dataset
    out: Path
    devices: tuple[torch.device, ...]
    together: int
    begins_until: float
    ends: float


class Begun(NamedTuple):
    """A trial in training, by its number in the work, and its course, which grows after the steps that are judged."""

    number: int
    training: Training
    course: list[list[Any]]
    judged: set[int]


class Results:
    """The rows of finished trials, in a folder that need not exist yet."""

    def __init__(self, out: Path) -> None:
        self.file = out / "results.jsonl"
        out.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[Row]:
        """All of them, oldest first."""
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    def of(self, trials: Sequence[Trial]) -> list[Row | None]:
        """The row of each, or None."""
        known = {_key(row["settings"]): row for row in self.rows()}
        return [known.get(_key(trial.settings())) for trial in trials]

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
    left = [trial for trial, row in zip(trials, results.of(trials), strict=True) if row is None]
    # They are on the way to stems that others wait for.
    left.sort(key=lambda trial: not _has(options.out / "unfinished", trial.run()))
    stems = tuple(trial.stems(options.share, dataset) for trial in left)
    devices = first_gpus(options.gpus) if options.gpus else (torch.device("cpu"),)
    begins_until = ends - (1 - _BEGINNING) * options.seconds
    together = options.together or (trials[0].recipe.together if options.gpus else 1)
    work = Work(tuple(left), stems, dataset, options.out, devices, together, begins_until, ends)
    context = multiprocessing.get_context("spawn")
    # The steps that each trial has done; its recipe's once nobody trains it any more.
    places = context.Array("q", [_NOT_BEGUN] * len(left))
    if len(devices) == 1:
        _train(0, work, places)
    else:
        processes = [context.Process(target=_train, args=(i, work, places)) for i in range(len(devices))]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"the processes ended with {[process.exitcode for process in processes]}: see above")
    return results.of(trials)


def ends_of_phases(recipe: ImageRecipe) -> list[int]:
    """The steps after which each phase ends."""
    return list(accumulate(phase.steps for phase in recipe.phases))


def cut(recipe: ImageRecipe, steps: int) -> ImageRecipe:
    """The first so many steps of a recipe, with dropout and rates as they are there."""
    starts = (0, *ends_of_phases(recipe)[:-1])
    left = [(phase, steps - start) for phase, start in zip(recipe.phases, starts, strict=True) if start < steps]
    phases = tuple(replace(phase, steps=min(phase.steps, of)) for phase, of in left)
    # On a straight line, a rate depends on the next pair too.
    pairs = sum(first < steps for first, _ in recipe.rates) + (recipe.curve == "linear")
    return replace(recipe, phases=phases, rates=recipe.rates[:pairs])


def mean_told(values: Iterable[float | None], digits: int) -> str:
    """The mean of those that are known, for a table; empty where none is."""
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.{digits}f}" if known else ""


def _has(folder: Path, run: Run) -> bool:
    return (folder / run.folder / "checkpoint.safetensors").exists()


def _train(place: int, work: Work, places: Any) -> None:
    """Train on one device: whenever a trial ends, the next one takes its place."""
    device = work.devices[place]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    images: dict[str, AnyMaterial] = {}
    active, own = list[Begun](), list[int]()
    try:
        with arithmetic("tf32", device):  # as any recipe that is not in float32 asks for
            while time.time() < work.ends or not own:
                while len(active) < work.together and (index := _next(work, places)) is not None:
                    own.append(index)
                    active.append(_begin(index, work, device, images))
                if active:
                    _epoch([one.training for one in active])
                    for one in active:
                        _settle(one, work, places)
                    active = [one for one in active if not one.training.done]
                elif _NOT_BEGUN in places[:] and time.time() < work.begins_until:
                    time.sleep(0.2)
                else:
                    return
        for one in active:
            _keep(work.out / "unfinished", work.trials[one.number].run(), one)
    finally:
        for index in own:
            places[index] = work.trials[index].recipe.steps


def _next(work: Work, places: Any) -> int | None:
    """Begin the first trial that no other one is training a stem for; None if there is none, or no time."""
    if time.time() >= work.begins_until:
        return None
    with places.get_lock():
        coming = {
            stem
            for stems, place in zip(work.stems, places[:], strict=True)
            for steps, stem in stems.items()
            if _NOT_BEGUN < place < steps and not _has(work.out / "stems", stem)
        }
        for index, stems in enumerate(work.stems):
            if places[index] == _NOT_BEGUN and coming.isdisjoint(stems.values()):
                places[index] = 0
                return index
    return None


def _begin(index: int, work: Work, device: torch.device, images: dict[str, AnyMaterial]) -> Begun:
    """From its own checkpoint, or else from its longest stem, or else from the start."""
    trial, recipe, stems = work.trials[index], work.trials[index].recipe, work.stems[index]
    if (how := recipe.normalization) not in images:
        images[how] = material(recipe, work.dataset, device)
    training = Training(recipe, trial.run(), images[how], device)
    ends = {recipe.steps * part // 20 for part in range(1, 20)} | {*ends_of_phases(recipe)[:-1]}
    judged = {recipe.steps, *stems, *trial.ends_of_epochs(ends, work.dataset)}
    begun = Begun(index, training, [], judged)
    for folder, run in (("unfinished", trial.run()), *(("stems", stem) for stem in stems.values())):
        if (found := Study(work.out / folder).read_checkpoint(run)) is not None:
            tensors, facts = found
            # Nothing was void. Another recipe told so by another number of steps.
            tensors["first_void"] = torch.full_like(tensors["first_void"], recipe.steps)
            training.load(tensors, facts)
            begun.course.extend(facts.get("course", ()))
            break
    return begun


def _settle(one: Begun, work: Work, places: Any) -> None:
    """Judge a trial at the end of an epoch where that is due, and keep what others or tables need."""
    trial, training, steps = work.trials[one.number], one.training, one.training.steps_done
    if training.done or steps in one.judged:
        seen = training.watch()
        one.course.append([steps, seen["validation_error"], seen["train_error"], seen["train_loss"]])
    stem = work.stems[one.number].get(steps)
    if stem is not None and training.diverged is None and not _has(work.out / "stems", stem):
        _keep(work.out / "stems", stem, one)
    if training.done:
        with places.get_lock():
            Results(work.out).add(_row(trial, one))
        Study(work.out / "unfinished").drop_checkpoint(trial.run())
    places[one.number] = trial.recipe.steps if training.done else steps


def _keep(folder: Path, run: Run, one: Begun) -> None:
    tensors, facts = one.training.state()
    Study(folder).write_checkpoint(run, tensors, {**facts, "course": one.course})


def _epoch(trainings: Sequence[Training]) -> None:
    """Train each for an epoch; what it cost is told when the trial ends."""
    started = time.perf_counter()
    stepping = take_epoch(trainings, started)
    cost = time.perf_counter() - started
    for training in trainings:
        training.spend(cost / len(trainings), stepping / len(trainings), len(trainings))


def _row(trial: Trial, one: Begun) -> Row:
    """What a trial leaves; errors in percent, None if it diverged, and seconds without evaluation."""
    spent = one.training.spent
    last = dict(zip(("steps", "validation_error", "train_error", "train_loss"), one.course[-1], strict=True))
    ok = one.training.diverged is None and last["validation_error"] is not None
    row = {
        "recipe": trial.recipe.name,
        "variant": trial.variant,
        "activation": trial.activation,
        "seed": trial.seed,
        "status": "ok" if ok else "diverged",
        **last,
        "seconds": round(spent.seconds, 1),
        "seconds_recording": round(spent.recording, 1),
        "images_per_second": round(trial.recipe.batch_size * last["steps"] / spent.stepping),
        "together": spent.together,
        "overflows": one.training.overflows,
        "course": one.course,
        "settings": trial.settings(),
    }
    errors = "validation error {validation_error:.2f} %, training {train_error:.1f} %, {seconds} s"
    told = (errors if ok else "diverged after {steps} steps").format_map(row)
    print(f"{trial.variant}, {trial.activation}, seed {trial.seed}: {told}", flush=True)
    return row


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all trials share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("recipe")
    made.add_argument("overrides", nargs="*", help="field=value, as for zeromean compare, of every trial")
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--seconds", type=float, default=500.0, help="after which the epoch in training is the last one")
    made.add_argument("--gpus", type=int, default=0, help="0 trains on the CPU")
    made.add_argument("--together", type=int, help="trials that share a GPU; by default the recipe's number")
    made.add_argument("--share", type=int, nargs="*", default=(), metavar="STEP", help="until which trials share steps")
    made.add_argument("--validation", type=int, default=VALIDATION, help="training images held out")
    return made
