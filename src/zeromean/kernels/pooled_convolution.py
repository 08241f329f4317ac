"""A convolution of images with few channels and the 2x2 max-pooling behind it, without the map between them.

    y = max_pool(conv(x, weight))    zeromean::pooled_convolution, and which of four was the largest
    dweight                          zeromean::pooled_convolution_backward, in shares that are yet to be summed

Both know the weight as a matrix with a row for each element of a patch, by row, column and channel, and zeros below.

That map is the largest of a network for small images, four times what is left of it, and is written and read again
twice forward and twice backward; the products themselves are small. Ties and NaN go as in `zeromean.kernels.pooling`,
by the products before they are rounded to half precision.

Where there are no programs, convolution and pooling follow one another.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from zeromean.kernels.linear import HALF_TYPES
from zeromean.kernels.operator import fused
from zeromean.kernels.pooling import largest, unpool

# Pooling windows of a program.
_ROWS = 32
# Programs of a backward pass, at most: as many as run at once, as each has a share of the gradient to be summed.
_PROGRAMS = 264

_library = torch.library.Library("zeromean", "FRAGMENT")


def convolve_and_pool(x_bchw: Tensor, weight: Tensor, padding: int, *, ceil: bool) -> Tensor:
    """``max_pool(conv(x, weight))`` with windows of 2x2 and strides of 1 and 2, in channels_last.

    Worth its while inside `torch.compile` only.

    Args:
        x_bchw: Images that ask for no gradient.
        weight: ``[units, C, kernel, kernel]``, of the images' type: float16 or bfloat16 for the programs.
        padding: Zeros on every side of an image.
        ceil: Whether a window that hangs over the edge of a map of odd size counts.
    """
    y: Tensor = _ConvolveAndPool.apply(x_bchw, weight, padding, ceil)  # type: ignore[no-untyped-call]
    return y


class _ConvolveAndPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: int, ceil: bool) -> Tensor:
        units, channels, kernel, _ = weight.shape
        matrix = weight.permute(2, 3, 1, 0).reshape(-1, units)
        matrix = F.pad(matrix, (0, 0, 0, sum(_parts(len(matrix))) - len(matrix))).contiguous()
        y, which = torch.ops.zeromean.pooled_convolution(x, matrix, kernel, padding, ceil)
        ctx.save_for_backward(x, which)
        ctx.shape, ctx.padding = (kernel, kernel, channels, units), padding
        return y  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None, None]:
        x, which = ctx.saved_tensors
        kernel, _, channels, units = ctx.shape
        shares = torch.ops.zeromean.pooled_convolution_backward(gradient, which, x, kernel, ctx.padding)
        matrix = shares.sum(0)[: kernel * kernel * channels].to(gradient.dtype)
        return None, matrix.view(kernel, kernel, channels, units).permute(3, 2, 0, 1), None, None


def _forward(x: Tensor, matrix: Tensor, kernel: int, padding: int, ceil: bool) -> tuple[Tensor, Tensor]:
    if _fits(x):
        return _launch(x, matrix, kernel, padding, ceil)
    inner = kernel * kernel * x.shape[1]
    weight = matrix[:inner].view(kernel, kernel, x.shape[1], -1).permute(3, 2, 0, 1)
    y, which = largest(F.conv2d(x, weight, None, 1, padding).contiguous(memory_format=torch.channels_last), ceil)
    return y.contiguous(memory_format=torch.channels_last), which.contiguous(memory_format=torch.channels_last)


def _backward(gradient: Tensor, which: Tensor, x: Tensor, kernel: int, padding: int) -> Tensor:
    if _fits(x):
        return _launch_backward(gradient, which, x, kernel, padding)
    shape = (gradient.shape[1], x.shape[1], kernel, kernel)
    dz = unpool(gradient, which, *_map(x, kernel, padding))
    dweight: Tensor = conv2d_weight(x, shape, dz, 1, padding)
    matrix = dweight.permute(2, 3, 1, 0).reshape(-1, len(dweight)).to(_wide(x))
    return F.pad(matrix, (0, 0, 0, sum(_parts(len(matrix))) - len(matrix))).unsqueeze(0)


def _fits(x: Tensor) -> bool:
    return fused(x) and x.dtype in HALF_TYPES and 0 < x.numel() < 2**31


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _launch(x: Tensor, matrix: Tensor, kernel: int, padding: int, ceil: bool) -> tuple[Tensor, Tensor]:
    units, channels = matrix.shape[1], x.shape[1]
    y, which = _fake(x, matrix, kernel, padding, ceil)
    most, rest = _parts(kernel * kernel * channels)
    out, (down, across) = _map(x, kernel, padding), y.shape[2:]
    # Each strip makes the patches anew.
    windows, width = y.numel() // units, 128 if units % 128 == 0 else 256
    strips = -(-units // width)
    _programs().pooled_convolution[(-(-windows // _ROWS) * strips,)](
        x.contiguous(memory_format=torch.channels_last), matrix.contiguous(), y, which,
        windows, *x.shape[2:], *out, down, across,
        CHANNELS=channels, UNITS=units, KERNEL=kernel, PADDING=padding, EVEN=out == (2 * down, 2 * across),
        MOST=most, REST=rest, STRIPS=strips, ROWS=_ROWS, WIDTH=width, num_warps=width // 32,
    )  # fmt: skip
    return y, which


def _launch_backward(gradient: Tensor, which: Tensor, x: Tensor, kernel: int, padding: int) -> Tensor:
    units, channels = gradient.shape[1], x.shape[1]
    most, rest = _parts(kernel * kernel * channels)
    share = _fake_backward(gradient, which, x, kernel, padding)
    windows, width, shares = gradient.numel() // units, _backward_width(units), len(share)
    strips = -(-units // width)
    _programs().pooled_convolution_backward[(shares * strips,)](
        gradient.contiguous(memory_format=torch.channels_last), which.contiguous(memory_format=torch.channels_last),
        x.contiguous(memory_format=torch.channels_last), share, windows, *x.shape[2:], *gradient.shape[2:], shares,
        CHANNELS=channels, UNITS=units, KERNEL=kernel, PADDING=padding,
        MOST=most, REST=rest, STRIPS=strips, ROWS=_ROWS, WIDTH=width, STEPS=-(-windows // (shares * _ROWS)),
        num_warps=4,
    )  # fmt: skip
    return share


def _backward_width(units: int) -> int:
    return 128 if units % 128 == 0 else 64


def _parts(inner: int) -> tuple[int, int]:
    """Two powers of two, 16 or more or none, that hold so many elements."""
    most = max(16, 1 << (inner.bit_length() - 1))
    rest = inner - most
    if rest <= 0:
        return most, 0
    rest = max(16, 1 << (rest - 1).bit_length())
    return (2 * most, 0) if rest == most else (most, rest)


def _map(x: Tensor, kernel: int, padding: int) -> tuple[int, int]:
    """Size of the map between convolution and pooling."""
    height, width = x.shape[2:]
    return height + 2 * padding - kernel + 1, width + 2 * padding - kernel + 1


@functools.cache
def _programs() -> Any:
    """Imported when first needed, as they need Triton."""
    from zeromean.kernels import pooled_convolution_programs

    return pooled_convolution_programs


def _fake(x: Tensor, matrix: Tensor, kernel: int, padding: int, ceil: bool) -> tuple[Tensor, Tensor]:
    down, across = ((side + int(ceil)) // 2 for side in _map(x, kernel, padding))
    empty = functools.partial(
        torch.empty, (len(x), matrix.shape[1], down, across), device=x.device, memory_format=torch.channels_last
    )
    return empty(dtype=x.dtype), empty(dtype=torch.uint8)


def _fake_backward(gradient: Tensor, which: Tensor, x: Tensor, kernel: int, padding: int) -> Tensor:
    units, shares = gradient.shape[1], 1
    if _fits(x):
        strips, blocks = -(-units // _backward_width(units)), -(-gradient.numel() // (units * _ROWS))
        shares = min(max(1, _PROGRAMS // strips), blocks)
    inner = sum(_parts(kernel * kernel * x.shape[1]))
    return torch.empty((shares, inner, units), dtype=_wide(x), device=x.device)


_library.define("pooled_convolution(Tensor x, Tensor matrix, int kernel, int padding, bool ceil) -> (Tensor, Tensor)")
_library.impl("pooled_convolution", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("zeromean::pooled_convolution", _fake, lib=_library)
_library.define(
    "pooled_convolution_backward(Tensor gradient, Tensor which, Tensor x, int kernel, int padding) -> Tensor"
)
_library.impl("pooled_convolution_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("zeromean::pooled_convolution_backward", _fake_backward, lib=_library)
