"""What the programs share: where a tile lies, which of it exists, its parameters, signs and random slopes."""

import triton
import triton.language as tl

from zeromean.kernels import noise
from zeromean.kernels.elementary import INTERPRETED

# What a slope is drawn from.
NO_NOISE, UNIFORM, NORMAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Where the eight elements of a call lie in columns: scattered, in eight consecutive rows, or in one row.
SCATTERED, BY_PLANE, BY_ROW = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def load(pointers, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.load(pointers).to(tl.float32)


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """Round to a type, two by two: one at a time is done by the unit that also makes exponentials, and slowly."""
    if INTERPRETED:
        return values.to(dtype)
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [values], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif dtype == tl.float16:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [values], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return values.to(dtype)


@triton.jit
def store(pointers, values, mask, MASKED: tl.constexpr):
    values = rounded(values, pointers.dtype.element_ty)
    if MASKED:
        tl.store(pointers, values, mask=mask)
    else:
        tl.store(pointers, values)


@triton.jit
def place_in_rows(
    rows, inner, chunks, ONE_ROW: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Where this program's slice starts; each group's row (scalar or [G]), first column and first position [G]."""
    pid = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    group = tl.arange(0, ROWS * SPAN // 8)
    base = 0
    if ONE_ROW:
        row = 0
        start = pid * (SPAN * STEPS) + group * 8
        first = start
        base = tl.program_id(1).to(tl.int64) * inner
    elif ROWS == 1:
        row, chunk = own_row(pid, chunks, FLAT)
        start = chunk * (SPAN * STEPS) + group * 8
        first = row * inner + start
    else:
        flat = pid * ROWS + group // (SPAN // 8)
        start = (group % (SPAN // 8)) * 8
        first = flat * inner + start
        row = flat
    return base, row, start, first


@triton.jit
def own_row(pid, chunks, FLAT: tl.constexpr):
    """A program's row and its chunk of that row: the two axes of the grid, or both in the first if FLAT."""
    if FLAT:
        return pid // chunks, pid % chunks
    else:
        return tl.program_id(1).to(pid.dtype), pid


@triton.jit
def masks_of_rows(row, start, rows, inner, ONE_ROW: tl.constexpr, MASKED: tl.constexpr):
    """Which elements exist, and which groups do at all."""
    if MASKED:
        there = True if ONE_ROW else row < rows
        groups = (start < inner) & there
        return (start[:, None] + tl.arange(0, 8)[None, :] < inner) & groups[:, None], groups
    else:
        return True, True


@triton.jit
def place_in_columns(strips, WIDE: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """Each group's block of rows [G], and its first column [G]."""
    pid = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    group = tl.arange(0, BLOCKS * WIDTH // 8)
    block = (pid // strips) * BLOCKS + group // (WIDTH // 8)
    return block, (pid % strips) * WIDTH + (group % (WIDTH // 8)) * 8


@triton.jit
def masks_of_columns(row, start, rows, columns, MASKED: tl.constexpr):
    """Which elements exist, and which groups do at all."""
    if MASKED:
        groups = (row < rows) & (start < columns)
        return (start[:, None] + tl.arange(0, 8)[None, :] < columns) & groups[:, None], groups
    else:
        return True, True


@triton.jit
def row_parameters(p0_ptr, p1_ptr, row, channels, ONE_ROW: tl.constexpr, ROWS: tl.constexpr, PARAMETERS: tl.constexpr):
    """The parameters of each row's channel."""
    if ONE_ROW:
        at = tl.program_id(1) * channels
    else:
        at = row % channels if ROWS == 1 else (row % channels)[:, None]
    p0 = tl.load(p0_ptr + at).to(tl.float32) if PARAMETERS > 0 else 0.0
    p1 = tl.load(p1_ptr + at).to(tl.float32) if PARAMETERS > 1 else 0.0
    return p0, p1


@triton.jit
def column_parameters(
    p0_ptr, p1_ptr, column, columns, MASKED: tl.constexpr, PARAMETERS: tl.constexpr, SHARED: tl.constexpr
):
    """The parameters of each column, or the one for all if SHARED."""
    p0, p1 = 0.0, 0.0
    if SHARED:
        if PARAMETERS > 0:
            p0 = tl.load(p0_ptr).to(tl.float32)
        if PARAMETERS > 1:
            p1 = tl.load(p1_ptr).to(tl.float32)
    else:
        if PARAMETERS > 0:
            p0 = load(p0_ptr + column, column < columns, MASKED)
        if PARAMETERS > 1:
            p1 = load(p1_ptr + column, column < columns, MASKED)
    return p0, p1


@triton.jit
def positive(v, signs_ptr, first, groups, ZERO_POSITIVE: tl.constexpr, SIGNS: tl.constexpr, MASKED: tl.constexpr):
    """Which elements had an input on the positive side: by the packed signs, else by the kept tensor itself."""
    if SIGNS:
        packed = tl.load(signs_ptr + first // 8, mask=groups if MASKED else None)
        return ((packed.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0
    else:
        return side(v, ZERO_POSITIVE)


@triton.jit
def side(v, ZERO_POSITIVE: tl.constexpr):
    """Whether v is on the positive side, to which zero and NaN belong if ZERO_POSITIVE."""
    return (v < 0) == 0 if ZERO_POSITIVE else v > 0


@triton.jit
def store_signs(signs_ptr, x, first, groups, ZERO_POSITIVE: tl.constexpr, MASKED: tl.constexpr):
    bits = side(x, ZERO_POSITIVE).to(tl.int32) << tl.arange(0, 8)[None, :]
    tl.store(signs_ptr + first // 8, tl.sum(bits, 1).to(tl.uint8), mask=groups if MASKED else None)


@triton.jit
def noise_state(seed_ptr, n0, n1, NOISE: tl.constexpr, ONE_ROW: tl.constexpr):
    """The seed, and the two numbers that make slopes of random ones."""
    if NOISE == NO_NOISE:
        return 0, 0.0, 0.0
    else:
        seed = tl.load(seed_ptr + tl.program_id(1)) if ONE_ROW else tl.load(seed_ptr)
        if NOISE == NORMAL:
            return seed, 0.0, noise.spread(noise.deviation(seed, n0))
        else:
            return seed, n0, n1


@triton.jit
def _eight(w0, w1, w2, w3, state, NOISE: tl.constexpr):
    """The slopes of a group, from its words."""
    if NOISE == UNIFORM:
        a0, a1, a2, a3, a4, a5, a6, a7 = noise.uniform8(w0, w1, w2, w3)
        low, width = state[1], state[2]
    else:
        a0, a1, a2, a3, a4, a5, a6, a7 = noise.half_slope8(w0, w1, w2, w3, state[2])
        low, width = 0.0, 2.0
    return (
        a0 * width + low, a1 * width + low, a2 * width + low, a3 * width + low,
        a4 * width + low, a5 * width + low, a6 * width + low, a7 * width + low,
    )  # fmt: skip


@triton.jit
def _one(position, state, NOISE: tl.constexpr):
    """The slope of each position, a call of the generator for each."""
    w0, w1, w2, w3 = noise.words(state[0], position // 8, 0)
    if NOISE == UNIFORM:
        return noise.uniform1(w0, w1, w2, w3, position % 8) * state[2] + state[1]
    else:
        return noise.half_slope1(w0, w1, w2, w3, position % 8, state[2]) * 2.0


@triton.jit
def slopes_of_rows(state, first, NOISE: tl.constexpr, GROUPED: tl.constexpr):
    """The random slopes of eight elements from each first position; GROUPED if those are multiples of eight."""
    if NOISE == NO_NOISE:
        return 1.0
    elif GROUPED:
        w0, w1, w2, w3 = noise.words(state[0], first // 8, 0)
        a0, a1, a2, a3, a4, a5, a6, a7 = _eight(w0, w1, w2, w3, state, NOISE)
        return noise.interleave8(a0, a1, a2, a3, a4, a5, a6, a7)
    else:
        return _one(first[:, None] + tl.arange(0, 8)[None, :], state, NOISE)


@triton.jit
def draw_of_columns(state, block, start, plane, columns, NOISE: tl.constexpr, GROUPED: tl.constexpr):
    """For each of eight columns, the slopes of a block's eight rows, if those are one group of positions."""
    drawn = ()
    if NOISE != NO_NOISE and GROUPED == BY_PLANE:
        groups = plane // 8
        base = (block // groups * columns + start) * groups + block % groups
        for column in tl.static_range(8):
            w0, w1, w2, w3 = noise.words(state[0], base + column * groups, 0)
            drawn += (_eight(w0, w1, w2, w3, state, NOISE),)  # type: ignore[assignment]
    return drawn


@triton.jit
def slopes_of_columns(
    state, drawn, row, column, first, plane, columns, NOISE: tl.constexpr, GROUPED: tl.constexpr, J: tl.constexpr
):
    """The random slopes of row ``J`` of the block, whose elements are found from ``first`` on in memory."""
    if NOISE == NO_NOISE:
        return 1.0
    elif GROUPED == BY_PLANE:
        return noise.interleave8(
            drawn[0][J], drawn[1][J], drawn[2][J], drawn[3][J], drawn[4][J], drawn[5][J], drawn[6][J], drawn[7][J]
        )
    elif GROUPED == BY_ROW:
        return slopes_of_rows(state, first, NOISE, True)
    else:
        return _one(((row // plane * columns)[:, None] + column) * plane + (row % plane)[:, None], state, NOISE)
