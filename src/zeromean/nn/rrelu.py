r"""Rectifiers with a random slope and nothing to learn: RReLU (negative side) and EReLU (positive side).

    RReLU(x) = x for x > 0,      a x otherwise,    a ~ U(lower, upper) for each element
    EReLU(x) = k x for x > 0,    0 otherwise,      k ~ U(1 - epsilon, 1 + epsilon) for each element

In evaluation a = (lower + upper) / 2 and k = 1. The backward pass keeps the output and the seed, from which it makes
the slopes again; where lower <= 0 the output's sign does not tell RReLU's side, and one bit an element is kept
with it where the fused programs pack those on the way, or else the input.

Sources: Xu et al., "Empirical evaluation of rectified activations in convolutional network", 2015 (RReLU; bounds 1/8
and 1/3 as in PyTorch, recalled, not checked against the paper); Jiang et al., 2018 (EReLU; definition and epsilon 0.4
from a later public implementation, not checked against the paper).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from zeromean.kernels import Operator, small
from zeromean.nn.backward import backward_may_follow, what_to_keep, widen
from zeromean.nn.noise import resolve_seed
from zeromean.nn.slope_noise import REACH, check_epsilon, uniform_slope


def _random_leak(x: Tensor, positive: Tensor, seed: Tensor, lower: float, upper: float) -> Tensor:
    wide = widen(x)
    return torch.where(positive, wide, wide * uniform_slope(seed, x, lower, upper)).to(x.dtype)


def _leak_value(x: Tensor, p0: None, p1: None, seed: Tensor, noisy: None, lower: float, upper: float) -> Tensor:
    return _random_leak(x, x > 0, seed, lower, upper)


def _leak_slope(
    gradient: Tensor,
    kept: Tensor,
    positive: Tensor | None,
    p0: None,
    p1: None,
    seed: Tensor,
    noisy: None,
    lower: float,
    upper: float,
    output_kept: bool,
) -> tuple[Tensor, None, None]:
    return _random_leak(gradient, kept > 0 if positive is None else positive, seed, lower, upper), None, None


def _random_gain(x: Tensor, negative: Tensor, seed: Tensor, epsilon: float) -> Tensor:
    k = uniform_slope(seed, x, 1 - epsilon, 1 + epsilon)
    return torch.where(negative, 0.0, widen(x) * k).to(x.dtype)


def _gain_value(x: Tensor, p0: None, p1: None, seed: Tensor, noisy: None, epsilon: float) -> Tensor:
    return _random_gain(x, x <= 0, seed, epsilon)


def _gain_slope(
    gradient: Tensor,
    kept: Tensor,
    positive: Tensor | None,
    p0: None,
    p1: None,
    seed: Tensor,
    noisy: None,
    epsilon: float,
    output_kept: bool,
) -> tuple[Tensor, None, None]:
    return _random_gain(gradient, kept <= 0, seed, epsilon), None, None


_RRELU = Operator("rrelu", _leak_value, _leak_slope)
_ERELU = Operator("erelu", _gain_value, _gain_slope)


def rrelu(
    x: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
    *,
    seed: Tensor | None = None,
) -> Tensor:
    """Randomized leaky rectifier: x for x > 0, a x otherwise, with a ~ U(lower, upper) for each element.

    Args:
        x: Any shape, any floating-point type.
        lower: The smallest slope.
        upper: The largest slope.
        training: Whether a is random; without it a = (lower + upper) / 2.
        inplace: Overwrite x with the result; the slopes are kept for the backward pass then, rounded to x's type.
        seed: int64, 0-d, or of x's number of dimensions with one seed a leading slice ([R, 1, 1]); the same seed gives
            the same noise everywhere. None draws one from torch's default generator; small tensors on a GPU outside a
            compiled program are left to torch then, which keeps their slopes.

    Raises:
        ValueError: If lower > upper, or the seed does not fit x.
    """
    _check_bounds(lower, upper)
    if not training:
        return F.leaky_relu(x, (lower + upper) / 2, inplace)
    if seed is None and not inplace and small(x):
        return F.rrelu(x, lower, upper, training=True)
    seed = resolve_seed(seed, x)
    if inplace:
        return x.mul_(_random_leak(torch.ones_like(x), x.detach() > 0, seed, lower, upper))
    keep, record = what_to_keep("auto", x, lower > 0, seed=seed), backward_may_follow(x)
    return _RRELU(x, None, None, seed, None, lower, upper, keep=keep, record=record)


def erelu(x: Tensor, epsilon: float = 0.4, training: bool = False, *, seed: Tensor | None = None) -> Tensor:
    """Elastic rectifier: k x for x > 0, 0 otherwise, with k ~ U(1 - epsilon, 1 + epsilon) for each element.

    Args:
        x: Any shape, any floating-point type.
        epsilon: How far k reaches to either side of 1, in [0, 1].
        training: Whether k is random; without it k = 1.
        seed: As in `rrelu`.

    Raises:
        ValueError: If epsilon lies outside [0, 1], or the seed does not fit x.
    """
    check_epsilon(epsilon, REACH)
    if not training:
        return F.relu(x)
    seed = resolve_seed(seed, x)
    return _ERELU(x, None, None, seed, None, epsilon, keep="output", record=backward_may_follow(x))


def _check_bounds(lower: float, upper: float) -> None:
    if isinstance(lower, bool) or isinstance(upper, bool):
        raise ValueError(f"lower and upper must be numbers, got {lower} and {upper}: write inplace=... to set inplace")
    if not (-math.inf < lower < math.inf and -math.inf < upper < math.inf):
        raise ValueError(
            f"lower and upper must be finite numbers, got {lower} and {upper}: the defaults are 1/8 and 1/3"
        )
    if lower > upper:
        raise ValueError(f"lower must not exceed upper, got {lower} and {upper}: swap them")


class RReLU(torch.nn.RReLU):
    """`rrelu` as a module; `torch.nn.RReLU` with noise from a seed, of which nothing but the seed is kept.

    Args:
        lower: The smallest slope.
        upper: The largest slope.
        inplace: Overwrite the input.

    Attributes:
        seed: If set, the noise's seed (see `rrelu`); if None, each training pass draws one.

    Raises:
        ValueError: If lower > upper.
    """

    def __init__(self, lower: float = 1.0 / 8, upper: float = 1.0 / 3, inplace: bool = False) -> None:
        _check_bounds(lower, upper)
        super().__init__(lower, upper, inplace)
        self.seed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply `rrelu` to each element."""
        return rrelu(x, self.lower, self.upper, self.training, self.inplace, seed=self.seed)


class EReLU(torch.nn.Module):
    """`erelu` as a module.

    Args:
        epsilon: How far k reaches to either side of 1, in [0, 1].

    Attributes:
        seed: If set, the noise's seed (see `rrelu`); if None, each training pass draws one.

    Raises:
        ValueError: If epsilon lies outside [0, 1].
    """

    def __init__(self, epsilon: float = 0.4) -> None:
        check_epsilon(epsilon, REACH)
        super().__init__()
        self.epsilon = epsilon
        self.seed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply `erelu` to each element."""
        return erelu(x, self.epsilon, self.training, seed=self.seed)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"epsilon={self.epsilon}"
