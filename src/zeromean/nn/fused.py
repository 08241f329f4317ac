r"""ELU together with its neighbour, in one pass over memory where the fused programs run.

    bias_elu(x, bias)    = ELU(x + bias)       after a layer without a bias of its own; keeps the output
    elu_add(x, residual) = ELU(x) + residual   instead of adding in place to an output that is still needed; keeps x

In the backward pass bias_elu sums the gradient of the bias while it makes the one of x; elu_add hands its gradient on
to the residual as it is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from zeromean.kernels import Operator, fused
from zeromean.nn.backward import backward_may_follow, exporting, widen
from zeromean.nn.elu import check_alpha
from zeromean.nn.parameters import align, sum_to


def _bias_value(
    x: Tensor, bias: Tensor, p1: None, seed: None, noisy: None, alpha: float, scale: float, input_scale: float
) -> Tensor:
    return torch.ops.aten.elu(widen(x) + bias, alpha, scale, input_scale).to(x.dtype)  # type: ignore[no-any-return]


def _bias_slope(
    gradient: Tensor,
    kept: Tensor,
    positive: None,
    bias: Tensor,
    p1: None,
    seed: None,
    noisy: None,
    alpha: float,
    scale: float,
    input_scale: float,
    output_kept: bool,
) -> tuple[Tensor, Tensor, None]:
    v = widen(kept) if output_kept else widen(kept) + bias
    dx = torch.ops.aten.elu_backward(widen(gradient), alpha, scale, input_scale, output_kept, v)
    return dx.to(gradient.dtype), sum_to(dx, bias), None


def _add_value(
    x: Tensor, residual: Tensor, p1: None, seed: None, noisy: None, alpha: float, scale: float, input_scale: float
) -> Tensor:
    return (torch.ops.aten.elu(widen(x), alpha, scale, input_scale) + residual).to(x.dtype)  # type: ignore[no-any-return]


def _add_slope(
    gradient: Tensor,
    kept: Tensor,
    positive: None,
    residual: Tensor | None,
    p1: None,
    seed: None,
    noisy: None,
    alpha: float,
    scale: float,
    input_scale: float,
    output_kept: bool,
) -> tuple[Tensor, Tensor, None]:
    return torch.ops.aten.elu_backward(gradient, alpha, scale, input_scale, False, kept), gradient.clone(), None


_BIAS_ELU = Operator("bias_elu", _bias_value, _bias_slope)
_ELU_ADD = Operator("elu_add", _add_value, _add_slope, adds=True)


def bias_elu(x: Tensor, bias: Tensor, alpha: float = 1.0) -> Tensor:
    """ELU of a sum with a bias: x + bias where that is positive, alpha (e^(x + bias) - 1) otherwise.

    Args:
        x: Any shape, any floating-point type; the arithmetic is in float32 at least.
        bias: One value; or C values for the channels in dimension 1 of x; or a tensor of x's number of dimensions that
            broadcasts to x. Its gradient is summed in float32 at least.
        alpha: As in `elu`, but not negative, as the output alone is kept.

    Raises:
        ValueError: If the bias does not fit x, or alpha is a bool or negative.
    """
    check_alpha(alpha, "bias_elu", "output", True)
    bias = align(bias, x, "bias")
    if exporting() or not (fused(x) or backward_may_follow(x, bias)):
        return _bias_value(x, bias, None, None, None, alpha, 1.0, 1.0)
    return _BIAS_ELU(x, bias, None, None, None, alpha, 1.0, 1.0, keep="output", record=backward_may_follow(x, bias))


def elu_add(x: Tensor, residual: Tensor, alpha: float = 1.0) -> Tensor:
    """ELU of x plus a residual: the addition in the same pass, and without overwriting what a backward pass needs.

    Args:
        x: Any shape, any floating-point type; the arithmetic is in float32 at least.
        residual: Of x's shape and type.
        alpha: As in `elu`.

    Raises:
        ValueError: If the residual differs from x in shape, type or device, or alpha is a bool.
    """
    check_alpha(alpha, "elu_add", "input", False)
    if (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"residual must have x's shape, type and device, {tuple(x.shape)} of {x.dtype} on {x.device}, got "
            f"{tuple(residual.shape)} of {residual.dtype} on {residual.device}: expand, convert or move it"
        )
    if exporting() or not (fused(x) or backward_may_follow(x, residual)):
        return F.elu(x, alpha) + residual
    record = backward_may_follow(x, residual)
    return _ELU_ADD(x, residual, None, None, None, alpha, 1.0, 1.0, keep="input", record=record)
