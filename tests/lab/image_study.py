"""Small studies on images: a data set that fits into memory, and a folder written as training would."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from zeromean.lab.data.dataset import Dataset
from zeromean.lab.plan import Plan, describe, make
from zeromean.lab.recipes.cifar import cifar100_elu11, cifar100_elu18
from zeromean.lab.recipes.images import ImageRecipe
from zeromean.lab.store import Run, Study

CPU = torch.device("cpu")
LAYERS = {"elu11": 10, "elu18": 18}
EPOCHS = 12


def tiny_cifar(name: str = "cifar100", train: int = 12, test: int = 6) -> Dataset:
    """Images of three classes that differ in brightness."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(count) % 3
        noise = torch.randint(0, 90, (count, 3, 32, 32), generator=generator)
        return (noise + 80 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels

    (train_images, train_labels), (test_images, test_labels) = split(train), split(test)
    classes, sums = ("dark", "grey", "light"), {"train": "0" * 64, "test": "1" * 64}
    return Dataset(name, train_images, train_labels, test_images, test_labels, 255, classes, sums, "made for tests")


def planned(recipe: ImageRecipe, *, seeds: int = 7, norms: Sequence[str] = ("none", "batch")) -> Plan:
    """ELU and ReLU, each with every one of those norms."""
    return make(recipe, ("elu", "relu"), norms=norms, seeds=seeds)


def write_image_study(root: Path, *, network: str = "elu11", seeds: int = 7, diverged: int | None = None) -> Study:
    """A study of four arms with made-up results; the run of ``relu`` with the seed ``diverged`` ended in step 7."""
    published = cifar100_elu11() if network == "elu11" else cifar100_elu18()
    plan, study = planned(published, seeds=seeds), Study(root / "study")
    facts: dict[str, Any] = describe(plan, tiny_cifar(train=100), CPU, None)
    study.write_plan({**facts, "command": "zeromean compare", "budget": {**facts["budget"], "epochs": EPOCHS}})
    for index, run in enumerate(plan.runs({})):
        _write_run(study, run, index, LAYERS[network], run.arm == "relu" and run.seed == diverged)
    return study


def _write_run(study: Study, run: Run, index: int, layers: int, lost: bool) -> None:
    base = 28.0 + 3 * (run.activation == "relu") + 0.5 * (run.norm == "batch") + 0.3 * math.sin(9.1 * index)
    epochs = 3 if lost else EPOCHS
    row: dict[str, Any] = {}
    study.begin(run)
    for epoch in range(1, epochs + 1):
        alive = epoch < epochs or not lost
        row = {
            "epoch": epoch,
            "train_loss": 4 / epoch if alive else None,
            "train_error": 90 / epoch if alive else None,
            "validation_error": None,
            "mean_activation": [0.03 * layer + 0.001 * index if alive else None for layer in range(layers)],
            "mean_activation_spread": [0.1 + 0.01 * layer if alive else None for layer in range(layers)],
            "learning_rate": 0.01,
            "images_per_second": 40_000.0,
            "seconds": 1.5 * epoch,
        }
        study.append_metrics(run, row)
    ok = {"train_loss": row["train_loss"], "train_error": row["train_error"], "validation_error": None}
    ok |= {"test_loss": 1.0, "test_error": base, "median_mean_activation": 0.1}
    outcome = {
        "status": "diverged" if lost else "ok",
        "diverged_at": 3 if lost else None,
        "diverged": {"epoch": 3, "step": 7, "layer": "output of stacks.2.convolution"} if lost else None,
        "epochs": epochs,
        **(dict.fromkeys(ok) if lost else ok),
        "seconds": 1.5 * epochs,
        "images_per_second": 40_000.0,
        "together": 1,
    }
    study.finish(run, outcome, None)


def short(recipe: ImageRecipe, **changes: Any) -> ImageRecipe:
    """Cut to 8 steps of 4 images, at a rate that so few images can bear."""
    few = recipe.shortened(8 / recipe.steps)
    return replace(few, batch_size=4, normalization="mean-std", probe_samples=4, rates=((0, 1e-5),), **changes)
