"""How the programs of `linear_programs` are launched.

All tensors are matrices of one half-precision type, contiguous, 16-byte aligned, their widths multiples of 8. A launch
through Triton's front end takes longer than some of these programs run, so it happens once for each kind of call; the
program that it compiles is then launched directly.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from zeromean.kernels.linear_programs import SLOPES, VALUES, forward, slopes, unit_elu
from zeromean.kernels.programs import finish

# The pass that makes slopes: columns and elements of a tile, and tiles to a program.
_WIDTH, _BLOCK, _STEPS = 128, 2048, 8
_compiled: dict[tuple[Any, ...], Any] = {}


@dataclass(frozen=True)
class Tile:
    """How a product is cut: tiles of rows by columns, summed ``depth`` at a time, ``stages`` of them on their way.

    A multiprocessor runs ``resident`` instances, which share out the tiles; 0 stands for an instance a tile.
    """

    rows: int = 128
    columns: int = 128
    depth: int = 64
    warps: int = 4
    stages: int = 3
    parts: int = 2
    resident: int = 2


TILE = Tile()


def run_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, scalars: Sequence[float], round_preact: bool,
    tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """The output f(x Wᵀ + b) for x [rows, inner] and W [units, inner]."""
    (rows, inner), units = x.shape, weight.shape[0]
    tile = tile or TILE
    s0, s1, s2 = scalars
    unit = activation == "elu" and s0 == s1 == s2 == 1
    y = x.new_empty(rows, units)
    arguments = (
        TensorDescriptor(x, [rows, inner], [inner, 1], [tile.rows, tile.depth]),
        TensorDescriptor(weight, [units, inner], [inner, 1], [tile.columns, tile.depth]),
        TensorDescriptor(y, [rows, units], [units, 1], [tile.rows, tile.columns // tile.parts]),
        bias, rows, inner, units, s0, s1, s2,
    )  # fmt: skip
    key = (forward, x.get_device(), x.dtype, inner, units, tile, activation, unit, bias is None, round_preact)
    value = unit_elu if unit else VALUES[activation]
    sizes = (tile.rows, tile.columns, tile.depth, tile.parts, tile.resident > 0)
    tiles = _quotient(rows, tile.rows) * _quotient(units, tile.columns)
    grid = (min(tiles, _multiprocessors(x.get_device()) * tile.resident) if tile.resident else tiles, 1, 1)
    _launch(x, key, grid, arguments, (value, bias is not None, round_preact, *sizes), tile.warps, tile.stages)
    return y


def run_slopes(
    gradient: Tensor, y: Tensor, with_bias: bool, activation: str, scalars: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The gradients dz = g f'(y) and db of `run_forward`; db is empty without bias."""
    rows, units = y.shape
    width = min(_WIDTH, _power_of_2(units))
    block = _BLOCK // width
    count, strips = _quotient(rows, block * _STEPS), _quotient(units, width)
    masked = rows % (block * _STEPS) != 0 or units % width != 0
    dz = torch.empty_like(y)
    shares = torch.empty((count, units) if with_bias else 0, dtype=torch.float32, device=y.device)
    key = (slopes, y.get_device(), y.dtype, units, activation, with_bias, masked)
    constants = (SLOPES[activation], with_bias, masked, block, width, _STEPS)
    _launch(y, key, (strips * count, 1, 1), (gradient, y, dz, shares, rows, units, *scalars), constants, 4, 3)
    return dz, _sum(shares, y.dtype) if with_bias else y.new_empty(0)


def _sum(shares: Tensor, dtype: torch.dtype) -> Tensor:
    count, units = shares.shape
    total = torch.empty(units, dtype=dtype, device=shares.device)
    deep = min(1024, _power_of_2(count))
    steps = _quotient(count, deep)
    key = (finish, shares.get_device(), dtype, count, units)
    _launch(shares, key, (_quotient(units, 8), 1, 1), (shares, total, None, count, units), (1, steps, deep, 8), 8, 3)
    return total


@functools.cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device >= 0 else 2


def _quotient(number: int, divisor: int) -> int:
    """Rounded up; Triton's own function takes as long as a launch."""
    return -(-number // divisor)


def _power_of_2(number: int) -> int:
    """The next one, if it is none."""
    return 1 << (number - 1).bit_length()


def _launch(
    x: Tensor, key: tuple[Any, ...], grid: tuple[int, int, int], arguments: tuple[Any, ...],
    constants: tuple[Any, ...], warps: int, stages: int,
) -> None:  # fmt: skip
    """Launch the program key[0] where x is; key tells everything that the compiled program depends on."""
    elsewhere = x.is_cuda and torch.cuda.current_device() != x.get_device()
    with torch.cuda.device_of(x) if elsewhere else contextlib.nullcontext():
        compiled = _compiled.get(key)
        if compiled is None:
            compiled = key[0][grid](*arguments, *constants, num_warps=warps, num_stages=stages)
            _compiled[key] = compiled and (compiled.run, compiled.function, compiled.packed_metadata, None, None, None)
        else:
            run, *fixed = compiled
            run(*grid, torch._C._cuda_getCurrentRawStream(x.get_device()), *fixed, *arguments, *constants)
