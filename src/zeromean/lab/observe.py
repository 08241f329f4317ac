"""What a network in training looks like: its error, its units' mean activations, and where it stopped being finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from zeromean.kernels.linear import HALF_TYPES
from zeromean.lab.data.augment import Batch

AT_ONCE = 1000
_TOP = 5


class Judgement(NamedTuple):
    """How good a network is on some images.

    Attributes:
        loss: the mean cross entropy.
        error: images whose class is not the first one of the network, in percent; nan if the loss is not finite.
        top5_error: images whose class is not among its first five, in percent; nan also for five classes or fewer.
    """

    loss: float
    error: float
    top5_error: float


UNKNOWN = Judgement(math.nan, math.nan, math.nan)


def outputs_of(network: nn.Module, x: Tensor, dtype: torch.dtype, copies: Mapping[str, Tensor] | None = None) -> Tensor:
    """The network's output, with these in place of parameters; in half precision its products run under autocast."""
    half = dtype in HALF_TYPES
    with torch.autocast(x.device.type, dtype if half else None, enabled=half):
        outputs: Tensor = functional_call(network, dict(copies), (x,)) if copies else network(x)
    return outputs


def logits_of(network: nn.Module, x: Tensor, dtype: torch.dtype, copies: Mapping[str, Tensor] | None = None) -> Tensor:
    """The same in float32."""
    return outputs_of(network, x, dtype, copies).float()


@torch.no_grad()
def judge(network: nn.Module, batches: Iterable[Batch], dtype: torch.dtype) -> Judgement:
    """Judge a network in evaluation mode, by at least one batch of images in that type."""
    sums = torch.zeros(3, dtype=torch.float64, device=next(network.parameters()).device)
    count = classes = 0
    for x, y in batches:
        logits = logits_of(network, x, dtype)
        first = logits.topk(min(_TOP, logits.shape[1])).indices
        sums[0] += F.cross_entropy(logits, y, reduction="sum").double()
        sums[1] += (logits.argmax(1) != y).sum()
        sums[2] += (first != y.unsqueeze(1)).all(1).sum()
        count, classes = count + len(y), logits.shape[1]
    loss, wrong, missed = (sums / count).tolist()
    if not math.isfinite(loss):
        return Judgement(loss, math.nan, math.nan)
    return Judgement(loss, 100 * wrong, 100 * missed if classes > _TOP else math.nan)


@torch.no_grad()
def mean_activations(network: nn.Module, images: Tensor, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """Median and interquartile range over a layer's units of each unit's mean activation, for every layer.

    A unit of a convolution is a channel; its mean is over images and positions. The network is in evaluation mode.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, y: Tensor) -> None:
        mean = y.float().mean([0, *range(2, y.ndim)]) * len(y) / len(images)
        sums[name] = sums[name] + mean if name in sums else mean

    layers = {name: one for name, one in network.named_modules() if name.rpartition(".")[2].startswith("activation")}
    with _watching(layers, add):
        for x in images.split(AT_ONCE):
            logits_of(network, x.to(dtype=dtype, memory_format=torch.channels_last), dtype)
    points = torch.tensor([0.25, 0.5, 0.75], device=images.device)
    quartiles = torch.stack([torch.quantile(mean, points) for mean in sums.values()])
    return quartiles[:, 1].tolist(), (quartiles[:, 2] - quartiles[:, 0]).tolist()


def blame(network: nn.Module, losses: Callable[[], Iterable[Tensor]]) -> str | None:
    """Where a step's numbers stop being finite when its losses are taken again; buffers are left as they were.

    Args:
        network: in training mode.
        losses: takes the step's loss, or one after the other those of its parts.

    Returns:
        In the order of the computation the first of: the images, the output of a layer, the gradient of a parameter,
        the norm of all gradients. None if all are finite.
    """
    found: list[str] = []

    def look(what: str, tensor: Tensor) -> None:
        if not torch.isfinite(tensor).all():
            found.append(what)

    layers = {name: one for name, one in network.named_modules() if not list(one.children())}
    named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    inputs = network.register_forward_pre_hook(lambda _, args: look("the images", args[0]))
    try:
        with _watching(layers, lambda name, y: look(f"output of {name}", y)):
            for loss in losses():
                gradients = torch.autograd.grad(loss, [parameter for _, parameter in named])
                for (name, _), gradient in reversed(list(zip(named, gradients, strict=True))):
                    look(f"gradient of {name}", gradient)
                look("norm of the gradient", torch.stack(torch._foreach_norm(gradients)).norm())
    finally:
        inputs.remove()
        for buffer, before in buffers:
            buffer.copy_(before)
    return found[0] if found else None


@contextmanager
def _watching(layers: dict[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within, every output of those layers is shown."""

    def hooked(name: str, layer: nn.Module) -> RemovableHandle:
        return layer.register_forward_hook(lambda _, __, y: see(name, y))

    hooks = [hooked(name, layer) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def finite(value: float) -> float | None:
    """The value to seven digits, or None where it is not a finite number."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def mean_size(medians: Sequence[float | None]) -> float | None:
    """How far the layers' medians are from zero, on average; None where one is not finite."""
    return finite(sum(math.nan if median is None else abs(median) for median in medians) / len(medians))
