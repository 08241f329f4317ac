"""What a recipe for images trains on, split as the stage needs it: images on the device, or streamed from the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from zeromean.lab import data
from zeromean.lab.data.augment import Batch, Batches, whole_batches
from zeromean.lab.data.imagenet import FolderDataset
from zeromean.lab.data.whiten import prepare
from zeromean.lab.observe import AT_ONCE
from zeromean.lab.recipes.images import ImageRecipe
from zeromean.lab.sharing import ALONE, Share
from zeromean.lab.streaming import StreamedMaterial, streamed_material


@dataclass(frozen=True, eq=False)
class Material:
    """Images ``[N, C, H, W]`` and labels ``[N]``.

    Attributes:
        train: to learn from.
        train_labels: theirs.
        probe: a fixed part of them, to be watched.
        probe_labels: theirs.
        test: read once, at the end of a run.
        test_labels: theirs.
        validation: held out of the training set, with their labels, if any.
        classes: how many.
    """

    train: Tensor
    train_labels: Tensor
    probe: Tensor
    probe_labels: Tensor
    test: Tensor
    test_labels: Tensor
    validation: tuple[Tensor, Tensor] | None
    classes: int

    @property
    def samples(self) -> int:
        """Images to learn from."""
        return len(self.train)

    def source(self, recipe: ImageRecipe, *, seed: int, dtype: torch.dtype, share: Share) -> Batches:
        """The training batches of a run."""
        return Batches(
            self.train, self.train_labels, recipe.batch_size, seed=seed, pad=recipe.pad, flip=recipe.flip,
            alternate_flip=recipe.alternate_flip, dtype=dtype, share=(share.rank, share.processes),
        )  # fmt: skip

    def validation_batches(self, dtype: torch.dtype) -> Iterator[Batch] | None:
        """The held-out images, if any."""
        return None if self.validation is None else whole_batches(*self.validation, AT_ONCE, dtype=dtype)

    def test_batches(self, dtype: torch.dtype) -> Iterator[Batch]:
        """The images that a run is judged on."""
        return whole_batches(self.test, self.test_labels, AT_ONCE, dtype=dtype)


AnyMaterial = Material | StreamedMaterial


def material(
    recipe: ImageRecipe,
    dataset: data.Dataset | FolderDataset,
    device: torch.device,
    *,
    workers: int = 0,
    share: Share = ALONE,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> AnyMaterial:
    """Split a data set, and normalise it by its training part.

    Args:
        recipe: says how.
        dataset: in memory, or in a folder.
        device: where to train.
        workers: processes that decode the images of a folder.
        share: this process's part of the pass over a folder that finds its mean image.
        tell: called during that pass with the images that are done and those of all.

    Raises:
        ValueError: the validation split leaves a class without images, or an image cannot be read.
    """
    if isinstance(dataset, FolderDataset):
        return streamed_material(recipe, dataset, device, workers=workers, share=share, tell=tell)
    return _resident(recipe, dataset, device)


def _resident(recipe: ImageRecipe, dataset: data.Dataset, device: torch.device) -> Material:
    assert recipe.normalization != "pixel-mean"
    kept, held_out = torch.arange(len(dataset.train_labels)), None
    if recipe.validation:
        kept, held_out = data.split_validation(dataset.train_labels, recipe.validation)
    images = prepare(dataset, recipe.normalization, kept=kept if recipe.validation else None, device=device)
    labels = dataset.train_labels.to(device)
    watched = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))[: recipe.probe_samples]]
    kept, watched = kept.to(device), watched.to(device)
    validation = None if held_out is None else (images.train[held_out.to(device)], labels[held_out.to(device)])
    return Material(
        train=images.train if held_out is None else images.train[kept],
        train_labels=labels if held_out is None else labels[kept],
        probe=images.train[watched],
        probe_labels=labels[watched],
        test=images.test,
        test_labels=dataset.test_labels.to(device),
        validation=validation,
        classes=len(dataset.classes),
    )
