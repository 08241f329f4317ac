"""Triton programs for y = f(x Wᵀ + b): the product with its activation, and the slopes that the backward pass needs."""

import triton
import triton.language as tl

from zeromean.kernels import formulas
from zeromean.kernels.elementary import power_of_2


@triton.jit
def unit_elu(x, p0, p1, k, s0, s1, s2):
    """`formulas.elu` with all scalars 1 in eight instructions, for tensor cores wait for them.

    Its relative error of 2e-5 is small against that of the rounding to half precision which follows.
    """
    m = tl.minimum(x, 0.0)
    near = 0.5 * m * m + x
    return tl.where(x > -0.01, near, power_of_2(x * 1.4426950408889634) - 1.0)


VALUES = {"elu": formulas.elu, "leaky_relu": formulas.leaky_relu, "shifted_relu": formulas.shifted_relu}
SLOPES = {
    "elu": formulas.elu_slope,
    "leaky_relu": formulas.leaky_relu_slope,
    "shifted_relu": formulas.shifted_relu_slope,
}


@triton.jit
def _write(
    tiles, bias, row, col, units, total, s0, s1, s2,
    VALUE: tl.constexpr, HAS_BIAS: tl.constexpr, ROUND: tl.constexpr, dtype: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    if HAS_BIAS:
        c = col + tl.arange(0, BN)
        total += tl.load(bias + c, mask=c < units, other=0.0).to(tl.float32)[None, :]
    if ROUND:
        total = total.to(dtype).to(tl.float32)
    tiles.store([row, col], VALUE(total, 0.0, 0.0, 0.0, s0, s1, s2).to(dtype))


@triton.jit(do_not_specialize=["rows"])
def forward(
    x_tiles, weight_tiles, y_tiles, bias, rows, inner, units, s0, s1, s2,
    VALUE: tl.constexpr, HAS_BIAS: tl.constexpr, ROUND: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Write tiles of f(x Wᵀ + b), in one or two PARTS (two take half the shared memory), rounded before f if ROUND.

    An instance goes from tile to tile; flattened into one loop with the sums, the loads for the next tile are under way
    while this one is written. Neighbouring instances take the tiles of the same rows: x is read from memory once.
    """
    dtype: tl.constexpr = y_tiles.dtype
    columns = tl.cdiv(units, BN)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BM) * columns, tl.num_programs(0), flatten=FLATTEN):
        row, col = (tile // columns) * BM, (tile % columns) * BN
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(0, inner, BK):
            total = tl.dot(x_tiles.load([row, k]), weight_tiles.load([col, k]).T, total)
        if PARTS == 2:
            left, right = total.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
            _write(y_tiles, bias, row, col, units, left, s0, s1, s2, VALUE, HAS_BIAS, ROUND, dtype, BN // 2)
            _write(y_tiles, bias, row, col + BN // 2, units, right, s0, s1, s2, VALUE, HAS_BIAS, ROUND, dtype, BN // 2)
        else:
            _write(y_tiles, bias, row, col, units, total, s0, s1, s2, VALUE, HAS_BIAS, ROUND, dtype, BN)


@triton.jit(do_not_specialize=["rows"])
def slopes(
    gradient, y, dz, shares, rows, units, s0, s1, s2,
    SLOPE: tl.constexpr, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Write dz = g f'(y) of STEPS times ROWS rows, and this instance's share of its sum over all rows."""
    strips = tl.cdiv(units, WIDTH)
    part, strip = tl.program_id(0) // strips, tl.program_id(0) % strips
    r = part * (ROWS * STEPS) + tl.arange(0, ROWS)
    c = strip * WIDTH + tl.arange(0, WIDTH)
    at = r.to(tl.int64)[:, None] * units + c[None, :]
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for _ in tl.range(0, STEPS, num_stages=3):
        inside = (r < rows)[:, None] & (c < units)[None, :] if MASKED else None
        g = tl.load(gradient + at, mask=inside).to(tl.float32)
        v = tl.load(y + at, mask=inside).to(tl.float32)
        d, _, _ = SLOPE(g, v, v > 0, 0.0, 0.0, 0.0, s0, s1, s2, True)
        tl.store(dz + at, d.to(dz.dtype.element_ty), mask=inside)
        total += tl.where(inside, d, 0.0) if MASKED else d
        r += ROWS
        at += ROWS * units
    if HAS_BIAS:
        tl.store(shares + part * units + c, tl.sum(total, 0), mask=c < units)
