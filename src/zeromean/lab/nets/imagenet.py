"""The ELU paper's network for ImageNet: 12 convolutions, a spatial pyramid and three fully connected layers.

    1x96x6 | 3x512x3 | 5x768x3 | 3x1024x3 | pyramid | 2x4096 | 1x1000      (layers x units x kernel)

with 2x2 max-pooling of stride 2 after each stack of convolutions and 50 % dropout behind the two layers of 4096.

The paper states no strides. Ours: the first convolution has stride 4 and padding 1, and poolings round up. A crop of
224 pixels leaves maps of 56, 28, 14, 7 and at last 4 pixels, so that the pyramid's finest level is the map itself. The
work is 10.3 G multiply-adds an image; stride 2 would be 40.9 G and stride 1 158 G, ten and forty times those of a
ResNet-50. Our choice too: the levels 4, 2 and 1 (the paper says three levels); with ``norm="batch"`` the convolutions
alone are normalized.

Sources: Clevert, Unterthiner, Hochreiter, ICLR 2016, section 4.4; He et al., "Spatial pyramid pooling in deep
convolutional networks for visual recognition", ECCV 2014.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zeromean.lab.nets.convolutional import (
    CHANNELS,
    ActivationSource,
    ConvolutionalNetwork,
    Layer,
    Norm,
    Stacks,
    check_classes,
    convolutional_stack,
    draw_weights,
    plan,
)
from zeromean.lab.nets.dropout import Dropout
from zeromean.lab.recipes.imagenet import ELU15_DROPOUT
from zeromean.lab.recipes.recipe import Initialization

ELU15: Stacks = (
    (Layer(96, 6, stride=4),),
    (Layer(512, 3),) * 3,
    (Layer(768, 3),) * 5,
    (Layer(1024, 3),) * 3,
)
PIXELS = 224
HIDDEN = 4096
LEVELS = (4, 2, 1)


class SpatialPyramid(nn.Module):
    """The maximum over each cell of grids over the map, side by side: ``[N, C, H, W]`` to ``[N, C sum(level^2)]``.

    Cell i of a grid of n cells reaches from floor(i H / n) to ceil((i + 1) H / n), so a map may have any size.

    Args:
        levels: cells along a side of each grid.
    """

    def __init__(self, levels: tuple[int, ...] = LEVELS) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x_bchw: Tensor) -> Tensor:
        """Pool and concatenate."""
        return torch.cat([F.adaptive_max_pool2d(x_bchw, level).flatten(1) for level in self.levels], 1)

    def extra_repr(self) -> str:
        """The constructor's argument."""
        return f"levels={self.levels}"


def elu15(
    classes: int,
    activation: ActivationSource,
    norm: Norm = "none",
    *,
    seed: int,
    initialization: Initialization = "he",
) -> ConvolutionalNetwork:
    """The 15-layer ImageNet network; 164,867,528 parameters for 1000 classes.

    Args and result are those of `elu11`, for images of 224 pixels (or others: the pyramid takes a map of any size).
    A learnable activation behind a fully connected layer has one value of each parameter. Dropout as published is set.

    Raises:
        ValueError: an unknown norm, or no class.
    """
    check_classes(classes)
    modules: dict[str, nn.Module] = {}
    channels = CHANNELS
    for number, stack in enumerate(plan(ELU15, "ceil", PIXELS), 1):
        modules[f"stack{number}"] = convolutional_stack(stack, channels, activation, norm)
        channels = stack.layers[-1].units
    modules["pyramid"] = SpatialPyramid()
    modules["stack5"] = _hidden(channels * sum(level**2 for level in LEVELS), activation)
    modules["stack6"] = nn.Sequential(OrderedDict({"linear1": _linear(HIDDEN, classes)}))
    network = ConvolutionalNetwork(OrderedDict(modules))
    network.set_dropout(ELU15_DROPOUT, everywhere=True)
    return draw_weights(network, activation, initialization, seed)


def _hidden(features: int, activation: ActivationSource) -> nn.Sequential:
    modules: dict[str, nn.Module] = {}
    for number, fan_in in enumerate((features, HIDDEN), 1):
        modules[f"linear{number}"] = _linear(fan_in, HIDDEN)
        modules[f"activation{number}"] = activation.build()
        modules[f"dropout{number}"] = Dropout(0.0)
    return nn.Sequential(OrderedDict(modules))


def _linear(fan_in: int, fan_out: int) -> nn.Linear:
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out, device=torch.get_default_device())
    return layer
