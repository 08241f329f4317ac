r"""The smooth, non-monotone relatives: SiLU, GELU, Mish, and Swish with a learnable beta.

    SiLU(x)  = x sigmoid(x)
    GELU(x)  = x Phi(x), Phi the standard normal distribution function
    Mish(x)  = x tanh(ln(1 + e^x))
    Swish(x) = x sigmoid(beta x)

They fall before they rise, so an output may come from two inputs, and the input must be kept for the backward pass:
4 bytes an element in bfloat16 together with the next layer's copy of the output. Whoever can do with an approximate
gradient may keep a code of 1 to 4 bits instead (``bits``, see `zeromean.nn.fewbit`).

Sources: Elfwing et al., 2018 (SiLU); Hendrycks and Gimpel, 2016 (GELU); Misra, 2019 (Mish); Ramachandran et al., 2017
(Swish; initial beta 1 recalled, not checked against the paper).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zeromean.kernels import Operator
from zeromean.nn.backward import backward_may_follow, exporting, left_to_torch, quick, widen
from zeromean.nn.fewbit import check_bits, fewbit
from zeromean.nn.parameters import align, sum_to


def _formula(x: Tensor, beta: Tensor) -> Tensor:
    wide = widen(x)
    return (wide * torch.sigmoid(wide * beta)).to(x.dtype)


def _value(x: Tensor, beta: Tensor, *absent: None) -> Tensor:
    return _formula(x, beta)


def _slope(
    gradient: Tensor,
    kept: Tensor,
    positive: None,
    beta: Tensor,
    p1: None,
    seed: None,
    noisy: None,
    output_kept: bool,
) -> tuple[Tensor, Tensor, None]:
    """The derivative, s = sigmoid(beta x): dx = s + beta x s (1 - s), dbeta = sum of x^2 s (1 - s)."""
    x, wide = widen(kept), widen(gradient)
    s = torch.sigmoid(x * beta)
    bend = x * s * (1 - s)
    return ((s + beta * bend) * wide).to(gradient.dtype), sum_to(wide * (x * bend), beta), None


_SWISH = Operator("swish", _value, _slope)


def _of_torch(
    name: str, value: Callable[[Tensor], Tensor], derivative: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Operator, Callable[[Tensor], Tensor]]:
    """The operator of a function that torch has, with a differentiable derivative of the gradient and x."""

    def slope(gradient: Tensor, kept: Tensor, *rest: Any) -> tuple[Tensor, None, None]:
        return derivative(gradient, kept), None, None

    return Operator(name, lambda x, *absent: value(x), slope), value


def _silu_slope(gradient: Tensor, kept: Tensor) -> Tensor:
    x = widen(kept)
    s = torch.sigmoid(x)
    return (widen(gradient) * (s + x * s * (1 - s))).to(gradient.dtype)


def _mish_slope(gradient: Tensor, kept: Tensor) -> Tensor:
    x = widen(kept)
    t = torch.tanh(F.softplus(x))
    return (widen(gradient) * (t + x * (1 - t * t) * torch.sigmoid(x))).to(gradient.dtype)


_ATEN = torch.ops.aten
_SMOOTH = {
    "silu": _of_torch("silu", F.silu, _silu_slope),
    "gelu": _of_torch("gelu", F.gelu, _ATEN.gelu_backward),
    "gelu_tanh": _of_torch(
        "gelu_tanh",
        lambda x: F.gelu(x, approximate="tanh"),
        # Torch's slope is NaN where x^2 overflows, long after it has become flat.
        lambda gradient, x: _ATEN.gelu_backward(gradient, x.clamp(-100, 100), approximate="tanh"),
    ),
    "mish": _of_torch("mish", F.mish, _mish_slope),
}


def _smooth(x: Tensor, name: str, bits: int | None) -> Tensor:
    if bits is not None:
        return fewbit(x, name, bits)
    operator, torchs = _SMOOTH[name]
    if quick("auto", x):
        return torchs(x)
    record = backward_may_follow(x)
    return torchs(x) if left_to_torch("auto", x, "input", record) else operator(x, keep="input", record=record)


def silu(x: Tensor, inplace: bool = False, *, bits: int | None = None) -> Tensor:
    """Sigmoid linear unit: x sigmoid(x).

    Args:
        x: Any shape, any floating-point type. Not defined at -infinity.
        inplace: Overwrite x with the result.
        bits: Keep a code of 1 to 4 bits an element instead of the input; the gradient is approximate then.

    Raises:
        ValueError: If bits is out of range, or given together with inplace.
    """
    _check_inplace("silu", inplace, bits)
    return F.silu(x, inplace=True) if inplace else _smooth(x, "silu", bits)


def gelu(x: Tensor, approximate: str = "none", *, bits: int | None = None) -> Tensor:
    """Gaussian error linear unit: x Phi(x).

    Args:
        x: Any shape, any floating-point type. Not defined at the infinities.
        approximate: "none", or "tanh" for x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)).
        bits: Keep a code of 1 to 4 bits an element instead of the input; the gradient is approximate then.

    Raises:
        ValueError: If approximate is neither, or bits is out of range.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}: leave it out for the exact gelu")
    return _smooth(x, "gelu_tanh" if approximate == "tanh" else "gelu", bits)


def mish(x: Tensor, inplace: bool = False, *, bits: int | None = None) -> Tensor:
    """Mish: x tanh(ln(1 + e^x)).

    Args:
        x: Any shape, any floating-point type. Not defined at -infinity.
        inplace: Overwrite x with the result.
        bits: Keep a code of 1 to 4 bits an element instead of the input; the gradient is approximate then.

    Raises:
        ValueError: If bits is out of range, or given together with inplace.
    """
    _check_inplace("mish", inplace, bits)
    return F.mish(x, inplace=True) if inplace else _smooth(x, "mish", bits)


def _check_inplace(name: str, inplace: bool, bits: int | None) -> None:
    if inplace and bits is not None:
        raise ValueError(f"{name} cannot keep bits={bits} of an input that it overwrites: choose inplace=False")


class SiLU(torch.nn.SiLU):
    """`silu` as a module; `torch.nn.SiLU` with the choice of what to keep for the backward pass.

    Args:
        inplace: Overwrite the input.
        bits: See `silu`. Evaluation mode runs the plain operator.

    Raises:
        ValueError: As `silu`.
    """

    def __init__(self, inplace: bool = False, *, bits: int | None = None) -> None:
        _check_inplace("silu", inplace, bits)
        check_bits(bits)
        super().__init__(inplace)
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """Apply `silu` to each element."""
        return silu(x, self.inplace, bits=self.bits) if self.training else super().forward(x)


class GELU(torch.nn.GELU):
    """`gelu` as a module; `torch.nn.GELU` with the choice of what to keep for the backward pass.

    Args:
        approximate: "none" or "tanh".
        bits: See `gelu`. Evaluation mode runs the plain operator.

    Raises:
        ValueError: If bits is out of range.
    """

    def __init__(self, approximate: str = "none", *, bits: int | None = None) -> None:
        check_bits(bits)
        super().__init__(approximate)
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """Apply `gelu` to each element."""
        return gelu(x, self.approximate, bits=self.bits) if self.training else super().forward(x)


class Mish(torch.nn.Mish):
    """`mish` as a module; `torch.nn.Mish` with the choice of what to keep for the backward pass.

    Args:
        inplace: Overwrite the input.
        bits: See `mish`. Evaluation mode runs the plain operator.

    Raises:
        ValueError: As `mish`.
    """

    def __init__(self, inplace: bool = False, *, bits: int | None = None) -> None:
        _check_inplace("mish", inplace, bits)
        check_bits(bits)
        super().__init__(inplace)
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """Apply `mish` to each element."""
        return mish(x, self.inplace, bits=self.bits) if self.training else super().forward(x)


def swish(x: Tensor, beta: Tensor) -> Tensor:
    """Swish with a learnable beta: x sigmoid(beta x).

    Args:
        x: Any shape, any floating-point type; the arithmetic is in float32 at least. Not defined at -infinity.
        beta: One value; or C values for the channels in dimension 1 of x; or a tensor of x's number of dimensions that
            broadcasts to x. Its gradient is summed in float32 at least.

    Raises:
        ValueError: If beta does not fit x.
    """
    asked = (None, x, beta)
    y = _SWISH.again(*asked)
    if y is not None:
        return y
    beta = align(beta, x, "beta")
    if exporting():
        return _formula(x, beta)
    return _SWISH(x, beta, keep="input", record=backward_may_follow(x, beta), asked=asked)


class Swish(torch.nn.Module):
    """`swish` as a module with beta as its parameter.

    Args:
        num_parameters: 1 for one beta, or the number of channels in dimension 1 of the input.
        beta: The initial value; 1 makes it SiLU.
        device: Where the parameter lies.
        dtype: The parameter's type.
    """

    def __init__(self, num_parameters: int = 1, beta: float = 1.0, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.num_parameters, self.initial_beta = num_parameters, beta
        self.beta = torch.nn.Parameter(torch.empty(num_parameters, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every beta to its initial value."""
        torch.nn.init.constant_(self.beta, self.initial_beta)

    def forward(self, x: Tensor) -> Tensor:
        """Apply `swish` to each element."""
        return swish(x, self.beta) if self.training else _formula(x, align(self.beta, x, "beta"))

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"num_parameters={self.num_parameters}, beta={self.initial_beta}"
