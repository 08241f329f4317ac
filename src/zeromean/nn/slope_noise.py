"""The random slopes of the noisy rectifiers: made from a seed, made again from it in the backward pass."""

import torch
from torch import Tensor

from zeromean.nn import noise

REACH = "how far the slope noise reaches to either side of 1"
LARGEST_DEVIATION = "the largest standard deviation of the slope noise"


def uniform_slope(seed: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """Slopes U(low, high) in float32, one for each element of x."""
    return low + (high - low) * noise.uniform(seed, x.shape)


def normal_slope(seed: Tensor, x: Tensor, epsilon: float) -> Tensor:
    """Slopes N(1, sigma^2) clipped to [0, 2], one for each element of x; one sigma ~ U(0, epsilon) for each seed."""
    sigma = epsilon * noise.uniform(seed, seed.shape, stream=1)
    return (1.0 + sigma * noise.normal(seed, x.shape)).clamp(0.0, 2.0)


def check_epsilon(epsilon: float, meaning: str) -> None:
    """Raise ValueError unless epsilon lies in [0, 1]."""
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon must lie in [0, 1], got {epsilon}: it is {meaning}")


def as_flag(noisy: bool | Tensor, x: Tensor) -> Tensor:
    """A flag as a tensor on x's device, so that neither a GPU nor a compiler has to stop and read it.

    Raises:
        ValueError: If it is neither a bool nor a 0-d bool tensor.
    """
    if not isinstance(noisy, Tensor):
        return torch.full((), noisy, device=x.device)
    if noisy.ndim or noisy.dtype != torch.bool:
        raise ValueError(
            f"noisy must be a bool or a 0-d bool tensor, got {noisy.dtype} of shape {tuple(noisy.shape)}: "
            "all of a layer takes its turn at once"
        )
    return noisy.to(x.device)


def learn_in_quiet_passes(parameter: Tensor, noisy: Tensor) -> Tensor:
    """The parameter, cut off from its gradient in a noisy pass."""
    return torch.where(noisy, parameter.detach(), parameter)
