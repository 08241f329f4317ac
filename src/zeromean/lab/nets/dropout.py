"""Dropout whose probability may change in every step of one compiled and recorded program."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """torch's own; with a strength, each element is dropped with probability ``strength p``, not p.

    A layer whose p is 0 does nothing either way.

    Attributes:
        strength: in [0, 1], float32 ``[]`` on the input's device, read in every step; no part of the state. Or None.
    """

    strength: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """``input / (1 - strength p)`` where it is kept, else 0; what is kept is drawn from the default generator."""
        if self.strength is None or self.p == 0 or not self.training:
            return super().forward(input)
        rate = self.p * self.strength
        kept = torch.rand_like(input, dtype=torch.float32) >= rate
        return (input.float() * (kept / (1 - rate))).to(input.dtype)
