"""CIFAR-10 and CIFAR-100, from their official binary files (Krizhevsky 2009, "Learning multiple layers of features").

A row is one label byte (CIFAR-10) or a coarse and a fine one (CIFAR-100), then 3072 pixels: 32 by 32 of red, of green,
of blue. Copies of these files exist with the same rows in another order, so a split is held to a sum that does not
depend on it: SHA-256 over the sorted SHA-256 sums of its rows. The rows are then used in the order of their own sums,
which is our choice, so that a training run does not depend on the order on the disk either.
"""

import hashlib
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zeromean.lab.data.dataset import Dataset, assert_class_counts
from zeromean.lab.data.download import download
from zeromean.lab.data.folder import VARIABLE
from zeromean.lab.store import write_whole

SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_FINE_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


@dataclass(frozen=True)
class CifarSplit:
    """The files of the training or of the test images.

    Attributes:
        files: Their names.
        rows: Rows of each file.
        sha256: The sum of the sorted sums of the rows of all files.
    """

    files: tuple[str, ...]
    rows: int
    sha256: str

    @property
    def count(self) -> int:
        """Rows of all files."""
        return self.rows * len(self.files)


@dataclass(frozen=True)
class CifarDataset:
    """A data set published in CIFAR's binary layout.

    Attributes:
        name: The name given to `load`.
        folder: Where the files lie below the data root, and in the archive.
        train: The training split.
        test: The test split.
        label_bytes: Bytes before the pixels; the last one is the class.
        archive: The official archive.
        archive_md5: Its published MD5 sum.
        addresses: URLs ending in a slash that hold the archive.
        classes: The name of each class, by index.
        source: Who published it.
    """

    name: str
    folder: str
    train: CifarSplit
    test: CifarSplit
    label_bytes: int
    archive: str
    archive_md5: str
    addresses: tuple[str, ...]
    classes: tuple[str, ...]
    source: str

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.label_bytes + _PIXELS

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by name."""
        return {file: split.rows * self.row_bytes for split in (self.train, self.test) for file in split.files}


CIFAR10 = CifarDataset(
    name="cifar10",
    folder="cifar-10-batches-bin",
    train=CifarSplit(
        files=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        rows=10_000,
        sha256="55a61f79a40ece2ceda9fb5f9f7078f6ea2fc4952489cef56682bcf92cfcc260",
    ),
    test=CifarSplit(
        files=("test_batch.bin",),
        rows=10_000,
        sha256="325704b01eb92e1e2a6215ae6a916bb7db7de054af0c496be1c7be2e0fcfbf5f",
    ),
    label_bytes=1,
    archive="cifar-10-binary.tar.gz",
    archive_md5="c32a1d4ab5d03f1284b67883e8d87530",
    addresses=("https://www.cs.toronto.edu/~kriz/",),
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    source="Krizhevsky 2009: CIFAR-10, official images and split; row order zeromean's own",
)

CIFAR100 = CifarDataset(
    name="cifar100",
    folder="cifar-100-binary",
    train=CifarSplit(
        files=("train.bin",),
        rows=50_000,
        sha256="7077d87fc363f92dbf1245f13ba80561d7b33a96c79ad57168d49dc172aaa92b",
    ),
    test=CifarSplit(
        files=("test.bin",),
        rows=10_000,
        sha256="96adb3db8da7632dbb350559a17b9f585fab5b17675de5fc8f6761384196b294",
    ),
    label_bytes=2,
    archive="cifar-100-binary.tar.gz",
    archive_md5="03b5dce01913d631647c71ecec9e9cb8",
    addresses=("https://www.cs.toronto.edu/~kriz/",),
    classes=tuple(_FINE_CLASSES.split()),
    source="Krizhevsky 2009: CIFAR-100, official images, split and fine labels; row order zeromean's own",
)


def load_cifar(published: CifarDataset, root: Path) -> Dataset:
    """Read the files below ``root``, unpacking or downloading the official archive if one is absent.

    Images come in the order of the SHA-256 sums of their rows, whatever the order in the files.

    Args:
        published: Which data set.
        root: The folder of all data sets; the archive lies there too.

    Raises:
        ValueError: If the content is not the official one, or it is absent and cannot be downloaded.
    """
    if absent := absent_files(published, root):
        _unpack(published, _fetch(published, absent, root), root)
    train_images, train_labels = read_split(published, published.train, root)
    test_images, test_labels = read_split(published, published.test, root)
    dataset = Dataset(
        name=published.name,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        pixel_max=255,
        classes=published.classes,
        checksums={"train": published.train.sha256, "test": published.test.sha256},
        source=published.source,
    )
    classes = len(published.classes)
    assert_class_counts(train_labels, (published.train.count // classes,) * classes)
    assert_class_counts(test_labels, (published.test.count // classes,) * classes)
    return dataset


def absent_files(published: CifarDataset, root: Path) -> list[str]:
    """The names of the files that are not there."""
    return [file for file in published.sizes if not (root / published.folder / file).is_file()]


def read_split(published: CifarDataset, split: CifarSplit, root: Path) -> tuple[Tensor, Tensor]:
    """Return the images, uint8 ``[N, 3, 32, 32]``, and the classes, int64 ``[N]``, of a split, its sum checked.

    Args:
        published: Which data set.
        split: Which of its splits.
        root: The folder of all data sets.

    Raises:
        ValueError: If a file has another size, or the rows are not the official ones.
    """
    folder = root / published.folder
    remedy = f"Delete {folder} and run again: it is then made anew from the official archive."
    parts = [_read_exactly(folder / file, published.sizes[file], remedy) for file in split.files]
    rows = np.frombuffer(b"".join(parts), dtype=np.uint8).reshape(split.count, published.row_bytes)
    sums = row_sums(rows)
    order = sorted(range(split.count), key=sums.__getitem__)
    found = hashlib.sha256(b"".join(sums[index] for index in order)).hexdigest()
    if found != split.sha256:
        raise ValueError(
            f"{', '.join(split.files)} of {folder} are damaged or another data set: expected the SHA-256 sum "
            f"{split.sha256} over the sorted sums of their rows, found {found}. {remedy}"
        )
    rows = rows[order]
    images = np.ascontiguousarray(rows[:, published.label_bytes :]).reshape(-1, *SHAPE)
    return torch.from_numpy(images), torch.from_numpy(rows[:, published.label_bytes - 1].astype(np.int64))


def row_sums(rows: np.ndarray) -> list[bytes]:
    """The SHA-256 sum of every row of a uint8 matrix."""
    return [hashlib.sha256(row).digest() for row in np.ascontiguousarray(rows)]


def _read_exactly(path: Path, size: int, remedy: str) -> bytes:
    with path.open("rb") as stream:
        content = stream.read(size + 1)
    if len(content) != size:
        found = "more" if len(content) > size else f"{len(content)}"
        raise ValueError(f"{path} must hold the {size} bytes of the official file, got {found}. {remedy}")
    return content


def _fetch(published: CifarDataset, absent: list[str], root: Path) -> Path:
    try:
        return download(published.archive, published.archive_md5, published.addresses, root)
    except ConnectionError as error:
        held = (root / published.archive).is_file()
        found = f", whose MD5 sum in {root} is not {published.archive_md5}," if held else ""
        raise ValueError(
            f"{published.name} needs {', '.join(absent)}, not in {root / published.folder}, and {published.archive}"
            f"{found} could not be downloaded. Either put the official files there, or the official archive into "
            f"{root}, or set {VARIABLE} to the folder that holds {published.folder}; or connect to the network and run "
            f"again. The data set 'digits' needs neither. Tried {error}"
        ) from error


def _unpack(published: CifarDataset, archive: Path, root: Path) -> None:
    """Write the data files, and nothing else of the archive, under names that are ours and not the archive's."""
    for file, content in _contents(published, archive):
        write_whole(root / published.folder / file, content)


def _contents(published: CifarDataset, archive: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(archive, "r:gz") as opened:
            members = {member.name: member for member in opened}
            for file, size in published.sizes.items():
                yield file, _extract(opened, members, f"{published.folder}/{file}", size)
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as error:
        remedy = f"Delete {archive} and run again: it is then downloaded anew."
        raise ValueError(f"{archive} is not the official archive: {error}. {remedy}") from error


def _extract(opened: tarfile.TarFile, members: dict[str, tarfile.TarInfo], name: str, size: int) -> bytes:
    member = members.get(name)
    if member is None or not member.isreg() or member.size != size:
        found = "none" if member is None else f"one of type {member.type!r} and {member.size} bytes"
        raise ValueError(f"it must hold a regular file {name} of {size} bytes, got {found}")
    stream = opened.extractfile(member)
    assert stream is not None
    return stream.read()
