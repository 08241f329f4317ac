"""The programs of max-pooling and of patches against torch's own operators."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.interpreted.device import DEVICE
from zeromean.kernels import patches, pooled_convolution, pooling

# Samples, channels, height, width.
MAPS = [(2, 64, 4, 6), (1, 5, 3, 4), (2, 264, 5, 7), (1, 384, 2, 2), (3, 8, 1, 2), (1, 40, 1, 1)]
# Channels, side of the kernel, stride, padding.
KERNELS = [(3, 5, 1, 2), (3, 3, 1, 1), (3, 6, 4, 1), (1, 2, 1, 1), (7, 3, 2, 0)]


def tied(shape: tuple[int, ...]) -> Tensor:
    """A map in channels_last with many equal elements, infinities and NaN."""
    x = torch.randn(shape).mul(2).round().to(DEVICE)
    x[0, 0, 0, 0], x[0, 1] = math.nan, -math.inf
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize("ceil", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gradient_goes_where_torch_s_own_puts_it(shape: tuple[int, ...], ceil: bool, dtype: torch.dtype) -> None:
    if not ceil and min(shape[2:]) < 2:
        pytest.skip("no window fits")
    x = tied(shape).to(dtype)
    own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = pooling.max_pool(own, ceil=ceil), F.max_pool2d(other, 2, ceil_mode=ceil)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    gradient = torch.randn_like(expected)
    y.backward(gradient)
    expected.backward(gradient)
    assert own.grad is not None
    assert own.grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(own.grad, other.grad, rtol=0, atol=0)


def test_a_gradient_in_another_layout_is_the_same() -> None:
    x = tied((2, 64, 4, 6))
    _, which = pooling.largest(x, ceil=False)
    gradient = torch.randn(which.shape, device=DEVICE)
    expected = pooling._launch(gradient.contiguous(memory_format=torch.channels_last), which, 4, 6)
    assert torch.equal(pooling._launch(gradient, which.contiguous(), 4, 6), expected)


@pytest.mark.parametrize(("channels", "kernel", "stride", "padding"), KERNELS)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_patches_lie_as_unfolded(
    channels: int, kernel: int, stride: int, padding: int, layout: torch.memory_format
) -> None:
    x = torch.randn(2, channels, 9, 12, device=DEVICE).contiguous(memory_format=layout)
    rows = patches.patches(x, kernel, stride, padding)
    columns = F.unfold(x, kernel, padding=padding, stride=stride).unflatten(1, (channels, -1))
    expected = columns.permute(0, 3, 2, 1).flatten(2).flatten(0, 1)
    assert rows.shape[1] % 8 == 0
    assert torch.equal(rows[:, : expected.shape[1]], expected)
    assert not rows[:, expected.shape[1] :].any()


@pytest.mark.parametrize(("channels", "kernel", "padding", "units"), [(3, 5, 2, 24), (3, 3, 1, 128), (1, 2, 1, 72)])
@pytest.mark.parametrize("ceil", [True, False])
def test_convolution_and_pooling_at_once(channels: int, kernel: int, padding: int, units: int, ceil: bool) -> None:
    """On whole numbers, so that products are exact and ties are ties."""
    x = torch.randint(-2, 3, (2, channels, 9, 12), device=DEVICE).half()
    weight = torch.randint(-1, 2, (units, channels, kernel, kernel), device=DEVICE).half()
    results = []
    for own in (True, False):
        leaf = (weight if own else weight.float()).requires_grad_()
        if own:
            y = pooled_convolution.convolve_and_pool(x, leaf, padding, ceil=ceil)
        else:
            y = F.max_pool2d(F.conv2d(x.float(), leaf, None, 1, padding), 2, ceil_mode=ceil)
        gradient = torch.arange(y.numel(), device=DEVICE).view(y.shape) % 3 - 1
        y.backward(gradient.to(y.dtype))
        assert leaf.grad is not None
        results.append((y.detach().float(), leaf.grad.float()))
        weight = weight.detach()
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
