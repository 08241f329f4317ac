"""Random crops and flips of images that live on the device, drawn for a whole epoch and gathered a batch at a time.

Every image is padded once by ``pad`` zeros on each side and kept as ``[N, H + 2 pad, W + 2 pad, C]``. A crop is then
named by one number, the flat position of its first pixel among all padded pixels, and by the direction in which its
rows are read: for pixel (i, j) of the crop whose upper left corner is (top, left) of image n,

    source = start + i (W + 2 pad) + direction j,   start = (n (H + 2 pad) + top) (W + 2 pad) + left

with direction -1 and W - 1 more in ``start`` where the crop is flipped. So a batch is one gather of B H W pixels, each
read and written once, in channels_last order. The draws are counter-based random numbers, functions of seed, epoch and
position in the epoch alone, as in `zeromean.lab.order`: a batch has the same bits on every device.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from zeromean.kernels.crops import crops
from zeromean.lab.order import sample_order
from zeromean.nn.noise import uniform

Batch = tuple[Tensor, Tensor]
_CROPS = 1 << 61  # keeps the streams of crops apart from those of orders and noise
_FLIPS = _CROPS + (1 << 59)


def draw_crops(seed: Tensor, epoch: int, count: int, places: int) -> tuple[Tensor, Tensor, Tensor]:
    """The upper edge, the left edge and whether to flip (0 or 1) of every crop of an epoch, each int64 ``[count]``.

    Args:
        seed: int64, 0-d, below 2^16.
        epoch: Every epoch has its own draws.
        count: How many; the first ones do not depend on it.
        places: Edges are uniform over ``range(places)``, each within 2^-16 of its share.
    """
    draws = uniform(_CROPS + (seed << 32) + epoch, (count, 3))
    top, left = (draws[:, :2].T * places).long()
    return top, left, (draws[:, 2] < 0.5).long()


def draw_flips(seed: Tensor, samples: int) -> Tensor:
    """Whether each image is flipped (0 or 1) in even epochs, int64 ``[samples]``; arguments as `draw_crops`."""
    return (uniform(_FLIPS + (seed << 32), (samples,)) < 0.5).long()


class Source(Protocol):
    """Where a training's batches come from, one epoch after the other.

    Attributes:
        steps: Batches in an epoch.
    """

    steps: int

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; every epoch has its own order, crops and flips."""

    def ready(self, place: int) -> None:
        """Called by the host before the step at that place of the epoch; gets what `take` then reads."""

    def take(self, step: Tensor) -> Batch:
        """Return the batch of a step, int64 ``[1]``, by work on the device alone."""


class Batches:
    """Augmented training batches of images on a device.

    ``set_epoch`` draws an epoch, ``take`` gathers one of its batches, by a step number on the device: it reads nothing
    back and changes nothing, so it may be captured in a CUDA graph or compiled, and ``set_epoch`` fills the buffers
    that it reads again. The samples beyond the last whole batch are left out, other ones in every epoch.

    Args:
        images: ``[N, C, H, W]``, normalised or uint8, on the device to train on.
        labels: int64 ``[N]``, there too.
        batch_size: Samples of a step, those of all processes together.
        seed: Fixes, with the epoch, order, crops and flips; below 2^16.
        pad: Zeros on each side. The crop is ``[H, W]`` and so has ``(2 pad + 1)^2`` places.
        flip: Whether images are mirrored left to right: each with probability 1/2 in every epoch.
        alternate_flip: Whether, instead, each is mirrored in every other epoch, half of them in the even ones. Source:
            Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv 2404.00498.
        dtype: In which images are kept and given; by default that of ``images``.
        channels_last: The memory format of a batch; False costs another copy of it.
        share: (rank, processes): this process takes the rank-th of so many equal parts of every batch.

    Attributes:
        steps: Batches in an epoch, ``N // batch_size``.

    Raises:
        ValueError: If ``batch_size`` exceeds the samples, or is no multiple of the processes.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        seed: int,
        pad: int = 4,
        flip: bool = True,
        alternate_flip: bool = False,
        dtype: torch.dtype | None = None,
        channels_last: bool = True,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._part = part_of_batch(batch_size, len(images), share)
        self.steps = len(images) // batch_size
        self._batch_size, self._pad, self._flip, self._alternate = batch_size, pad, flip, alternate_flip
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        device = images.device
        count, channels, height, width = images.shape
        padded = images.new_zeros(count, height + 2 * pad, width + 2 * pad, channels, dtype=dtype or images.dtype)
        padded[:, pad : pad + height, pad : pad + width] = images.permute(0, 2, 3, 1)
        self._height, self._width, self._size = padded.shape[1], padded.shape[2], (height, width)
        self._pixels, self._labels = padded.view(-1, channels), labels
        self._seed = torch.tensor(seed, device=device)
        self._numbers = torch.arange(self.steps, device=device)
        own = self._part.stop - self._part.start
        self._plan = torch.empty(self.steps, 3, own, dtype=torch.int64, device=device)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order, the crops and the flips of an epoch, into the buffers that `take` reads."""
        kept = self.steps * self._batch_size
        order = sample_order(self._seed.view(1), epoch, len(self._labels))[0, :kept]
        top, left, flipped = draw_crops(self._seed, epoch, kept, 2 * self._pad + 1)
        if self._alternate:
            flipped = (draw_flips(self._seed, len(self._labels))[order] + epoch) % 2
        flipped *= self._flip
        start = (order * self._height + top) * self._width + left + flipped * (self._size[1] - 1)
        plan = torch.stack([start, 1 - 2 * flipped, self._labels[order]])
        self._plan.copy_(plan.view(3, self.steps, -1).transpose(0, 1)[:, :, self._part])

    def ready(self, place: int) -> None:
        """Do nothing: all batches of the epoch lie on the device."""

    def take(self, step: Tensor) -> Batch:
        """Gather the batch of a step of the epoch that was set.

        Args:
            step: int64 ``[1]`` on the images' device, in ``[0, steps)``.

        Returns:
            Images ``[B, C, H, W]`` and labels ``[B]``, B being this process's part of ``batch_size``.
        """
        x_bchw, labels = crops(self._pixels, self._plan, step, self._size, self._width)
        return x_bchw.contiguous(memory_format=self._format), labels

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Set an epoch and yield its batches."""
        self.set_epoch(epoch)
        return (self.take(step) for step in self._numbers.split(1))


def whole_batches(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    *,
    dtype: torch.dtype | None = None,
    channels_last: bool = True,
) -> Iterator[Batch]:
    """Yield all samples in their order, without augmentation, for evaluation; the last batch may be smaller.

    Args:
        images: ``[N, C, H, W]``.
        labels: ``[N]``.
        batch_size: Samples of a batch.
        dtype: Of the batches; by default that of ``images``.
        channels_last: The memory format of the batches.
    """
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for part, part_labels in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        yield part.to(dtype=dtype or images.dtype, memory_format=memory_format), part_labels


def part_of_batch(batch_size: int, samples: int, share: tuple[int, int]) -> slice:
    """Which samples of every batch a process takes; arguments and errors are those of `Batches`."""
    rank, processes = share
    if not 1 <= batch_size <= samples:
        raise ValueError(
            f"batch_size must lie in [1, {samples}], got {batch_size}: an epoch has no more training samples"
        )
    if batch_size % processes:
        raise ValueError(f"batch_size must be a multiple of {processes}, got {batch_size}: every process takes as many")
    own = batch_size // processes
    return slice(rank * own, (rank + 1) * own)
