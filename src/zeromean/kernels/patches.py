"""The patches of a convolution on images of few channels, as the rows of a matrix: ``zeromean::patches``.

A convolution of three channels feeds tensor cores badly: they multiply in steps of eight channels or more. With the
patch under a kernel as a row, ``y = patches @ weight^T`` is one product of an inner size of kernel * kernel * channels,
rounded up to a multiple of 8 by zeros, and so is the weight's gradient.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zeromean.kernels.operator import fused

# Elements that a program of four warps makes.
_TILE = 2048

_library = torch.library.Library("zeromean", "FRAGMENT")


def round_up(count: int) -> int:
    """The next multiple of 8: tensor cores read 16 bytes at a time."""
    return -(-count // 8) * 8


def patches(x_bchw: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """A row for each place of a square kernel: its elements by row, column and channel, then zeros.

    Args:
        x_bchw: Images, in any layout, that ask for no gradient.
        kernel: Side of the kernel.
        stride: Step from one place to the next.
        padding: Zeros on every side.

    Returns:
        ``[B H' W', round_up(kernel * kernel * C)]`` with H' = (H + 2 padding - kernel) // stride + 1.
    """
    rows: Tensor = torch.ops.zeromean.patches(x_bchw, kernel, stride, padding)
    return rows


def convolve(x_bchw: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """The convolution without its bias, as one product; channels_last, differentiable by the weight alone.

    Args:
        x_bchw: Images that ask for no gradient.
        weight: ``[units, C, kernel, kernel]``, of the images' type.
        stride: As in `torch.nn.functional.conv2d`.
        padding: Too.
    """
    units, _, kernel, _ = weight.shape
    down, across = _places(x_bchw, kernel, stride, padding)
    rows = patches(x_bchw, kernel, stride, padding)
    matrix = weight.permute(0, 2, 3, 1).reshape(units, -1)
    y = rows @ F.pad(matrix, (0, rows.shape[1] - matrix.shape[1])).t()
    return y.view(-1, down, across, units).permute(0, 3, 1, 2)


def _patches(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    if fused(x) and x.numel():
        return _launch(x, kernel, stride, padding)
    windows = F.pad(x, (padding,) * 4).unfold(2, kernel, stride).unfold(3, kernel, stride)
    rows = windows.permute(0, 2, 3, 4, 5, 1).reshape(-1, kernel * kernel * x.shape[1])
    return F.pad(rows, (0, round_up(rows.shape[1]) - rows.shape[1]))


def _launch(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    channels, height, width = x.shape[1:]
    out, (down, across) = _fake(x, kernel, stride, padding), _places(x, kernel, stride, padding)
    rows, inner = out.shape
    span = 1 << (inner - 1).bit_length()
    block = max(1, _TILE // span)
    _program()[(-(-rows // block),)](
        x, out, rows, height, width, down, across, *x.stride(),
        CHANNELS=channels, KERNEL=kernel, STRIDE=stride, PADDING=padding,
        INNER=inner, ROWS=block, WIDTH=span, num_warps=4,
    )  # fmt: skip
    return out


@functools.cache
def _program() -> Any:
    """Imported when first needed, as it needs Triton."""
    from zeromean.kernels.patches_programs import gather

    return gather


def _places(x: Tensor, kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """How often the kernel fits, down and across."""
    height, width = x.shape[2:]
    return (height + 2 * padding - kernel) // stride + 1, (width + 2 * padding - kernel) // stride + 1


def _fake(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    down, across = _places(x, kernel, stride, padding)
    return x.new_empty(len(x) * down * across, round_up(kernel * kernel * x.shape[1]))


_library.define("patches(Tensor x, int kernel, int stride, int padding) -> Tensor")
_library.impl("patches", _patches, "CompositeExplicitAutograd")
torch.library.register_fake("zeromean::patches", _fake, lib=_library)
