"""A stack of convolutions as a compiled step in half precision on CUDA computes it: the same function, faster.

Tensor cores read eight channels at a time. Where a layer has 3, 260 or 300, cuDNN pads and crops around every call. So:

    channels    Weights and biases are padded with zeros to multiples of eight, and so the maps have a few channels
                more, through activation, pooling and dropout up to the next convolution, whose weights for them are
                zero. Only where a module has something of its own for each channel are they cut off before it.
    images      A convolution on images, which ask for no gradient, is a product of patches, made and pooled at once.
    bias        A pooling right behind a convolution comes before the bias, which is added to a quarter of the elements.
    pooling     Has a backward pass of its own.

Everywhere else the stack is its modules one after the other. Modules, parameters and state are torch's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zeromean.kernels.linear import HALF_TYPES
from zeromean.kernels.patches import convolve, round_up
from zeromean.kernels.pooled_convolution import convolve_and_pool
from zeromean.kernels.pooling import max_pool

# Images of fewer channels are taken apart into patches.
_FEW = 8


class AlignedStack(nn.Sequential):
    """Convolutions with what follows each: normalization, activation, 2x2 max-pooling, dropout.

    In that half precision the output has a multiple of eight channels if it comes from an activation without
    parameters; the next convolution is to be in an `AlignedStack` too.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the modules one after the other."""
        dtype = half_precision(x)
        if dtype is None:
            y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
            return y
        modules, place = list(self), 0
        while place < len(modules):
            module, place = modules[place], place + 1
            if isinstance(module, nn.Conv2d):
                if place < len(modules) and isinstance(modules[place], nn.MaxPool2d):
                    x, place = _convolved_and_pooled(x.to(dtype), module, modules[place]), place + 1
                else:
                    x = _convolved(x.to(dtype), module, module.bias)
                if not _may_pass(modules[place:]):
                    x = x[:, : module.out_channels]
            else:
                x = _pooled(x, module) if isinstance(module, nn.MaxPool2d) else module(x)
        return x


def half_precision(x: Tensor) -> torch.dtype | None:
    """The type in which a convolution of x is computed if that is half precision, on CUDA, in a compiled function."""
    if not (x.is_cuda and torch.compiler.is_compiling()):
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return dtype if dtype in HALF_TYPES else None


def _convolved_and_pooled(x: Tensor, layer: nn.Conv2d, pooling: nn.Module) -> Tensor:
    """The convolution, the pooling and only then the bias."""
    assert isinstance(pooling, nn.MaxPool2d)
    if _takes_images(layer, x) and layer.stride[0] == 1:
        weight = _widened(layer.weight.to(x.dtype), round_up(layer.out_channels), layer.in_channels)
        y = convolve_and_pool(x, weight, _padding(layer), ceil=pooling.ceil_mode)
    else:
        y = _pooled(_convolved(x, layer, None), pooling)
    return _biased(y, layer.bias)


def _convolved(x: Tensor, layer: nn.Conv2d, bias: Tensor | None) -> Tensor:
    """The convolution, its units padded."""
    weight, units = layer.weight.to(x.dtype), round_up(layer.out_channels)
    stride, padding = layer.stride[0], _padding(layer)
    if _takes_images(layer, x):
        return _biased(convolve(x, _widened(weight, units, layer.in_channels), stride, padding), bias)
    channels = round_up(layer.in_channels)
    if x.shape[1] < channels:
        x = F.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1]))
    if bias is not None:
        bias = F.pad(bias.to(x.dtype), (0, units - len(bias)))
    return F.conv2d(x, _widened(weight, units, channels), bias, stride, padding)


def _takes_images(layer: nn.Conv2d, x: Tensor) -> bool:
    return layer.in_channels < _FEW and not x.requires_grad


def _padding(layer: nn.Conv2d) -> int:
    padding = layer.padding[0]
    assert isinstance(padding, int)
    return padding


def _widened(weight: Tensor, units: int, channels: int) -> Tensor:
    if weight.shape[:2] == (units, channels):
        return weight
    return F.pad(weight, (0, 0, 0, 0, 0, channels - weight.shape[1], 0, units - weight.shape[0]))


def _pooled(x: Tensor, layer: nn.Module) -> Tensor:
    assert isinstance(layer, nn.MaxPool2d)
    assert (layer.kernel_size, layer.stride, layer.padding) == (2, 2, 0)
    return max_pool(x, ceil=layer.ceil_mode)


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return x
    return x + F.pad(bias.to(x.dtype), (0, x.shape[1] - len(bias))).view(-1, 1, 1)


def _may_pass(behind: Sequence[nn.Module]) -> bool:
    """Whether padded channels may pass through the modules up to the next convolution.

    There must be such modules, or this is the network's output, and none with parameters, running statistics or noise,
    which each belong to one channel.
    """
    until = next((place for place, module in enumerate(behind) if isinstance(module, nn.Conv2d)), len(behind))
    return until > 0 and not any(_has_channels(module) for module in behind[:until])


def _has_channels(module: nn.Module) -> bool:
    own = len(list(module.parameters())) + len(list(module.buffers()))
    return own > 0 or hasattr(module, "seed")
