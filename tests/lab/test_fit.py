"""What does not fit is refused before anything is written."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab.image_study import CPU, tiny_cifar

from zeromean.lab.compare import open_study
from zeromean.lab.data.imagenet import FolderDataset
from zeromean.lab.data.images import ImageFolder, ImageSplit
from zeromean.lab.fit import check_data
from zeromean.lab.plan import make
from zeromean.lab.recipes import RECIPES, find
from zeromean.lab.recipes.cifar import cifar100_elu11, cifar100_elu18
from zeromean.lab.recipes.imagenet import imagenet_elu15
from zeromean.lab.recipes.images import ImageRecipe
from zeromean.lab.store import Study

FOLDER = ImageFolder(("a", "b"), ImageSplit((), ()), ImageSplit((), ()))
TWELVE = replace(cifar100_elu11(), batch_size=4)


def refused(recipe: ImageRecipe, rule: str, *, processes: int = 1, norms: Sequence[str] = ("none", "batch")) -> None:
    """The rule is told before there is a plan."""
    with pytest.raises(ValueError, match=rule):
        open_study(
            make(recipe, ["elu"], norms=norms, seeds=1), Study(Path("nowhere")), tiny_cifar(), CPU, processes=processes
        )
    assert not Path("nowhere").exists()


@pytest.mark.parametrize(
    ("changes", "processes", "rule"),
    [
        ({"validation": 2}, 1, r"validation=2: count must leave every class on both sides .* got 2 of 12 samples in 3"),
        ({"validation": 70}, 1, r"validation=70: count must leave every class on both sides .* got 70 of 12 samples"),
        ({"batch_size": 13}, 1, r"batch_size must lie in \[1, 12\], got 13"),
        ({"batch_size": 4}, 3, "batch_size must be a multiple of 3, got 4"),
        ({"accumulate": 4}, 2, "accumulate must divide each process's 2 images of a batch, got 4"),
        ({"batch_size": 6, "mixup": 0.2}, 2, "each process's part of a batch must be even, got 3"),
        (
            {"batch_size": 1},
            1,
            "two images at a time, got 1 of a batch of 1 in 1 parts: change batch_size or accumulate",
        ),
        (
            {"accumulate": 2},
            2,
            "two images at a time, got 1 of a batch of 4 in 4 parts: change batch_size or accumulate",
        ),
        ({"cutout": 33}, 1, "cutout must be at most 32, the side of the images, got 33: "),
    ],
)
def test_what_does_not_fit_the_data_or_the_processes(changes: dict[str, Any], processes: int, rule: str) -> None:
    refused(replace(TWELVE, **changes), rule, processes=processes)


def test_one_image_at_a_time_is_enough_without_batch_normalization() -> None:
    check_data(replace(TWELVE, batch_size=1, cutout=32), ["none"], tiny_cifar(), 1)


def test_a_padding_that_leaves_no_pixel() -> None:
    refused(
        replace(cifar100_elu18(), batch_size=4, padding="ceil"), "padding must leave a pixel in every layer, got 'ce"
    )


@pytest.mark.parametrize("shape", [(1, 32, 32), (4, 32, 32), (1, 8, 8)])
def test_images_of_another_shape(shape: tuple[int, int, int]) -> None:
    data = tiny_cifar("digits")
    other = replace(data, train_images=torch.zeros(12, *shape, dtype=torch.uint8))
    told = "x".join(map(str, shape))
    with pytest.raises(ValueError, match=f"elu11 does not take images of {told}, as those of data=digits are: choose"):
        check_data(replace(TWELVE, data="digits"), ["none"], other, 1)


def test_every_recipe_fits_what_it_names() -> None:
    for name in RECIPES:
        recipe = find(name)
        if isinstance(recipe, ImageRecipe) and recipe.network != "elu15":
            check_data(recipe, ["none", "batch"], tiny_cifar(recipe.data, train=600), 1)


def test_averaged_weights_have_no_statistics_of_their_own() -> None:
    averaged = replace(TWELVE, ema=0.9)
    refused(
        averaged, r"ema must be 0 with batch normalization, .* got 0\.9: leave it out of 'cifar100-elu11', or compare"
    )
    assert make(averaged, ["elu"], norms=["none"], seeds=1).arms


def test_a_crop_of_a_folder_that_is_too_small() -> None:
    folder = FolderDataset("./photos", FOLDER, torch.arange(12) % 2, torch.arange(4) % 2, {})
    small = replace(imagenet_elu15(), data="./photos", batch_size=4, crop=1)
    with pytest.raises(ValueError, match=r"elu15 does not take images of 3x1x1, as crops of data=\./photos are"):
        check_data(small, ["none"], folder, 1)
    check_data(replace(small, crop=224), ["none"], folder, 1)
