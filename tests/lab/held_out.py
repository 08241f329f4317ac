"""Trials of a small network on few images: how they are called, and a test set that nobody may read."""

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.lab.image_study import tiny_cifar
from tests.lab.small_images import small

from zeromean.lab.images import Material

DATA = tiny_cifar(train=200)
FOREVER = math.inf


@contextmanager
def small_and_held_out() -> Iterator[None]:
    """The small network in the place of the others, and an error for who reads the test set."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the test set must not be read")

    with small(), patch.object(Material, "test_batches", refuse):
        yield


def options(out: Path, **changes: Any) -> argparse.Namespace:
    """Those of a command with trials."""
    given = {"out": out, "gpus": 0, "together": 3, "seconds": 100.0, "seeds": 1, "validation": 30, "share": ()}
    return argparse.Namespace(**{**given, **changes})
