r"""Step functions that stand for the derivative of SiLU, GELU and Mish: 2^bits levels, best for x ~ N(0, 1).

    minimise  E[(f'(x) - level(x))^2]  over all ways to give each x one of 2^bits levels

The best way looks at f'(x) alone: each x takes the level nearest to its derivative, and each level is the mean of the
derivatives that it stands for (Lloyd, 1982). Where f' turns, several intervals of x share a level. Dynamic programming
over 512 equally probable pieces finds the global optimum up to their width, Lloyd's iteration then the exact place.

The levels are numbered by Gray code in rising order. As f' is continuous, one bit alone changes at each threshold.

Source: Novikov et al., "Few-bit backward: quantized gradients of activation functions for memory footprint reduction",
2022, who let each of 2^bits intervals of x have a level of its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "mish": F.mish,
}
MOST_BITS = 4
_REACH, _POINTS, _PIECES, _ITERATIONS, _STEP = 8.0, 2**15, 512, 100, 1e-5


@dataclass(frozen=True)
class Table:
    """A derivative in steps.

    Attributes:
        thresholds: Where the code changes, rising: interval i is thresholds[i - 1] < x <= thresholds[i].
        codes: The code of each interval, one more than there are thresholds.
        levels: The derivative that a code stands for.
        rms: The root of the mean squared error of the derivative for x ~ N(0, 1).
        largest: The largest error of the derivative.
    """

    thresholds: tuple[float, ...]
    codes: tuple[int, ...]
    levels: tuple[float, ...]
    rms: float
    largest: float


@cache
def table(name: str, bits: int) -> Table:
    """The best table of 2^bits levels for a function of `FUNCTIONS`; the first call takes some hundredths of a second.

    Thresholds and levels are rounded to float32, the type in which the programs use them.
    """
    x = (torch.arange(_POINTS, dtype=torch.float64, device="cpu") + 0.5) * (2 * _REACH / _POINTS) - _REACH
    slope = derivative(name, x)
    weight = torch.exp(-(x**2) / 2)
    weight /= weight.sum()
    levels = _best_levels(slope, weight, 2**bits)
    between = (levels[1:] + levels[:-1]) / 2
    rank = torch.bucketize(slope, between)
    change = (rank[1:] != rank[:-1]).nonzero().flatten()
    value = between[torch.minimum(rank[change], rank[change + 1])]
    share = (value - slope[change]) / (slope[change + 1] - slope[change])
    thresholds = x[change] + share * (x[change + 1] - x[change])
    ranks = [*rank[change].tolist(), int(rank[-1])]
    gray = [number ^ (number >> 1) for number in range(2**bits)]
    error = slope - levels[rank]
    return Table(
        thresholds=tuple(thresholds.float().tolist()),
        codes=tuple(gray[number] for number in ranks),
        levels=tuple(levels.float()[[gray.index(code) for code in range(2**bits)]].tolist()),
        rms=math.sqrt(float(weight @ error**2)),
        largest=float(error.abs().max()),
    )


def derivative(name: str, x: Tensor) -> Tensor:
    """The derivative of a function of `FUNCTIONS` in float64, by central differences: autograd may be off here."""
    function = FUNCTIONS[name]
    above, below = function(x + _STEP), function(x - _STEP)
    slope: Tensor = (above - below) / (2 * _STEP)
    return slope


def _best_levels(values: Tensor, weights: Tensor, count: int) -> Tensor:
    """The levels, rising, that minimise the weighted squared distance of the values to the nearest level."""
    values, order = values.sort()
    moments = [torch.cat([values.new_zeros(1), (weights[order] * values**power).cumsum(0)]) for power in range(3)]
    cuts = _best_cuts(moments, count)
    for _ in range(_ITERATIONS):
        mass, total = (moment[cuts].diff() for moment in moments[:2])
        levels: Tensor = total / mass
        cuts[1:-1] = torch.searchsorted(values, (levels[1:] + levels[:-1]) / 2)
    return levels


def _best_cuts(moments: list[Tensor], count: int) -> Tensor:
    """Where to cut sorted values into ``count`` runs, by dynamic programming over pieces of equal weight."""
    shares = torch.linspace(0, 1, _PIECES + 1).to(moments[0])
    grid: Tensor = torch.searchsorted(moments[0], shares * moments[0][-1]).unique()
    mass, total, square = (moment[grid] - moment[grid, None] for moment in moments)
    cost = torch.where(mass > 0, square - total**2 / mass, math.inf)
    best, choices = cost[0], []
    for _ in range(count - 1):
        best, choice = (best[:, None] + cost).min(0)
        choices.append(choice)
    path = [len(grid) - 1]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return grid[[0, *reversed(path)]]
