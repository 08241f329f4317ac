"""The tensors of a measurement: their shape and layout, enough of them that no cache holds them all."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from zeromean.lab.bench.subjects import Subject

Layout = Literal["contiguous", "nchw", "channels_last"]
CHANNELS = 256
_IMAGES = 64
_MOST_COPIES = 32
_CPU_CACHE = 32 * 2**20


@dataclass(frozen=True)
class Inputs:
    """Equal tensors to take turns with, and the learnable parameters.

    Attributes:
        xs: Inputs that require a gradient, normal with standard deviation 2.
        gradients: Of the outputs, standard normal, as many and in the same layout.
        parameters: One value a channel each, or one value where the layout has no channels.
    """

    xs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]

    @property
    def wanted(self) -> tuple[Tensor, ...]:
        """What a gradient is asked for, with the first of the inputs."""
        return (self.xs[0], *self.parameters)

    def alone(self) -> Inputs:
        """The first of the inputs, without the others."""
        return replace(self, xs=self.xs[:1], gradients=self.gradients[:1])


def own_layouts(subject: Subject) -> tuple[Layout, ...]:
    """Where an activation is measured unless asked otherwise: with channels if it learns a value for each."""
    return ("nchw", "channels_last") if subject.ranges else ("contiguous",)


def shape(elements: int, layout: Layout) -> tuple[int, ...]:
    """``[elements]``, or ``[images, 256, height, width]`` with up to 64 images and a nearly square picture.

    Raises:
        ValueError: If there are channels, and the elements are no multiple of 256.
    """
    if layout == "contiguous":
        return (elements,)
    if elements % CHANNELS:
        raise ValueError(
            f"elements must be a multiple of {CHANNELS} in the layout {layout}, got {elements}: "
            f"take {CHANNELS * max(1, round(elements / CHANNELS))}"
        )
    images = math.gcd(elements // CHANNELS, _IMAGES)
    pixels = elements // CHANNELS // images
    height = next(size for size in range(math.isqrt(pixels), 0, -1) if pixels % size == 0)
    return images, CHANNELS, height, pixels // height


def make(subject: Subject, elements: int, dtype: torch.dtype, layout: Layout, device: torch.device) -> Inputs:
    """New inputs, the same for the same arguments.

    Raises:
        ValueError: As `shape`.
    """
    generator = torch.Generator(device).manual_seed(0)
    size = shape(elements, layout)
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format

    def normal(deviation: float) -> Tensor:
        empty = torch.empty(size, dtype=dtype, device=device, memory_format=memory)
        return empty.normal_(0, deviation, generator=generator)

    copies = range(_copies(elements * dtype.itemsize, device))
    values = CHANNELS if len(size) > 1 else 1
    parameters = [torch.empty(values, device=device).uniform_(*r, generator=generator) for r in subject.ranges]
    return Inputs(
        tuple(normal(2.0).requires_grad_() for _ in copies),
        tuple(normal(1.0) for _ in copies),
        tuple(parameter.to(dtype).requires_grad_() for parameter in parameters),
    )


def _copies(size: int, device: torch.device) -> int:
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _CPU_CACHE
    return min(_MOST_COPIES, math.ceil(4 * cache / size))
