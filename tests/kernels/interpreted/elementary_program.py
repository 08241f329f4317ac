"""A program that applies one function of `zeromean.kernels.elementary` to each element."""

# mypy: disable-error-code="import-untyped,untyped-decorator,no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zeromean.kernels import elementary

_BLOCK = 1 << 15


@triton.jit
def tail(x):
    """The first of the two results of `normal_tail`."""
    area, _ = elementary.normal_tail(x)
    return area


@triton.jit
def program(x_ptr, y_ptr, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, FUNCTION(tl.load(x_ptr + at)))


def apply(function: Any, x: Tensor) -> Tensor:
    """A function of as many elements as fill whole blocks."""
    y = torch.empty_like(x)
    program[(x.numel() // _BLOCK,)](x, y, FUNCTION=function, BLOCK=_BLOCK)
    return y
