"""Run a study where only torch, numpy and scipy are at hand (a bare GPU machine), and pack what is worth keeping.

    PYTHONPATH=src python benchmarks/study.py RECIPE [field=value ...] --out DIR [--seeds N] [--runs DIR]
    PYTHONPATH=src python benchmarks/study.py cifar100-elu18 --together 3 --seconds 1300 --out DIR

Runs the recipe's own arms and continues where it stopped, like ``zeromean compare``. DIR gets ``<study>.tar.gz``: the
study's folder without the weights, from which ``zeromean report`` makes the tables and the page elsewhere.

Where convolutional runs that train together would not all end within ``--seconds``, by the pace of their epochs, the
last of them stops with a checkpoint, as often as needed, and waits for the next session.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import tarfile
import time
from pathlib import Path

import torch

from zeromean.lab import data
from zeromean.lab.compare import Progress, mend, open_study, run
from zeromean.lab.pauses import OnEpoch
from zeromean.lab.plan import Plan, make
from zeromean.lab.recipes import find, override
from zeromean.lab.recipes.images import ImageRecipe
from zeromean.lab.session import Session, train_images
from zeromean.lab.store import Stage, Study
from zeromean.lab.train import Stopped

# Of all epochs: the first ones compile, the next ones show the pace.
_COMPILING, _PACED = 0.02, 0.08


class Lines:
    """A line every tenth of the way.

    Attributes:
        late: whether a training was asked to stop, as it would not end in time.

    Args:
        ends: by `time.monotonic`; infinite asks none to stop.
    """

    def __init__(self, ends: float = float("inf")) -> None:
        self.late, self.may_stop, self._ends = False, True, ends

    def stage(self, stage: Stage, epochs: int) -> OnEpoch:
        """Begin a stage."""
        started = time.monotonic()
        marks: list[tuple[float, float]] = []
        self.late = False

        def on_epoch(epoch: float, runs: int) -> None:
            now = time.monotonic()
            if epoch // max(1, epochs // 10) > (marks[-1][1] if marks else -1) // max(1, epochs // 10):
                print(f"{stage}: epoch {epoch:g} of {epochs}, {runs} runs, {now - started:.0f} s", flush=True)
            marks.append((now, epoch))
            begun = marks[0][1]
            if epoch - begun < _PACED * epochs or self.late or not self.may_stop:
                return
            first, before = next(mark for mark in marks if mark[1] - begun >= _COMPILING * epochs)
            if before < epoch and now + (epochs - epoch) * (now - first) / (epoch - before) > self._ends:
                self.late = True
                os.kill(os.getpid(), signal.SIGTERM)

        return on_epoch


def in_time(
    plan: Plan, recipe: ImageRecipe, study: Study, dataset: data.AnyDataset, device: torch.device, lines: Lines
) -> None:
    """Train as many of the runs that have no result as end in time, together; one at least."""
    runs = plan.runs({})
    mend(study, runs, runs, print)
    pending = study.pending(runs)
    while pending:
        lines.may_stop = len(pending) > 1
        try:
            session = Session(device, together=len(pending))
            train_images(recipe, pending, dataset, study, session, Progress(stage=lines.stage))
            break
        except Stopped:
            if not lines.late:
                raise
            pending = study.pending(pending)[:-1]
            print(f"too slow: {len(pending)} runs go on", flush=True)
        gc.collect()


def pack(study: Study, folder: Path) -> Path:
    """The study without weights and checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{study.path.name}.tar.gz"
    with tarfile.open(target, "w:gz") as archive:
        for file in sorted(study.path.rglob("*.json*")):
            archive.add(file, Path(study.path.name) / file.relative_to(study.path))
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--name")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--checkpoint-every", type=int, default=25)
    parser.add_argument("--together", type=int, help="convolutional runs that share the device")
    parser.add_argument("--seconds", type=float, help="in which all pending convolutional runs train together")
    options = parser.parse_args()
    started = time.monotonic()
    recipe = override(find(options.recipe), options.overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = make(recipe, (), seeds=recipe.seeds if options.seeds is None else options.seeds, name=options.name)
    study, dataset = Study(options.runs / plan.study), data.load_any(recipe.data)
    facts = open_study(plan, study, dataset, device)
    if study.plan() is None:
        study.write_plan(facts)
    print(f"{plan.study}: {facts['budget']}", flush=True)
    if options.seconds is None:
        session = Session(device, together=options.together)
        progress, every = Progress(stage=Lines().stage), options.checkpoint_every
        run(plan, study, dataset, device=device, progress=progress, checkpoint_every=every, session=session)
    else:
        assert isinstance(recipe, ImageRecipe), "--seconds is for convolutional recipes"
        in_time(plan, recipe, study, dataset, device, Lines(started + options.seconds))
    print(f"packed {pack(study, options.out)}", flush=True)


if __name__ == "__main__":
    main()
