"""The program of the 2x2 max-pooling's backward pass, in channels_last.

A program takes some windows and a strip of channels. It reads each window's gradient and the byte that says which
element was the largest, and writes the window's four elements; what a map of odd size has beyond its windows is
covered by windows without a gradient.
"""

import triton
import triton.language as tl


@triton.jit
def max_pool_backward(
    g_ptr, which_ptr, dx_ptr, windows, height, width, pooled_height, pooled_width,
    CHANNELS: tl.constexpr, STRIPS: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradient of every element."""
    window = (tl.program_id(0) // STRIPS) * ROWS + tl.arange(0, ROWS)
    channel = (tl.program_id(0) % STRIPS) * WIDTH + tl.arange(0, WIDTH)[None, :]
    down, across = (height + 1) // 2, (width + 1) // 2
    j, i, sample = window % across, window // across % down, (window // (across * down)).to(tl.int64)
    there = (window < windows)[:, None] & (channel < CHANNELS)
    pooled = there
    if not EVEN:
        pooled = there & ((i < pooled_height) & (j < pooled_width))[:, None]
    at = ((sample * pooled_height + i) * pooled_width + j)[:, None] * CHANNELS + channel
    g = tl.load(g_ptr + at, mask=pooled, other=0.0)
    which = tl.load(which_ptr + at, mask=pooled, other=0)
    for place in tl.static_range(4):
        y, x = 2 * i + place // 2, 2 * j + place % 2
        inside = there
        if not EVEN:
            inside = there & ((y < height) & (x < width))[:, None]
        at = ((sample * height + y) * width + x)[:, None] * CHANNELS + channel
        tl.store(dx_ptr + at, tl.where(which == place, g, 0.0), mask=inside)
