"""Muon in few launches: momentum in one pass over all weights, orthogonal matrices, and the step in another pass.

A gradient of a weight matrix ``[outputs, inputs]`` has a few large singular values and many small ones. Muon replaces
all of them by about 1, so that each direction moves as far: no direction is so steep that the rate must be small for
it. Without normalization layers, whose scales hide how far weights move, that is what bounds a step: at rate r, what
the matrix makes of an input moves by about r times the input's length at most, and times the root of outputs over
inputs where there are more outputs, as in a first layer.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, whose five steps of a
Newton-Schulz iteration and factor for tall matrices these are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zeromean.kernels.operator import fused
from zeromean.kernels.sgd import Flat, Ledger, carried_on

_TILE = 2048
_ITERATIONS = 5
# x <- (A + B x x' + C (x x')^2) x lifts small singular values the fastest and ends with all in about [0.7, 1.2].
_A, _B, _C = 3.4445, -4.7750, 2.0315
# Below it a direction is as good as none; its squares would have no sum in float32.
_SMALLEST = 1e-18


def muon_step(
    flat: Flat,
    ledger: Ledger,
    *,
    matrices: Sequence[Tensor],
    decay: float,
    momentum: float,
    nesterov: bool,
) -> None:
    """``v <- momentum v + scale gradient; w <- (1 - rate decay) w - rate orthogonal(v); copy <- w``, in place.

    With Nesterov's momentum it is ``orthogonal(scale gradient + momentum v)``.

    Args:
        flat: what is updated; its gradient is lost.
        ledger: has rate and scale; a void step changes nothing.
        matrices: all weights' parts of `Flat.direction`, ``[outputs, inputs]``.
        decay: of the weights, not through the gradient, whose size is lost (Loshchilov and Hutter, ICLR 2019).
        momentum: the share of the velocity that is kept.
        nesterov: looks ahead.
    """
    _gather(flat, ledger, momentum, nesterov)
    for matrix in matrices:
        orthogonalize(matrix)
    _apply(flat, ledger, decay)


def orthogonalize(matrix: Tensor) -> None:
    """Replace ``U S V'`` (its singular value decomposition) by about ``U V'``, in place; zeros stay zeros.

    Singular values end in about [0.7, 1.2], times the root of rows over columns where there are more rows. Those below
    a five-hundredth of the root of their squares' sum end smaller.
    """
    rows, columns = matrix.shape
    x = matrix if rows <= columns else matrix.mT
    x = x / torch.linalg.vector_norm(x, dtype=torch.float32).clamp(min=_SMALLEST)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.addmm(gram, gram, gram, beta=_B, alpha=_C)
        polynomial.diagonal().add_(_A)
        x = polynomial @ x
    x = x if rows <= columns else x.mT
    torch.mul(x, math.sqrt(max(1.0, rows / columns)), out=matrix)


def _gather(flat: Flat, ledger: Ledger, momentum: float, nesterov: bool) -> None:
    """Update the velocity, and put the direction in the gradient's place."""
    direction, count = flat.direction, flat.weight.numel()
    if fused(flat.weight):
        _programs().gather[(-(-count // _TILE),)](
            flat.velocity, flat.gradient, direction, ledger.scale, ledger.void, count, momentum,
            NESTEROV=nesterov, TILE=_TILE, num_warps=4,
        )  # fmt: skip
        return
    velocity, way = carried_on(flat.velocity, ledger.scale * flat.gradient.float(), momentum, nesterov)
    direction.copy_(torch.where(ledger.void == 0, way, 0.0))
    flat.velocity.copy_(torch.where(ledger.void == 0, velocity, flat.velocity))


def _apply(flat: Flat, ledger: Ledger, decay: float) -> None:
    """Take the step along the direction."""
    direction, count = flat.direction, flat.weight.numel()
    if fused(flat.weight):
        _programs().apply[(-(-count // _TILE),)](
            flat.weight, flat.copy, direction, ledger.rate, ledger.void, count, decay, TILE=_TILE, num_warps=4
        )
        return
    stepped = flat.weight * (1 - ledger.rate * decay) - ledger.rate * direction.float()
    flat.weight.copy_(torch.where(ledger.void == 0, stepped, flat.weight))
    flat.copy.copy_(flat.weight)


@functools.cache
def _programs() -> Any:
    """Imported when first needed, as they need Triton."""
    from zeromean.kernels import muon_programs

    return muon_programs
