r"""The exponential linear unit and its two fixed relatives: ELU, SELU, CELU.

    ELU(x)  = x                 for x > 0,    alpha (e^x - 1)            otherwise
    SELU(x) = lambda x          for x > 0,    lambda alpha (e^x - 1)     otherwise
    CELU(x) = x                 for x > 0,    alpha (e^(x / alpha) - 1)  otherwise

All three are s·x and s·alpha·(e^(c x) - 1) for a scale s and an input scale c. On the negative side the derivative
s c alpha e^(c x) equals c (y + s alpha) for the output y, so the output alone serves the backward pass, as long as
its sign tells the sign of the input: alpha >= 0. For a negative alpha one bit more does. At x = 0 the derivative is
that of the negative side.

Sources: Clevert, Unterthiner, Hochreiter, "Fast and accurate deep network learning by exponential linear units", ICLR
2016; Klambauer et al., "Self-normalizing neural networks", NeurIPS 2017; Barron, "Continuously differentiable
exponential linear units", 2017.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from zeromean.kernels import Operator
from zeromean.nn.backward import Save, backward_may_follow, check_save, left_to_torch, quick, what_to_keep, widen

SELU_ALPHA = 1.6732632423543772848170429916717
SELU_SCALE = 1.0507009873554804934193349852946


def _value(
    x: Tensor, p0: None, p1: None, seed: None, noisy: None, alpha: float, scale: float, input_scale: float
) -> Tensor:
    return torch.ops.aten.elu(x, alpha, scale, input_scale)  # type: ignore[no-any-return]


def _slope(
    gradient: Tensor,
    kept: Tensor,
    positive: Tensor | None,
    p0: None,
    p1: None,
    seed: None,
    noisy: None,
    alpha: float,
    scale: float,
    input_scale: float,
    output_kept: bool,
) -> tuple[Tensor, None, None]:
    if positive is None:
        return torch.ops.aten.elu_backward(gradient, alpha, scale, input_scale, output_kept, kept), None, None
    negative = input_scale * (widen(kept) + scale * alpha)
    return (widen(gradient) * torch.where(positive, scale, negative)).to(gradient.dtype), None, None


_ELU = Operator("elu", _value, _slope)


def _apply(x: Tensor, alpha: float, scale: float, input_scale: float, save: Save) -> Tensor | None:
    """The whole family; None where torch's own operator does what is wanted."""
    keep, record = what_to_keep(save, x, alpha >= 0), backward_may_follow(x)
    if input_scale < 0 or left_to_torch(save, x, keep, record):
        return None
    return _ELU(x, None, None, None, None, alpha, scale, input_scale, keep=keep, record=record)


def elu(x: Tensor, alpha: float = 1.0, inplace: bool = False, *, save: Save = "auto") -> Tensor:
    """Exponential linear unit: x for x > 0, alpha (e^x - 1) otherwise.

    Args:
        x: Any shape, any floating-point type.
        alpha: Minus the value approached at large negative x.
        inplace: Overwrite x with the result.
        save: What to keep for the backward pass. "auto" is the output, at no extra memory before a layer that keeps its
            input; for alpha < 0, one bit an element more on a GPU, and the input elsewhere. On a GPU, small tensors
            outside a compiled program are left to torch, which keeps both. In bfloat16 the slope from the output is off
            by up to 0.002, and zero below x = -6.2; "input" gives it in full.

    Raises:
        ValueError: If alpha is a bool, or negative where the output overwrites x.
    """
    check_alpha(alpha, "elu", save, inplace)
    y = None if inplace or quick(save, x) else _apply(x, alpha, 1.0, 1.0, save)
    return F.elu(x, alpha, inplace) if y is None else y


def selu(x: Tensor, inplace: bool = False, *, save: Save = "auto") -> Tensor:
    """Scaled ELU, with the published alpha and lambda that make mean 0 and variance 1 a fixed point.

    Args:
        x: Any shape, any floating-point type.
        inplace: Overwrite x with the result.
        save: What to keep for the backward pass; "auto" is the output. See `elu`.

    Raises:
        ValueError: If save is unknown, or "input" together with inplace.
    """
    check_alpha(SELU_ALPHA, "selu", save, inplace)
    y = None if inplace or quick(save, x) else _apply(x, SELU_ALPHA, SELU_SCALE, 1.0, save)
    return F.selu(x, inplace) if y is None else y


def celu(x: Tensor, alpha: float = 1.0, inplace: bool = False, *, save: Save = "auto") -> Tensor:
    """Continuously differentiable ELU: x for x > 0, alpha (e^(x / alpha) - 1) otherwise.

    Args:
        x: Any shape, any floating-point type.
        alpha: Minus the value approached at large negative x, and the width of the bend; not 0.
        inplace: Overwrite x with the result.
        save: What to keep for the backward pass; "auto" is the output for alpha > 0, else the input. See `elu`.

    Raises:
        ValueError: If alpha is 0 or a bool, or negative where the output is kept or overwrites x.
    """
    check_alpha(alpha, "celu", save, inplace)
    y = None if inplace or quick(save, x) else _apply(x, alpha, 1.0, 1.0 / alpha, save)
    return F.celu(x, alpha, inplace) if y is None else y


def check_alpha(alpha: float, name: str, save: Save, inplace: bool) -> None:
    """Raise ValueError for an alpha that cannot be, or not with what is kept."""
    if save == "auto" and type(alpha) is float and 0 < alpha < math.inf:
        return
    if isinstance(alpha, bool):
        raise ValueError(f"alpha of {name} must be a number, got {alpha}: write inplace={alpha} to set inplace")
    if not -math.inf < alpha < math.inf:
        raise ValueError(f"alpha of {name} must be a finite number, got {alpha}: the default is 1")
    if name == "celu" and alpha == 0:
        raise ValueError("alpha of celu must not be 0, as x is divided by it: use relu, its limit")
    check_save(save)
    if inplace and save == "input":
        raise ValueError(f"{name} cannot keep the input that it overwrites: choose inplace=False or save='auto'")
    if alpha < 0 and (inplace or (save == "output" and name == "celu")):
        raise ValueError(
            f"alpha of {name} must be >= 0 where only the output is kept, got {alpha}: its sign no longer tells the "
            "input's. Choose inplace=False and save='auto'"
        )


class ELU(torch.nn.ELU):
    """`elu` as a module; `torch.nn.ELU` with the choice of what to keep for the backward pass.

    Args:
        alpha: Minus the value approached at large negative x.
        inplace: Overwrite the input.
        save: "auto", "output" or "input", see `elu`. Evaluation mode runs the plain operator.

    Raises:
        ValueError: As `elu`.
    """

    def __init__(self, alpha: float = 1.0, inplace: bool = False, *, save: Save = "auto") -> None:
        check_alpha(alpha, "elu", save, inplace)
        super().__init__(alpha, inplace)
        self.save = save

    def forward(self, x: Tensor) -> Tensor:
        """Apply `elu` to each element."""
        return elu(x, self.alpha, self.inplace, save=self.save) if self.training else super().forward(x)


class SELU(torch.nn.SELU):
    """`selu` as a module; `torch.nn.SELU` with the choice of what to keep for the backward pass.

    Args:
        inplace: Overwrite the input.
        save: "auto", "output" or "input", see `elu`. Evaluation mode runs the plain operator.

    Raises:
        ValueError: As `selu`.
    """

    def __init__(self, inplace: bool = False, *, save: Save = "auto") -> None:
        check_alpha(SELU_ALPHA, "selu", save, inplace)
        super().__init__(inplace)
        self.save = save

    def forward(self, x: Tensor) -> Tensor:
        """Apply `selu` to each element."""
        return selu(x, self.inplace, save=self.save) if self.training else super().forward(x)


class CELU(torch.nn.CELU):
    """`celu` as a module; `torch.nn.CELU` with the choice of what to keep for the backward pass.

    Args:
        alpha: Minus the value approached at large negative x, and the width of the bend; not 0.
        inplace: Overwrite the input.
        save: "auto", "output" or "input", see `elu`. Evaluation mode runs the plain operator.

    Raises:
        ValueError: As `celu`.
    """

    def __init__(self, alpha: float = 1.0, inplace: bool = False, *, save: Save = "auto") -> None:
        check_alpha(alpha, "celu", save, inplace)
        super().__init__(alpha, inplace)
        self.save = save

    def forward(self, x: Tensor) -> Tensor:
        """Apply `celu` to each element."""
        return celu(x, self.alpha, self.inplace, save=self.save) if self.training else super().forward(x)
