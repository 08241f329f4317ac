"""Elementary functions in float32 that cost a handful of instructions.

A bfloat16 tensor leaves about 30 instructions an element before arithmetic, not memory, sets the pace; the usual expm1
alone takes them all. Accuracy here is that of float32 results; an infinity or NaN comes out as one.
"""

import os

import triton
import triton.language as tl

# The interpreter cannot run machine instructions, so it takes the exact functions instead.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

_LOG2E = tl.constexpr(1.4426950408889634)
_NEAR_ZERO = tl.constexpr(-0.35)
SQRT_2_OVER_PI_TIMES_2 = tl.constexpr(1.5957691216057308)
INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def power_of_2(x):
    """2^x within 2 units in the last place, 0 where that would be a subnormal number."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def exp(x):
    """e^x, as `power_of_2`."""
    return power_of_2(x * _LOG2E)


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 0, relative error below 1e-6: a polynomial near 0, where the difference would cancel."""
    p = (((0.0072319354 * x + 0.0413486509) * x + 0.1666298693) * x + 0.4999986626) * (x * x) + x
    return tl.where(x > _NEAR_ZERO, p, exp(x) - 1.0)


@triton.jit
def log(x):
    """Natural logarithm of a positive, normal number."""
    if INTERPRETED:
        return tl.log(x)
    else:
        binary = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        return binary * 0.6931471805599453


@triton.jit
def reciprocal(x):
    """1 / x within 1 unit in the last place; 0 for infinity."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return reciprocal(1.0 + power_of_2(x * -_LOG2E))


@triton.jit
def normal_tail(x):
    """Phi(-|x|) and e^(-x^2 / 2): a polynomial in 1 / (1 + 0.3 |x|) times the exponential, relative error 1e-6."""
    t = reciprocal(tl.abs(x) * 0.3 + 1.0)
    p = ((0.0356747592 * t - 0.1572030192) * t + 0.206353395) * t - 0.0536835403
    p = ((((p * t + 0.128561571) * t + 0.0999135091) * t + 0.1207539533) * t + 0.119629299) * t
    bell = power_of_2(x * x * (-0.5 * _LOG2E))
    return p * bell, bell
