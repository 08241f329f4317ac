"""Images in folders, such as ImageNet's, read by worker processes: ``train/<class>/*.jpeg`` and ``val/<class>/*``.

Tiny ImageNet is recognised by its ``val/val_annotations.txt``: its validation images lie together in ``val/images``,
their classes in that file, and its training images in ``train/<class>/images``. An image at any other place under
``train`` or ``val`` is refused, as is one of a format that is not read.

The central square of every image is resized to ``resize`` by ``resize`` pixels (bilinear, antialiased). Training takes
a random ``crop`` by ``crop`` part of it, half of them mirrored, evaluation the central one. Clevert et al. 2016,
section 4.4, say no more than "re-sized to 256x256 pixels" and "per-pixel mean subtracted"; a square cut out rather than
squeezed, and the filter, are our choices. All draws are made before a worker sees them, as functions of seed, epoch and
position alone, so batches do not depend on the number of workers.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Never

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from zeromean.lab.data.augment import draw_crops, part_of_batch
from zeromean.lab.data.folder import expanded
from zeromean.lab.order import sample_order
from zeromean.lab.sharing import ALONE, Share

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_UNREAD = (
    *(".apng", ".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl"),
    *(".pbm", ".pgm", ".pnm", ".ppm", ".tga", ".tif", ".tiff"),
)


@dataclass(frozen=True)
class ImageSplit:
    """The files of a split, sorted by class and name, and the class index of each."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]

    @cached_property
    def paths(self) -> np.ndarray:
        """The files' names as one array, which forked workers share: reading a Python object would copy its page."""
        return np.array([os.fsencode(file) for file in self.files])

    def take(self, indices: Sequence[int]) -> "ImageSplit":
        """Return those images alone."""
        return ImageSplit(tuple(self.files[i] for i in indices), tuple(self.labels[i] for i in indices))

    def checksum(self) -> str:
        """Return the SHA-256 sum over the images' classes, names and sizes in bytes; contents are not read."""
        found = hashlib.sha256()
        for file, label in zip(self.files, self.labels, strict=True):
            found.update(os.fsencode(f"{label}\t{file.name}\t{file.stat().st_size}\n"))
        return found.hexdigest()


@dataclass(frozen=True)
class ImageFolder:
    """The names of the classes by index, sorted, and the training and validation images."""

    classes: tuple[str, ...]
    train: ImageSplit
    val: ImageSplit


class ImageBatch(NamedTuple):
    """A batch on the CPU.

    Attributes:
        images: uint8 ``[B, 3, crop, crop]``, channels_last.
        labels: int64 ``[B]``.
        crops: Upper edge, left edge and whether flipped (0 or 1), int64 ``[B, 3]``, for `subtract_mean`.
    """

    images: Tensor
    labels: Tensor
    crops: Tensor


def read_image_folder(root: str | os.PathLike[str]) -> ImageFolder:
    """List the images of ``<root>/train`` and ``<root>/val``: what ends in one of ``SUFFIXES``, in either case.

    Args:
        root: The folder of the data set.

    Raises:
        ValueError: If a folder is absent, a class has no image or is a link that leads nowhere, training and validation
            have other classes, an image lies where it would be left out, or one is of another format; files that are
            no images may lie anywhere.
    """
    folder = expanded(root)
    train, val = _by_class(folder / "train"), _validation(folder / "val")
    if differing := sorted(train.keys() ^ val.keys()):
        listed = ", ".join(f"{name} (only in {'train' if name in train else 'val'})" for name in differing[:5])
        raise ValueError(
            f"train and val of {folder} must have the same classes, got {len(differing)} in one alone: {listed}. "
            "Every class needs its folder in both"
        )
    return ImageFolder(tuple(train), _split(train), _split(val))


def _split(by_class: dict[str, list[Path]]) -> ImageSplit:
    files = tuple(file for files in by_class.values() for file in files)
    return ImageSplit(files, tuple(index for index, files in enumerate(by_class.values()) for _ in files))


def _validation(folder: Path) -> dict[str, list[Path]]:
    annotations = folder / "val_annotations.txt"
    known = (folder / "images").is_dir() and annotations.is_file()
    return _annotated(folder, annotations) if known else _by_class(folder)


def _by_class(folder: Path) -> dict[str, list[Path]]:
    _, names, files = next(os.walk(folder, onerror=_stop)) if folder.is_dir() else ("", [], [])
    if loose := _images_among(files, folder):
        raise ValueError(
            f"{folder} must hold a folder of images for each class, got {len(loose):,} directly in it, such as "
            f"{loose[0]}: move each into the folder of its class"
        )
    if lost := sorted(name for name in files if not (folder / name).exists()):
        raise ValueError(
            f"every link in {folder} must lead to the images of a class, got {len(lost):,} that leads nowhere, such as "
            f"{lost[0]}: mount or restore what it leads to, or delete it"
        )
    if not names:
        raise ValueError(f"{folder} must hold a folder of images for each class, got none: see its data set's layout")
    by_class = {
        name: _images_in(folder / name, (".", "images"), "move them to one of these places, or out of the folder")
        for name in sorted(names)
    }
    if empty := [name for name, files in by_class.items() if not files]:
        raise ValueError(
            f"every class of {folder} must have an image ending in {', '.join(SUFFIXES)}, got none in "
            f"{', '.join(empty[:5])} ({len(empty)} of {len(names)} classes): add images or delete the folder"
        )
    return by_class


def _images_in(folder: Path, places: tuple[str, ...], remedy: str) -> list[Path]:
    """The images under a folder in the order of their names; all must lie in one of those places, ``.`` is itself."""
    found = {
        os.path.relpath(path, folder): images
        for path, _, names in os.walk(folder, onerror=_stop, followlinks=True)
        if (images := _images_among(names, path))
    }
    if len(found) > 1 or not found.keys() <= set(places):
        listed = [f"{len(found[place]):,} {_where(place)}" for place in sorted(found)]
        raise ValueError(
            f"{folder} must hold its images {' or '.join(f'all {_where(place)}' for place in places)}, got "
            f"{', '.join(listed[:4])}{' and others' if len(listed) > 4 else ''}: {remedy}"
        )
    return [folder / place / name for place, names in found.items() for name in names]


def _where(place: str) -> str:
    return "directly in it" if place == "." else f"in {place}"


def _images_among(names: list[str], folder: str | Path) -> list[str]:
    suffixes = {name: os.path.splitext(name)[1].lower() for name in names}
    if unread := sorted(name for name, suffix in suffixes.items() if suffix in _UNREAD):
        raise ValueError(
            f"the images of {folder} must end in {', '.join(SUFFIXES)}, got {len(unread):,} of another format, such as "
            f"{unread[0]}: convert them or take them out"
        )
    return sorted(name for name, suffix in suffixes.items() if suffix in SUFFIXES)


def _stop(error: OSError) -> Never:
    raise error


def _annotated(folder: Path, annotations: Path) -> dict[str, list[Path]]:
    classes = _annotations(annotations)
    remedy = f"move them there, or delete {annotations.name} where every class has a folder"
    files = {file.name: file for file in _images_in(folder, ("images",), remedy)}
    if differing := sorted(files.keys() ^ classes.keys()):
        raise ValueError(
            f"{annotations} must name every image of {folder / 'images'} and no other, got {len(differing)} in one of "
            f"them alone, such as {differing[0]}: unpack the data set again"
        )
    by_class: dict[str, list[Path]] = {name: [] for name in sorted(set(classes.values()))}
    for name in sorted(files):
        by_class[classes[name]].append(files[name])
    return by_class


def _annotations(file: Path) -> dict[str, str]:
    """The class of each file name; lines without any are left out, as is a byte order mark."""
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} must be text in UTF-8, got byte 0x{error.object[error.start]:02x} at position {error.start}: "
            "save it as UTF-8, or unpack the data set again"
        ) from error
    classes: dict[str, str] = {}
    for line in filter(str.strip, lines):
        name, _, rest = line.partition("\t")
        label = rest.partition("\t")[0]
        if not name or not label:
            raise ValueError(f"each line of {file} must be a file name, a tab and a class, got {line!r}")
        if classes.setdefault(name, label) != label:
            raise ValueError(
                f"{file} must give every image one class, got {classes[name]} and {label} for {name}: delete the line "
                "that is wrong"
            )
    return classes


def training_batches(
    split: ImageSplit,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    workers: int,
    resize: int = 256,
    crop: int = 224,
    flip: bool = True,
    first: int = 0,
    share: tuple[int, int] = (0, 1),
) -> Iterator[ImageBatch]:
    """Yield the batches of an epoch: shuffled, randomly cropped and flipped; a last part of a batch is left out.

    Args:
        split: The training images.
        batch_size: Samples of a step, those of all processes together.
        seed: Fixes, with the epoch, order, crops and flips; below 2^16.
        epoch: Every epoch has its own.
        workers: Processes that read; 0 reads in this one. The batches are the same.
        resize: Side of the square that an image becomes.
        crop: Side of the part that is taken of it.
        flip: Whether each image is mirrored left to right with probability 1/2.
        first: Batches of the epoch that are left out at its beginning.
        share: (rank, processes): this process takes the rank-th of so many equal parts of every batch.

    Raises:
        ValueError: If ``batch_size`` exceeds the images or is no multiple of the processes, ``crop`` exceeds
            ``resize``, or an image cannot be read.
    """
    part = part_of_batch(batch_size, len(split.files), share)
    kept = len(split.files) // batch_size * batch_size
    seed_tensor = torch.tensor(seed)
    order = sample_order(seed_tensor.view(1), epoch, len(split.files))[0, :kept]
    top, left, flipped = draw_crops(seed_tensor, epoch, kept, _places(resize, crop))
    plan = torch.stack([order, top, left, flipped * flip], dim=1).view(-1, batch_size, 4)[first:, part]
    return _batches(split, list(plan), resize, crop, workers)


def evaluation_batches(
    split: ImageSplit, batch_size: int, *, workers: int, resize: int = 256, crop: int = 224
) -> Iterator[ImageBatch]:
    """Yield all images in their order, their central crop; the last batch may be smaller.

    Arguments and errors are those of `training_batches`.
    """
    count, edge = len(split.files), (_places(resize, crop) - 1) // 2
    plan = torch.stack([torch.arange(count), *torch.tensor([edge, edge, 0]).view(3, 1).expand(3, count)], dim=1)
    return _batches(split, list(plan.split(batch_size)), resize, crop, workers)


def mean_image(
    split: ImageSplit,
    *,
    workers: int,
    resize: int = 256,
    share: Share = ALONE,
    device: torch.device | str = "cpu",
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Tensor:
    """Return the mean of every pixel over the images, float32 ``[3, resize, resize]``; sums are exact.

    Args:
        split: The training images.
        workers: Processes that read.
        resize: Side of the square that an image becomes.
        share: Every process reads an equal part of the images, and all return the same.
        device: Where several processes exchange their sums.
        tell: Hears after every batch how many images this process has read, and of how many.

    Raises:
        ValueError: If an image cannot be read.
    """
    total = torch.zeros(3, resize, resize, dtype=torch.int64)
    own = split.take(range(share.rank, len(split.files), share.processes))
    done = 0
    for batch in evaluation_batches(own, 64, workers=workers, resize=resize, crop=resize):
        total += batch.images.sum(0)
        done += len(batch.images)
        tell(done, len(own.files))
    if share.processes > 1:
        total = share.begin_sum([total.to(device)])()[0].cpu()
    return (total.double() / len(split.files)).float()


def subtract_mean(batch: ImageBatch, mean: Tensor) -> Tensor:
    """Return a batch less the part of the mean image under each crop, mirrored where the crop is.

    Args:
        batch: On any device.
        mean: float32 ``[3, resize, resize]``, on the same device; see `mean_image`.

    Returns:
        float32 ``[B, 3, crop, crop]``, channels_last.
    """
    top, left, flipped = batch.crops.unsqueeze(2).unbind(1)
    steps = torch.arange(batch.images.shape[2], device=mean.device)
    columns = left + torch.where(flipped > 0, steps.flip(0), steps)
    under_bhwc = mean.permute(1, 2, 0)[(top + steps).unsqueeze(2), columns.unsqueeze(1)]
    return batch.images - under_bhwc.permute(0, 3, 1, 2)


def _places(resize: int, crop: int) -> int:
    if not 1 <= crop <= resize:
        raise ValueError(f"crop must lie in [1, {resize}], got {crop}: an image is resized to {resize}")
    return resize - crop + 1


def _batches(split: ImageSplit, plan: list[Tensor], resize: int, crop: int, workers: int) -> Iterator[ImageBatch]:
    loader = DataLoader(
        _Crops(split.paths, resize, crop),
        batch_sampler=map(Tensor.tolist, plan),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
    labels = torch.tensor(split.labels)
    try:
        for part, images_bhwc in zip(plan, loader, strict=True):
            yield ImageBatch(images_bhwc.permute(0, 3, 1, 2), labels[part[:, 0]], part[:, 1:])
    except ValueError as error:  # a worker's ends in what it raised, behind its traceback
        raise ValueError(str(error).rstrip().rpartition("\nValueError: ")[2]) from error


class _Crops(TorchDataset[Tensor]):
    """Cuts what it is told to, so that nothing is drawn in a worker."""

    def __init__(self, paths: np.ndarray, resize: int, crop: int) -> None:
        self.paths, self.resize, self.crop = paths, resize, crop

    def __getitem__(self, place: list[int]) -> Tensor:
        index, top, left, flipped = place
        pixels = _square(os.fsdecode(self.paths[index]), self.resize)[top : top + self.crop, left : left + self.crop]
        return torch.from_numpy(np.ascontiguousarray(pixels[:, ::-1] if flipped else pixels))


def _square(path: str, resize: int) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = (_eight_bits(opened) if opened.mode[0] in "IF" else opened).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}): restore it or take it out") from error
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.array(image.resize((resize, resize), Image.Resampling.BILINEAR, box=box))


def _eight_bits(opened: "Image.Image") -> "Image.Image":
    """The upper half of 16 bits of grey, which is what pillow reads of 16 bits of a colour; `convert` would clip."""
    from PIL import Image

    values = np.asarray(opened)
    if opened.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(f"grey must be whole numbers in [0, 65535], got {values.min():g} to {values.max():g}")
    return Image.fromarray((values >> 8).astype(np.uint8))
