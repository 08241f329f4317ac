r"""SiLU, GELU and Mish with a backward pass that keeps 1 to 4 bits an element instead of the input.

    forward:    y = f(x), and the code c(x), one of 2^bits
    backward:   dx = level[c(x)] * gradient,   level[c(x)] the nearest of 2^bits numbers to f'(x)

Between layers that keep their inputs, bfloat16 takes 2 + bits / 8 bytes an element instead of 4. The price is an
approximate gradient: the derivative is off by 0.18, 0.09, 0.044, 0.022 (root mean square for x ~ N(0, 1), 1 to 4 bits).
The levels are best for such x, and constants beyond them, so they suit inputs of about unit size.

Source: Novikov et al., "Few-bit backward: quantized gradients of activation functions for memory footprint reduction",
2022; `zeromean.kernels.fewbit_tables` says where ours differs.
"""

from typing import Any

import torch
from torch import Tensor

from zeromean.kernels import fewbit as operators
from zeromean.kernels.fewbit_tables import FUNCTIONS, MOST_BITS
from zeromean.nn.backward import backward_may_follow
from zeromean.spelling import nearest


class _FewBit(torch.autograd.Function):
    """The function of a contiguous tensor, with the code's bit-planes alone kept.

    The third output has no elements, but depends on x, and so leads a second backward pass to its error. Without it a
    gradient would seem not to depend on x, and a penalty on the gradient would count for nothing, in silence.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, name: str, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        return *operators.forward(x, name, bits), x.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, planes, tie = output
        ctx.mark_non_differentiable(planes)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(planes, tie)
        ctx.name = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor, None, None]:
        dx: Tensor = _Steps.apply(gradient, *ctx.saved_tensors, ctx.name)  # type: ignore[no-untyped-call]
        return dx, None, None


class _Steps(torch.autograd.Function):
    """The gradient times the levels."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, planes: Tensor, tie: Tensor, name: str) -> Tensor:
        return operators.backward(gradient, planes, name)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[3]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        raise ValueError(
            f"the few-bit gradient of {ctx.name} is a step function and has no derivative, which a second backward "
            "pass asks for: use bits=None there"
        )


def fewbit(x: Tensor, name: str, bits: int) -> Tensor:
    """SiLU, GELU or Mish whose backward pass keeps ``bits`` bits an element and takes the derivative in 2^bits steps.

    Args:
        x: Any shape, layout and real floating-point type. Where x is NaN so is the result, and the derivative is that
            of large x.
        name: "silu", "gelu", "gelu_tanh" or "mish".
        bits: 1 to 4. 3 is a fair start: the derivative is off by 0.044 (root mean square for x ~ N(0, 1)).

    Returns:
        The function itself, to rounding, in x's type and memory layout. Only the gradient is approximate.

    Raises:
        ValueError: If the name or the number of bits is unknown, if x is not of a real floating-point type; or, in a
            second backward pass through the gradient, because steps have no second derivative.
    """
    _check(x, name, bits)
    if not backward_may_follow(x):
        return FUNCTIONS[name](x)
    if x.is_contiguous():
        return _first(x, name, bits)
    order = x.dim_order()
    return _first(x.permute(order), name, bits).permute([order.index(dim) for dim in range(x.ndim)])


def _first(x: Tensor, name: str, bits: int) -> Tensor:
    y: Tensor = _FewBit.apply(x, name, bits)[0]  # type: ignore[no-untyped-call]
    return y


def _check(x: Tensor, name: str, bits: int) -> None:
    if name not in FUNCTIONS:
        raise ValueError(f"unknown few-bit activation {name!r}: {nearest(name, FUNCTIONS)}")
    check_bits(bits)
    if not x.is_floating_point():
        raise ValueError(f"x must be of a real floating-point type, got {x.dtype}: use x.float()")


def check_bits(bits: int | None) -> None:
    """Raise ValueError for a number of bits that there is no table for; None means none."""
    if bits is not None and (not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= MOST_BITS):
        raise ValueError(f"bits must be a whole number from 1 to {MOST_BITS}, got {bits}: 3 is a fair start")
