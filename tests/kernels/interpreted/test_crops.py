"""The program of crops against what it stands for, pixel by pixel."""

import pytest
import torch

from tests.kernels.interpreted.device import DEVICE
from zeromean.kernels import crops


@pytest.mark.parametrize("size", [(5, 7), (32, 32), (1, 1)], ids=str)
@pytest.mark.parametrize(("channels", "dtype"), [(3, torch.float16), (1, torch.float32), (4, torch.uint8)])
def test_crops_are_taken_pixel_by_pixel(size: tuple[int, int], channels: int, dtype: torch.dtype) -> None:
    (height, width), stride, images = size, size[1] + 4, 6
    area = (height + 4) * stride
    pixels = torch.randint(0, 250, (images * area, channels), device=DEVICE).to(dtype)
    order, flips, top, left = (torch.randint(0, most, (2, 4), device=DEVICE) for most in (images, 2, 5, 5))
    start = order * area + top * stride + left + flips * (width - 1)
    plan = torch.stack([start, 1 - 2 * flips, order + 70], 1)
    for step in range(2):
        x, labels = crops.crops(pixels, plan, torch.tensor([step], device=DEVICE), size, stride)
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert x.dtype == dtype
        assert torch.equal(labels, order[step] + 70)
        for place in range(4):
            image = pixels.view(images, height + 4, stride, channels)[order[step, place]]
            crop = image[top[step, place] :, left[step, place] :][:height, :width]
            expected = crop.flip(1) if flips[step, place] else crop
            assert torch.equal(x[place].permute(1, 2, 0), expected)
