"""The program that lays out patches as rows; a program makes some whole rows."""

import triton
import triton.language as tl


@triton.jit
def gather(
    x_ptr, out_ptr, rows, height, width, down, across, by_sample, by_channel, by_row, by_column,
    CHANNELS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    INNER: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Each element of a row, zero outside the image and behind the patch."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, WIDTH)
    sample, i, j = (row // (across * down)).to(tl.int64), row // across % down, row % across
    y0, x0 = i * STRIDE - PADDING, j * STRIDE - PADDING
    channel, dx, dy = k % CHANNELS, k // CHANNELS % KERNEL, k // (CHANNELS * KERNEL)
    y, x = y0[:, None] + dy[None, :], x0[:, None] + dx[None, :]
    # A negative number without its sign is a large one.
    inside = (y.to(tl.uint32) < height) & (x.to(tl.uint32) < width) & (k < CHANNELS * KERNEL * KERNEL)[None, :]
    there = (row < rows)[:, None]
    corner = sample * by_sample + y0 * by_row + x0 * by_column
    offset = dy * by_row + dx * by_column + channel * by_channel
    value = tl.load(x_ptr + (corner[:, None] + offset[None, :]), mask=inside & there, other=0.0)
    at = row.to(tl.int64)[:, None] * INNER + k[None, :]
    tl.store(out_ptr + at, value, mask=there & (k < INNER)[None, :])
