"""How near a result of each type must come to its float64 oracle."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """Of values and of slopes; a slope taken from a rounded output carries that rounding as an absolute error."""

    rtol: float
    atol: float
    slope_atol: float


TOLERANCES = {
    torch.float64: Tolerance(rtol=1e-12, atol=1e-300, slope_atol=1e-12),
    torch.float32: Tolerance(rtol=2e-6, atol=1e-37, slope_atol=1e-6),
    torch.float16: Tolerance(rtol=2e-3, atol=1e-7, slope_atol=1e-3),
    torch.bfloat16: Tolerance(rtol=8e-3, atol=1e-37, slope_atol=8e-3),
}

# The noise is made in float32 whatever the input's type; torch's smooth functions cancel where their value is tiny.
NOISY = Tolerance(rtol=2e-6, atol=1e-37, slope_atol=1e-6)
SMOOTH_ATOL = 1e-6
