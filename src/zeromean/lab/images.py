"""What a recipe for images trains on: normalised images on the device, split as the stage needs them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zeromean.lab import data
from zeromean.lab.data.whiten import prepare
from zeromean.lab.recipes.images import ImageRecipe


@dataclass(frozen=True, eq=False)
class Material:
    """Images ``[N, C, H, W]`` and labels ``[N]``.

    Attributes:
        train: to learn from.
        train_labels: theirs.
        probe: a fixed part of them, to be watched.
        probe_labels: theirs.
        test: read once, at the end of a run.
        test_labels: theirs.
        validation: held out of the training set, with their labels, if any.
        classes: how many.
    """

    train: Tensor
    train_labels: Tensor
    probe: Tensor
    probe_labels: Tensor
    test: Tensor
    test_labels: Tensor
    validation: tuple[Tensor, Tensor] | None
    classes: int


def material(recipe: ImageRecipe, dataset: data.Dataset, device: torch.device) -> Material:
    """Normalise a data set by its training part and put it on the device.

    Raises:
        ValueError: the validation split leaves a class without images.
    """
    kept, held_out = torch.arange(len(dataset.train_labels)), None
    if recipe.validation:
        kept, held_out = data.split_validation(dataset.train_labels, recipe.validation)
    images = prepare(dataset, recipe.normalization, kept=kept if recipe.validation else None, device=device)
    labels = dataset.train_labels.to(device)
    watched = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))[: recipe.probe_samples]]
    kept, watched = kept.to(device), watched.to(device)
    validation = None if held_out is None else (images.train[held_out.to(device)], labels[held_out.to(device)])
    return Material(
        train=images.train if held_out is None else images.train[kept],
        train_labels=labels if held_out is None else labels[kept],
        probe=images.train[watched],
        probe_labels=labels[watched],
        test=images.test,
        test_labels=dataset.test_labels.to(device),
        validation=validation,
        classes=len(dataset.classes),
    )
