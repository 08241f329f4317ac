r"""Rectifiers with a learnable negative slope: PReLU and its noisy form EPReLU.

    PReLU(x)  = x for x > 0,      weight x otherwise
    EPReLU(x) = k x for x >= 0,   weight x otherwise,    k ~ U(1 - epsilon, 1 + epsilon) for each element

EPReLU trains in alternating passes: in a noisy pass k is random and the weight gets no gradient, in the next k = 1 and
the weight learns; in evaluation k = 1. The slope may take any sign, so what is kept for the backward pass is the
output and one bit an element for the input's side: 2.125 bytes an element in bfloat16, where the input would make it 4
together with the next layer's copy of the output. It is the default on a GPU, where the bits are packed on the way, and
to be chosen elsewhere (save="output"). A slope of 0 would make the output forget the input, so slopes smaller than
2^-100 (2^-14 in float16) in size are read as that then.

Sources: He et al., "Delving deep into rectifiers", ICCV 2015 (PReLU; initial slope 0.25 recalled, not checked against
the paper); Jiang et al., 2018 (EPReLU; definition, initial slope 0.1 and epsilon 0.4 from a later public
implementation, not checked against the paper).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zeromean.kernels import Keep, Operator, fused
from zeromean.nn.alternating import AlternatingPasses
from zeromean.nn.backward import Save, backward_may_follow, check_save, exporting, quick, what_to_keep, widen
from zeromean.nn.noise import resolve_seed
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


def _smallest(keep: Keep, x: Tensor) -> float:
    """The smallest slope that is told from 0: an output smaller than its type can hold would forget the input."""
    if keep == "input":
        return 0.0
    return 2.0**-14 if x.dtype == torch.float16 else 2.0**-100


def _away_from_zero(weight: Tensor, smallest: float) -> Tensor:
    # In float16 the smallest slope of a wider x would itself be 0.
    weight = widen(weight)
    return torch.where(weight.abs() < smallest, smallest + (weight - weight.detach()), weight)


def _value(
    x: Tensor,
    weight: Tensor,
    p1: None,
    seed: Tensor | None,
    noisy: Tensor | None,
    smallest: float,
    epsilon: float,
) -> Tensor:
    if noisy is not None:
        # Inside torch.vmap autograd follows this and not the derivative below.
        weight = learn_in_quiet_passes(weight, noisy)
    return _formula(x, _away_from_zero(weight, smallest), _slope_noise(seed, noisy, x, epsilon))


def _slope(
    gradient: Tensor,
    kept: Tensor,
    positive: Tensor | None,
    weight: Tensor,
    p1: None,
    seed: Tensor | None,
    noisy: Tensor | None,
    smallest: float,
    epsilon: float,
    output_kept: bool,
) -> tuple[Tensor, Tensor, None]:
    """The derivative: dx = k or weight by the sign of x, dweight = sum of x over x < 0."""
    if noisy is not None:
        weight = learn_in_quiet_passes(weight, noisy)
    read = _away_from_zero(weight, smallest)
    k = _slope_noise(seed, noisy, kept, epsilon)
    if positive is None:
        positive = kept > 0 if k is None else (kept < 0).logical_not()
    wide = widen(gradient)
    dx = torch.where(positive, wide if k is None else wide * k, wide * read).to(gradient.dtype)
    x = widen(kept) / read if output_kept else widen(kept)
    dweight = sum_to(torch.where(positive, 0.0, wide * x), weight)
    return dx, dweight if noisy is None else torch.where(noisy, 0.0, dweight), None


_PRELU = Operator("prelu", _value, _slope)
_EPRELU = Operator("eprelu", _value, _slope, zero_positive=True)


def _torch_takes(weight: Tensor, x: Tensor) -> bool:
    fits = weight.numel() == 1 or (x.ndim > 1 and weight.shape[0] == x.shape[1])
    return weight.ndim == 1 and x.ndim > 0 and fits and weight.dtype == x.dtype


def prelu(x: Tensor, weight: Tensor, *, save: Save = "auto") -> Tensor:
    """Rectifier with a learnable negative slope: x for x > 0, weight x otherwise.

    Args:
        x: Any shape, any floating-point type; the arithmetic is in float32 at least.
        weight: One slope; or C slopes for the channels in dimension 1 of x; or a tensor of x's number of dimensions
            that broadcasts to x. Its type may differ from x's. Its gradient is summed in float32 at least.
        save: What to keep for the backward pass. "output" is the output and one bit an element, and the default where
            the fused programs pack those on the way; "input" the default elsewhere, and the most exact. On a GPU, small
            tensors outside a compiled program are left to torch, which keeps both.

    Raises:
        ValueError: If the weight does not fit x.
    """
    check_save(save)
    if quick(save, x) and _torch_takes(weight, x):
        return F.prelu(x, weight)
    asked = (save, x, weight)
    y = _PRELU.again(*asked)
    if y is not None:
        return y
    aligned = align(weight, x, "weight")
    keep, record = what_to_keep(save, x, False, aligned), backward_may_follow(x, weight)
    if exporting() or not (fused(x) or record):
        return _formula(x, aligned, None)
    return _PRELU(x, aligned, None, None, None, _smallest(keep, x), 0.0, keep=keep, record=record, asked=asked)


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
    asked = ((save, epsilon), x, weight, None, seed, noisy)
    y = _EPRELU.again(*asked)
    if y is not None:
        return y
    weight = align(weight, x, "weight")
    keep, record = what_to_keep(save, x, False, weight, seed), backward_may_follow(x, weight)
    return _EPRELU(x, weight, None, seed, noisy, _smallest(keep, x), epsilon, keep=keep, record=record, asked=asked)


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
        if _torch_takes(self.weight, x):
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
