"""Max-pooling and convolutions of patches, as formulas of torch and as a compiler sees them."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zeromean.kernels import patches, pooled_convolution, pooling

KERNELS = [(3, 5, 1, 2), (3, 3, 1, 1), (3, 6, 4, 1), (1, 2, 1, 1), (7, 3, 2, 0)]


def pooled(x: Tensor, own: bool, ceil: bool) -> Tensor:
    return pooling.max_pool(x, ceil=ceil) if own else F.max_pool2d(x, 2, ceil_mode=ceil)


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (3, 4), (1, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("ceil", [True, False])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_pooling_is_torch_s(size: tuple[int, int], ceil: bool, layout: torch.memory_format) -> None:
    if not ceil and min(size) < 2:
        pytest.skip("no window fits")
    x = torch.randn(2, 6, *size, dtype=torch.float64).mul(2).round()
    x[0, 0, 0, 0], x[0, 1] = math.nan, -math.inf
    x = x.contiguous(memory_format=layout)
    both = []
    for own in (True, False):
        leaf = x.clone().requires_grad_()
        y = pooled(leaf, own, ceil)
        y.backward(torch.arange(y.numel(), dtype=y.dtype).view(y.shape))
        both.append((y, leaf.grad))
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("ceil", [True, False])
def test_gradient_of_pooling(ceil: bool) -> None:
    x = torch.randperm(2 * 3 * 5 * 4).view(2, 3, 5, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pooling.max_pool(x, ceil=ceil), x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inside torch, which makes an instance of a function
def test_pooling_compiles_whole() -> None:
    x = torch.randn(2, 16, 5, 6).contiguous(memory_format=torch.channels_last)
    step = torch.compile(
        lambda x: pooling.max_pool(x * 2, ceil=True).square().sum(), backend="aot_eager", fullgraph=True
    )
    gradients = []
    for function in (step, lambda x: F.max_pool2d(x * 2, 2, ceil_mode=True).square().sum()):
        leaf = x.clone().requires_grad_()
        function(leaf).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(("channels", "kernel", "stride", "padding"), KERNELS)
def test_a_product_of_patches_is_the_convolution(channels: int, kernel: int, stride: int, padding: int) -> None:
    x = torch.randn(2, channels, 9, 12, dtype=torch.float64)
    weight = torch.randn(10, channels, kernel, kernel, dtype=torch.float64, requires_grad=True)
    y, expected = patches.convolve(x, weight, stride, padding), F.conv2d(x, weight, None, stride, padding)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)
    direction = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, weight, direction), torch.autograd.grad(expected, weight, direction)
    )


@pytest.mark.parametrize(("channels", "kernel", "padding"), [(3, 5, 2), (3, 3, 1), (1, 2, 1)])
@pytest.mark.parametrize("ceil", [True, False])
def test_convolution_and_pooling_at_once(channels: int, kernel: int, padding: int, ceil: bool) -> None:
    x = torch.randn(2, channels, 9, 12, dtype=torch.float64)
    weight = torch.randn(10, channels, kernel, kernel, dtype=torch.float64, requires_grad=True)
    y = pooled_convolution.convolve_and_pool(x, weight, padding, ceil=ceil)
    expected = F.max_pool2d(F.conv2d(x, weight, None, 1, padding), 2, ceil_mode=ceil)
    torch.testing.assert_close(y, expected)
    direction = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, weight, direction), torch.autograd.grad(expected, weight, direction)
    )


@pytest.mark.parametrize("inner", range(1, 200))
def test_two_parts_hold_a_patch(inner: int) -> None:
    most, rest = pooled_convolution._parts(inner)
    assert most + rest >= inner
    assert most + rest <= max(2 * inner, 16)
    assert all(part & (part - 1) == 0 and (part >= 16 or part == 0) for part in (most, rest))


def arguments(name: str) -> tuple[Any, ...]:
    which = torch.randint(4, (2, 8, 3, 2)).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(2, 8, 3, 2).contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 6, 4)
    return {
        "max_pool_backward": (gradient, which, 5, 4),
        "patches": (x, 3, 2, 1),
        "pooled_convolution": (x, torch.randn(32, 8), 3, 1, False),
        "pooled_convolution_backward": (gradient, which, x, 3, 1),
    }[name]


@pytest.mark.parametrize("name", ["max_pool_backward", "patches", "pooled_convolution", "pooled_convolution_backward"])
def test_operators_are_as_a_compiler_believes(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.zeromean, name).default, arguments(name))
