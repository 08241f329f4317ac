"""The elementary functions of the programs on a dense grid of float32 numbers, against float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreted.device import DEVICE
from tests.kernels.interpreted.elementary_program import apply, tail
from zeromean.kernels import elementary

_MINUS_ZERO, _MINUS_INFINITY = -(2**31), -(2**23)  # as bits, read as int32


def negative_floats(first: int, last: int, step: int) -> Tensor:
    """Every ``step``-th float between two bit patterns, those of small numbers first."""
    bits = torch.arange(first, last, step, device=DEVICE).to(torch.int32)
    return bits.view(torch.float32)


def assert_near(function: Any, exact: Callable[[Tensor], Tensor], x: Tensor, rtol: float) -> None:
    wide = exact(x.double())
    error = (apply(function, x).double() - wide).abs()
    assert (error <= rtol * wide.abs()).all(), x[(error > rtol * wide.abs())][:5]


def test_expm1_of_negative_floats() -> None:
    """Denormal numbers and minus infinity among them; the step is odd, so that all last digits occur."""
    x = negative_floats(_MINUS_ZERO, _MINUS_INFINITY + 1, 2041)
    x = torch.cat([x, x.new_full((-x.numel() % 2**15,), -math.inf)])
    assert x.numel() >= 2**20
    assert_near(elementary.expm1, torch.expm1, x, 1e-6)


def test_expm1_around_its_seam() -> None:
    assert_near(elementary.expm1, torch.expm1, torch.linspace(-0.4, -0.3, 2**17, device=DEVICE), 1e-6)


@pytest.mark.slow
def test_expm1_of_every_negative_float() -> None:
    for first in range(_MINUS_ZERO, _MINUS_INFINITY, 2**24):
        last = min(first + 2**24, _MINUS_INFINITY)
        assert_near(elementary.expm1, torch.expm1, negative_floats(first, last, 1), 1e-6)


@pytest.mark.parametrize(
    ("function", "exact", "low", "high", "rtol"),
    [
        (elementary.exp, torch.exp, -80.0, 80.0, 1e-5),
        (elementary.exp, torch.exp, -1.0, 1.0, 3e-7),
        (elementary.log, torch.log, 1e-30, 0.7, 1e-6),
        (elementary.reciprocal, torch.reciprocal, 0.01, 100.0, 2e-7),
        (elementary.sigmoid, torch.sigmoid, -15.0, 15.0, 2e-6),
        (tail, lambda x: torch.special.ndtr(-x.abs()), -4.0, 4.0, 3e-6),
    ],
    ids=["exp", "exp near 0", "log", "reciprocal", "sigmoid", "tail"],
)
def test_the_others(function: Any, exact: Callable[[Tensor], Tensor], low: float, high: float, rtol: float) -> None:
    assert_near(function, exact, torch.linspace(low, high, 2**17, device=DEVICE), rtol)
