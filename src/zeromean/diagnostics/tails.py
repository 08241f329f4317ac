"""Where an activation is flat: the tails in which a unit hardly passes a gradient, found by following its graph.

Everything is relative to the steepest slope that the activation has on [-64, 64]. A *flat tail* is the outermost
stretch of a side on which the slope stays below `FLAT` of the steepest, if it ends below `GONE` of it: ReLU's lower one
is x <= 0, ELU's x <= -3, tanh's two are |x| >= 2.19; LeakyReLU has none, since a constant slope never dies. An
activation with no upper tail is a rectifier; its *knee* is the end of the stretch on its lower side where the slope
stays below half of the steepest (ReLU 0, ELU -0.69): above the knee it is nearly linear. The two bounds and the half
are our choice.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FLAT = 0.05
GONE = 1e-3
_GRID = torch.cat((torch.arange(-64.0, -8.0), torch.arange(-8.0, 8.0, 1 / 16), torch.arange(8.0, 65.0)))


@dataclass(frozen=True)
class Tails:
    """The limits of an activation's tails: one number, or a tensor ``[C]`` with one of each channel.

    Attributes:
        lower: inputs up to it lie in the lower flat tail; -inf without one.
        knee: inputs up to it switch a rectifier off; -inf where it has none.
        upper: inputs from it on lie in the upper flat tail; inf without one.
    """

    lower: float | Tensor
    knee: float | Tensor
    upper: float | Tensor


@torch.no_grad()
def tails(activation: nn.Module) -> Tails:
    """Find the tails of an activation as it is now, in evaluation mode, without calling its hooks.

    Args:
        activation: An elementwise module; one with parameters for each channel takes inputs ``[N, C]``.
    """
    parameters = list(activation.parameters())
    like = parameters[0].detach() if parameters else torch.empty(0)
    channels = max((p.numel() for p in parameters), default=1)
    grid = _GRID.to(like.device)[:, None].expand(-1, channels).to(like.dtype, copy=True)
    y = _evaluated(activation, grid).float()
    slopes = y.diff(dim=0).abs() / _GRID.to(like.device).diff()[:, None]
    limits = _limits(slopes)
    return Tails(*limits) if parameters else Tails(*(float(limit) for limit in limits))


@functools.lru_cache(maxsize=64)
def both_limits(found: Tails, dimensions: int, device: torch.device) -> Tensor:
    """Lower tail and knee, kept on the device, to compare a tensor of so many dimensions with both at once."""
    return torch.tensor([found.lower, found.knee], device=device).view(2, *[1] * dimensions)


def _evaluated(activation: nn.Module, grid: Tensor) -> Tensor:
    training = activation.training
    activation.training = False
    try:
        y: Tensor = activation.forward(grid.clone())
        return y
    finally:
        activation.training = training


def _limits(slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lower tail, knee and upper tail of slopes ``[G - 1, C]`` between the points of the grid."""
    steepest = slopes.amax(0)
    lower = _stretch(slopes, FLAT * steepest)
    lower[slopes[0] >= GONE * steepest] = -math.inf
    upper = -_stretch(slopes.flip(0), FLAT * steepest)
    upper[slopes[-1] >= GONE * steepest] = math.inf
    knee = _stretch(slopes, 0.5 * steepest)
    knee[upper.isfinite()] = -math.inf
    return lower, knee, upper


def _stretch(slopes: Tensor, bound: Tensor) -> Tensor:
    """End of the stretch from the first slope on that stays below the bound, -inf if there is none."""
    count = (slopes < bound).cumprod(0).sum(0)
    return torch.where(count > 0, _GRID.to(slopes.device)[count], -math.inf)
