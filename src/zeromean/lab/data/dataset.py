"""What a data set is here: images and labels as tensors, and the fixed, stratified way to hold some of them out."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels, with the sums of what they were read from.

    Attributes:
        name: The name given to `load`.
        train_images: Pixels as stored, uint8 in ``[0, pixel_max]``, shape ``[N, C, H, W]``, in the official order;
            for CIFAR in the order of the rows' sums, since copies differ in theirs.
        train_labels: Class indices, int64, shape ``[N]``.
        test_images: As ``train_images``; read it once per finished run.
        test_labels: As ``train_labels``.
        pixel_max: The value of a full pixel: 255, or 16 for digits.
        classes: The name of each class, by index.
        checksums: SHA-256 sums in hexadecimal, of the uncompressed files by name, or of each split (see `cifar`).
        source: Who published it, and which choices are ours.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    pixel_max: int
    classes: tuple[str, ...]
    checksums: dict[str, str]
    source: str


def as_vectors(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Return the training and the test images as flat vectors: ``pixel / pixel_max``, float32 in [0, 1].

    Args:
        dataset: A loaded data set.

    Returns:
        Two tensors of shape ``[N, C * H * W]``, on the device of the images.
    """
    train, test = (
        images.flatten(1).float().div_(dataset.pixel_max) for images in (dataset.train_images, dataset.test_images)
    )
    return train, test


def split_validation(labels: Tensor, count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hold out ``count`` samples, each class in proportion, the same ones for the same labels, count and seed.

    Each class gives ``count * n_class / N`` samples, rounded by largest remainder, lower class first in a tie. Which
    of a class are taken follows from the raw 64-bit stream of numpy's PCG64, which numpy promises never to change,
    so a split stays the same over versions and platforms. Only labels of the training set belong here.

    Args:
        labels: Class indices, int64, shape ``[N]``.
        count: How many samples to hold out.
        seed: Another seed is another split. The default 0 is what every recipe uses, so that arms share a split.

    Returns:
        The indices to train on and the indices held out: int64, ascending, disjoint, together all of them.

    Raises:
        ValueError: If ``count`` leaves a class without a sample on either side.
    """
    classes = labels.cpu().numpy()
    sizes = np.bincount(classes)
    quotas = _proportional(sizes, count)
    if np.any((quotas < 1) | (quotas >= sizes)):
        raise ValueError(
            f"count must leave every class on both sides of the split, got {count} of {len(classes)} samples in "
            f"{len(sizes)} classes, the smallest of {sizes.min()}: choose a count nearer to half of the samples"
        )
    order = np.argsort(np.random.PCG64(seed).random_raw(len(classes)), kind="stable")
    by_class = order[np.argsort(classes[order], kind="stable")]
    place = np.arange(len(classes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    held_out = np.zeros(len(classes), dtype=bool)
    held_out[by_class[place < np.repeat(quotas, sizes)]] = True
    return torch.from_numpy(np.flatnonzero(~held_out)), torch.from_numpy(np.flatnonzero(held_out))


def _proportional(sizes: np.ndarray, count: int) -> np.ndarray:
    quotas, remainders = np.divmod(sizes * count, sizes.sum())
    largest_first = np.argsort(-remainders, kind="stable")
    quotas[largest_first[: count - quotas.sum()]] += 1
    return quotas


def assert_class_counts(labels: Tensor, counts: tuple[int, ...]) -> None:
    """Assert that each class occurs as often as published: content whose sum is right cannot fail this."""
    found = tuple(torch.bincount(labels, minlength=len(counts)).tolist())
    assert found == counts, f"class counts {found} are not the published {counts}"
