"""Mean, variance and counts of every unit of a tensor, by as few operators as that takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zeromean.diagnostics.tails import Tails, both_limits

FEW_ROWS = 4096
"""Up to so many the fastest way on a CPU sums to six digits: it adds them one after another, in float32."""


OF_PASSES = (0, 2)
"""The dimensions that count passes and units where copies of passes lie one behind the other ``[P, N, C]``."""


def _others(x: Tensor, kept: Sequence[int]) -> list[int]:
    return [place for place in range(x.ndim) if place not in kept]


def moments(y: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each unit, in at least float32; torch.var_mean is slow on a CPU."""
    wide = _wide(y)
    if dimension == y.ndim - 1:
        wide = wide if y.ndim == 2 else wide.reshape(-1, y.shape[-1])
        if len(wide) <= FEW_ROWS and not wide.is_cuda:
            mean, variance = torch.batch_norm_update_stats(wide, None, None, 0)
            return mean, variance
        dimension = 1
    others = _others(wide, (dimension,))
    if wide.is_cuda:
        variance, mean = torch.var_mean(wide, others, correction=0)
        return mean, variance
    mean = wide.mean(others, keepdim=True)
    return mean.flatten(), (wide - mean).square_().mean(others)


def moments_of_passes(y: Tensor) -> tuple[Tensor, Tensor]:
    """Those of each unit in each pass ``[P, C]``."""
    variance, mean = torch.var_mean(_wide(y), _others(y, OF_PASSES), correction=0)
    return mean, variance


def _wide(y: Tensor) -> Tensor:
    return y.float() if y.dtype in (torch.float16, torch.bfloat16) else y


def count_names(found: Tails) -> tuple[str, ...]:
    """Which counts there are: ``high`` and ``off`` only of activations with an upper tail or a knee."""
    high = isinstance(found.upper, Tensor) or found.upper < math.inf
    off = isinstance(found.knee, Tensor) or found.knee > -math.inf
    return ("low", *(["high"] if high else []), *(["off"] if off else []))


def counts(x: Tensor, dimension: int | tuple[int, int], found: Tails, room: Tensor | None = None) -> Tensor:
    """How many samples of each unit lie in the tails and up to the knee ``[K, C]``, a row for each of `count_names`.

    Args:
        x: inputs of an activation.
        dimension: of the units; with `OF_PASSES` the counts are ``[K, P, C]``.
        found: its tails.
        room: memory to work in, which grows as needed.
    """
    if x.ndim == 1:
        x, dimension = x[None], 1
    kept = (dimension,) if isinstance(dimension, int) else dimension
    if isinstance(found.lower, float) and -math.inf < found.lower < float(found.knee):
        return _count(x, kept, torch.le, both_limits(found, x.ndim, x.device), room)
    if isinstance(found.lower, float) and math.isinf(found.lower):
        low = torch.zeros([x.shape[place] for place in kept], device=x.device)
    else:
        low = _count(x, kept, torch.le, _of_channels(found.lower, x), room)
    names = count_names(found)
    if "off" in names and isinstance(found.knee, float) and found.knee == found.lower:
        return low.expand(2, *low.shape)
    numbers = [low]
    if "high" in names:
        numbers.append(_count(x, kept, torch.ge, _of_channels(found.upper, x), room))
    if "off" in names:
        numbers.append(_count(x, kept, torch.le, _of_channels(found.knee, x), room))
    return torch.stack(numbers)


def _count(
    x: Tensor, kept: Sequence[int], compare: Callable[..., Tensor], limit: float | Tensor, room: Tensor | None
) -> Tensor:
    """How often a comparison is true, for each unit, and for each limit if they have one dimension more than x."""
    more = [len(limit)] if isinstance(limit, Tensor) and limit.ndim > x.ndim else []
    others = [place + len(more) for place in _others(x, kept)]
    if x.is_cuda:
        return compare(x, limit).sum(others, dtype=torch.float32)
    shape = more + list(x.shape)
    ones = torch.empty(shape, dtype=torch.float32, device=x.device) if room is None else room.resize_(shape)
    return compare(x, limit, out=ones).sum(others)


def _of_channels(limit: float | Tensor, x: Tensor) -> float | Tensor:
    """Limits ``[C]`` against the channels of x, which for every activation with parameters are dimension 1."""
    if not isinstance(limit, Tensor) or limit.numel() == 1:
        return limit
    return limit.view([-1 if place == min(1, x.ndim - 1) else 1 for place in range(x.ndim)])
