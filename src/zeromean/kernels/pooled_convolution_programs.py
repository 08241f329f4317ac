"""The programs of a convolution of few channels with the 2x2 max-pooling behind it, on images in channels_last.

A program has some pooling windows and a strip of units. Forward, it makes the maps' four values of each window one
beside the other, and writes the largest and which it was. Backward, the gradient of the four is made anew from those
two for each product with the patches; a program adds up its share of the windows, in an order that depends on the
shape alone. The elements of a patch, by row, column and channel, are taken in two parts, powers of two.
"""

import triton
import triton.language as tl


@triton.jit
def _place(window, down, across):
    row = window // across
    return row // down, row % down, window % across


@triton.jit
def _patch(
    x_ptr, sample, y, x, inside, height, width,
    CHANNELS: tl.constexpr, KERNEL: tl.constexpr, BEGIN: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A part of the patches whose first elements lie at these places."""
    k = BEGIN + tl.arange(0, SIZE)
    row, rest = k // (KERNEL * CHANNELS), k % (KERNEL * CHANNELS)
    first = ((sample * height + y) * width + x) * CHANNELS
    # A negative number without its sign is a large one.
    row_there = (y[:, None] + row[None, :]).to(tl.uint32) < height
    column_there = (x[:, None] + (rest // CHANNELS)[None, :]).to(tl.uint32) < width
    there = row_there & column_there & inside[:, None] & (row < KERNEL)[None, :]
    return tl.load(x_ptr + (first[:, None] + (row * width * CHANNELS + rest)[None, :]), mask=there, other=0.0)


@triton.jit
def _product(
    x_ptr, sample, y, x, inside, height, width, w, more,
    CHANNELS: tl.constexpr, KERNEL: tl.constexpr, MOST: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    z = tl.dot(_patch(x_ptr, sample, y, x, inside, height, width, CHANNELS, KERNEL, 0, MOST), w)
    if REST:
        z = tl.dot(_patch(x_ptr, sample, y, x, inside, height, width, CHANNELS, KERNEL, MOST, REST), more, z)
    return z


@triton.jit
def pooled_convolution(
    x_ptr, w_ptr, y_ptr, which_ptr, windows, height, width, out_height, out_width, down, across,
    CHANNELS: tl.constexpr, UNITS: tl.constexpr, KERNEL: tl.constexpr, PADDING: tl.constexpr, EVEN: tl.constexpr,
    MOST: tl.constexpr, REST: tl.constexpr, STRIPS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The largest of each window, and its place in the window."""
    window = (tl.program_id(0) // STRIPS) * ROWS + tl.arange(0, ROWS)
    unit = (tl.program_id(0) % STRIPS) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = window < windows
    sample, i, j = _place(window, down, across)
    y, x = 2 * i - PADDING, 2 * j - PADDING
    w = tl.load(w_ptr + tl.arange(0, MOST)[:, None] * UNITS + unit, mask=unit < UNITS, other=0.0)
    more = w
    if REST:
        more = tl.load(w_ptr + (MOST + tl.arange(0, REST))[:, None] * UNITS + unit, mask=unit < UNITS, other=0.0)
    best = _product(x_ptr, sample, y, x, inside, height, width, w, more, CHANNELS, KERNEL, MOST, REST)
    which = tl.zeros([ROWS, WIDTH], tl.int32)
    for place in tl.static_range(1, 4):
        y1, x1 = y + place // 2, x + place % 2
        z = _product(x_ptr, sample, y1, x1, inside, height, width, w, more, CHANNELS, KERNEL, MOST, REST)
        above = (z > best) | (z != z)
        if not EVEN:
            there = (2 * i + place // 2 < out_height) & (2 * j + place % 2 < out_width)
            above = above & there[:, None]
        best, which = tl.where(above, z, best), tl.where(above, place, which)
    at = window.to(tl.int64)[:, None] * UNITS + unit
    written = inside[:, None] & (unit < UNITS)
    tl.store(y_ptr + at, best.to(y_ptr.dtype.element_ty), mask=written)
    tl.store(which_ptr + at, which.to(tl.uint8), mask=written)


@triton.jit
def pooled_convolution_backward(
    g_ptr, which_ptr, x_ptr, share_ptr, windows, height, width, down, across, shares,
    CHANNELS: tl.constexpr, UNITS: tl.constexpr, KERNEL: tl.constexpr, PADDING: tl.constexpr,
    MOST: tl.constexpr, REST: tl.constexpr, STRIPS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """This program's share of the weight's gradient, ``[MOST + REST, WIDTH]``."""
    share = tl.program_id(0) // STRIPS
    unit = (tl.program_id(0) % STRIPS) * WIDTH + tl.arange(0, WIDTH)[None, :]
    total = tl.zeros([MOST, WIDTH], tl.float32)
    more = tl.zeros([REST if REST else 16, WIDTH], tl.float32)
    for step in tl.range(0, STEPS):
        window = (step * shares + share) * ROWS + tl.arange(0, ROWS)
        inside = window < windows
        at = window.to(tl.int64)[:, None] * UNITS + unit
        there = inside[:, None] & (unit < UNITS)
        g = tl.load(g_ptr + at, mask=there, other=0.0)
        which = tl.load(which_ptr + at, mask=there, other=0)
        sample, i, j = _place(window, down, across)
        for place in tl.static_range(4):
            y, x = 2 * i - PADDING + place // 2, 2 * j - PADDING + place % 2
            dz = tl.where(which == place, g, 0.0).to(g.dtype)
            patch = _patch(x_ptr, sample, y, x, inside, height, width, CHANNELS, KERNEL, 0, MOST)
            total = tl.dot(tl.trans(patch), dz, total)
            if REST:
                patch = _patch(x_ptr, sample, y, x, inside, height, width, CHANNELS, KERNEL, MOST, REST)
                more = tl.dot(tl.trans(patch), dz, more)
    first = share_ptr + share * ((MOST + REST) * UNITS)
    tl.store(first + tl.arange(0, MOST)[:, None] * UNITS + unit, total, mask=unit < UNITS)
    if REST:
        tl.store(first + (MOST + tl.arange(0, REST))[:, None] * UNITS + unit, more, mask=unit < UNITS)
