"""Run a planned study from wherever it stands: tune, train, summarise."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zeromean.lab import data
from zeromean.lab.fit import check_data
from zeromean.lab.pauses import OnEpoch
from zeromean.lab.plan import Plan, describe, estimate_seconds, splits, written_plan
from zeromean.lab.recipes.images import ImageRecipe
from zeromean.lab.recipes.recipe import Recipe
from zeromean.lab.session import Session, train_images
from zeromean.lab.spread import spread
from zeromean.lab.store import DamagedFileError, Run, Stage, Study
from zeromean.lab.together import train


@dataclass(frozen=True)
class Progress:
    """How a study in progress talks.

    Attributes:
        say: one line for the reader.
        stage: begins a stage of so many epochs and returns what is called after each; on images the epochs are
            those of all runs.
        note: what to show with the next epoch, in place of run-epochs a second.
    """

    say: Callable[[str], None] = print
    stage: Callable[[Stage, int], OnEpoch] = lambda stage, epochs: lambda epoch, runs: None
    note: Callable[[str], None] = lambda text: None


SILENT = Progress(say=lambda line: None)


def open_study(
    plan: Plan, study: Study, dataset: data.AnyDataset, device: torch.device, *, processes: int = 1
) -> dict[str, Any]:
    """The study's written plan: the one on disk where it is the same, else the new one, not yet written.

    Raises:
        ValueError: the folder holds a study with another plan; the message names what differs. Or a recipe for images
            does not fit the data set or the processes.
    """
    written = written_plan(study)
    if written is None:
        if left := sorted(path.name for path in study.path.glob("[!.]*")):
            raise ValueError(
                f"{study.path} has no plan.json, but holds {left[0]}: "
                "restore the plan, or choose another folder with --name"
            )
        if isinstance(plan.recipe, ImageRecipe):
            check_data(plan.recipe, [arm.norm for arm in plan.arms], dataset, processes)
        seconds = estimate_seconds(plan, dataset, device)
        return describe(plan, dataset, device, seconds, processes=processes)
    checks = {**plan.decided(), "checksums": dataset.checksums}
    found = {**written, "recipe": plan.known(written["recipe"]), "checksums": written["data"]["checksums"]}
    different = [key for key, value in checks.items() if found.get(key) != value]
    if different:
        key = different[0]
        raise ValueError(
            f"{study.path} holds a study with another plan: {_difference(key, found.get(key), checks[key])}; "
            "choose another folder with --name, or delete this one"
        )
    return written


def _difference(key: str, old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        inner = next(name for name in new if old.get(name) != new[name])
        return _difference(f"{key}.{inner}", old.get(inner), new[inner])
    return f"its {key} is {json.dumps(old)}, not {json.dumps(new)}"


@contextmanager
def exclusive(study: Study) -> Iterator[None]:
    """Keep a second process out of the study while we write to it.

    Raises:
        ValueError: another process has it.
    """
    from filelock import FileLock, Timeout

    study.path.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(study.path / ".lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(f"another process is running the study {study.path}: wait for it, or use --name") from None


def run(
    plan: Plan,
    study: Study,
    dataset: data.AnyDataset,
    *,
    device: torch.device,
    progress: Progress,
    checkpoint_every: int = 1,
    session: Session | None = None,
) -> None:
    """Bring the study to its end, training only what has no result yet.

    Args:
        plan: what to run; the same as any plan already in the folder (:func:`open_study`).
        study: the folder, held by :func:`exclusive`.
        dataset: of the recipe.
        device: where to train.
        progress: how to report.
        checkpoint_every: epochs between checkpoints; on images they are written by the clock instead.
        session: processes and groups of a study on images; by default one process that takes the recipe's groups.

    Raises:
        Stopped: SIGTERM ended a study on images, after a checkpoint.
    """
    if device.type == "cpu":
        _tell_threads(study, progress)
    if isinstance(plan.recipe, ImageRecipe):
        return _images_stage(plan, plan.recipe, study, dataset, session or Session(device), progress)
    assert isinstance(dataset, data.Dataset)
    chosen: dict[str, float] = {}
    if plan.tune:
        _stage(plan.recipe, plan.tuning_runs(), "tuning", study, dataset, device, progress, checkpoint_every)
        chosen = choose(plan, study)
    return _stage(plan.recipe, plan.runs(chosen), "final", study, dataset, device, progress, checkpoint_every)


def _tell_threads(study: Study, progress: Progress) -> None:
    """Sums over many threads are rounded otherwise than over few."""
    written, now = study.plan(), torch.get_num_threads()
    before = written["device"]["threads"] if written else now
    if before != now:
        progress.say(
            f"planned with {before} threads, this session has {now}: its numbers are the same up to rounding, with "
            f"OMP_NUM_THREADS={before} bit by bit"
        )


def _images_stage(
    plan: Plan, recipe: ImageRecipe, study: Study, dataset: data.AnyDataset, session: Session, progress: Progress
) -> None:
    runs = plan.runs({})
    if session.share.writes:
        mend(study, runs, runs, progress.say)
    session.any(False)  # nobody looks for results before the damaged ones are set aside
    pending = _pending(study, runs, "final", progress)
    if pending and session.devices:
        assert isinstance(dataset, data.Dataset), "a process of a pool cannot start workers of its own"
        spread(recipe, pending, dataset, study, session, progress)
    elif pending:
        train_images(recipe, pending, dataset, study, session, progress)


def _stage(
    recipe: Recipe,
    runs: list[Run],
    stage: Stage,
    study: Study,
    dataset: data.Dataset,
    device: torch.device,
    progress: Progress,
    checkpoint_every: int,
) -> None:
    mend(study, runs, [stage], progress.say)
    if _pending(study, runs, stage, progress):
        parts = splits(recipe, dataset, tuning=stage == "tuning")
        on_epoch = progress.stage(stage, recipe.epochs)
        train(recipe, runs, parts, study, device=device, on_epoch=on_epoch, checkpoint_every=checkpoint_every)


def _pending(study: Study, runs: list[Run], stage: Stage, progress: Progress) -> list[Run]:
    pending = study.pending(runs)
    if len(pending) < len(runs):
        progress.say(f"{len(runs) - len(pending)} of {len(runs)} {stage} runs are done already")
    return pending


def mend(study: Study, runs: Sequence[Run], owners: Sequence[Stage | Run], say: Callable[[str], None]) -> None:
    """Report damaged results and checkpoints and set them aside, so that what they stood for is run again."""
    for one in runs:
        try:
            if study.finished(one) is not None:
                study.drop_checkpoint(one)  # a kill came before that
        except DamagedFileError as error:
            say(f"{error}; it is set aside as {study.set_aside(one).name} and the run repeated")
    for owner in owners:
        try:
            _check_checkpoint(study, owner, runs)
        except DamagedFileError as error:
            say(f"{error}: deleted")
            study.drop_checkpoint(owner)


def _check_checkpoint(study: Study, owner: Stage | Run, runs: Sequence[Run]) -> None:
    """Whether a checkpoint can be read, if there is one, and the metrics of its runs reach as far."""
    found = study.read_checkpoint(owner)
    if found is None:
        return
    _, state = found
    for one in runs:
        if one == owner or one.folder in state.get("runs", ()):
            study.check_metrics(one, state["epoch"])


def choose(plan: Plan, study: Study) -> dict[str, float]:
    """Each arm's learning rate: the lowest mean validation error among those at which no tuning run diverged.

    Writes ``tuning.json``.

    Raises:
        ValueError: an arm diverged at every learning rate of the grid.
    """
    recipe, arms = plan.recipe, dict[str, Any]()
    assert isinstance(recipe, Recipe)
    for arm in plan.arms:
        grid: list[dict[str, Any]] = []
        for rate in recipe.tuning_grid:
            results = [
                study.result(run) for run in plan.tuning_runs() if run.arm == arm.name and run.learning_rate == rate
            ]
            grid.append(
                {
                    "learning_rate": rate,
                    "validation_errors": [result and result["validation_error"] for result in results],
                }
            )
        sound = [point for point in grid if None not in point["validation_errors"]]
        if not sound:
            raise ValueError(f"{arm.label} diverged at every learning rate of the grid: extend tuning_grid downwards")
        best = min(sound, key=lambda point: sum(point["validation_errors"]))["learning_rate"]
        at_edge = best in (min(recipe.tuning_grid), max(recipe.tuning_grid))
        arms[arm.name] = {"chosen": best, "at_edge": at_edge, "grid": grid}
    seeds = list(range(recipe.tuning_seeds))
    content = {"arms": arms, "seeds": seeds, "validation": recipe.tuning_validation}
    study.write_text("tuning.json", json.dumps(content, indent=1) + "\n")
    return {name: arm["chosen"] for name, arm in arms.items()}


def study_at(root: Path, name: str) -> Study:
    """The study of that name under the folder of all runs.

    Raises:
        ValueError: the name is not a plain folder name.
    """
    if not name or Path(name).name != name or name.startswith("."):
        raise ValueError(f"a study's name must be a plain folder name, got {name!r}: for example first-try")
    return Study(root / name)
