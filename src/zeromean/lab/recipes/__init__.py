"""The experiments that ``zeromean ls`` shows: a function each, by name."""

from __future__ import annotations

from collections.abc import Callable

from zeromean.lab.recipes.mnist import digits_mlp8, mnist_autoencoder, mnist_mlp8
from zeromean.lab.recipes.recipe import Recipe as Recipe
from zeromean.lab.recipes.recipe import override as override
from zeromean.spelling import nearest

RECIPES: dict[str, Callable[[], Recipe]] = {
    "digits-mlp8": digits_mlp8,
    "mnist-mlp8": mnist_mlp8,
    "mnist-autoencoder": mnist_autoencoder,
}


def find(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}: {nearest(name, RECIPES)}")
    return RECIPES[name]()
