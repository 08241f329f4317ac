"""Which data sets there are, by name, and in what state each is on this machine."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zeromean.lab.data import cifar, digits, mnist
from zeromean.lab.data.cifar import CifarDataset
from zeromean.lab.data.dataset import Dataset
from zeromean.lab.data.folder import data_root
from zeromean.lab.data.idx import IdxFile, locate, read_idx
from zeromean.lab.data.mnist import IdxDataset
from zeromean.spelling import nearest

State = Literal["present", "absent", "damaged"]
_IDX = {published.name: published for published in (mnist.MNIST, mnist.FASHION_MNIST)}
_CIFAR = {published.name: published for published in (cifar.CIFAR10, cifar.CIFAR100)}


@dataclass(frozen=True)
class Description:
    """One line of ``zeromean data``.

    Attributes:
        name: The name given to `load`.
        train_count: Training images.
        test_count: Test images.
        image_shape: Channels, height, width.
        state: ``present`` means that every sum was checked just now.
        where: The folder, or the package it comes with.
        size: Bytes on disk; 0 for what comes with a package.
        detail: What the check found, and the remedy if any.
    """

    name: str
    train_count: int
    test_count: int
    image_shape: tuple[int, int, int]
    state: State
    where: str
    size: int
    detail: str


def available() -> tuple[str, ...]:
    """Return the names that `load` knows, the default first."""
    return (digits.NAME, *_IDX, *_CIFAR)


def load(name: str, root: str | os.PathLike[str] | None = None) -> Dataset:
    """Return a data set whose every byte was checked against a pinned SHA-256 sum, downloading it if absent.

    Files are looked for in ``<root>/MNIST/raw`` and ``<root>/FashionMNIST/raw``, plain or ``.gz``, and in
    ``<root>/cifar-10-batches-bin`` and ``<root>/cifar-100-binary``, their rows in any order.

    Args:
        name: ``digits``, ``mnist``, ``fashion-mnist``, ``cifar10`` or ``cifar100``.
        root: The folder of all data sets; see `data_root` for the default.

    Raises:
        ValueError: If the name is unknown, a file is not the official one, or it is absent and cannot be downloaded.
    """
    if name == digits.NAME:
        return digits.load_digits()
    if name in _IDX:
        return mnist.load_idx(_IDX[name], data_root(root))
    if name in _CIFAR:
        return cifar.load_cifar(_CIFAR[name], data_root(root))
    raise ValueError(f"unknown data set {name!r}: {nearest(name, available())}")


def describe(root: str | os.PathLike[str] | None = None) -> list[Description]:
    """Return the state of every data set, all sums checked; nothing is downloaded.

    Args:
        root: The folder of all data sets; see `data_root` for the default.
    """
    return [
        _describe_digits(),
        *(_describe_idx(published, data_root(root)) for published in _IDX.values()),
        *(_describe_cifar(published, data_root(root)) for published in _CIFAR.values()),
    ]


def _describe_digits() -> Description:
    state: State = "present"
    try:
        detail = f"checksums ok ({len(digits.load_digits().checksums)})"
    except ValueError as error:
        state, detail = "absent", str(error)
    test_count = digits.TEST_COUNT
    train_count = sum(digits.COUNTS) - test_count
    return Description(digits.NAME, train_count, test_count, (1, 8, 8), state, "scikit-learn", 0, detail)


def _describe_idx(published: IdxDataset, root: Path) -> Description:
    folder = root / published.folder
    found = {file: path for file in published.files if (path := locate(folder, file))}
    state, detail = _check_idx(published, found)
    train_count, height, width = published.files[0].shape
    return Description(
        name=published.name,
        train_count=train_count,
        test_count=published.files[2].shape[0],
        image_shape=(1, height, width),
        state=state,
        where=str(folder),
        size=sum(path.stat().st_size for path in found.values()),
        detail=detail,
    )


def _check_idx(published: IdxDataset, found: dict[IdxFile, Path]) -> tuple[State, str]:
    try:
        for file, path in found.items():
            read_idx(path, file)
    except (OSError, ValueError) as error:
        return "damaged", str(error)
    if len(found) < len(published.files):
        return "absent", f"{len(found)} of {len(published.files)} files; the rest is downloaded at first use"
    return "present", f"checksums ok ({len(found)})"


def _describe_cifar(published: CifarDataset, root: Path) -> Description:
    folder = root / published.folder
    state, detail = _check_cifar(published, root)
    return Description(
        name=published.name,
        train_count=published.train.count,
        test_count=published.test.count,
        image_shape=cifar.SHAPE,
        state=state,
        where=str(folder),
        size=sum((folder / file).stat().st_size for file in published.sizes if (folder / file).is_file()),
        detail=detail,
    )


def _check_cifar(published: CifarDataset, root: Path) -> tuple[State, str]:
    absent = cifar.absent_files(published, root)
    splits = [split for split in (published.train, published.test) if not set(split.files) & set(absent)]
    try:
        for split in splits:
            cifar.read_split(published, split, root)
    except (OSError, ValueError) as error:
        return "damaged", str(error)
    if absent:
        held = len(published.sizes) - len(absent)
        return "absent", f"{held} of {len(published.sizes)} files; the archive is downloaded at first use"
    return "present", f"checksums ok ({len(splits)})"
