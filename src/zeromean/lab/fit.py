"""Whether an experiment fits its network, its data and its processes, found out before anything is written."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from zeromean.lab import data
from zeromean.lab.data.augment import part_of_batch
from zeromean.lab.nets import STACKS
from zeromean.lab.nets.convolutional import CHANNELS
from zeromean.lab.recipes.images import ImageRecipe
from zeromean.lab.recipes.recipe import Recipe
from zeromean.lab.store import Run
from zeromean.lab.train import build


def check_network(recipe: Recipe | ImageRecipe) -> None:
    """Whether a recipe's data are of the kind that its network takes, and its dropout of as many stacks.

    Raises:
        ValueError: they are not.
    """
    if isinstance(recipe, Recipe):
        if data.is_folder(recipe.data):
            raise ValueError(
                f"data={recipe.data} is a folder of images, which {recipe.name!r} cannot train on, as its networks "
                f"take the data set in memory: choose one of {', '.join(data.available())}"
            )
        return
    stacks = STACKS[recipe.network]
    for number, phase in enumerate(recipe.phases, 1):
        if len(phase.dropout) != stacks:
            raise ValueError(
                f"phase {number} of {recipe.name!r} must have a dropout rate for each of the {stacks} stacks of "
                f"{recipe.network}, got {len(phase.dropout)}: 0 where nothing is dropped"
            )


def check_data(recipe: ImageRecipe, norms: Iterable[str], dataset: data.AnyDataset, processes: int) -> None:
    """Whether the arms of a recipe can be trained on a data set by so many processes.

    Raises:
        ValueError: the images are of another shape than the network takes or smaller than what is cut out of them, the
            validation split leaves a class without images, or a batch has no such parts.
    """
    labels, held_out = dataset.train_labels, recipe.validation
    if held_out:
        try:
            data.split_validation(labels, held_out)
        except ValueError as error:
            raise ValueError(f"validation={held_out}: {error}") from error
    part_of_batch(recipe.batch_size, len(labels) - held_out, (0, processes))
    recipe.check_parts(processes)
    one = recipe.batch_size // processes // recipe.accumulate
    if one < 2 and "batch" in norms:
        raise ValueError(
            f"batch normalization takes two images at a time, got {one} of a batch of {recipe.batch_size} in "
            f"{processes * recipe.accumulate} parts: change batch_size or accumulate, or compare --norm none"
        )
    shape = dataset.train_images.shape[1:] if isinstance(dataset, data.Dataset) else (CHANNELS, *[recipe.crop] * 2)
    if recipe.cutout > shape[-1]:
        raise ValueError(
            f"cutout must be at most {shape[-1]}, the side of the images, got {recipe.cutout}: 8 cuts a sixteenth of "
            "32 pixels"
        )
    _check_images(recipe, tuple(shape), len(dataset.classes))


def _check_images(recipe: ImageRecipe, shape: tuple[int, ...], classes: int) -> None:
    """Let the network, without memory, say what it makes of two images of that shape."""
    with torch.device("meta"):
        network = build(recipe, Run("relu", "relu", 0.0, seed=0), classes)
        try:
            sound = network(torch.empty(2, *shape)).shape == (2, classes)
        except RuntimeError:
            sound = False
    if not sound:
        told = "x".join(map(str, shape))
        crop = data.is_folder(recipe.data)
        remedy = "make crop larger, such as 224" if crop else "choose other data for it, such as cifar100"
        raise ValueError(
            f"{recipe.network} does not take images of {told}, as {'crops' if crop else 'those'} of data={recipe.data} "
            f"are: {remedy}"
        )
