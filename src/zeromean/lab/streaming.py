"""Images that stay on the disk: worker processes decode them while the device takes its steps.

A step reads its batch at addresses that stay, so that it can be recorded as a CUDA graph. Before each step the host
waits for the workers' next batch and has it copied there. On CUDA there are two places: the batch of the next step is
copied from pinned memory into the second while the current step reads the first, and moved over, within the device's
memory, when that step has ended. So decoding and copying both overlap the steps, and the host is one step ahead.

    x = (pixels - mean image under the crop) / 64

The paper subtracts the mean of every pixel and names no scale. Ours: 64 is about the standard deviation of pixels, so
that inputs have a variance near 1, as the initialization of the weights assumes; as a power of two it is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from zeromean.lab import data
from zeromean.lab.data.augment import Batch, part_of_batch
from zeromean.lab.data.imagenet import FolderDataset, cached_mean_image
from zeromean.lab.data.images import ImageBatch, ImageSplit, evaluation_batches, subtract_mean, training_batches
from zeromean.lab.recipes.images import ImageRecipe
from zeromean.lab.sharing import ALONE, Share

SCALE = 64.0


class StreamedBatches:
    """Training batches from worker processes, with the interface of `Batches`.

    Args:
        split: the training images.
        mean: the mean image ``[3, resize, resize]``, on the device to train on.
        recipe: sizes of batch, image and crop, and whether to flip.
        seed: fixes, with the epoch, order, crops and flips.
        workers: processes that decode; 0 decodes in this one. The batches are the same.
        dtype: of the batches.
        share: (rank, processes): this process takes the rank-th of so many equal parts of every batch.

    Attributes:
        steps: batches in an epoch.

    Raises:
        ValueError: the batch exceeds the images, or is no multiple of the processes.
    """

    def __init__(
        self,
        split: ImageSplit,
        mean: Tensor,
        recipe: ImageRecipe,
        *,
        seed: int,
        workers: int,
        dtype: torch.dtype = torch.float32,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        part = part_of_batch(recipe.batch_size, len(split.files), share)
        self.steps = len(split.files) // recipe.batch_size
        self._mean, self._dtype = mean, dtype
        self._open = partial(
            training_batches, split, recipe.batch_size, seed=seed, workers=workers, resize=recipe.resize,
            crop=recipe.crop, flip=recipe.flip, share=share,
        )  # fmt: skip
        self._current = _empty(part.stop - part.start, recipe.crop, mean.device)
        self._side = _Side(self._current) if mean.device.type == "cuda" else None
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; what was decoded of the last one is let go."""
        self._epoch, self._place = epoch, -1
        self._coming: Iterator[ImageBatch] = iter(())

    def ready(self, place: int) -> None:
        """Get the batch at that place of the epoch to where `take` reads it; places in their order are decoded ahead.

        Raises:
            ValueError: an image cannot be read; names it.
        """
        if place != self._place:
            self._coming = self._open(epoch=self._epoch, first=place)
        self._place = place + 1
        batch = next(self._coming)
        if self._side is None:
            _copy(self._current, batch)
        else:
            self._side.bring(batch, self._current)

    def take(self, step: Tensor) -> Batch:
        """The batch that was made ready, its mean image subtracted, scaled, in channels_last order."""
        return _scaled(self._current, self._mean, self._dtype), self._current.labels


class _Side:
    """The second place of a batch on a GPU, with a stream of its own that copies into it."""

    def __init__(self, like: ImageBatch) -> None:
        self._arriving = ImageBatch(*(torch.empty_like(tensor) for tensor in like))
        self._stream = torch.cuda.Stream(like.images.device)
        self._free = torch.cuda.Event()

    def bring(self, batch: ImageBatch, current: ImageBatch) -> None:
        """Copy a pinned batch here beside the work that is queued, and then to its place behind that work."""
        self._free.synchronize()
        with torch.cuda.stream(self._stream):
            _copy(self._arriving, batch)
        ours = torch.cuda.current_stream(current.images.device)
        ours.wait_stream(self._stream)
        _copy(current, self._arriving)
        self._free.record(ours)


@dataclass(frozen=True, eq=False)
class StreamedMaterial:
    """What `Material` is to images in memory, for images on the disk.

    Attributes:
        recipe: sizes of batch, image and crop.
        train: images to learn from.
        test: images to be judged on, once, at the end of a run.
        validation: held out of the training images, if any.
        mean: of every pixel over the training images, on the device to train on.
        probe: a fixed part of the training images, their central crops, on the device.
        probe_labels: theirs.
        classes: how many.
        workers: processes that decode.
    """

    recipe: ImageRecipe
    train: ImageSplit
    test: ImageSplit
    validation: ImageSplit | None
    mean: Tensor
    probe: Tensor
    probe_labels: Tensor
    classes: int
    workers: int

    @property
    def samples(self) -> int:
        """Images to learn from."""
        return len(self.train.files)

    def source(self, recipe: ImageRecipe, *, seed: int, dtype: torch.dtype, share: Share) -> StreamedBatches:
        """The training batches of a run."""
        ranks = (share.rank, share.processes)
        return StreamedBatches(self.train, self.mean, recipe, seed=seed, workers=self.workers, dtype=dtype, share=ranks)

    def validation_batches(self, dtype: torch.dtype) -> Iterator[Batch] | None:
        """The held-out images, if any."""
        return None if self.validation is None else _whole(self.validation, self.mean, self.recipe, self.workers, dtype)

    def test_batches(self, dtype: torch.dtype) -> Iterator[Batch]:
        """The images that a run is judged on."""
        return _whole(self.test, self.mean, self.recipe, self.workers, dtype)


def streamed_material(
    recipe: ImageRecipe,
    dataset: FolderDataset,
    device: torch.device,
    *,
    workers: int,
    share: Share = ALONE,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> StreamedMaterial:
    """Split a folder of images and find the mean of its training part, in one pass over it that is remembered.

    ``tell`` is called during that pass, with the images that are done and those of all.

    Raises:
        ValueError: the validation split leaves a class without images, or an image cannot be read.
    """
    train, validation = dataset.folder.train, None
    if recipe.validation:
        kept, held_out = data.split_validation(dataset.train_labels, recipe.validation)
        train, validation = train.take(kept.tolist()), train.take(held_out.tolist())
    key = f"{dataset.checksums['classes']} {dataset.checksums['train']} without {recipe.validation}"
    mean = cached_mean_image(
        train, key, resize=recipe.resize, workers=workers, share=share, device=device, tell=tell
    ).to(device)
    watched = torch.randperm(len(train.files), generator=torch.Generator().manual_seed(0))[: recipe.probe_samples]
    batches = list(_whole(train.take(watched.tolist()), mean, recipe, workers, torch.float32))
    return StreamedMaterial(
        recipe=recipe,
        train=train,
        test=dataset.folder.val,
        validation=validation,
        mean=mean,
        probe=torch.cat([x for x, _ in batches]),
        probe_labels=torch.cat([labels for _, labels in batches]),
        classes=len(dataset.classes),
        workers=workers,
    )


def _whole(split: ImageSplit, mean: Tensor, recipe: ImageRecipe, workers: int, dtype: torch.dtype) -> Iterator[Batch]:
    """All images in their order, their central crops; the last batch may be smaller."""
    size = min(recipe.batch_size, len(split.files))
    for batch in evaluation_batches(split, size, workers=workers, resize=recipe.resize, crop=recipe.crop):
        here = ImageBatch(*(tensor.to(mean.device, non_blocking=True) for tensor in batch))
        yield _scaled(here, mean, dtype), here.labels


def _scaled(batch: ImageBatch, mean: Tensor, dtype: torch.dtype) -> Tensor:
    return subtract_mean(batch, mean).div_(SCALE).to(dtype)


def _empty(count: int, crop: int, device: torch.device) -> ImageBatch:
    images = torch.zeros(count, 3, crop, crop, dtype=torch.uint8, device=device)
    labels, crops = (torch.zeros(count, *shape, dtype=torch.int64, device=device) for shape in ((), (3,)))
    return ImageBatch(images.contiguous(memory_format=torch.channels_last), labels, crops)


def _copy(target: ImageBatch, source: ImageBatch) -> None:
    for to, tensor in zip(target, source, strict=True):
        to.copy_(tensor, non_blocking=True)
