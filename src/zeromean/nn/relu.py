r"""The piecewise linear rectifiers without parameters to learn: ReLU, ShiftedReLU, LeakyReLU.

    ReLU(x)        = max(0, x)
    ShiftedReLU(x) = max(-1, x)
    LeakyReLU(x)   = x for x > 0,    negative_slope x otherwise

ReLU is torch's own, which keeps its output for the backward pass already. So do the other two here, where the output
tells which side the input was on: always for ShiftedReLU, for a positive slope in LeakyReLU.

Sources: Nair and Hinton, ICML 2010 (ReLU); Clevert et al., ICLR 2016 (ShiftedReLU, there SReLU, as a rival of ELU);
Maas et al., ICML 2013 (LeakyReLU).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import ReLU as ReLU
from torch.nn.functional import relu as relu

from zeromean.nn.backward import apply, backward_may_follow


class _ShiftedFromOutput(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.threshold(x, -1.0, -1.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, y, -1.0)  # type: ignore[no-any-return]


class _LeakyFromOutput(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, slope: float) -> Tensor:
        return F.leaky_relu(x, slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.slope = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.leaky_relu_backward(gradient, y, ctx.slope, True), None


def shifted_relu(x: Tensor) -> Tensor:
    """Shifted rectifier max(-1, x) of any shape and type; its derivative at x = -1 is 0, and the output is kept."""
    return apply(_ShiftedFromOutput, x) if backward_may_follow(x) else F.threshold(x, -1.0, -1.0)


def leaky_relu(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """Leaky rectifier: x for x > 0, negative_slope x otherwise.

    Args:
        x: Any shape, any floating-point type.
        negative_slope: The slope for x <= 0. Only the output is kept for the backward pass if it is positive.
        inplace: Overwrite x with the result.

    Raises:
        ValueError: If negative_slope is a bool, or negative together with inplace.
    """
    _check_slope(negative_slope, inplace)
    if not inplace and negative_slope > 0 and backward_may_follow(x):
        return apply(_LeakyFromOutput, x, negative_slope)
    return F.leaky_relu(x, negative_slope, inplace)


def _check_slope(slope: float, inplace: bool) -> None:
    if isinstance(slope, bool):
        raise ValueError(f"negative_slope must be a number, got {slope}: write inplace={slope} to set inplace")
    if not -math.inf < slope < math.inf:
        raise ValueError(f"negative_slope must be a finite number, got {slope}: the default is 0.01")
    if inplace and slope < 0:
        raise ValueError(
            f"negative_slope must be >= 0 in place, got {slope}: the sign of the output no longer tells the input's. "
            "Choose inplace=False"
        )


class ShiftedReLU(torch.nn.Module):
    """`shifted_relu` as a module: max(-1, x)."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply `shifted_relu` to each element."""
        return shifted_relu(x) if self.training else F.threshold(x, -1.0, -1.0)


class LeakyReLU(torch.nn.LeakyReLU):
    """`leaky_relu` as a module; `torch.nn.LeakyReLU` that keeps only its output for a positive slope.

    Args:
        negative_slope: The slope for x <= 0.
        inplace: Overwrite the input.

    Raises:
        ValueError: As `leaky_relu`.
    """

    def __init__(self, negative_slope: float = 0.01, inplace: bool = False) -> None:
        _check_slope(negative_slope, inplace)
        super().__init__(negative_slope, inplace)

    def forward(self, x: Tensor) -> Tensor:
        """Apply `leaky_relu` to each element."""
        return leaky_relu(x, self.negative_slope, self.inplace) if self.training else super().forward(x)
