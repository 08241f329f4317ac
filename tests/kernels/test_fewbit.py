"""The few-bit tables against an independent quadrature; the operators' registration; the programs, interpreted."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import oracles
from tests.tolerances import SMOOTH_ATOL, TOLERANCES
from zeromean.kernels import fewbit
from zeromean.kernels.fewbit_tables import FUNCTIONS, Table, table

BITS = (1, 2, 3, 4)
PROGRAM_TYPES = (torch.float16, torch.bfloat16, torch.float32)


class Case(NamedTuple):
    """What the interpreter runs. A tile has 1024 elements; sizes are less, one and a rest inside a byte, and two."""

    name: str
    bits: int
    dtype: torch.dtype = torch.float32
    size: int = 1035


class Result(NamedTuple):
    """Tensors in and out of both programs."""

    x: Tensor
    gradient: Tensor
    y: Tensor
    planes: Tensor
    dx: Tensor


CASES = {Case(name, bits) for name in FUNCTIONS for bits in BITS}
CASES |= {Case("gelu", 3, dtype, size) for dtype in PROGRAM_TYPES for size in (1, 8, 1000, 1035, 2048)}


def gelu_tanh_slope(x: oracles.Array) -> oracles.Array:
    t = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    slope: oracles.Array = (1 + t) / 2 + x / 2 * (1 - t**2) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return slope


SLOPES: dict[str, Callable[[oracles.Array], oracles.Array]] = {
    "silu": lambda x: oracles.swish_slope(x, 1.0),
    "gelu": oracles.gelu_slope,
    "gelu_tanh": gelu_tanh_slope,
    "mish": oracles.mish_slope,
}
# Root mean square and largest error of the derivative, 1 to 4 bits.
ERRORS = {
    "silu": ((0.1791, 0.312), (0.0889, 0.155), (0.0440, 0.077), (0.0218, 0.039)),
    "gelu": ((0.1961, 0.409), (0.0895, 0.187), (0.0436, 0.089), (0.0215, 0.044)),
    "gelu_tanh": ((0.1961, 0.409), (0.0895, 0.187), (0.0436, 0.089), (0.0215, 0.044)),
    "mish": ((0.1845, 0.358), (0.0876, 0.171), (0.0425, 0.083), (0.0210, 0.041)),
}
POINTS = np.linspace(-7, 7, 20_001)
WEIGHTS = np.exp(-(POINTS**2) / 2) / np.exp(-(POINTS**2) / 2).sum()

each_name = pytest.mark.parametrize("name", FUNCTIONS)
each_bits = pytest.mark.parametrize("bits", BITS)


def steps(table: Table, x: oracles.Array) -> oracles.Array:
    """The derivative in steps, one comparison a threshold."""
    interval = (x[:, None] > np.array(table.thresholds)).sum(1)
    values: oracles.Array = np.array(table.levels)[np.array(table.codes)[interval]]
    return values


def mean_square(levels: oracles.Array, slope: oracles.Array) -> float:
    """The error if each x takes the nearest level."""
    return float(WEIGHTS @ np.abs(slope[:, None] - levels).min(1) ** 2)


@each_bits
@each_name
def test_the_error_is_as_documented(name: str, bits: int) -> None:
    entry, slope = table(name, bits), SLOPES[name](POINTS)
    error = steps(entry, POINTS) - slope
    rms, largest = np.sqrt(WEIGHTS @ error**2), np.abs(error).max()
    assert rms == pytest.approx(ERRORS[name][bits - 1][0], abs=1e-4)
    assert largest == pytest.approx(ERRORS[name][bits - 1][1], abs=1e-3)
    assert (rms, largest) == pytest.approx((entry.rms, entry.largest), abs=3e-4)


@each_bits
@each_name
def test_each_x_takes_the_nearest_level(name: str, bits: int) -> None:
    slope = SLOPES[name](POINTS)
    levels = np.array(table(name, bits).levels)
    chosen = np.abs(steps(table(name, bits), POINTS) - slope)
    assert (chosen <= np.abs(slope[:, None] - levels).min(1) + 5e-4).all()


@each_bits
@each_name
def test_no_move_of_the_levels_helps(name: str, bits: int) -> None:
    generator, slope = np.random.default_rng(0), SLOPES[name](POINTS)
    levels = np.array(table(name, bits).levels)
    best = mean_square(levels, slope)
    for size in (0.003, 0.03, 0.3):
        for _ in range(10):
            assert mean_square(levels + size * generator.standard_normal(levels.shape), slope) > best


@each_name
def test_two_levels_are_the_best_of_all_cuts(name: str) -> None:
    order = np.argsort(SLOPES[name](POINTS))
    mass, slope = WEIGHTS[order], SLOPES[name](POINTS)[order]
    below, total = mass.cumsum()[:-1], (mass * slope).cumsum()
    explained = total[:-1] ** 2 / below + (total[-1] - total[:-1]) ** 2 / (1 - below)
    assert table(name, 1).rms ** 2 == pytest.approx(mass @ slope**2 - explained.max(), rel=1e-3)


@each_bits
@each_name
def test_neighbouring_codes_differ_in_one_bit(name: str, bits: int) -> None:
    entry = table(name, bits)
    assert list(entry.thresholds) == sorted(entry.thresholds)
    assert set(entry.codes) == set(range(2**bits))
    assert all((one ^ other).bit_count() == 1 for one, other in zip(entry.codes, entry.codes[1:], strict=False))


def decoded(planes: Tensor, size: int) -> list[int]:
    return [sum(int(planes[bit, m // 8] >> (m % 8) & 1) << bit for bit in range(len(planes))) for m in range(size)]


@each_bits
@pytest.mark.parametrize("size", [1, 7, 8, 19])
def test_planes_hold_the_codes_in_logical_order(bits: int, size: int) -> None:
    x = torch.linspace(-3, 3, size).flip(0)
    _, planes = fewbit.forward(x, "gelu", bits)
    entry = table("gelu", bits)
    assert planes.shape == (bits, (size + 7) // 8)
    assert decoded(planes, size) == [entry.codes[sum(float(v) > t for t in entry.thresholds)] for v in x]


@each_bits
def test_operators_are_registered_in_full(bits: int) -> None:
    x = torch.randn(3, 7)
    y, planes = fewbit.forward(x, "mish", bits)
    torch.library.opcheck(torch.ops.zeromean.fewbit_forward.default, (x, "mish", bits))
    torch.library.opcheck(torch.ops.zeromean.fewbit_forward.default, (torch.randn(4, 3).t(), "silu", bits))
    torch.library.opcheck(torch.ops.zeromean.fewbit_backward.default, (y, planes, "mish"))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Result]:
    path: Path = tmp_path_factory.mktemp("fewbit") / "results.pt"
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.fewbit_program", str(path)]
    subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    return {Case(*case): Result(*result) for case, result in torch.load(path, weights_only=True).items()}


@pytest.mark.parametrize("case", sorted(CASES, key=str), ids=str)
def test_programs_equal_the_plain_path(case: Case, interpreted: dict[Case, Result]) -> None:
    result, tolerance = interpreted[case], TOLERANCES[case.dtype]
    y, planes = fewbit.forward(result.x, case.name, case.bits)
    dx = fewbit.backward(result.gradient, planes, case.name)
    torch.testing.assert_close(result.planes, planes, rtol=0, atol=0)
    torch.testing.assert_close(result.y, y, rtol=tolerance.rtol, atol=SMOOTH_ATOL, equal_nan=True)
    torch.testing.assert_close(result.dx, dx, rtol=tolerance.rtol, atol=0)
