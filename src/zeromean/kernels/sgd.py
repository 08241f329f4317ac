"""Gradient descent in few launches: one program decides about a step, another takes it in one pass over memory.

The second is for weights that are computed with in half precision. Weights and velocities are float32; the copies with
which forward and backward pass compute are rounded anew by the same program, and gradients are read as the backward
pass leaves them. That moves 20 bytes a weight where casts before and behind an optimizer in float32 move 32.

Float16 holds numbers down to 6e-8 only, so there the loss is multiplied by a scale before it is differentiated, and the
gradient is divided by it: as in Micikevicius et al., "Mixed precision training", ICLR 2018, section 3.2, the scale is
halved where a gradient is not finite, and doubled after many steps without.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zeromean.kernels.operator import fused

_TILE = 2048
_FIRST_SCALE = 2.0**12
_LARGEST_SCALE = 2.0**16
# Steps until the scale of the loss is doubled.
_CALM = 2000


@dataclass(frozen=True)
class Ledger:
    """Where a training stands, on its device.

    Attributes:
        rates: the learning rate of each step, float32 ``[steps]``.
        place: of the next batch in its epoch, int64 ``[1]``.
        number: of the next step, counted from 0, int64 ``[1]``.
        first_void: number of the step from which on all are void, or the number of steps, int64 ``[1]``.
        loss_sum: over steps, float64 ``[]``.
        rate: the learning rate of the step that was settled last, float32 ``[]``.
        scale: what its gradient is multiplied by, float32 ``[]``: less than 1 where it is clipped, over `loss_scale`.
        void: 1 if it must change nothing, else 0, float32 ``[]``.
        loss_scale: what the next step's loss is multiplied by before it is differentiated, float32 ``[]``.
        calm: steps since that was changed, int64 ``[]``.
        overflows: steps that were void because their gradient alone was not finite, int64 ``[]``.
        scales: whether the scale ever changes; it is 1 where not.
    """

    rates: Tensor
    place: Tensor
    number: Tensor
    first_void: Tensor
    loss_sum: Tensor
    rate: Tensor
    scale: Tensor
    void: Tensor
    loss_scale: Tensor
    calm: Tensor
    overflows: Tensor
    scales: bool

    @classmethod
    def opened(cls, rates: Tensor, *, scales: bool = False) -> Ledger:
        """Before the first step of a training with these rates."""
        device = rates.device
        place, number = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        calm, overflows = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        first_void = torch.full((1,), len(rates), dtype=torch.int64, device=device)
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        rate, void = (torch.zeros((), device=device) for _ in range(2))
        scale = torch.ones_like(rate)
        loss_scale = torch.full_like(rate, _FIRST_SCALE if scales else 1.0)
        return cls(rates, place, number, first_void, loss_sum, rate, scale, void, loss_scale, calm, overflows, scales)

    def settle(self, loss: Tensor, norms: Tensor, clip: float) -> None:
        """Decide about a step, and turn to the next one.

        It is void, as are all after it, if its loss or the norm of its whole gradient is not finite. Where the loss is
        finite and its scale above 1, the step alone is void and the scale is halved.

        Args:
            loss: before it is multiplied, float32 ``[]``.
            norms: of parts of the gradient as it was found, float32 ``[parts]``.
            clip: the largest norm of the whole gradient; 0 does not clip.
        """
        if fused(loss):
            _programs().settle[(1,)](
                loss, norms, self.rates, self.place, self.number, self.first_void, self.loss_sum, self.rate, self.scale,
                self.void, self.loss_scale, self.calm, self.overflows, len(norms), clip, _LARGEST_SCALE, _CALM,
                PADDED=1 << (len(norms) - 1).bit_length(), SCALES=self.scales, num_warps=1,
            )  # fmt: skip
            return
        norm = torch.linalg.vector_norm(norms) / self.loss_scale
        goes_on = torch.isfinite(loss) & (torch.isfinite(norm) | (self.loss_scale > 1))
        overflow = goes_on & ~torch.isfinite(norm)
        self.first_void.copy_(torch.where(goes_on, self.first_void, torch.minimum(self.first_void, self.number)))
        self.void.copy_(((self.first_void <= self.number) | overflow)[0])
        self.rate.copy_(self.rates.index_select(0, self.number)[0])
        self.scale.copy_((clip / norm.clamp(min=clip) if clip else 1) / self.loss_scale)
        if self.scales:
            self._rescale(overflow)
        self.loss_sum.add_(loss)
        self.place.add_(1)
        self.number.add_(1)

    def _rescale(self, overflow: Tensor) -> None:
        calm = torch.where(overflow, 0, self.calm + 1)
        grown = torch.where(calm == _CALM, (2 * self.loss_scale).clamp(max=_LARGEST_SCALE), self.loss_scale)
        self.loss_scale.copy_(torch.where(overflow, self.loss_scale / 2, grown))
        self.calm.copy_(calm % _CALM)
        self.overflows.add_(overflow)


@dataclass(frozen=True)
class Flat:
    """All weights of a network, one behind the other; each tensor is one-dimensional.

    Attributes:
        weight: float32.
        velocity: float32, what momentum keeps.
        copy: the weights in half precision, or the weights themselves.
        gradient: in any precision.
    """

    weight: Tensor
    velocity: Tensor
    copy: Tensor
    gradient: Tensor

    @property
    def direction(self) -> Tensor:
        """Memory for where a step goes, that of the gradient: bfloat16, as wide in range as float32, or float32."""
        return self.gradient if self.gradient.dtype == torch.float32 else self.gradient.view(torch.bfloat16)


def sgd_step(flat: Flat, ledger: Ledger, *, decay: float, momentum: float, nesterov: bool) -> None:
    """``g = scale gradient + decay weight; v <- momentum v + g; weight <- weight - rate v; copy <- weight``, in place.

    With Nesterov's momentum the step is ``g + momentum v`` instead of v (Sutskever et al., ICML 2013), as in
    `torch.optim.SGD`.

    Args:
        flat: what is updated.
        ledger: has rate and scale; a void step changes nothing.
        decay: L2 of the weights.
        momentum: the share of the velocity that is kept.
        nesterov: looks ahead.
    """
    if fused(flat.weight):
        count = flat.weight.numel()
        _programs().sgd_step[(-(-count // _TILE),)](
            flat.weight, flat.velocity, flat.copy, flat.gradient, ledger.rate, ledger.scale, ledger.void, count, decay,
            momentum, NESTEROV=nesterov, TILE=_TILE, num_warps=4,
        )  # fmt: skip
        return
    gradient = torch.add(ledger.scale * flat.gradient.float(), flat.weight, alpha=decay)
    velocity, step = carried_on(flat.velocity, gradient, momentum, nesterov)
    for old, new in ((flat.velocity, velocity), (flat.weight, flat.weight - ledger.rate * step)):
        old.copy_(torch.where(ledger.void == 0, new, old))
    flat.copy.copy_(flat.weight)


def carried_on(velocity: Tensor, gradient: Tensor, momentum: float, nesterov: bool) -> tuple[Tensor, Tensor]:
    """The velocity after a gradient, and where it leads."""
    velocity = momentum * velocity + gradient
    return velocity, gradient + momentum * velocity if nesterov else velocity


@functools.cache
def _programs() -> Any:
    """Imported when first needed, as they need Triton."""
    from zeromean.kernels import sgd_programs

    return sgd_programs
