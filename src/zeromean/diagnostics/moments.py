"""Mean, variance and counts of every unit of a tensor, by as few operators as that takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from zeromean.diagnostics.tails import Tails, both_limits

FEW_ROWS = 4096
"""Up to so many the fastest way on a CPU sums to six digits: it adds them one after another, in float32."""


Key = tuple[int, int]


def moments_together(pairs: Iterable[tuple[Tensor, int]]) -> dict[Key, tuple[Tensor, Tensor]]:
    """Those of tensors with the dimension of their units, by the tensor's `id` and the dimension."""
    found: dict[Key, tuple[Tensor, Tensor]] = {}
    for keys, columns, widths in _side_by_side(pairs):
        mean, variance = (whole.split(widths) for whole in moments(columns, 1))
        found |= {key: (mean[place], variance[place]) for place, key in enumerate(keys)}
    return found


def counts_together(pairs: Iterable[tuple[Tensor, int]], tails: Tails) -> dict[Key, dict[str, Tensor]]:
    """Those of inputs of activations that have the same tails."""
    found: dict[Key, dict[str, Tensor]] = {}
    for keys, columns, widths in _side_by_side(pairs):
        parts = {name: whole.split(widths) for name, whole in counts(columns, 1, tails).items()}
        found |= {key: {name: of[place] for name, of in parts.items()} for place, key in enumerate(keys)}
    return found


def _side_by_side(pairs: Iterable[tuple[Tensor, int]]) -> Iterator[tuple[list[Key], Tensor, list[int]]]:
    """Tensors whose units come last and that have as many rows, as one matrix; the others are left out."""
    groups: dict[tuple[object, ...], dict[Key, Tensor]] = {}
    for x, dimension in pairs:
        if dimension == x.ndim - 1:
            rows = x.detach() if x.ndim == 2 else x.detach().reshape(-1, x.shape[-1])
            groups.setdefault((len(rows), x.dtype, x.device), {})[id(x), dimension] = rows
    for group in groups.values():
        yield list(group), torch.cat(list(group.values()), 1), [rows.shape[1] for rows in group.values()]


def _others(x: Tensor, dimension: int) -> list[int]:
    return [place for place in range(x.ndim) if place != dimension]


def moments(y: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each unit, in at least float32; torch.var_mean is slow on a CPU."""
    wide = y.float() if y.dtype in (torch.float16, torch.bfloat16) else y
    if dimension == y.ndim - 1:
        wide = wide if y.ndim == 2 else wide.reshape(-1, y.shape[-1])
        if len(wide) <= FEW_ROWS and not wide.is_cuda:
            mean, variance = torch.batch_norm_update_stats(wide, None, None, 0)
            return mean, variance
        dimension = 1
    others = _others(wide, dimension)
    if wide.is_cuda:
        variance, mean = torch.var_mean(wide, others, correction=0)
        return mean, variance
    mean = wide.mean(others, keepdim=True)
    return mean.flatten(), (wide - mean).square_().mean(others)


def counts(x: Tensor, dimension: int, found: Tails) -> dict[str, Tensor]:
    """How many samples of each unit lie in the tails and up to the knee; ``high`` and ``off`` only where there are."""
    if x.ndim == 1:
        x, dimension = x[None], 1
    if isinstance(found.lower, float) and -math.inf < found.lower < float(found.knee):
        low, off = _count(x, dimension, torch.le, both_limits(found, x.ndim, x.device)).unbind()
        return {"low": low, "off": off}
    numbers = {}
    if isinstance(found.lower, float) and math.isinf(found.lower):
        numbers["low"] = torch.zeros(x.shape[dimension], device=x.device)
    else:
        numbers["low"] = _count(x, dimension, torch.le, _of_channels(found.lower, x))
    if isinstance(found.upper, Tensor) or found.upper < math.inf:
        numbers["high"] = _count(x, dimension, torch.ge, _of_channels(found.upper, x))
    if isinstance(found.knee, Tensor) or found.knee > -math.inf:
        same = isinstance(found.knee, float) and found.knee == found.lower
        numbers["off"] = numbers["low"] if same else _count(x, dimension, torch.le, _of_channels(found.knee, x))
    return numbers


def _count(x: Tensor, dimension: int, compare: Callable[..., Tensor], limit: float | Tensor) -> Tensor:
    """How often a comparison is true, for each unit, and for each limit if they have one dimension more than x."""
    more = [len(limit)] if isinstance(limit, Tensor) and limit.ndim > x.ndim else []
    ones = torch.empty(more + list(x.shape), dtype=torch.float32, device=x.device)
    return compare(x, limit, out=ones).sum([place + len(more) for place in _others(x, dimension)])


def _of_channels(limit: float | Tensor, x: Tensor) -> float | Tensor:
    """Limits ``[C]`` against the channels of x, which for every activation with parameters are dimension 1."""
    if not isinstance(limit, Tensor) or limit.numel() == 1:
        return limit
    return limit.view([-1 if place == min(1, x.ndim - 1) else 1 for place in range(x.ndim)])
