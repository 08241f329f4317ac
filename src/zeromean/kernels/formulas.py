"""The activations as element-wise formulas in float32: value and derivatives, one pair of functions each.

A value is a function of the input x, the learnable parameters p0 and p1, the random slope k (None without noise) and
the numbers s0, s1, s2. A derivative is a function of the gradient g, the kept tensor v (the output, or the input if not
OUTPUT), whether the input was on the positive side, and the same rest; it returns the gradients of x, p0 and p1. The
mathematics stands in the files of `zeromean.nn`; the bounds on parameters are applied here as there.
"""

import triton
import triton.language as tl

from zeromean.kernels.elementary import (
    INVERSE_SQRT_2PI,
    SQRT_2_OVER_PI_TIMES_2,
    exp,
    expm1,
    log,
    normal_tail,
    reciprocal,
    sigmoid,
)

_SMALLEST = tl.constexpr(2.0**-10)
_PELU_BOUND = tl.constexpr(0.1)
_TINY = tl.constexpr(1e-30)


@triton.jit
def at_least(parameter, bound):
    """The parameter or its bound; NaN stays one, so that a run that has diverged shows it."""
    return tl.maximum(parameter, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def elu(x, p0, p1, k, s0, s1, s2):
    return tl.where(x > 0, x * s1, expm1(x * s2) * (s0 * s1))


@triton.jit
def elu_slope(g, v, positive, p0, p1, k, s0, s1, s2, OUTPUT: tl.constexpr):
    if OUTPUT:
        negative = v * s2 + s0 * s1 * s2
    else:
        negative = exp(v * s2) * (s0 * s1 * s2)
    return g * tl.where(positive, s1, negative), g, g


@triton.jit
def bias_elu(x, p0, p1, k, s0, s1, s2):
    return elu(x + p0, p0, p1, k, s0, s1, s2)


@triton.jit
def bias_elu_slope(g, v, positive, p0, p1, k, s0, s1, s2, OUTPUT: tl.constexpr):
    dx, _, _ = elu_slope(g, v, positive, p0, p1, k, s0, s1, s2, OUTPUT)
    return dx, dx, g


@triton.jit
def elu_add(x, p0, p1, k, s0, s1, s2):
    return elu(x, p0, p1, k, s0, s1, s2) + p0


@triton.jit
def shifted_relu(x, p0, p1, k, s0, s1, s2):
    return tl.where(x <= -1.0, -1.0, x)


@triton.jit
def shifted_relu_slope(g, v, positive, p0, p1, k, s0, s1, s2, OUTPUT: tl.constexpr):
    return tl.where(v <= -1.0, 0.0, g), g, g


@triton.jit
def leaky_relu(x, p0, p1, k, s0, s1, s2):
    return tl.where(x > 0, x, x * s0)


@triton.jit
def leaky_relu_slope(g, v, positive, p0, p1, k, s0, s1, s2, OUTPUT: tl.constexpr):
    return tl.where(positive, g, g * s0), g, g


@triton.jit
def prelu(x, p0, p1, k, s0, s1, s2):
    return tl.where(x > 0, x, x * away_from_zero(p0, s0))


@triton.jit
def prelu_slope(g, v, positive, p0, p1, k, s0, s1, s2, OUTPUT: tl.constexpr):
    p0 = away_from_zero(p0, s0)
    if OUTPUT:
        v = v * reciprocal(p0)
    return tl.where(positive, g, g * p0), tl.where(positive, 0.0, g * v), g


@triton.jit
def away_from_zero(p0, smallest):
    """The slope, but at least ``smallest`` in size: times zero, an output would forget its input."""
    return tl.where(tl.abs(p0) < smallest, smallest, p0)


@triton.jit
def eprelu(x, p0, p1, k, s0, s1, s2):
    return x * tl.where(x < 0, away_from_zero(p0, s0), k)


@triton.jit
def eprelu_slope(g, v, positive, p0, p1, k, s0, s1, s2, OUTPUT: tl.constexpr):
    p0 = away_from_zero(p0, s0)
    if OUTPUT:
        v = v * reciprocal(p0)
    return g * tl.where(positive, k, p0), tl.where(positive, 0.0, g * v), g


@triton.jit
def rrelu(x, p0, p1, k, s0, s1, s2):
    return tl.where(x > 0, x, x * k)


@triton.jit
def rrelu_slope(g, v, positive, p0, p1, k, s0, s1, s2, OUTPUT: tl.constexpr):
    return tl.where(positive, g, g * k), g, g


@triton.jit
def erelu(x, p0, p1, k, s0, s1, s2):
    return tl.where(x <= 0, 0.0, x * k)


@triton.jit
def erelu_slope(g, v, positive, p0, p1, k, s0, s1, s2, OUTPUT: tl.constexpr):
    return tl.where(v <= 0, 0.0, g * k), g, g


@triton.jit
def pelu(x, p0, p1, k, s0, s1, s2):
    t = x * reciprocal(at_least(p1, _PELU_BOUND))
    return at_least(p0, _PELU_BOUND) * tl.where(t < 0, expm1(t), t)


@triton.jit
def pelu_slope(g, v, positive, p0, p1, k, s0, s1, s2, OUTPUT: tl.constexpr):
    a, b = at_least(p0, _PELU_BOUND), at_least(p1, _PELU_BOUND)
    if OUTPUT:
        u = v * reciprocal(a)
        decay = tl.where(positive, 1.0, tl.maximum(1.0 + u, 0.0))
        exponent = tl.where(positive, u, log(tl.maximum(decay, _TINY)))
    else:
        exponent = v * reciprocal(b)
        decay = tl.where(positive, 1.0, exp(exponent))
        u = tl.where(positive, exponent, expm1(exponent))
        exponent = tl.maximum(exponent, -1e30)
    dx = g * (a * reciprocal(b) * decay)
    return dx, g * u, -dx * exponent


@triton.jit
def mpelu(x, p0, p1, k, s0, s1, s2):
    return tl.where(x < 0, at_least(p0, _SMALLEST) * expm1(x * at_least(p1, _SMALLEST)), x)


@triton.jit
def mpelu_slope(g, v, positive, p0, p1, k, s0, s1, s2, OUTPUT: tl.constexpr):
    return eelu_slope(g, v, positive, p0, p1, 1.0, s0, s1, s2, OUTPUT)


@triton.jit
def eelu(x, p0, p1, k, s0, s1, s2):
    return tl.where(x < 0, at_least(p0, _SMALLEST) * expm1(x * at_least(p1, _SMALLEST)), x * k)


@triton.jit
def eelu_slope(g, v, positive, p0, p1, k, s0, s1, s2, OUTPUT: tl.constexpr):
    alpha, beta = at_least(p0, _SMALLEST), at_least(p1, _SMALLEST)
    if OUTPUT:
        ratio = tl.maximum(v * reciprocal(alpha), -1.0)
        decay = 1.0 + ratio
        exponent = log(tl.maximum(decay, _TINY))
    else:
        exponent = tl.maximum(v * beta, -1e30)
        ratio, decay = expm1(exponent), exp(exponent)
    steep = g * decay * alpha
    dx = tl.where(positive, g * k, steep * beta)
    return dx, tl.where(positive, 0.0, g * ratio), tl.where(positive, 0.0, steep * exponent * reciprocal(beta))


@triton.jit
def silu(x, p0, p1, k, s0, s1, s2):
    return x * sigmoid(x)


@triton.jit
def silu_slope(g, v, positive, p0, p1, k, s0, s1, s2, OUTPUT: tl.constexpr):
    s = sigmoid(v)
    return g * (s + v * s * (1.0 - s)), g, g


@triton.jit
def swish(x, p0, p1, k, s0, s1, s2):
    return x * sigmoid(x * p0)


@triton.jit
def swish_slope(g, v, positive, p0, p1, k, s0, s1, s2, OUTPUT: tl.constexpr):
    s = sigmoid(v * p0)
    bend = v * s * (1.0 - s)
    return g * (s + p0 * bend), g * (v * bend), g


@triton.jit
def gelu(x, p0, p1, k, s0, s1, s2):
    tail, _ = normal_tail(x)
    return x * tl.where(x > 0, 1.0 - tail, tail)


@triton.jit
def gelu_slope(g, v, positive, p0, p1, k, s0, s1, s2, OUTPUT: tl.constexpr):
    tail, bell = normal_tail(v)
    return g * (tl.where(v > 0, 1.0 - tail, tail) + v * bell * INVERSE_SQRT_2PI), g, g


@triton.jit
def gelu_tanh(x, p0, p1, k, s0, s1, s2):
    return x * sigmoid(SQRT_2_OVER_PI_TIMES_2 * x * (1.0 + 0.044715 * (x * x)))


@triton.jit
def gelu_tanh_slope(g, v, positive, p0, p1, k, s0, s1, s2, OUTPUT: tl.constexpr):
    # Where it would overflow the sigmoid has long been flat, and 0 times infinity is no number.
    square = tl.minimum(v * v, 1e4)
    s = sigmoid(SQRT_2_OVER_PI_TIMES_2 * v * (1.0 + 0.044715 * square))
    inner = SQRT_2_OVER_PI_TIMES_2 * (1.0 + 0.134145 * square)
    return g * (s + v * s * (1.0 - s) * inner), g, g


@triton.jit
def mish(x, p0, p1, k, s0, s1, s2):
    e = exp(tl.minimum(x, 20.0))
    n = e * (e + 2.0)
    return x * (n * reciprocal(n + 2.0))


@triton.jit
def mish_slope(g, v, positive, p0, p1, k, s0, s1, s2, OUTPUT: tl.constexpr):
    v = tl.minimum(v, 20.0, propagate_nan=tl.PropagateNan.ALL)
    e = exp(v)
    n = e * (e + 2.0)
    r = reciprocal(n + 2.0)
    return g * (r * (n + 4.0 * (v * e) * (e + 1.0) * r)), g, g
