r"""The smooth, non-monotone relatives: SiLU, GELU, Mish (torch's own) and Swish with a learnable beta.

    SiLU(x)  = x sigmoid(x)
    GELU(x)  = x Phi(x), Phi the standard normal distribution function
    Mish(x)  = x tanh(ln(1 + e^x))
    Swish(x) = x sigmoid(beta x)

They fall before they rise, so an output may come from two inputs, and the input must be kept for the backward pass.

Sources: Elfwing et al., 2018 (SiLU); Hendrycks and Gimpel, 2016 (GELU); Misra, 2019 (Mish); Ramachandran et al., 2017
(Swish; initial beta 1 recalled, not checked against the paper).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import GELU as GELU
from torch.nn import Mish as Mish
from torch.nn import SiLU as SiLU
from torch.nn.functional import gelu as gelu
from torch.nn.functional import mish as mish
from torch.nn.functional import silu as silu

from zeromean.nn.backward import apply, backward_may_follow, widen
from zeromean.nn.parameters import align, sum_to


def _formula(x: Tensor, beta: Tensor) -> Tensor:
    wide = widen(x)
    return (wide * torch.sigmoid(wide * beta)).to(x.dtype)


class _Swish(torch.autograd.Function):
    """The derivative, s = sigmoid(beta x): dx = s + beta x s (1 - s), dbeta = sum of x^2 s (1 - s)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, beta: Tensor) -> Tensor:
        return _formula(x, beta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        kept, beta = ctx.saved_tensors
        x, wide = widen(kept), widen(gradient)
        s = torch.sigmoid(x * beta)
        bend = x * s * (1 - s)
        dx = ((s + beta * bend) * wide).to(gradient.dtype)
        return dx, sum_to(wide * (x * bend), beta) if ctx.needs_input_grad[1] else None


def swish(x: Tensor, beta: Tensor) -> Tensor:
    """Swish with a learnable beta: x sigmoid(beta x).

    Args:
        x: Any shape, any floating-point type; the arithmetic is in float32 at least. Not defined at -infinity.
        beta: One value; or C values for the channels in dimension 1 of x; or a tensor of x's number of dimensions that
            broadcasts to x. Its gradient is summed in float32 at least.

    Raises:
        ValueError: If beta does not fit x.
    """
    beta = align(beta, x, "beta")
    return apply(_Swish, x, beta) if backward_may_follow(x, beta) else _formula(x, beta)


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
