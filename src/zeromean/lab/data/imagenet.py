"""ImageNet, Tiny ImageNet and any other folder of images as a data set whose images stay on the disk.

Nothing is downloaded: ImageNet's licence asks every user to fetch it. A folder is summed over class names, file names
and sizes in bytes, not over contents: to read 1.3 million files before every study would take longer than an epoch. So
a study notices files that came, went or changed their length, and no others.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zeromean.lab.data.catalog import Description
from zeromean.lab.data.folder import VARIABLE, data_root, expanded
from zeromean.lab.data.images import ImageFolder, ImageSplit, mean_image, read_image_folder
from zeromean.lab.data.kept import keep, recall
from zeromean.lab.sharing import ALONE, Share

_READ = 100
_SOURCE = "images in folders, summed over class names, file names and sizes, not over contents"


@dataclass(frozen=True)
class Published:
    """A data set that is published as a folder of images.

    Attributes:
        name: The name given to `load_folder`.
        folder: Under the data root.
        train_count: Training images.
        val_count: Validation images.
        side: Pixels along a side that a recipe reads them at.
    """

    name: str
    folder: str
    train_count: int
    val_count: int
    side: int


IMAGENET = Published("imagenet", "imagenet", 1_281_167, 50_000, 256)
TINY_IMAGENET = Published("tiny-imagenet", "tiny-imagenet-200", 100_000, 10_000, 64)
FOLDERS = {published.name: published for published in (IMAGENET, TINY_IMAGENET)}


@dataclass(frozen=True, eq=False)
class FolderDataset:
    """What a folder of images holds; the attributes that a `Dataset` has too mean the same.

    Attributes:
        name: The name given to `load_folder`.
        folder: Classes and files.
        train_labels: int64 ``[N]``.
        test_labels: Those of the folder's ``val`` part, which serves as the test set: read it once per finished run.
        checksums: SHA-256 sums of the class names and of each part's listing (see `ImageSplit.checksum`).
        source: What was summed.
    """

    name: str
    folder: ImageFolder
    train_labels: Tensor
    test_labels: Tensor
    checksums: dict[str, str]
    source: str = _SOURCE

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each class, by index."""
        return self.folder.classes


def is_folder(name: str) -> bool:
    """Whether a data set's name is that of a folder of images: ``imagenet``, ``tiny-imagenet`` or a path."""
    return name in FOLDERS or "/" in name


def load_folder(name: str, root: str | os.PathLike[str] | None = None) -> FolderDataset:
    """List a folder of images.

    Args:
        name: ``imagenet`` (in ``<root>/imagenet``), ``tiny-imagenet`` (in ``<root>/tiny-imagenet-200``), or the path
            of a folder, with a ``/`` in it.
        root: The folder of all data sets; see `data_root` for the default.

    Raises:
        ValueError: If the folder is absent, or is not laid out as `read_image_folder` asks.
    """
    path = _place(name, root)
    if absent := [part for part in ("train", "val") if not (path / part).is_dir()]:
        raise ValueError(
            f"{path} must hold the folders train and val of {name}, got no {' and no '.join(absent)}: it is not "
            f"downloaded, so unpack it there, set {VARIABLE} to the folder that holds {path.name}, or name any folder "
            "of images by its path, as data=/data/photos"
        )
    folder = read_image_folder(path)
    sums = {
        "classes": hashlib.sha256(os.fsencode("\n".join(folder.classes))).hexdigest(),
        "train": folder.train.checksum(),
        "val": folder.val.checksum(),
    }
    return FolderDataset(name, folder, torch.tensor(folder.train.labels), torch.tensor(folder.val.labels), sums)


def describe_folders(root: str | os.PathLike[str] | None = None) -> list[Description]:
    """Return the state of every published folder; one that is there is listed, which takes seconds."""
    return [_describe(published, root) for published in FOLDERS.values()]


def _describe(published: Published, root: str | os.PathLike[str] | None) -> Description:
    path = _place(published.name, root)
    counts, shape = (published.train_count, published.val_count), (3, published.side, published.side)
    if not path.is_dir():
        return Description(published.name, *counts, shape, "absent", str(path), 0, "not downloaded: unpack it there")
    try:
        folder = read_image_folder(path)
    except (OSError, ValueError) as error:
        return Description(published.name, *counts, shape, "damaged", str(path), 0, str(error))
    found = len(folder.train.files), len(folder.val.files)
    detail = "listed; contents are not checked" if found == counts else f"published are {counts[0]} and {counts[1]}"
    return Description(published.name, *found, shape, "present", str(path), 0, detail)


def _place(name: str, root: str | os.PathLike[str] | None) -> Path:
    return data_root(root) / FOLDERS[name].folder if name in FOLDERS else expanded(name)


def cached_mean_image(
    split: ImageSplit,
    key: str,
    *,
    resize: int,
    workers: int,
    share: Share = ALONE,
    device: torch.device | str = "cpu",
    root: str | os.PathLike[str] | None = None,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Tensor:
    """Return `mean_image`, kept in ``<root>/cache`` for the next time, since it reads every image once.

    It is found again by the key, the side and the contents of a hundred images: other images may have the same names
    and sizes, as those of BMP files often are.

    Args:
        split: The training images.
        key: Sums up their names and sizes.
        resize: Side of the square that an image becomes.
        workers: Processes that read.
        share: Each of several processes reads its part.
        device: Where several processes exchange their sums.
        root: The folder of all data sets; see `data_root` for the default.
        tell: Hears of the images read, as in `mean_image`; never called where the mean is found in the cache.
    """
    named = hashlib.sha256(f"3 {key} {resize} {_contents(split)}".encode()).hexdigest()
    file = data_root(root) / "cache" / f"mean-image-{named[:32]}.safetensors"
    found = recall(file, named, ("mean",), "the mean image")
    if share.first(None if found else "absent") is None and found:
        return found[0]
    mean = mean_image(split, workers=workers, resize=resize, share=share, device=device, tell=tell)
    if share.writes:
        keep(file, named, {"mean": mean}, "the mean image")
    return mean


def _contents(split: ImageSplit) -> str:
    """The SHA-256 sum over images at even distances."""
    found = hashlib.sha256()
    for file in split.files[:: -(-len(split.files) // _READ)]:
        found.update(file.read_bytes())
    return found.hexdigest()
