"""Run a study where only torch, numpy and scipy are at hand (a bare GPU machine), and pack what is worth keeping.

    PYTHONPATH=src python benchmarks/study.py RECIPE [field=value ...] --out DIR [--seeds N] [--runs DIR]

Runs the recipe's own arms and continues where it stopped, like ``zeromean compare``. DIR gets ``<study>.tar.gz``: the
study's folder without the weights, from which ``zeromean report`` makes the tables and the page elsewhere.
"""

from __future__ import annotations

import argparse
import tarfile
import time
from pathlib import Path

import torch

from zeromean.lab import data
from zeromean.lab.compare import Progress, open_study, run
from zeromean.lab.plan import make
from zeromean.lab.recipes import find, override
from zeromean.lab.store import Stage, Study
from zeromean.lab.together import OnEpoch


def lines(stage: Stage, epochs: int) -> OnEpoch:
    """A line every tenth of the way."""
    started = time.perf_counter()

    def on_epoch(epoch: int, runs: int) -> None:
        if epoch % max(1, epochs // 10) == 0:
            print(f"{stage}: epoch {epoch} of {epochs}, {runs} runs, {time.perf_counter() - started:.0f} s", flush=True)

    return on_epoch


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
    options = parser.parse_args()
    recipe = override(find(options.recipe), options.overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = make(recipe, (), seeds=options.seeds or recipe.seeds, name=options.name)
    study, dataset = Study(options.runs / plan.study), data.load(recipe.data)
    facts = open_study(plan, study, dataset, device)
    if study.plan() is None:
        study.write_plan(facts)
    print(f"{plan.study}: {facts['budget']}", flush=True)
    progress = Progress(stage=lines)
    run(plan, study, dataset, device=device, progress=progress, checkpoint_every=options.checkpoint_every)
    print(f"packed {pack(study, options.out)}", flush=True)


if __name__ == "__main__":
    main()
