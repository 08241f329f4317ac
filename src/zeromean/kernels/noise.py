"""The noise of `zeromean.nn.noise` in registers: eight numbers from each Philox call, a few instructions apiece.

A group is eight elements with consecutive logical indices. `words` makes the four random words of a group; functions
named ``8`` turn them into the group's numbers 0 to 7, those named ``2`` turn one word into its two, and those named
``1`` the four into number ``j`` alone, for layouts in which a group's elements do not lie together.

Bits become floats in the mantissa of 2**23, since conversions have a slow unit of their own, and logarithm, root, sine
and cosine are the approximate machine instructions: a normal number differs from the reference's by less than 1e-4.
Compiled for compute capability 9.0, an element costs 3.3 instructions for its random bits, 1.5 more for a uniform
number or 6 more for half a normal slope.
"""

import triton
import triton.language as tl

from zeromean.kernels.elementary import INTERPRETED

_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_INCREMENT_0 = tl.constexpr(0x9E3779B9)
_INCREMENT_1 = tl.constexpr(0xBB67AE85)

# A float with these bits is 2**23, and its last mantissa bit counts 1.
_MAGIC_BITS = tl.constexpr(0x4B000000)
_MAGIC = tl.constexpr(float(2**23))

_ANGLE_STEP = tl.constexpr(6.283185307179586 / 2**14)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def words(seed, group, stream: tl.constexpr):
    """Four random 32-bit words of each group: seed int64 (a scalar costs least), group int32 or int64, not negative.

    Products are taken in 64 bits, because the machine has an instruction for them.
    """
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0 = group.to(tl.uint32)
    c1 = tl.zeros_like(c0)
    if group.dtype.primitive_bitwidth == 64:
        c1 = (group >> 32).to(tl.uint32)
    c2, c3 = tl.full(c0.shape, stream, tl.uint32), tl.zeros_like(c0)
    for _ in tl.static_range(7):
        first, second = c0.to(tl.uint64) * _MULTIPLIER_0, c2.to(tl.uint64) * _MULTIPLIER_1
        c0, c1 = (second >> 32).to(tl.uint32) ^ c1 ^ k0, second.to(tl.uint32)
        c2, c3 = (first >> 32).to(tl.uint32) ^ c3 ^ k1, first.to(tl.uint32)
        k0, k1 = k0 + _INCREMENT_0, k1 + _INCREMENT_1
    return c0, c1, c2, c3


@triton.jit
def uniform2(word):
    """Two uniform numbers in (0, 1) of each word."""
    low = _float_of_low(word, 0xFFFF) * 2.0**-16 - (_MAGIC - 0.5) * 2.0**-16
    high = _float_of(word >> 16) * 2.0**-16 - (_MAGIC - 0.5) * 2.0**-16
    return low, high


@triton.jit
def normal2(word):
    """Two standard normal numbers of each word."""
    radius, cosine, sine = _polar(word, -2.0 * _LN2)
    return radius * cosine, radius * sine


@triton.jit
def half_slope2(word, spread):
    """Half of two slopes, min(max(1 + sigma z, 0), 2) / 2, for spread = `spread(sigma)`: k x is (h x) + (h x).

    The half saturates at 0 and 1, which the multiply-add does for nothing.
    """
    radius, cosine, sine = _polar(word, spread)
    return _saturated(radius, cosine, 0.5), _saturated(radius, sine, 0.5)


@triton.jit
def uniform8(w0, w1, w2, w3):
    """A group's eight uniform numbers in (0, 1)."""
    a0, a1 = uniform2(w0)
    a2, a3 = uniform2(w1)
    a4, a5 = uniform2(w2)
    a6, a7 = uniform2(w3)
    return a0, a1, a2, a3, a4, a5, a6, a7


@triton.jit
def normal8(w0, w1, w2, w3):
    """A group's eight standard normal numbers."""
    a0, a1 = normal2(w0)
    a2, a3 = normal2(w1)
    a4, a5 = normal2(w2)
    a6, a7 = normal2(w3)
    return a0, a1, a2, a3, a4, a5, a6, a7


@triton.jit
def half_slope8(w0, w1, w2, w3, spread):
    """Half of a group's eight slopes, as `half_slope2`."""
    a0, a1 = half_slope2(w0, spread)
    a2, a3 = half_slope2(w1, spread)
    a4, a5 = half_slope2(w2, spread)
    a6, a7 = half_slope2(w3, spread)
    return a0, a1, a2, a3, a4, a5, a6, a7


@triton.jit
def uniform1(w0, w1, w2, w3, j):
    """Each element's number j of its group's eight in `uniform8`."""
    even, odd = uniform2(_word_of(w0, w1, w2, w3, j))
    return tl.where(j % 2 == 0, even, odd)


@triton.jit
def half_slope1(w0, w1, w2, w3, j, spread):
    """Each element's number j of its group's eight in `half_slope8`."""
    even, odd = half_slope2(_word_of(w0, w1, w2, w3, j), spread)
    return tl.where(j % 2 == 0, even, odd)


@triton.jit
def deviation(seed, epsilon):
    """The pass's sigma, epsilon times number 0 of stream 1: a Philox call, so once a program, not once a tile."""
    w0, _, _, _ = words(seed, tl.zeros_like(seed).to(tl.int32), 1)
    number, _ = uniform2(w0)
    return number * epsilon


@triton.jit
def spread(sigma):
    """What half slopes need of sigma: its square, times the factor of Box-Muller with a base-2 logarithm, halved."""
    return sigma * sigma * (-0.5 * _LN2)


@triton.jit
def interleave8(a0, a1, a2, a3, a4, a5, a6, a7):
    """Eight [G] tensors as one [G, 8] with number j in column j: nothing moves if a thread's access is a whole row.

    That is so for types of two bytes; with wider ones Triton passes the numbers through shared memory.
    """
    even = tl.join(tl.join(a0, a4), tl.join(a2, a6))
    odd = tl.join(tl.join(a1, a5), tl.join(a3, a7))
    return tl.reshape(tl.join(even, odd), [a0.shape[0], 8])


@triton.jit
def _word_of(w0, w1, w2, w3, j):
    lower, upper = tl.where(j < 2, w0, w1), tl.where(j < 6, w2, w3)
    return tl.where(j < 4, lower, upper)


@triton.jit
def _polar(word, scale):
    """Box-Muller's radius, sqrt(scale * log2(u1)), and the cosine and sine of its angle."""
    u1 = _float_of(word >> 14) * 2.0**-18 - (_MAGIC - 0.5) * 2.0**-18
    angle = _angle(word)
    return _sqrt(_log2(u1) * scale), _cos(angle), _sin(angle)


@triton.jit
def _angle(word):
    if INTERPRETED:
        return (word & 0x3FFF).to(tl.float32) * _ANGLE_STEP
    # The two products cancel to a single rounding.
    return tl.fma(_float_of_low(word, 0x3FFF), _ANGLE_STEP, -_MAGIC * _ANGLE_STEP)


@triton.jit
def _float_of(bits):
    """2**23 plus at most 23 bits."""
    return (bits | _MAGIC_BITS).to(tl.float32, bitcast=True)


@triton.jit
def _float_of_low(word, mask: tl.constexpr):
    if INTERPRETED:
        return _float_of(word & mask)
    magic = tl.full(word.shape, _MAGIC_BITS, tl.uint32)
    masks = tl.full(word.shape, mask, tl.uint32)
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xEA;", "=f,r,r,r", [word, masks, magic], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _saturated(a, b, c):
    if INTERPRETED:
        return tl.minimum(tl.maximum(a * b + c, 0.0), 1.0)
    return tl.inline_asm_elementwise(
        "fma.rn.ftz.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _log2(x):
    return tl.log2(x) if INTERPRETED else _machine(x, "lg2.approx.ftz.f32 $0, $1;")


@triton.jit
def _sqrt(x):
    return tl.sqrt(x) if INTERPRETED else _machine(x, "sqrt.approx.ftz.f32 $0, $1;")


@triton.jit
def _sin(x):
    return tl.sin(x) if INTERPRETED else _machine(x, "sin.approx.ftz.f32 $0, $1;")


@triton.jit
def _cos(x):
    return tl.cos(x) if INTERPRETED else _machine(x, "cos.approx.ftz.f32 $0, $1;")


@triton.jit
def _machine(x, instruction: tl.constexpr):
    return tl.inline_asm_elementwise(instruction, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
