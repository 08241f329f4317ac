r"""EELU, the elastic exponential linear unit: MPELU with a random slope on the positive side while training.

    EELU(x) = k x for x >= 0,    alpha (e^(beta x) - 1) otherwise
    k = min(max(s, 0), 2),    s ~ N(1, sigma^2) for each element,    sigma ~ U(0, epsilon) for each layer and pass

Training passes alternate. In a noisy pass k is random and alpha and beta get no gradient; in a quiet pass k = 1 and
they learn. The first is noisy; in evaluation k = 1. The backward pass keeps the output and the seed, from which it
makes k again; the derivatives are MPELU's, with k instead of 1 for x >= 0.

The initialisation used with it is `zeromean.nn.taylor_gain`.

Source: Kim, Kim and Kim, "Elastic exponential linear units for convolutional neural networks", Neurocomputing 406,
2020. The noise, its standard deviation rather than its variance drawn uniformly, the turns, and the defaults alpha
0.25, beta 1 and epsilon 1 are those of a public PyTorch implementation that appears to be the authors'; the paper's own
text is recalled, not checked. Deviations, our choice: alpha and beta are read as at least 1/1024 instead of 0 (see
MPELU), evaluation passes do not change the turn, and NaN is passed on instead of replaced by 0.
"""

from typing import Any

import torch
from torch import Tensor

from zeromean.kernels import Operator
from zeromean.nn.alternating import AlternatingPasses
from zeromean.nn.backward import Save, backward_may_follow, check_save, what_to_keep
from zeromean.nn.mpelu import formula, mpelu, plain, slope
from zeromean.nn.noise import resolve_seed
from zeromean.nn.parameters import SMALLEST, align, check_positive
from zeromean.nn.slope_noise import LARGEST_DEVIATION, as_flag, check_epsilon, learn_in_quiet_passes, normal_slope


def _slope_noise(seed: Tensor, noisy: Tensor, x: Tensor, epsilon: float) -> Tensor:
    """The random k of a noisy pass, 1 in a quiet one."""
    return torch.where(noisy, normal_slope(seed, x, epsilon), 1.0)


def _value(x: Tensor, alpha: Tensor, beta: Tensor, seed: Tensor, noisy: Tensor, epsilon: float) -> Tensor:
    # Inside torch.vmap autograd follows this and not the derivative below.
    alpha, beta = learn_in_quiet_passes(alpha, noisy), learn_in_quiet_passes(beta, noisy)
    return formula(x, alpha, beta, _slope_noise(seed, noisy, x, epsilon))


def _slope(
    gradient: Tensor,
    kept: Tensor,
    positive: None,
    alpha: Tensor,
    beta: Tensor,
    seed: Tensor,
    noisy: Tensor,
    epsilon: float,
    output_kept: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    alpha, beta = learn_in_quiet_passes(alpha, noisy), learn_in_quiet_passes(beta, noisy)
    k = _slope_noise(seed, noisy, kept, epsilon)
    dx, dalpha, dbeta = slope(gradient, kept, alpha, beta, k, output_kept)
    return dx, torch.where(noisy, 0.0, dalpha), torch.where(noisy, 0.0, dbeta)


_EELU = Operator("eelu", _value, _slope, zero_positive=True)


def eelu(
    x: Tensor,
    alpha: Tensor,
    beta: Tensor,
    epsilon: float = 1.0,
    training: bool = False,
    *,
    seed: Tensor | None = None,
    noisy: bool | Tensor = True,
    save: Save = "auto",
) -> Tensor:
    """Elastic exponential linear unit: k x for x >= 0, alpha (e^(beta x) - 1) otherwise.

    Args:
        x: Any shape, any floating-point type; the arithmetic is in float32 at least.
        alpha: As in `mpelu`.
        beta: As in `mpelu`.
        epsilon: The largest standard deviation of k, in [0, 1].
        training: Whether there is noise at all; without it k = 1 and this is `mpelu`.
        seed: int64, 0-d, or of x's number of dimensions with one seed a leading slice ([R, 1, 1]); the same seed gives
            the same noise everywhere. None draws one from torch's default generator.
        noisy: Whether this training pass is a noisy one, in which alpha and beta get no gradient, or a quiet one with
            k = 1. A bool, or a 0-d bool tensor, which a GPU need not stop to read.
        save: What to keep for the backward pass; "auto" is the output. See `mpelu`.

    Raises:
        ValueError: If epsilon lies outside [0, 1], or alpha, beta or the seed does not fit x.
    """
    check_epsilon(epsilon, LARGEST_DEVIATION)
    check_save(save)
    if not training:
        return mpelu(x, alpha, beta, save=save)
    seed, noisy = resolve_seed(seed, x), as_flag(noisy, x)
    asked = ((save, epsilon), x, alpha, beta, seed, noisy)
    y = _EELU.again(*asked)
    if y is not None:
        return y
    alpha, beta = align(alpha, x, "alpha"), align(beta, x, "beta")
    record = backward_may_follow(x, alpha, beta)
    return _EELU(x, alpha, beta, seed, noisy, epsilon, keep=what_to_keep(save, x, True), record=record, asked=asked)


class EELU(AlternatingPasses):
    """`eelu` as a module, noisy and quiet by turns in training (see `AlternatingPasses`), k = 1 in evaluation.

    Args:
        num_parameters: 1 for one pair, or the number of channels in dimension 1 of the input.
        alpha: The initial value.
        beta: The initial value.
        epsilon: The largest standard deviation of k, in [0, 1].
        device: Where the parameters lie.
        dtype: The parameters' type.
        save: "auto", "output" or "input", see `eelu`.

    Attributes:
        seed: If set, the noise's seed (see `eelu`); if None, each training pass draws one.

    Raises:
        ValueError: If epsilon lies outside [0, 1].
    """

    def __init__(
        self,
        num_parameters: int = 1,
        alpha: float = 0.25,
        beta: float = 1.0,
        epsilon: float = 1.0,
        device: Any = None,
        dtype: Any = None,
        *,
        save: Save = "auto",
    ) -> None:
        check_epsilon(epsilon, LARGEST_DEVIATION)
        check_save(save)
        check_positive(SMALLEST, alpha=alpha, beta=beta)
        super().__init__(device)
        self.num_parameters, self.initial_alpha, self.initial_beta = num_parameters, alpha, beta
        self.epsilon, self.save = epsilon, save
        self.alpha = torch.nn.Parameter(torch.empty(num_parameters, device=device, dtype=dtype))
        self.beta = torch.nn.Parameter(torch.empty(num_parameters, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every alpha and beta to its initial value, and the first training pass to noisy."""
        torch.nn.init.constant_(self.alpha, self.initial_alpha)
        torch.nn.init.constant_(self.beta, self.initial_beta)
        self.noisy_next.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Apply `eelu` to each element."""
        if not self.training:
            return plain(x, self.alpha, self.beta)
        turn = self.take_turn()
        return eelu(x, self.alpha, self.beta, self.epsilon, True, seed=self.seed, noisy=turn, save=self.save)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        pair = f"alpha={self.initial_alpha}, beta={self.initial_beta}"
        return f"num_parameters={self.num_parameters}, {pair}, epsilon={self.epsilon}"
