"""The program that takes a batch of crops out of padded images."""

import triton
import triton.language as tl


@triton.jit
def crops(
    pixels_ptr, plan_ptr, step_ptr, x_ptr, labels_ptr, count, stride,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A program takes one image."""
    image = tl.program_id(0)
    plan = plan_ptr + tl.load(step_ptr) * (3 * count) + image
    start, direction = tl.load(plan), tl.load(plan + count)
    tl.store(labels_ptr + image, tl.load(plan + 2 * count))
    for first in range(0, HEIGHT * WIDTH * CHANNELS, TILE):
        at = first + tl.arange(0, TILE)
        there = at < HEIGHT * WIDTH * CHANNELS
        channel, column, row = at % CHANNELS, at // CHANNELS % WIDTH, at // CHANNELS // WIDTH
        pixel = start + row * stride + direction * column
        x = tl.load(pixels_ptr + pixel * CHANNELS + channel, mask=there, other=0.0)
        tl.store(x_ptr + image.to(tl.int64) * (HEIGHT * WIDTH * CHANNELS) + at, x, mask=there)
