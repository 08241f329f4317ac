"""The launches of one activation on tensors of one kind: all that Python can work out before it sees a number.

In eager mode the time between two launches is Python's, and below some hundred thousand elements there is no other. So
a lane is made once for each kind, and a call through it allocates and launches, no more.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zeromean.kernels import launch
from zeromean.kernels.launch import FORMULAS, View

# Lanes by all that decides them, so that a program compiled for one is found again at little cost.
_lanes: dict[Any, Lane | None] = {}
_MOST_LANES = 4096


def lane_of(
    name: str, x: Tensor, parameters: Sequence[Tensor], seed: Tensor | None, signs: bool, output_kept: bool
) -> Lane | None:
    """The lane of a dense tensor with contiguous parameters; None where only plain operators can do it."""
    key: Any = (name, signs, output_kept, x.shape, x.stride(), x.dtype, x.device, None if seed is None else seed.shape)
    for parameter in parameters:
        key = (key, parameter.shape, parameter.dtype)
    try:
        return _lanes[key]
    except KeyError:
        if len(_lanes) >= _MOST_LANES:
            _lanes.clear()
    view = launch.view_of(x, () if FORMULAS[name].full else parameters, seed)
    fits = view is not None and (view.packs() or not signs)
    _lanes[key] = Lane(name, view, x, signs, output_kept) if view is not None and fits else None
    return _lanes[key]


class Lane:
    """The launches of one activation on dense tensors of one kind, with contiguous parameters and seeds.

    Args:
        name: The formula.
        view: How the programs see the tensors.
        x: One of them.
        signs: Whether the forward pass packs the input's signs.
        output_kept: Whether the backward pass gets the output, and not the input.
    """

    def __init__(self, name: str, view: View, x: Tensor, signs: bool, output_kept: bool) -> None:
        formula = FORMULAS[name]
        # A parameter of x's own shape is added: its gradient is the incoming one.
        parameters = 0 if formula.full else formula.parameters
        self.forward_plan = launch.forward_plan(view, name, signs)
        self.backward_plan = launch.backward_plan(view, name, parameters, signs, output_kept, learn=False)[0]
        self.packed = _room(torch.uint8, x.device).expand((x.numel() + 7) // 8) if signs else None
        self.shares: Tensor | None = None
        if parameters:
            self.learning_plan, shape = launch.backward_plan(view, name, parameters, signs, output_kept, learn=True)
            self._sum(shape, not view.columns, _room(torch.float32, x.device))

    def _sum(self, shape: tuple[int, int, int, int], padded: bool, room: Tensor) -> None:
        """Sum [parameter, slice, share, channel] over the shares; many shares of one channel in two steps."""
        kinds, slices, shares, channels = shape
        fold = channels == 1 and shares % launch.FOLD == 0
        self.shares = room.expand(kinds * slices * shares * channels)
        # Shares that no program writes are there to fill up the last column.
        self.make_shares = torch.zeros_like if fold and padded else torch.empty_like
        self.folded = room.expand(kinds * slices * launch.FOLD) if fold else None
        if fold:
            self.fold_plan = launch.finish_plan(1, kinds * slices, shares // launch.FOLD, launch.FOLD)
            shares = launch.FOLD
        self.finish_plan = launch.finish_plan(kinds, slices, shares, channels)

    def forward(
        self,
        numbers: Sequence[float],
        x: Tensor,
        p0: Tensor | None,
        p1: Tensor | None,
        seed: Tensor | None,
        noisy: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The value, and the packed signs if there are any."""
        y = torch.empty_like(x)
        packed = None if self.packed is None else torch.empty_like(self.packed)
        launch._launch(self.forward_plan, (x, y, packed, p0, p1, seed, noisy), numbers)
        return y, packed

    def backward(
        self,
        numbers: Sequence[float],
        gradient: Tensor,
        kept: Tensor,
        signs: Tensor | None,
        p0: Tensor | None,
        p1: Tensor | None,
        seed: Tensor | None,
        noisy: Tensor | None,
        learn: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The gradient of x, for one laid out as the kept tensor, and those of the parameters if they learn."""
        dx = torch.empty_like(gradient)
        if not learn or self.shares is None or p0 is None:
            launch._launch(self.backward_plan, (gradient, kept, signs, dx, None, p0, p1, seed, noisy), numbers)
            return dx, None, None
        shares = self.make_shares(self.shares)
        launch._launch(self.learning_plan, (gradient, kept, signs, dx, shares, p0, p1, seed, noisy), numbers)
        d0, d1 = torch.empty_like(p0), None if p1 is None else torch.empty_like(p1)
        if self.folded is not None:
            columns = torch.empty_like(self.folded)
            launch._launch(self.fold_plan, (shares, columns, None), ())
            shares = columns
        launch._launch(self.finish_plan, (shares, d0, d1), ())
        return dx, d0, d1


@functools.cache
def _room(dtype: torch.dtype, device: torch.device) -> Tensor:
    """One element, to be expanded: `torch.empty_like` takes half the time of `torch.empty`, a size and a type."""
    return torch.empty(1, dtype=dtype, device=device)
