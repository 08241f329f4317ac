"""A batch of random crops, some of them mirrored, in one launch."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from zeromean.kernels.operator import fused

_TILE = 1024


def crops(pixels: Tensor, plan: Tensor, step: Tensor, size: tuple[int, int], stride: int) -> tuple[Tensor, Tensor]:
    """``x[b, c, i, j] = pixels[start[b] + i stride + direction[b] j, c]``, and the labels of these images.

    Args:
        pixels: of all images, one row behind the other, ``[P, C]``.
        plan: start, direction (1 or -1) and label of each image of each step, int64 ``[steps, 3, B]``.
        step: whose batch to take, int64 ``[1]``.
        size: rows and columns of a crop, ``(H, W)``.
        stride: pixels between two rows of an image.

    Returns:
        Images ``[B, C, H, W]`` in channels_last, and int64 labels ``[B]``.
    """
    (height, width), count, channels = size, plan.shape[2], pixels.shape[1]
    if fused(pixels):
        x_bhwc = pixels.new_empty(count, height, width, channels)
        labels = plan.new_empty(count)
        _program()[(count,)](
            pixels, plan, step, x_bhwc, labels, count, stride,
            HEIGHT=height, WIDTH=width, CHANNELS=channels, TILE=_TILE, num_warps=4,
        )  # fmt: skip
        return x_bhwc.permute(0, 3, 1, 2), labels
    start, direction, labels = plan.index_select(0, step)[0]
    rows_i1 = stride * torch.arange(height, device=step.device).view(-1, 1)
    rows_b1j = (start.unsqueeze(1) + direction.unsqueeze(1) * torch.arange(width, device=step.device)).unsqueeze(1)
    return pixels[rows_b1j + rows_i1].permute(0, 3, 1, 2), labels


@functools.cache
def _program() -> Any:
    """Imported when first needed, as it needs Triton."""
    from zeromean.kernels.crops_programs import crops as program

    return program
