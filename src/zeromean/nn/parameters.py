"""Learnable slopes: how they lie along an input, how their gradient is summed, how they are kept positive."""

import math

import torch
from torch import Tensor

from zeromean.nn.backward import exporting

# Read instead of zero where a parameter must stay positive: at exactly zero the output would forget the input, and with
# it the gradient that could bring the parameter back. A power of two well inside float16.
SMALLEST = 2.0**-10


def align(parameter: Tensor, x: Tensor, name: str) -> Tensor:
    """View a parameter so that it broadcasts along ``x``.

    Args:
        parameter: One value; or C values for the C channels in dimension 1 of x (as in `torch.nn.PReLU`); or a tensor
            of as many dimensions as x that broadcasts to x's shape, such as [R, 1, 1] for R stacked networks.
        x: The input, of any shape.
        name: What to call the parameter in an error.

    Raises:
        ValueError: If it fits in none of the three ways, or lies on another device.
    """
    if not isinstance(parameter, Tensor):
        raise ValueError(f"{name} must be a tensor, got {parameter!r}: use torch.tensor({parameter!r})")
    if parameter.device != x.device:
        # A program would read the one's memory at an address of the other's.
        raise ValueError(f"{name} must lie on x's device {x.device}, got {parameter.device}: use {name}.to(x.device)")
    if parameter.numel() == 1 and parameter.ndim <= 1:
        return parameter.reshape((1,) * x.ndim)
    if parameter.ndim == 1 and x.ndim > 1 and parameter.shape[0] == x.shape[1]:
        return parameter.reshape(1, -1, *(1,) * (x.ndim - 2))
    if parameter.ndim == x.ndim and all(size in (1, full) for size, full in zip(parameter.shape, x.shape, strict=True)):
        return parameter
    raise ValueError(
        f"{name} must hold one value, one for each channel in dimension 1 of x, or broadcast to x in as many "
        f"dimensions, got shape {tuple(parameter.shape)} for x of shape {tuple(x.shape)}: "
        "set num_parameters to 1 or to the number of channels"
    )


def check_initial(**values: float) -> None:
    """Raise ValueError for an initial value that is not a finite number."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"the initial {name} must be a finite number, got {value}: start it near 0.25")


def check_positive(bound: float, **values: float) -> None:
    """Raise ValueError for an initial value below the bound that it would be read as."""
    for name, value in values.items():
        if not bound <= value < math.inf:
            raise ValueError(
                f"the initial {name} must be at least {bound:g}, as it is read, got {value}: start it there"
            )


def sum_to(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Sum an element-wise gradient, in the precision it came in, over the dimensions along which a parameter lay."""
    return gradient.sum_to_size(parameter.shape).to(parameter.dtype)


def at_least(parameter: Tensor, bound: float) -> Tensor:
    """Read a parameter as at least ``bound``; its gradient passes straight through, so a stored value can come back."""
    # A parameter inside torch.vmap does not tell that it requires a gradient.
    if exporting() or torch.jit.is_tracing() or not torch.is_grad_enabled():  # type: ignore[attr-defined, no-untyped-call]
        return parameter.clamp(min=bound)
    return torch.where(parameter < bound, bound + (parameter - parameter.detach()), parameter)
