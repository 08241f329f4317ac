"""The programs: one forward and one backward for each view of memory, and the sum that finishes parameter gradients.

Memory is seen in one of two ways. As rows: contiguous runs of ``inner`` elements of one channel, so that a learnable
parameter is one number a row; a tensor without per-channel parameters is a single row. As columns: the channel runs
fastest (channels_last, or samples by units), so that a parameter is one number a column. Either way a tile is [G, 8],
eight consecutive elements to a thread: one 16-byte access in bfloat16, one byte of packed signs, one call of the random
number generator.

Random numbers belong to the logical (row-major) position of an element, eight positions to a call. In rows those lie
together in memory; in columns a program takes eight consecutive positions of a plane one after another. Whether a pass
is noisy is read on the device, and each kind of pass has code of its own: noisy ones learn nothing, quiet ones draw
nothing.

Gradients of parameters are summed in float32 in an order that depends on the shape alone: each program adds up its
share, and `finish` adds the shares. The second grid axis counts rows, or slices (stacked networks) with seeds of their
own.
"""

import triton
import triton.language as tl

from zeromean.kernels import tiles

# What becomes of the parameters' gradients: none wanted, summed, or zero in a noisy pass.
NOTHING, SUMS, ZEROS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def forward_rows(
    x_ptr, y_ptr, signs_ptr, p0_ptr, p1_ptr, seed_ptr, noisy_ptr,
    rows, inner, channels, chunks, s0, s1, s2, n0, n1,
    VALUE: tl.constexpr, ZERO_POSITIVE: tl.constexpr, PARAMETERS: tl.constexpr, FULL: tl.constexpr,
    NOISE: tl.constexpr, FLAG: tl.constexpr, SIGNS: tl.constexpr,
    ONE_ROW: tl.constexpr, EVEN: tl.constexpr, GROUPED: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Value of each element, and the packed signs of the input if SIGNS."""
    pointers = (x_ptr, y_ptr, signs_ptr, p0_ptr, p1_ptr, seed_ptr)
    shape, numbers = (rows, inner, channels, chunks), (s0, s1, s2, n0, n1)
    noisy = tl.load(noisy_ptr) != 0 if FLAG else True
    if noisy:
        _forward_rows_by_mask(
            pointers, shape, numbers, VALUE, ZERO_POSITIVE, PARAMETERS, FULL, NOISE, SIGNS,
            ONE_ROW, EVEN, GROUPED, WIDE, FLAT, ROWS, SPAN, STEPS,
        )  # fmt: skip
    else:
        _forward_rows_by_mask(
            pointers, shape, numbers, VALUE, ZERO_POSITIVE, PARAMETERS, FULL, tiles.NO_NOISE, SIGNS,
            ONE_ROW, EVEN, GROUPED, WIDE, FLAT, ROWS, SPAN, STEPS,
        )  # fmt: skip


@triton.jit
def _forward_rows_by_mask(
    pointers, shape, numbers,
    VALUE: tl.constexpr, ZERO_POSITIVE: tl.constexpr, PARAMETERS: tl.constexpr, FULL: tl.constexpr,
    NOISE: tl.constexpr, SIGNS: tl.constexpr,
    ONE_ROW: tl.constexpr, EVEN: tl.constexpr, GROUPED: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    whole = EVEN
    if ONE_ROW and not EVEN:
        # A mask would keep the compiler from wide accesses: all programs but the last go without one.
        whole = (tl.program_id(0).to(tl.int64) + 1) * (SPAN * STEPS) <= shape[1]
    if whole:
        _forward_rows(
            pointers, shape, numbers, VALUE, ZERO_POSITIVE, PARAMETERS, FULL, NOISE, SIGNS,
            ONE_ROW, GROUPED, WIDE, FLAT, ROWS, SPAN, STEPS, False,
        )  # fmt: skip
    else:
        _forward_rows(
            pointers, shape, numbers, VALUE, ZERO_POSITIVE, PARAMETERS, FULL, NOISE, SIGNS,
            ONE_ROW, GROUPED, WIDE, FLAT, ROWS, SPAN, STEPS, True,
        )  # fmt: skip


@triton.jit
def _forward_rows(
    pointers, shape, numbers,
    VALUE: tl.constexpr, ZERO_POSITIVE: tl.constexpr, PARAMETERS: tl.constexpr, FULL: tl.constexpr,
    NOISE: tl.constexpr, SIGNS: tl.constexpr,
    ONE_ROW: tl.constexpr, GROUPED: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr, STEPS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    x_ptr, y_ptr, signs_ptr, p0_ptr, p1_ptr, seed_ptr = pointers
    rows, inner, channels, chunks = shape
    s0, s1, s2, n0, n1 = numbers
    base, row, start, first = tiles.place_in_rows(rows, inner, chunks, ONE_ROW, WIDE, FLAT, ROWS, SPAN, STEPS)
    lane = tl.arange(0, 8)[None, :]
    p0, p1 = tiles.row_parameters(p0_ptr, p1_ptr, row, channels, ONE_ROW, ROWS, 0 if FULL else PARAMETERS)
    state = tiles.noise_state(seed_ptr, n0, n1, NOISE, ONE_ROW)
    for step in tl.static_range(STEPS):
        mask, groups = tiles.masks_of_rows(row, start + step * SPAN, rows, inner, ONE_ROW, MASKED)
        at = base + (first + step * SPAN)[:, None] + lane
        x = tiles.load(x_ptr + at, mask, MASKED)
        if FULL:
            p0 = tiles.load(p0_ptr + at, mask, MASKED)
        k = tiles.slopes_of_rows(state, first + step * SPAN, NOISE, GROUPED)
        y = VALUE(x, p0, p1, k, s0, s1, s2)
        tiles.store(y_ptr + at, y, mask, MASKED)
        if SIGNS:
            tiles.store_signs(signs_ptr, x, base + first + step * SPAN, groups, ZERO_POSITIVE, MASKED)


@triton.jit
def backward_rows(
    g_ptr, v_ptr, signs_ptr, dx_ptr, share_ptr, p0_ptr, p1_ptr, seed_ptr, noisy_ptr,
    rows, inner, channels, chunks, shares, s0, s1, s2, n0, n1,
    SLOPE: tl.constexpr, ZERO_POSITIVE: tl.constexpr, OUTPUT: tl.constexpr, PARAMETERS: tl.constexpr,
    LEARN: tl.constexpr, NOISE: tl.constexpr, FLAG: tl.constexpr, SIGNS: tl.constexpr, KEPT: tl.constexpr,
    ONE_ROW: tl.constexpr, EVEN: tl.constexpr, GROUPED: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Gradient of each element, and this program's share of the parameters' gradients if LEARN."""
    pointers = (g_ptr, v_ptr, signs_ptr, dx_ptr, share_ptr, p0_ptr, p1_ptr, seed_ptr)
    shape, numbers = (rows, inner, channels, chunks, shares), (s0, s1, s2, n0, n1)
    noisy = tl.load(noisy_ptr) != 0 if FLAG else True
    if noisy:
        _backward_rows_by_mask(
            pointers, shape, numbers, SLOPE, ZERO_POSITIVE, OUTPUT, PARAMETERS, ZEROS if LEARN and FLAG else LEARN,
            NOISE, SIGNS, KEPT, ONE_ROW, EVEN, GROUPED, WIDE, FLAT, ROWS, SPAN, STEPS,
        )  # fmt: skip
    else:
        _backward_rows_by_mask(
            pointers, shape, numbers, SLOPE, ZERO_POSITIVE, OUTPUT, PARAMETERS, LEARN,
            tiles.NO_NOISE, SIGNS, KEPT, ONE_ROW, EVEN, GROUPED, WIDE, FLAT, ROWS, SPAN, STEPS,
        )  # fmt: skip


@triton.jit
def _backward_rows_by_mask(
    pointers, shape, numbers,
    SLOPE: tl.constexpr, ZERO_POSITIVE: tl.constexpr, OUTPUT: tl.constexpr, PARAMETERS: tl.constexpr,
    LEARN: tl.constexpr, NOISE: tl.constexpr, SIGNS: tl.constexpr, KEPT: tl.constexpr,
    ONE_ROW: tl.constexpr, EVEN: tl.constexpr, GROUPED: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    whole = EVEN
    if ONE_ROW and not EVEN:
        whole = (tl.program_id(0).to(tl.int64) + 1) * (SPAN * STEPS) <= shape[1]
    if whole:
        _backward_rows(
            pointers, shape, numbers, SLOPE, ZERO_POSITIVE, OUTPUT, PARAMETERS, LEARN, NOISE, SIGNS, KEPT,
            ONE_ROW, GROUPED, WIDE, FLAT, ROWS, SPAN, STEPS, False,
        )  # fmt: skip
    else:
        _backward_rows(
            pointers, shape, numbers, SLOPE, ZERO_POSITIVE, OUTPUT, PARAMETERS, LEARN, NOISE, SIGNS, KEPT,
            ONE_ROW, GROUPED, WIDE, FLAT, ROWS, SPAN, STEPS, True,
        )  # fmt: skip


@triton.jit
def _backward_rows(
    pointers, shape, numbers,
    SLOPE: tl.constexpr, ZERO_POSITIVE: tl.constexpr, OUTPUT: tl.constexpr, PARAMETERS: tl.constexpr,
    LEARN: tl.constexpr, NOISE: tl.constexpr, SIGNS: tl.constexpr, KEPT: tl.constexpr,
    ONE_ROW: tl.constexpr, GROUPED: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr, STEPS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    g_ptr, v_ptr, signs_ptr, dx_ptr, share_ptr, p0_ptr, p1_ptr, seed_ptr = pointers
    rows, inner, channels, chunks, shares = shape
    s0, s1, s2, n0, n1 = numbers
    base, row, start, first = tiles.place_in_rows(rows, inner, chunks, ONE_ROW, WIDE, FLAT, ROWS, SPAN, STEPS)
    lane = tl.arange(0, 8)[None, :]
    p0, p1 = tiles.row_parameters(p0_ptr, p1_ptr, row, channels, ONE_ROW, ROWS, PARAMETERS)
    state = tiles.noise_state(seed_ptr, n0, n1, NOISE, ONE_ROW)
    sum0 = tl.zeros([ROWS * SPAN // 8, 8], tl.float32)
    sum1 = sum0
    for step in tl.static_range(STEPS):
        mask, groups = tiles.masks_of_rows(row, start + step * SPAN, rows, inner, ONE_ROW, MASKED)
        at = base + (first + step * SPAN)[:, None] + lane
        g = tiles.load(g_ptr + at, mask, MASKED)
        v = tiles.load(v_ptr + at, mask, MASKED) if KEPT else g
        positive = tiles.positive(v, signs_ptr, base + first + step * SPAN, groups, ZERO_POSITIVE, SIGNS, MASKED)
        k = tiles.slopes_of_rows(state, first + step * SPAN, NOISE, GROUPED)
        dx, d0, d1 = SLOPE(g, v, positive, p0, p1, k, s0, s1, s2, OUTPUT)
        tiles.store(dx_ptr + at, dx, mask, MASKED)
        if LEARN == SUMS:
            sum0, sum1 = sum0 + d0, sum1 + d1
    if LEARN:
        total0, total1 = sum0, sum1
        if ONE_ROW:
            at = tl.program_id(1).to(tl.int64) * shares + tl.program_id(0)
            inside = at >= 0
            if LEARN == SUMS:
                total0, total1 = tl.sum(sum0), tl.sum(sum1)
            second = tl.num_programs(1).to(tl.int64) * shares
        elif ROWS == 1:
            own, chunk = tiles.own_row(tl.program_id(0), chunks, FLAT)
            at = ((own // channels) * chunks + chunk) * channels + own % channels
            inside = at >= 0
            if LEARN == SUMS:
                total0, total1 = tl.sum(sum0), tl.sum(sum1)
            second = shares * channels
        else:
            at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
            inside = at < rows
            if LEARN == SUMS:
                total0 = tl.sum(tl.reshape(sum0, [ROWS, SPAN]), 1)
                total1 = tl.sum(tl.reshape(sum1, [ROWS, SPAN]), 1)
            second = shares * channels
        tl.store(share_ptr + at, total0 if LEARN == SUMS else 0.0, mask=inside)
        if PARAMETERS == 2:
            tl.store(share_ptr + second + at, total1 if LEARN == SUMS else 0.0, mask=inside)


@triton.jit
def forward_columns(
    x_ptr, y_ptr, signs_ptr, p0_ptr, p1_ptr, seed_ptr, noisy_ptr,
    rows, plane, columns, strips, shares, s0, s1, s2, n0, n1,
    VALUE: tl.constexpr, ZERO_POSITIVE: tl.constexpr, PARAMETERS: tl.constexpr, SHARED: tl.constexpr,
    NOISE: tl.constexpr, FLAG: tl.constexpr, SIGNS: tl.constexpr, MASKED: tl.constexpr, GROUPED: tl.constexpr,
    WIDE: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """As `forward_rows`; a program goes through every ``shares``-th block of ``DEPTH`` rows."""
    pointers = (x_ptr, y_ptr, signs_ptr, p0_ptr, p1_ptr, seed_ptr)
    shape, numbers = (rows, plane, columns, strips, shares), (s0, s1, s2, n0, n1)
    noisy = tl.load(noisy_ptr) != 0 if FLAG else True
    if noisy:
        _forward_columns(
            pointers, shape, numbers, VALUE, ZERO_POSITIVE, PARAMETERS, SHARED, NOISE, SIGNS,
            MASKED, GROUPED, WIDE, BLOCKS, WIDTH, DEPTH, STEPS, STAGES,
        )  # fmt: skip
    else:
        _forward_columns(
            pointers, shape, numbers, VALUE, ZERO_POSITIVE, PARAMETERS, SHARED, tiles.NO_NOISE, SIGNS,
            MASKED, GROUPED, WIDE, BLOCKS, WIDTH, DEPTH, STEPS, STAGES,
        )  # fmt: skip


@triton.jit
def _forward_columns(
    pointers, shape, numbers,
    VALUE: tl.constexpr, ZERO_POSITIVE: tl.constexpr, PARAMETERS: tl.constexpr, SHARED: tl.constexpr,
    NOISE: tl.constexpr, SIGNS: tl.constexpr, MASKED: tl.constexpr, GROUPED: tl.constexpr,
    WIDE: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    x_ptr, y_ptr, signs_ptr, p0_ptr, p1_ptr, seed_ptr = pointers
    rows, plane, columns, strips, shares = shape
    s0, s1, s2, n0, n1 = numbers
    block, start = tiles.place_in_columns(strips, WIDE, BLOCKS, WIDTH)
    lane = tl.arange(0, 8)[None, :]
    column = start[:, None] + lane
    p0, p1 = tiles.column_parameters(p0_ptr, p1_ptr, column, columns, MASKED, PARAMETERS, SHARED)
    state = tiles.noise_state(seed_ptr, n0, n1, NOISE, False)
    for _step in tl.range(0, STEPS, num_stages=STAGES):
        drawn = tiles.draw_of_columns(state, block, start, plane, columns, NOISE, GROUPED)
        for j in tl.static_range(DEPTH):
            row = block * DEPTH + j
            first = row * columns + start
            at = first[:, None] + lane
            mask, groups = tiles.masks_of_columns(row, start, rows, columns, MASKED)
            x = tiles.load(x_ptr + at, mask, MASKED)
            k = tiles.slopes_of_columns(state, drawn, row, column, first, plane, columns, NOISE, GROUPED, j)
            y = VALUE(x, p0, p1, k, s0, s1, s2)
            tiles.store(y_ptr + at, y, mask, MASKED)
            if SIGNS:
                tiles.store_signs(signs_ptr, x, first, groups, ZERO_POSITIVE, MASKED)
        block += shares * BLOCKS


@triton.jit
def backward_columns(
    g_ptr, v_ptr, signs_ptr, dx_ptr, share_ptr, p0_ptr, p1_ptr, seed_ptr, noisy_ptr,
    rows, plane, columns, strips, shares, s0, s1, s2, n0, n1,
    SLOPE: tl.constexpr, ZERO_POSITIVE: tl.constexpr, OUTPUT: tl.constexpr, PARAMETERS: tl.constexpr,
    SHARED: tl.constexpr, LEARN: tl.constexpr, NOISE: tl.constexpr, FLAG: tl.constexpr, SIGNS: tl.constexpr,
    KEPT: tl.constexpr, MASKED: tl.constexpr, GROUPED: tl.constexpr,
    WIDE: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """As `backward_rows`; a program goes through every ``shares``-th block of ``DEPTH`` rows."""
    pointers = (g_ptr, v_ptr, signs_ptr, dx_ptr, share_ptr, p0_ptr, p1_ptr, seed_ptr)
    shape, numbers = (rows, plane, columns, strips, shares), (s0, s1, s2, n0, n1)
    noisy = tl.load(noisy_ptr) != 0 if FLAG else True
    if noisy:
        _backward_columns(
            pointers, shape, numbers, SLOPE, ZERO_POSITIVE, OUTPUT, PARAMETERS, SHARED,
            ZEROS if LEARN and FLAG else LEARN, NOISE, SIGNS, KEPT,
            MASKED, GROUPED, WIDE, BLOCKS, WIDTH, DEPTH, STEPS, STAGES,
        )  # fmt: skip
    else:
        _backward_columns(
            pointers, shape, numbers, SLOPE, ZERO_POSITIVE, OUTPUT, PARAMETERS, SHARED,
            LEARN, tiles.NO_NOISE, SIGNS, KEPT, MASKED, GROUPED, WIDE, BLOCKS, WIDTH, DEPTH, STEPS, STAGES,
        )  # fmt: skip


@triton.jit
def _backward_columns(
    pointers, shape, numbers,
    SLOPE: tl.constexpr, ZERO_POSITIVE: tl.constexpr, OUTPUT: tl.constexpr, PARAMETERS: tl.constexpr,
    SHARED: tl.constexpr, LEARN: tl.constexpr, NOISE: tl.constexpr, SIGNS: tl.constexpr,
    KEPT: tl.constexpr, MASKED: tl.constexpr, GROUPED: tl.constexpr,
    WIDE: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    g_ptr, v_ptr, signs_ptr, dx_ptr, share_ptr, p0_ptr, p1_ptr, seed_ptr = pointers
    rows, plane, columns, strips, shares = shape
    s0, s1, s2, n0, n1 = numbers
    block, start = tiles.place_in_columns(strips, WIDE, BLOCKS, WIDTH)
    lane = tl.arange(0, 8)[None, :]
    column = start[:, None] + lane
    p0, p1 = tiles.column_parameters(p0_ptr, p1_ptr, column, columns, MASKED, PARAMETERS, SHARED)
    state = tiles.noise_state(seed_ptr, n0, n1, NOISE, False)
    sum0 = tl.zeros([BLOCKS * WIDTH // 8, 8], tl.float32)
    sum1 = sum0
    for _step in tl.range(0, STEPS, num_stages=STAGES):
        drawn = tiles.draw_of_columns(state, block, start, plane, columns, NOISE, GROUPED)
        for j in tl.static_range(DEPTH):
            row = block * DEPTH + j
            first = row * columns + start
            at = first[:, None] + lane
            mask, groups = tiles.masks_of_columns(row, start, rows, columns, MASKED)
            g = tiles.load(g_ptr + at, mask, MASKED)
            v = tiles.load(v_ptr + at, mask, MASKED) if KEPT else g
            positive = tiles.positive(v, signs_ptr, first, groups, ZERO_POSITIVE, SIGNS, MASKED)
            k = tiles.slopes_of_columns(state, drawn, row, column, first, plane, columns, NOISE, GROUPED, j)
            dx, d0, d1 = SLOPE(g, v, positive, p0, p1, k, s0, s1, s2, OUTPUT)
            tiles.store(dx_ptr + first[:, None] + lane, dx, mask, MASKED)
            if LEARN == SUMS:
                sum0, sum1 = sum0 + d0, sum1 + d1
        block += shares * BLOCKS
    if LEARN:
        own = (tl.program_id(0) % strips) * WIDTH + tl.arange(0, WIDTH)
        at = (tl.program_id(0) // strips) * columns + own
        total0 = tl.sum(tl.reshape(sum0, [BLOCKS, WIDTH]), 0)
        tl.store(share_ptr + at, total0, mask=own < columns)
        if PARAMETERS == 2:
            total1 = tl.sum(tl.reshape(sum1, [BLOCKS, WIDTH]), 0)
            tl.store(share_ptr + shares * columns + at, total1, mask=own < columns)


@triton.jit
def finish(
    share_ptr, d0_ptr, d1_ptr, shares, channels,
    PARAMETERS: tl.constexpr, STEPS: tl.constexpr, DEEP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum [parameter, slice, share, channel] over the shares."""
    which, piece = tl.program_id(1), tl.program_id(2)
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    share_ptr += (which.to(tl.int64) * tl.num_programs(2) + piece) * shares * channels
    total = tl.zeros([DEEP, WIDTH], tl.float32)
    for step in tl.range(0, STEPS):
        share = step * DEEP + tl.arange(0, DEEP)[:, None]
        inside = (share < shares) & (channel < channels)[None, :]
        total += tl.load(share_ptr + share.to(tl.int64) * channels + channel[None, :], mask=inside, other=0.0)
    result = tl.sum(total, 0)
    at, inside = piece * channels + channel, channel < channels
    if which == 0:
        tl.store(d0_ptr + at, result.to(d0_ptr.dtype.element_ty), mask=inside)
    elif PARAMETERS == 2:
        tl.store(d1_ptr + at, result.to(d1_ptr.dtype.element_ty), mask=inside)
