"""The ELU paper's two networks for CIFAR images: 11 and 18 layers of convolutions, in stacks.

A layer is convolution, batch normalization if asked for, activation, dropout; a stack ends with 2x2 max-pooling of
stride 2 before its dropout, and the last stack is the 1x1 convolution that gives the classes.

The paper does not say how 2x2 kernels are padded, nor how maps of odd size are pooled, and a map of 32 pixels does not
live through every reading. Other kernels keep the size of the map. Four readings, with what is left of 32 pixels behind
each pooling, and the multiply-adds of an image:

    padding     of a 2x2 kernel     pooling rounds   elu11                     elu18
    alternate   1, 0, 1, 0 ...      down             16 8 4 2 1      166.1 M   16 8 4 2 1 1        1.70 G
    one         1                   down             16 8 4 2 1      166.1 M   16 9 6 4 3 2 1      2.79 G
    ceil        0                   up               16 8 4 2        150.7 M   vanishes in stack 4
    one_ceil    1                   up               16 8 5 3 2 1    172.9 M   16 10 7 5 4 3 2 1   3.28 G

The default is ``alternate`` (our choice), which takes the least arithmetic and, on held-out images of CIFAR-100, was
better for ELU than ``one_ceil``. For that one speaks that it alone pools in all eight stacks of elu18, the classes' own
included, and ends with a map of exactly one pixel, and that it is what Caffe makes of a padding of 1, as its poolings
round up (recalled). A pooling of one pixel is left out.

Source: Clevert, Unterthiner, Hochreiter, "Fast and accurate deep network learning by exponential linear units (ELUs)",
ICLR 2016, section 4.2 (elu11) and 4.3 (elu18, which with the classes' own has 19 convolutions). Stated there: units,
kernels, poolings, dropout rates. Our choice, beside the padding: dropout after the pooling; of the seven rates given
for eight stacks, the largest is that of two; initial weights; one slope a channel for learnable activations.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn

import zeromean.nn as zmnn
from zeromean.lab.nets.aligned import AlignedStack
from zeromean.lab.nets.dropout import Dropout
from zeromean.lab.recipes.cifar import ELU11_DROPOUT, ELU18_DROPOUT
from zeromean.lab.recipes.recipe import ConvolutionalInitialization

Norm = Literal["none", "batch"]
Padding = Literal["alternate", "one", "ceil", "one_ceil"]


class ActivationSource(Protocol):
    """What a network asks of an activation; `zeromean.lab.activation.Activation` answers it."""

    @property
    def commutes_with_maximum(self) -> bool:
        """Whether it may follow the max-pooling, where a quarter of the elements is left, instead of preceding it."""

    def build(self, width: int = 1) -> nn.Module:
        """A new module for that many channels."""


class Layer(NamedTuple):
    """One convolution: its units (output channels), the side of its square kernel, its stride."""

    units: int
    kernel: int
    stride: int = 1


Stacks = tuple[tuple[Layer, ...], ...]

ELU11: Stacks = (
    (Layer(192, 5),),
    (Layer(192, 1), Layer(240, 3)),
    (Layer(240, 1), Layer(260, 2)),
    (Layer(260, 1), Layer(280, 2)),
    (Layer(280, 1), Layer(300, 2)),
    (Layer(300, 1),),
)
ELU18: Stacks = (
    (Layer(384, 3),),
    (Layer(384, 1), Layer(384, 2), Layer(640, 2), Layer(640, 2)),
    (Layer(640, 1), Layer(768, 2), Layer(768, 2), Layer(768, 2)),
    (Layer(768, 1), Layer(896, 2), Layer(896, 2)),
    (Layer(896, 3), Layer(1024, 2), Layer(1024, 2)),
    (Layer(1024, 1), Layer(1152, 2)),
    (Layer(1152, 1),),
)
PIXELS, CHANNELS = 32, 3


@dataclass(frozen=True)
class Stack:
    """A stack whose paddings are settled.

    Attributes:
        layers: its convolutions.
        paddings: zeros on every side before each.
        sizes: side of the map behind each convolution, and behind the pooling if there is one.
        pooled: whether there is more than one pixel to pool.
        ceil: whether the pooling rounds up: a window that hangs over the edge counts.
    """

    layers: tuple[Layer, ...]
    paddings: tuple[int, ...]
    sizes: tuple[int, ...]
    pooled: bool
    ceil: bool


def plan(stacks: Stacks, padding: Padding, pixels: int) -> list[Stack]:
    """Settle the padding of every convolution and find which poolings there are.

    Args:
        stacks: the convolutions of each stack.
        padding: see the file's first lines; a kernel other than 2x2 is centred on its stride.
        pixels: side of the square image.

    Raises:
        ValueError: the padding is unknown, or a map vanishes.
    """
    if padding not in get_args(Padding):
        raise ValueError(
            f"padding must be one of {', '.join(get_args(Padding))}, got {padding!r}: 'alternate' is the default"
        )
    planned: list[Stack] = []
    for layers in stacks:
        planned.append(_settle(layers, padding, pixels, number=len(planned) + 1))
        pixels = planned[-1].sizes[-1]
    return planned


def _settle(layers: tuple[Layer, ...], padding: Padding, pixels: int, number: int) -> Stack:
    paddings, sizes = [], [pixels]
    for layer in layers:
        paddings.append(_padding(layer, padding, grown=sizes[-1] > pixels))
        sizes.append((sizes[-1] + 2 * paddings[-1] - layer.kernel) // layer.stride + 1)
    if sizes[-1] < 1:
        raise ValueError(
            f"padding must leave a pixel in every layer, got {padding!r}: the map of stack {number} shrinks "
            f"from {pixels} pixels to {sizes[-1]}; use 'one_ceil'"
        )
    pooled, ceil = sizes[-1] > 1, padding in ("ceil", "one_ceil")
    if pooled:
        sizes.append((sizes[-1] + ceil) // 2)
    return Stack(layers, tuple(paddings), tuple(sizes[1:]), pooled, ceil)


def _padding(layer: Layer, padding: Padding, grown: bool) -> int:
    if layer.kernel != 2:
        return (layer.kernel - layer.stride) // 2
    return int(padding in ("one", "one_ceil") or (padding == "alternate" and not grown))


class ConvolutionalNetwork(nn.Sequential):
    """Children ``stack1``, ``stack2`` ... and what lies between and behind them, one after the other.

    In a stack, layer 2 is ``conv2`` (``linear2`` in a fully connected one), ``norm2`` with batch normalization,
    ``activation2`` and ``dropout2``, so a layer's name, such as ``stack3.conv2``, tells where it is. Dropout has no
    state, and its layers are always there: the keys of the state do not depend on the rates.
    """

    @property
    def stacks(self) -> list[nn.Sequential]:
        """The stacks in order; the last one gives the classes."""
        named = self.named_children()
        return [child for name, child in named if name.startswith("stack") and isinstance(child, nn.Sequential)]

    def set_dropout(self, rates: Sequence[float], *, everywhere: bool = False) -> None:
        """Change the dropout, at any time: the published training raises it twice.

        The rates are plain numbers (our choice): a layer of rate 0 launches nothing and is compiled to nothing. The
        price is that torch.compile (with ``dynamic=False``, or it makes inputs of the rates) compiles once more for new
        rates, and that a step recorded as a CUDA graph must be recorded again.

        Args:
            rates: the probability to drop an element, for each stack; 0 for the last one, which gives the classes.
            everywhere: behind every layer of a stack, as in the published fine-tuning, instead of behind its last one.

        Raises:
            ValueError: not as many rates as stacks, a rate outside [0, 1), or one above 0 for the classes.
        """
        if len(rates) != len(self.stacks):
            raise ValueError(
                f"dropout takes a rate for each of {len(self.stacks)} stacks, got {len(rates)}: 0 where there is none"
            )
        if not all(0 <= rate < 1 for rate in rates):
            raise ValueError(f"dropout rates must lie in [0, 1), got {tuple(rates)}: 0.5 drops every second element")
        if rates[-1] != 0:
            raise ValueError(f"the last stack's dropout must be 0, got {rates[-1]}: it would drop the classes")
        for rate, stack in zip(rates, self.stacks, strict=True):
            layers = [module for module in stack if isinstance(module, nn.Dropout)]
            for layer in layers:
                layer.p = float(rate) if everywhere or layer is layers[-1] else 0.0

    def set_dropout_strength(self, strength: Tensor | None) -> None:
        """Let every layer drop with that share of its rate, which may change in every step; None for all of it.

        Args:
            strength: in [0, 1], float32 ``[]``, read in every step.
        """
        for module in self.modules():
            if isinstance(module, Dropout):
                module.strength = strength

    def drop_before_pooling(self) -> None:
        """Move the pooling of every stack that drops behind its dropout: the other reading of the paper.

        There, dropout belongs to "the last layer in each stack" and pooling comes "after each stack". The maximum of
        four elements survives where one of them does, so less is lost. Parameters and their names are unchanged.
        """
        for stack in self.stacks:
            rates = [module.p for module in stack if isinstance(module, nn.Dropout)]
            if rates and rates[-1] > 0 and "pool" in stack._modules:
                stack._modules["pool"] = stack._modules.pop("pool")


def convolutional_stack(stack: Stack, channels: int, activation: ActivationSource, norm: Norm) -> nn.Sequential:
    """The modules of one stack, on so many channels; its weights are yet to be drawn.

    With ``norm="batch"`` the convolutions have no bias: the normalization would take it out again and adds its own.
    At the end of the stack an activation that commutes with the maximum follows the pooling: the same function.
    How a compiled step in half precision computes it, `zeromean.lab.nets.aligned` says.

    Raises:
        ValueError: the norm is unknown.
    """
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, got {norm!r}: 'none' is the default")
    modules: dict[str, nn.Module] = {}
    for number, (layer, padding) in enumerate(zip(stack.layers, stack.paddings, strict=True), 1):
        modules[f"conv{number}"] = _convolution(channels, layer, padding, bias=norm == "none")
        if norm == "batch":
            modules[f"norm{number}"] = nn.BatchNorm2d(layer.units)
        activated = {f"activation{number}": activation.build(layer.units)}
        pooled = _pooling(stack) if number == len(stack.layers) else {}
        modules |= pooled | activated if activation.commutes_with_maximum else activated | pooled
        modules[f"dropout{number}"] = Dropout(0.0)
        channels = layer.units
    return AlignedStack(OrderedDict(modules))


def _convolution(channels: int, layer: Layer, padding: int, *, bias: bool) -> nn.Conv2d:
    shape = (channels, layer.units, layer.kernel, layer.stride, padding)
    convolution: nn.Conv2d = nn.utils.skip_init(nn.Conv2d, *shape, bias=bias, device=torch.get_default_device())
    return convolution


def _pooling(stack: Stack) -> dict[str, nn.Module]:
    return {"pool": nn.MaxPool2d(2, ceil_mode=stack.ceil)} if stack.pooled else {}


def draw_weights(
    network: ConvolutionalNetwork, activation: ActivationSource, initialization: ConvolutionalInitialization, seed: int
) -> ConvolutionalNetwork:
    """Draw the initial weights from a seed and leave the global generator as it was; biases are zero."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        follows = activation.build() if initialization == "activation" else "relu"
        zmnn.init_(network, follows, gain=1.0 if initialization == "lecun" else None)
    return network


def check_classes(classes: int) -> None:
    """Raise ValueError if there is none."""
    if classes < 1:
        raise ValueError(f"classes must be at least 1, got {classes}: it is the number of outputs")


def elu11(
    classes: int,
    activation: ActivationSource,
    norm: Norm = "none",
    *,
    seed: int,
    initialization: ConvolutionalInitialization = "he",
    padding: Padding = "alternate",
) -> ConvolutionalNetwork:
    """The 11-layer network that compares activations on CIFAR-100; 1,669,028 parameters for 100 classes.

    Args:
        classes: outputs; the result is ``[N, classes]``, the mean over what is left of the map. That is one pixel for
            images of 32; larger ones leave more.
        activation: follows every convolution but the last; learnable ones have a value of each parameter a channel.
        norm: ``batch`` puts batch normalization between convolution and activation, and takes away the convolution's
            bias; the convolution that gives the classes has none, and keeps its bias.
        seed: fixes the initial weights, leaving the global generator as it was. All activations get the same weights
            from the same seed, and so do all norms and paddings.
        initialization: ``he`` draws N(0, 2 / fan_in) for any activation; ``activation`` uses the activation's own
            gain, and then the weights differ by that factor; ``lecun`` draws N(0, 1 / fan_in), the variance of
            Caffe's "xavier" filler. Biases are zero.
        padding: of 2x2 kernels, see the file's first lines.

    Returns:
        The network with the published dropout.

    Raises:
        ValueError: an unknown norm or padding, or no class.
    """
    network = _network(ELU11, classes, activation, norm, padding)
    network.set_dropout(ELU11_DROPOUT)
    return draw_weights(network, activation, initialization, seed)


def elu18(
    classes: int,
    activation: ActivationSource,
    norm: Norm = "none",
    *,
    seed: int,
    initialization: ConvolutionalInitialization = "he",
    padding: Padding = "alternate",
) -> ConvolutionalNetwork:
    """The 18-layer network of the paper's best CIFAR results; 39,330,404 parameters for 100 classes.

    Args and result are those of `elu11`. The dropout is that of the published base phase; fine-tuning sets
    ``set_dropout(ELU18_DROPOUT, everywhere=True)``, and then the same times 1.5.

    Raises:
        ValueError: an unknown norm or padding, no class, or padding="ceil", under which the map vanishes.
    """
    network = _network(ELU18, classes, activation, norm, padding)
    network.set_dropout(ELU18_DROPOUT)
    return draw_weights(network, activation, initialization, seed)


def _network(
    stacks: Stacks, classes: int, activation: ActivationSource, norm: Norm, padding: Padding
) -> ConvolutionalNetwork:
    check_classes(classes)
    *hidden, last = plan((*stacks, (Layer(classes, 1),)), padding, PIXELS)
    modules: dict[str, nn.Module] = {}
    channels = CHANNELS
    for number, stack in enumerate(hidden, 1):
        modules[f"stack{number}"] = convolutional_stack(stack, channels, activation, norm)
        channels = stack.layers[-1].units
    conv = {"conv1": _convolution(channels, last.layers[0], last.paddings[0], bias=True)}
    modules[f"stack{len(hidden) + 1}"] = AlignedStack(OrderedDict({**conv, **_pooling(last)}))
    modules |= {"mean": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return ConvolutionalNetwork(OrderedDict(modules))
