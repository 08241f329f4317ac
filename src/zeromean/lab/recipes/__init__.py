"""The experiments that ``zeromean ls`` shows: a function each, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from zeromean.lab.recipes import images, recipe
from zeromean.lab.recipes.cifar import (
    cifar10_elu18,
    cifar10_elu18_fast,
    cifar100_elu11,
    cifar100_elu11_fast,
    cifar100_elu18,
    cifar100_elu18_fast,
)
from zeromean.lab.recipes.imagenet import imagenet_elu15, imagenet_elu15_fast
from zeromean.lab.recipes.images import ImageRecipe as ImageRecipe
from zeromean.lab.recipes.mnist import digits_mlp8, mnist_autoencoder, mnist_mlp8
from zeromean.lab.recipes.recipe import Recipe as Recipe
from zeromean.spelling import nearest

AnyRecipe = Recipe | ImageRecipe

RECIPES: dict[str, Callable[[], AnyRecipe]] = {
    "digits-mlp8": digits_mlp8,
    "mnist-mlp8": mnist_mlp8,
    "mnist-autoencoder": mnist_autoencoder,
    "cifar100-elu11": cifar100_elu11,
    "cifar100-elu18": cifar100_elu18,
    "cifar10-elu18": cifar10_elu18,
    "cifar100-elu11-fast": cifar100_elu11_fast,
    "cifar100-elu18-fast": cifar100_elu18_fast,
    "cifar10-elu18-fast": cifar10_elu18_fast,
    "imagenet-elu15": imagenet_elu15,
    "imagenet-elu15-fast": imagenet_elu15_fast,
}


def find(name: str) -> AnyRecipe:
    """The recipe of that name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}: {nearest(name, RECIPES)}")
    return RECIPES[name]()


def override(published: AnyRecipe, assignments: Sequence[str]) -> AnyRecipe:
    """The recipe with fields changed by ``field=value`` texts, as the command line gives them.

    Args:
        published: what to start from.
        assignments: such as ``epochs=20``, or ``length=0.01`` on images; see the ``override`` of each kind.

    Raises:
        ValueError: an unknown field (names the nearest), a text without ``=``, or a value of the wrong type.
    """
    if isinstance(published, ImageRecipe):
        return images.override(published, assignments)
    return recipe.override(published, assignments)
