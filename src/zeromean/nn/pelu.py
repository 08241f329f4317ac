r"""PELU, the parametric exponential linear unit.

    PELU(x) = (a / b) x for x >= 0,    a (e^(x / b) - 1) otherwise

The slope is a / b on both sides of 0. With u = x / b on the positive side and e = e^(x / b) on the negative one:
dx = (a / b) times 1 or e, da = sum of u or e - 1, db = -(a / b) times the sum of u or (x / b) e. All of it follows from
the output, whose sign is the input's for positive a and b. Both are read as at least 0.1, with the gradient passing
straight through to the stored value.

Source: Trottier, Giguere and Chaib-draa, "Parametric exponential linear unit for deep convolutional neural networks",
ICMLA 2017. The bound a, b >= 0.1 is recalled, not checked against the paper; the authors' code resets stored values
instead and also keeps a below 2, which is not done here.
"""

from typing import Any

import torch
from torch import Tensor

from zeromean.kernels import Operator
from zeromean.nn.backward import Save, backward_may_follow, check_save, exporting, what_to_keep, widen
from zeromean.nn.mpelu import from_input, from_output
from zeromean.nn.parameters import align, at_least, check_positive, sum_to

_LOWER_BOUND = 0.1


def _formula(x: Tensor, a: Tensor, b: Tensor, *absent: None) -> Tensor:
    a, b = at_least(a, _LOWER_BOUND), at_least(b, _LOWER_BOUND)
    scaled = widen(x) / b
    return (a * torch.where(scaled < 0, torch.expm1(scaled.clamp(max=0)), scaled)).to(x.dtype)


def _slope(
    gradient: Tensor,
    kept: Tensor,
    positive: None,
    a: Tensor,
    b: Tensor,
    seed: None,
    noisy: None,
    output_kept: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivative, from the output or from the input."""
    a, b = at_least(a, _LOWER_BOUND), at_least(b, _LOWER_BOUND)
    wide, g = widen(kept), widen(gradient)
    side = from_output(wide, a) if output_kept else from_input(wide, 1 / b)
    u, negative = wide / (a if output_kept else b), wide < 0
    dx = torch.where(negative, side.decay, 1.0) * (a / b) * g
    da = sum_to(g * torch.where(negative, side.ratio, u), a)
    db = sum_to(-g * (a / b) * torch.where(negative, side.exponent * side.decay, u), b)
    return dx.to(gradient.dtype), da, db


_PELU = Operator("pelu", _formula, _slope, zero_positive=True)


def _aligned(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return align(a, x, "a"), align(b, x, "b")


def pelu(x: Tensor, a: Tensor, b: Tensor, *, save: Save = "auto") -> Tensor:
    """Parametric ELU: (a / b) x for x >= 0, a (e^(x / b) - 1) otherwise.

    Args:
        x: Any shape, any floating-point type; the arithmetic is in float32 at least.
        a: Minus the value approached at large negative x. One value; or C values for the channels in dimension 1 of x;
            or a tensor of x's number of dimensions that broadcasts to x. Read as at least 0.1. Its gradient is summed
            in float32 at least, and passes straight through that bound.
        b: The width of the bend, in the unit of x; as a.
        save: What to keep for the backward pass; "auto" is the output. In bfloat16 "input" gives slopes in full
            precision, see `zeromean.functional.elu`.

    Raises:
        ValueError: If a or b does not fit x.
    """
    check_save(save)
    asked = (save, x, a, b)
    y = _PELU.again(*asked)
    if y is not None:
        return y
    a, b = _aligned(x, a, b)
    if exporting():
        return _formula(x, a, b)
    return _PELU(x, a, b, keep=what_to_keep(save, x, True), record=backward_may_follow(x, a, b), asked=asked)


class PELU(torch.nn.Module):
    """`pelu` as a module with a and b as its parameters.

    Args:
        num_parameters: 1 for one pair, as published, or the number of channels in dimension 1 of the input.
        a: The initial value.
        b: The initial value.
        device: Where the parameters lie.
        dtype: The parameters' type.
        save: "auto", "output" or "input", see `pelu`. Evaluation mode runs plain operators.

    Raises:
        ValueError: If an initial value is below 0.1, or save is unknown.
    """

    def __init__(
        self,
        num_parameters: int = 1,
        a: float = 1.0,
        b: float = 1.0,
        device: Any = None,
        dtype: Any = None,
        *,
        save: Save = "auto",
    ) -> None:
        check_save(save)
        check_positive(_LOWER_BOUND, a=a, b=b)
        super().__init__()
        self.num_parameters, self.initial_a, self.initial_b, self.save = num_parameters, a, b, save
        self.a = torch.nn.Parameter(torch.empty(num_parameters, device=device, dtype=dtype))
        self.b = torch.nn.Parameter(torch.empty(num_parameters, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every a and b to its initial value."""
        torch.nn.init.constant_(self.a, self.initial_a)
        torch.nn.init.constant_(self.b, self.initial_b)

    def forward(self, x: Tensor) -> Tensor:
        """Apply `pelu` to each element."""
        if self.training:
            return pelu(x, self.a, self.b, save=self.save)
        return _formula(x, *_aligned(x, self.a, self.b))

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"num_parameters={self.num_parameters}, a={self.initial_a}, b={self.initial_b}"
