"""A linear layer and its activation as one operation: y = f(x Wᵀ + b).

On a Hopper GPU in half precision the activation is applied where the matrix product ends, before anything is written,
and the backward pass makes dz = g f'(y) and its sum, the gradient of b, in one pass, ahead of the two products
dx = dz W and dW = dzᵀ x. Only x and y are kept, which the neighbouring layers keep anyway. Everywhere else the two
plain operations run.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from zeromean.kernels import linear as kernels
from zeromean.nn.backward import exporting
from zeromean.nn.elu import SELU_ALPHA, SELU_SCALE, celu, elu, selu
from zeromean.nn.relu import leaky_relu, relu, shifted_relu
from zeromean.spelling import nearest

Fused = Literal["auto", "always", "never"]

_PLAIN: dict[str, Callable[..., Tensor]] = {
    "elu": elu,
    "selu": selu,
    "celu": celu,
    "relu": relu,
    "leaky_relu": leaky_relu,
    "shifted_relu": shifted_relu,
}


class Formula(NamedTuple):
    """An activation as the operators take it."""

    name: str
    scalars: tuple[float, ...]


def _formula(activation: str, settings: dict[str, Any]) -> Formula | None:
    """The operators' form; none where a setting is not for them, or its output does not tell the slope."""
    number = settings.get("alpha", settings.get("negative_slope", 0.01 if activation == "leaky_relu" else 1.0))
    if isinstance(number, bool) or not 0 <= number < math.inf:
        return None
    match activation, tuple(settings):
        case "elu", () | ("alpha",):
            return Formula("elu", (number, 1.0, 1.0))
        case "celu", () | ("alpha",) if number > 0:
            return Formula("elu", (number, 1.0, 1.0 / number))
        case "selu", ():
            return Formula("elu", (SELU_ALPHA, SELU_SCALE, 1.0))
        case "leaky_relu", () | ("negative_slope",):
            return Formula("leaky_relu", (number, 0.0, 0.0))
        case "relu", ():
            return Formula("leaky_relu", (0.0, 0.0, 0.0))
        case "shifted_relu", ():
            return Formula("shifted_relu", (0.0, 0.0, 0.0))
    return None


class _Fused(torch.autograd.Function):
    """Without ``setup_context``, which takes longer than the whole of this: torch.func runs the plain operations."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, formula: Formula, round_preact: bool
    ) -> Tensor:
        y: Tensor = torch.ops.zeromean.linear_act(x, weight, bias, *formula, round_preact)
        ctx.formula = formula
        ctx.save_for_backward(y, x, weight)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[:3])
        # Where gradients are on, a second derivative may follow.
        fused = torch.ops.zeromean.linear_act_backward
        operator: Callable[..., kernels.Gradients] = kernels.plain_backward if torch.is_grad_enabled() else fused
        gradients = operator(gradient, *ctx.saved_tensors, *ctx.formula, wanted)
        return *(made if want else None for made, want in zip(gradients, wanted, strict=True)), None, None


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "elu",
    *,
    round_preact: bool = False,
    fused: Fused = "auto",
    **settings: float,
) -> Tensor:
    """Apply a linear layer and then an activation, f(x Wᵀ + b).

    Args:
        x: Shape [..., in_features].
        weight: Shape [out_features, in_features].
        bias: Shape [out_features].
        activation: "elu", "selu", "celu", "relu", "leaky_relu" or "shifted_relu".
        round_preact: Round x Wᵀ + b to the type of x before the activation, as two operations do. By default the
            activation takes the unrounded sum, which is more accurate.
        fused: "auto" runs the fused programs where they are known to be faster; "always" the fused operators, which
            must be able to take the tensors; "never" the two plain operations, as always under torch.func.
        settings: The activation's own: alpha of elu and celu, negative_slope of leaky_relu.

    Returns:
        Shape [..., out_features]. Under autocast, of the autocast type, as `torch.nn.functional.linear`.

    Raises:
        ValueError: If activation or fused is none of those, if a setting is out of its range, or with "always" if the
            operators cannot take the tensors or the setting.
    """
    _check(activation, fused)
    if fused != "never" and not _must_be_plain():
        formula = _formula(activation, settings)
        operands = _autocast(x, weight, bias)
        if formula is not None and (kernels.pays(*operands) or (fused == "always" and kernels.supported(*operands))):
            y: Tensor = _Fused.apply(*operands, formula, round_preact)  # type: ignore[no-untyped-call]
            return y
        if fused == "always":
            raise ValueError(
                f"fused='always' needs float16 or bfloat16 tensors that fit, whose feature counts are multiples of 8, "
                f"and a setting >= 0, got {x.dtype} {tuple(x.shape)}, {weight.dtype} {tuple(weight.shape)}, "
                f"{settings}: use fused='auto'"
            )
    return _PLAIN[activation](F.linear(x, weight, bias), **settings)


def _must_be_plain() -> bool:
    """Whether an exported program, a transform of torch.func or forward mode is to see the plain operators."""
    if torch.compiler.is_compiling():
        return exporting()
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _check(activation: str, fused: Fused) -> None:
    if activation not in _PLAIN:
        raise ValueError(f"unknown activation {activation!r} of a fused linear layer: {nearest(activation, _PLAIN)}")
    if fused not in get_args(Fused):
        raise ValueError(f"fused must be one of {', '.join(get_args(Fused))}, got {fused!r}: leave it at 'auto'")


def _autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the type that autocast has linear layers run in, if it is on; it leaves float64 alone."""
    kind = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


class LinearAct(torch.nn.Linear):
    """`linear_act` as a module: `torch.nn.Linear`, with the same state, and the activation behind it.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        bias: Whether there is one.
        activation: See `linear_act`.
        round_preact: See `linear_act`.
        fused: See `linear_act`. Evaluation mode runs the plain operators.
        device: Of the parameters.
        dtype: Of the parameters.
        settings: The activation's own.

    Raises:
        ValueError: As `linear_act`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "elu",
        *,
        round_preact: bool = False,
        fused: Fused = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: float,
    ) -> None:
        _check(activation, fused)
        _PLAIN[activation](torch.zeros(()), **settings)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation, self.settings = activation, settings
        self.round_preact, self.fused = round_preact, fused

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer and its activation to the last dimension."""
        fused = self.fused if self.training else "never"
        return linear_act(
            x, self.weight, self.bias, self.activation,
            round_preact=self.round_preact, fused=fused, **self.settings,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The layer's sizes and its activation."""
        settings = "".join(f", {name}={value}" for name, value in self.settings.items())
        return f"{super().extra_repr()}, activation={self.activation!r}{settings}"
