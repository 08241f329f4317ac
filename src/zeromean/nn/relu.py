r"""The piecewise linear rectifiers without parameters to learn: ReLU, ShiftedReLU, LeakyReLU.

    ReLU(x)        = max(0, x)
    ShiftedReLU(x) = max(-1, x)
    LeakyReLU(x)   = x for x > 0,    negative_slope x otherwise

ReLU is torch's own, which keeps its output for the backward pass already. So do the other two here, where the output
tells which side the input was on: always for ShiftedReLU, for a slope that is not negative in LeakyReLU, where else one
bit more tells it.

Sources: Nair and Hinton, ICML 2010 (ReLU); Clevert et al., ICLR 2016 (ShiftedReLU, there SReLU, as a rival of ELU);
Maas et al., ICML 2013 (LeakyReLU).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import ReLU as ReLU
from torch.nn.functional import relu as relu

from zeromean.kernels import Operator
from zeromean.nn.backward import backward_may_follow, left_to_torch, quick, what_to_keep


def _shifted_value(x: Tensor, p0: None, p1: None, seed: None, noisy: None) -> Tensor:
    return F.threshold(x, -1.0, -1.0)


def _shifted_slope(
    gradient: Tensor,
    kept: Tensor,
    positive: Tensor | None,
    p0: None,
    p1: None,
    seed: None,
    noisy: None,
    output_kept: bool,
) -> tuple[Tensor, None, None]:
    return torch.ops.aten.threshold_backward(gradient, kept, -1.0), None, None


def _leaky_value(x: Tensor, p0: None, p1: None, seed: None, noisy: None, slope: float) -> Tensor:
    return F.leaky_relu(x, slope)


def _leaky_slope(
    gradient: Tensor,
    kept: Tensor,
    positive: Tensor | None,
    p0: None,
    p1: None,
    seed: None,
    noisy: None,
    slope: float,
    output_kept: bool,
) -> tuple[Tensor, None, None]:
    if positive is None:
        return torch.ops.aten.leaky_relu_backward(gradient, kept, slope, output_kept), None, None
    return torch.where(positive, gradient, gradient * slope), None, None


_SHIFTED = Operator("shifted_relu", _shifted_value, _shifted_slope)
_LEAKY = Operator("leaky_relu", _leaky_value, _leaky_slope)


def shifted_relu(x: Tensor) -> Tensor:
    """Shifted rectifier max(-1, x) of any shape and type; its derivative at x = -1 is 0, and the output is kept."""
    if quick("auto", x):
        return F.threshold(x, -1.0, -1.0)
    record = backward_may_follow(x)
    if left_to_torch("auto", x, "output", record):
        return F.threshold(x, -1.0, -1.0)
    return _SHIFTED(x, keep="output", record=record)


def leaky_relu(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """Leaky rectifier: x for x > 0, negative_slope x otherwise.

    Args:
        x: Any shape, any floating-point type.
        negative_slope: The slope for x <= 0. Only the output is kept for the backward pass if it is not negative; if it
            is, the output and one bit an element on a GPU, and the input elsewhere.
        inplace: Overwrite x with the result.

    Raises:
        ValueError: If negative_slope is a bool, or negative together with inplace.
    """
    _check_slope(negative_slope, inplace)
    if inplace or quick("auto", x):
        return F.leaky_relu(x, negative_slope, inplace)
    keep, record = what_to_keep("auto", x, negative_slope >= 0), backward_may_follow(x)
    if left_to_torch("auto", x, keep, record):
        return F.leaky_relu(x, negative_slope, inplace)
    return _LEAKY(x, None, None, None, None, negative_slope, keep=keep, record=record)


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
