"""Max-pooling with windows of 2x2 and a stride of 2, as `torch.compile` makes one kernel of it and its neighbours.

The forward pass is made of element-wise operators, so that what precedes and follows it (a bias, an activation,
dropout) is computed with it in one pass over memory; one byte of each window says which element was the largest. The
backward pass is an operator of its own, ``zeromean::max_pool_backward``: it writes each element of the gradient once,
zeros included, where Inductor's own spends its time on finding out the element's place.

Ties and NaN go as in `torch.nn.functional.max_pool2d` on CUDA: the first of equal elements, the last NaN.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zeromean.kernels.operator import fused

# Elements of a tile, four warps to a program: one access of 16 bytes a thread in half precision.
_TILE = 1024
_NARROWEST, _WIDEST = 32, 128

_library = torch.library.Library("zeromean", "FRAGMENT")


def max_pool(x_bchw: Tensor, *, ceil: bool) -> Tensor:
    """``y[i, j] = max(x[2i : 2i + 2, 2j : 2j + 2])`` over each channel, in channels_last.

    Worth its while inside `torch.compile` only.

    Args:
        x_bchw: A map; in channels_last nothing is copied.
        ceil: Whether a window that hangs over the edge of a map of odd size counts.
    """
    y: Tensor = _MaxPool.apply(x_bchw, ceil)  # type: ignore[no-untyped-call]
    return y


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ceil: bool) -> Tensor:
        y, which = largest(x, ceil)
        ctx.save_for_backward(which)
        ctx.size = x.shape[2:]
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (which,) = ctx.saved_tensors
        return torch.ops.zeromean.max_pool_backward(gradient, which, *ctx.size), None


def largest(x: Tensor, ceil: bool) -> tuple[Tensor, Tensor]:
    """The largest element of each window, and its place in it, counted row by row."""
    height, width = x.shape[2:]
    if ceil and (height % 2 or width % 2):
        x = F.pad(x, (0, width % 2, 0, height % 2), value=-math.inf)
    elif height % 2 or width % 2:
        x = x[:, :, : height - height % 2, : width - width % 2]
    y, *others = (x[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1))
    which = torch.zeros_like(y, dtype=torch.uint8)
    for place, other in enumerate(others, 1):
        above = (other > y) | (other != other)
        y, which = torch.where(above, other, y), torch.where(above, place, which)
    return y, which


def unpool(gradient: Tensor, which: Tensor, height: int, width: int) -> Tensor:
    """The gradient of a map of that size, given that of its windows and the place of each one's largest element."""
    if fused(gradient) and gradient.numel():
        return _launch(gradient, which, height, width)
    count, channels, down, across = gradient.shape
    dx = gradient.new_zeros(count, channels, 2 * down, 2 * across)
    for place in range(4):
        dx[:, :, place // 2 :: 2, place % 2 :: 2] = torch.where(which == place, gradient, 0)
    dx = F.pad(dx, (0, width - 2 * across, 0, height - 2 * down))
    return dx.contiguous(memory_format=torch.channels_last)


def _launch(gradient: Tensor, which: Tensor, height: int, width: int) -> Tensor:
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    which = which.contiguous(memory_format=torch.channels_last)
    count, channels, *pooled = gradient.shape
    dx = _fake(gradient, which, height, width)
    windows = count * -(-height // 2) * -(-width // 2)
    strip = max(_NARROWEST, min(_WIDEST, channels & -channels))
    strips, rows = -(-channels // strip), _TILE // strip
    even = 2 * pooled[0] == height and 2 * pooled[1] == width
    _program()[(-(-windows // rows) * strips,)](
        gradient, which, dx, windows, height, width, *pooled,
        CHANNELS=channels, STRIPS=strips, EVEN=even, ROWS=rows, WIDTH=strip, num_warps=4,
    )  # fmt: skip
    return dx


@functools.cache
def _program() -> Any:
    """Imported when first needed, as it needs Triton."""
    from zeromean.kernels.pooling_programs import max_pool_backward

    return max_pool_backward


def _fake(gradient: Tensor, which: Tensor, height: int, width: int) -> Tensor:
    shape = (*gradient.shape[:2], height, width)
    return torch.empty(shape, dtype=gradient.dtype, device=gradient.device, memory_format=torch.channels_last)


_library.define("max_pool_backward(Tensor gradient, Tensor which, SymInt height, SymInt width) -> Tensor")
_library.impl("max_pool_backward", unpool, "CompositeExplicitAutograd")
torch.library.register_fake("zeromean::max_pool_backward", _fake, lib=_library)
