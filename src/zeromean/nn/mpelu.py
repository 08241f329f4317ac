r"""MPELU, the ELU with a learnable depth and a learnable decay, and the core that EELU shares.

    MPELU(x) = x for x >= 0,    alpha (e^(beta x) - 1) otherwise

With e = e^(beta x): dx = alpha beta e, dalpha = sum of e - 1, dbeta = sum of alpha x e over x < 0, and dx = 1
elsewhere. All of it follows from the output y, since e = y / alpha + 1 and x = ln(e) / beta, as long as alpha and beta
are positive. So both are read as at least 1/1024, with the gradient passing straight through to the stored value. This
bound is our choice: the published code has none (MPELU) or 0 (EELU), where the output would forget the input and a
parameter that arrived at zero could not leave it.

`taylor_gain` in `zeromean.nn.init` is the initialisation published with it.

Source: Li et al., "Improving deep neural network with Multiple Parametric Exponential Linear Units", Neurocomputing
301, 2018. The authors' code starts alpha at 0.25 or 1 and beta at 1.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from zeromean.kernels import Operator
from zeromean.nn.backward import Save, backward_may_follow, check_save, exporting, what_to_keep, widen
from zeromean.nn.parameters import SMALLEST, align, at_least, check_positive, sum_to


class NegativeSide(NamedTuple):
    """What the derivatives need on the side of x < 0; elsewhere the values for x = 0."""

    ratio: Tensor
    """e^(beta x) - 1."""
    decay: Tensor
    """e^(beta x)."""
    exponent: Tensor
    """beta x, finite."""


def from_output(y: Tensor, alpha: Tensor) -> NegativeSide:
    """Recover the negative side from y = alpha (e^(beta x) - 1), in y's precision; alpha > 0."""
    ratio = (y.clamp(max=0) / alpha).clamp(min=-1)
    # Where y has rounded to -alpha the logarithm is finite, and multiplied by a decay of 0.
    return NegativeSide(ratio, ratio + 1, torch.log1p(ratio.clamp(min=-1 + torch.finfo(ratio.dtype).eps)))


def from_input(x: Tensor, beta: Tensor) -> NegativeSide:
    """Compute the negative side from x, in x's precision."""
    exponent = (beta * x.clamp(max=0)).clamp(min=torch.finfo(x.dtype).min)
    return NegativeSide(torch.expm1(exponent), torch.exp(exponent), exponent)


def formula(x: Tensor, alpha: Tensor, beta: Tensor, k: Tensor | None = None) -> Tensor:
    """K x for x >= 0 (k = 1 if None), alpha (e^(beta x) - 1) otherwise, for aligned alpha and beta."""
    alpha, beta = at_least(alpha, SMALLEST), at_least(beta, SMALLEST)
    wide = widen(x)
    # Clamped, so that the side not chosen stays finite, and so does its gradient.
    negative = alpha * torch.expm1(beta * wide.clamp(max=0))
    return torch.where(wide < 0, negative, wide if k is None else wide * k).to(x.dtype)


def slope(
    gradient: Tensor, kept: Tensor, alpha: Tensor, beta: Tensor, k: Tensor | None, output_kept: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivative of the file's first lines, from the output or from the input."""
    alpha, beta = at_least(alpha, SMALLEST), at_least(beta, SMALLEST)
    wide, g = widen(kept), widen(gradient)
    side = from_output(wide, alpha) if output_kept else from_input(wide, beta)
    # With k = 0 an input above 0 gives an output of 0, an input below never does: so 0 counts as positive.
    negative = wide < 0
    dx = torch.where(negative, g * (alpha * beta * side.decay), g if k is None else g * k)
    dalpha = sum_to(torch.where(negative, g * side.ratio, 0.0), alpha)
    dbeta = sum_to(torch.where(negative, g * (alpha * side.decay * side.exponent / beta), 0.0), beta)
    return dx.to(gradient.dtype), dalpha, dbeta


def _value(x: Tensor, alpha: Tensor, beta: Tensor, seed: None, noisy: None) -> Tensor:
    return formula(x, alpha, beta)


def _slope(
    gradient: Tensor,
    kept: Tensor,
    positive: None,
    alpha: Tensor,
    beta: Tensor,
    seed: None,
    noisy: None,
    output_kept: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return slope(gradient, kept, alpha, beta, None, output_kept)


_MPELU = Operator("mpelu", _value, _slope, zero_positive=True)


def mpelu(x: Tensor, alpha: Tensor, beta: Tensor, *, save: Save = "auto") -> Tensor:
    """Multiple parametric ELU: x for x >= 0, alpha (e^(beta x) - 1) otherwise.

    Args:
        x: Any shape, any floating-point type; the arithmetic is in float32 at least.
        alpha: Minus the value approached at large negative x. One value; or C values for the channels in dimension 1
            of x; or a tensor of x's number of dimensions that broadcasts to x. Read as at least 1/1024. Its gradient is
            summed in float32 at least, and passes straight through that bound.
        beta: How fast that value is approached, in 1 / (unit of x); as alpha.
        save: What to keep for the backward pass; "auto" is the output. In bfloat16 "input" gives slopes in full
            precision, see `zeromean.functional.elu`.

    Raises:
        ValueError: If alpha or beta does not fit x.
    """
    check_save(save)
    asked = (save, x, alpha, beta)
    y = _MPELU.again(*asked)
    if y is not None:
        return y
    alpha, beta = align(alpha, x, "alpha"), align(beta, x, "beta")
    if exporting():
        return formula(x, alpha, beta)
    record = backward_may_follow(x, alpha, beta)
    return _MPELU(x, alpha, beta, keep=what_to_keep(save, x, True), record=record, asked=asked)


def plain(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """MPELU by plain operators, for evaluation and export."""
    return formula(x, align(alpha, x, "alpha"), align(beta, x, "beta"))


class MPELU(torch.nn.Module):
    """`mpelu` as a module with alpha and beta as its parameters.

    Args:
        num_parameters: 1 for one pair, or the number of channels in dimension 1 of the input.
        alpha: The initial value; the authors' code uses 0.25 or 1.
        beta: The initial value.
        device: Where the parameters lie.
        dtype: The parameters' type.
        save: "auto", "output" or "input", see `mpelu`. Evaluation mode runs plain operators.

    Raises:
        ValueError: If an initial value is below 1/1024, or save is unknown.
    """

    def __init__(
        self,
        num_parameters: int = 1,
        alpha: float = 0.25,
        beta: float = 1.0,
        device: Any = None,
        dtype: Any = None,
        *,
        save: Save = "auto",
    ) -> None:
        check_save(save)
        check_positive(SMALLEST, alpha=alpha, beta=beta)
        super().__init__()
        self.num_parameters, self.initial_alpha, self.initial_beta, self.save = num_parameters, alpha, beta, save
        self.alpha = torch.nn.Parameter(torch.empty(num_parameters, device=device, dtype=dtype))
        self.beta = torch.nn.Parameter(torch.empty(num_parameters, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every alpha and beta to its initial value."""
        torch.nn.init.constant_(self.alpha, self.initial_alpha)
        torch.nn.init.constant_(self.beta, self.initial_beta)

    def forward(self, x: Tensor) -> Tensor:
        """Apply `mpelu` to each element."""
        if self.training:
            return mpelu(x, self.alpha, self.beta, save=self.save)
        return plain(x, self.alpha, self.beta)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"num_parameters={self.num_parameters}, alpha={self.initial_alpha}, beta={self.initial_beta}"
