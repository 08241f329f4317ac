r"""Rectifiers with a learnable negative slope: PReLU and its noisy form EPReLU.

    PReLU(x)  = x for x > 0,      weight x otherwise
    EPReLU(x) = k x for x >= 0,   weight x otherwise,    k ~ U(1 - epsilon, 1 + epsilon) for each element

EPReLU trains in alternating passes: in a noisy pass k is random and the weight gets no gradient, in the next k = 1 and
the weight learns; in evaluation k = 1. The slope may take any sign, so by default the input is kept for the backward
pass: 4 bytes an element in bfloat16 together with the next layer's copy of the output. Whoever knows that the slope
stays positive may choose save="output" and halve that.

Sources: He et al., "Delving deep into rectifiers", ICCV 2015 (PReLU; initial slope 0.25 recalled, not checked against
the paper); Jiang et al., 2018 (EPReLU; definition, initial slope 0.1 and epsilon 0.4 from a later public
implementation, not checked against the paper).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zeromean.nn.alternating import AlternatingPasses
from zeromean.nn.backward import Save, apply, backward_may_follow, check_save, keeps_output, widen
from zeromean.nn.noise import complement, resolve_seed
from zeromean.nn.parameters import align, check_initial, sum_to
from zeromean.nn.slope_noise import REACH, as_flag, check_epsilon, learn_in_quiet_passes, uniform_slope


def _formula(x: Tensor, weight: Tensor, k: Tensor | None) -> Tensor:
    wide = widen(x)
    if k is None:
        return torch.where(wide > 0, wide, wide * weight).to(x.dtype)
    return torch.where(wide < 0, wide * weight, wide * k).to(x.dtype)


def _slope_noise(seed: Tensor | None, noisy: Tensor | None, x: Tensor, epsilon: float) -> Tensor | None:
    if seed is None or noisy is None:
        return None
    return torch.where(noisy, uniform_slope(seed, x, 1 - epsilon, 1 + epsilon), 1.0)


class _LearnableSlope(torch.autograd.Function):
    """The derivative: dx = k or weight by the sign of x, dweight = sum of x over x < 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, seed: Tensor | None, noisy: Tensor | None, epsilon: float, output_kept: bool
    ) -> Tensor:
        return _formula(x, weight, _slope_noise(seed, noisy, x, epsilon))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, seed, noisy, ctx.epsilon, ctx.output_kept = inputs
        ctx.save_for_backward(
            output if ctx.output_kept else x, weight, None if seed is None else complement(seed), noisy
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, sealed, noisy = ctx.saved_tensors
        k = _slope_noise(None if sealed is None else complement(sealed), noisy, kept, ctx.epsilon)
        wide = widen(gradient)
        positive = kept > 0 if k is None else kept >= 0
        dx = torch.where(positive, wide if k is None else wide * k, wide * weight).to(gradient.dtype)
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None, None, None
        x = widen(kept) / weight if ctx.output_kept else widen(kept)
        return dx, sum_to(torch.where(positive, 0.0, wide * x), weight), None, None, None, None


def prelu(x: Tensor, weight: Tensor, *, save: Save = "auto") -> Tensor:
    """Rectifier with a learnable negative slope: x for x > 0, weight x otherwise.

    Args:
        x: Any shape, any floating-point type; the arithmetic is in float32 at least.
        weight: One slope; or C slopes for the channels in dimension 1 of x; or a tensor of x's number of dimensions
            that broadcasts to x. Its type may differ from x's. Its gradient is summed in float32 at least.
        save: What to keep for the backward pass. "auto" is the input, as a slope may take any sign; "output" is the
            caller's promise that every slope stays positive.

    Raises:
        ValueError: If the weight does not fit x.
    """
    check_save(save)
    weight = align(weight, x, "weight")
    if backward_may_follow(x, weight):
        return apply(_LearnableSlope, x, weight, None, None, 0.0, keeps_output(save, False))
    return _formula(x, weight, None)


def eprelu(
    x: Tensor,
    weight: Tensor,
    epsilon: float = 0.4,
    training: bool = False,
    *,
    seed: Tensor | None = None,
    noisy: bool | Tensor = True,
    save: Save = "auto",
) -> Tensor:
    """Noisy PReLU: k x for x >= 0, weight x otherwise, with k ~ U(1 - epsilon, 1 + epsilon) for each element.

    Args:
        x: Any shape, any floating-point type.
        weight: As in `prelu`.
        epsilon: How far k reaches to either side of 1, in [0, 1].
        training: Whether there is noise at all; without it k = 1.
        seed: int64, 0-d, or of x's number of dimensions with one seed a leading slice ([R, 1, 1]); the same seed gives
            the same noise everywhere. None draws one from torch's default generator.
        noisy: Whether this training pass is a noisy one, in which the weight gets no gradient, or a quiet one (k = 1).
        save: As in `prelu`.

    Raises:
        ValueError: If epsilon lies outside [0, 1], or the weight or the seed does not fit x.
    """
    check_epsilon(epsilon, REACH)
    check_save(save)
    if not training:
        return prelu(x, weight, save=save)
    seed, noisy = resolve_seed(seed, x), as_flag(noisy, x)
    weight = learn_in_quiet_passes(align(weight, x, "weight"), noisy)
    if backward_may_follow(x, weight):
        return apply(_LearnableSlope, x, weight, seed, noisy, epsilon, keeps_output(save, False))
    return _formula(x, weight, _slope_noise(seed, noisy, x, epsilon))


class PReLU(torch.nn.PReLU):
    """`prelu` as a module; `torch.nn.PReLU` for any mix of types and stacked weights, with the choice of what to keep.

    Args:
        num_parameters: 1 for one slope, or the number of channels in dimension 1 of the input.
        init: The initial slope.
        device: Where the weight lies.
        dtype: The weight's type.
        save: "auto", "output" or "input", see `prelu`. Evaluation mode runs plain operators.
    """

    def __init__(
        self, num_parameters: int = 1, init: float = 0.25, device: Any = None, dtype: Any = None, *, save: Save = "auto"
    ) -> None:
        check_save(save)
        check_initial(slope=init)
        super().__init__(num_parameters, init, device, dtype)
        self.save = save

    def forward(self, x: Tensor) -> Tensor:
        """Apply `prelu` to each element."""
        if self.training:
            return prelu(x, self.weight, save=self.save)
        if self.weight.ndim == 1 and x.ndim > 1 and self.weight.dtype == x.dtype:
            return F.prelu(x, self.weight)
        return _formula(x, align(self.weight, x, "weight"), None)


class EPReLU(AlternatingPasses):
    """`eprelu` as a module, noisy and quiet by turns in training (see `AlternatingPasses`), k = 1 in evaluation.

    Args:
        num_parameters: 1 for one slope, or the number of channels in dimension 1 of the input.
        init: The initial slope.
        epsilon: How far k reaches to either side of 1, in [0, 1].
        device: Where the weight lies.
        dtype: The weight's type.
        save: "auto", "output" or "input", see `prelu`.

    Raises:
        ValueError: If epsilon lies outside [0, 1].
    """

    def __init__(
        self,
        num_parameters: int = 1,
        init: float = 0.1,
        epsilon: float = 0.4,
        device: Any = None,
        dtype: Any = None,
        *,
        save: Save = "auto",
    ) -> None:
        check_epsilon(epsilon, REACH)
        check_save(save)
        check_initial(slope=init)
        super().__init__(device)
        self.num_parameters, self.init, self.epsilon, self.save = num_parameters, init, epsilon, save
        self.weight = torch.nn.Parameter(torch.empty(num_parameters, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every slope to its initial value, and the first training pass to noisy."""
        torch.nn.init.constant_(self.weight, self.init)
        self.noisy_next.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Apply `eprelu` to each element."""
        if not self.training:
            return _formula(x, align(self.weight, x, "weight"), None)
        return eprelu(x, self.weight, self.epsilon, True, seed=self.seed, noisy=self.take_turn(), save=self.save)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"num_parameters={self.num_parameters}, init={self.init}, epsilon={self.epsilon}"
