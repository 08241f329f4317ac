"""MNIST and Fashion-MNIST, from their four official idx files each.

MNIST: LeCun, Bottou, Bengio, Haffner 1998, "Gradient-based learning applied to document recognition".
Fashion-MNIST: Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747, which took over MNIST's sizes and file names.
Both have 60,000 training and 10,000 test images of 28 by 28 grey pixels in ten classes.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from zeromean.lab.data.dataset import Dataset, assert_class_counts
from zeromean.lab.data.download import download
from zeromean.lab.data.folder import VARIABLE
from zeromean.lab.data.idx import IdxFile, locate, read_idx


@dataclass(frozen=True)
class IdxDataset:
    """A data set published as four idx files.

    Attributes:
        name: The name given to `load`.
        folder: Where the files lie below the data root.
        files: Training images, training labels, test images, test labels.
        addresses: URLs ending in a slash that hold each file with ``.gz`` appended.
        classes: The name of each class, by index.
        train_counts: Training images of each class.
        test_counts: Test images of each class.
        source: Who published it.
    """

    name: str
    folder: str
    files: tuple[IdxFile, IdxFile, IdxFile, IdxFile]
    addresses: tuple[str, ...]
    classes: tuple[str, ...]
    train_counts: tuple[int, ...]
    test_counts: tuple[int, ...]
    source: str


MNIST = IdxDataset(
    name="mnist",
    folder="MNIST/raw",
    files=(
        IdxFile(
            name="train-images-idx3-ubyte",
            shape=(60_000, 28, 28),
            sha256="ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            gz_md5="f68b3c2dcbeaaa9fbdd348bbdeb94873",
        ),
        IdxFile(
            name="train-labels-idx1-ubyte",
            shape=(60_000,),
            sha256="65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            gz_md5="d53e105ee54ea40749a09fcbcd1e9432",
        ),
        IdxFile(
            name="t10k-images-idx3-ubyte",
            shape=(10_000, 28, 28),
            sha256="0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            gz_md5="9fb629c4189551a2d022fa330f9573f3",
        ),
        IdxFile(
            name="t10k-labels-idx1-ubyte",
            shape=(10_000,),
            sha256="ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            gz_md5="ec29112dd5afa0611ce80d1b7f02629c",
        ),
    ),
    addresses=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    classes=tuple("0123456789"),
    train_counts=(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
    test_counts=(980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),
    source="LeCun, Cortes, Burges: the MNIST database of handwritten digits, official files and split",
)

FASHION_MNIST = IdxDataset(
    name="fashion-mnist",
    folder="FashionMNIST/raw",
    files=(
        IdxFile(
            name="train-images-idx3-ubyte",
            shape=(60_000, 28, 28),
            sha256="c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            gz_md5="8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        ),
        IdxFile(
            name="train-labels-idx1-ubyte",
            shape=(60_000,),
            sha256="bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            gz_md5="25c81989df183df01b3e8a0aad5dffbe",
        ),
        IdxFile(
            name="t10k-images-idx3-ubyte",
            shape=(10_000, 28, 28),
            sha256="5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            gz_md5="bef4ecab320f06d8554ea6380940ec79",
        ),
        IdxFile(
            name="t10k-labels-idx1-ubyte",
            shape=(10_000,),
            sha256="0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            gz_md5="bb300cfdad3c16e7a12a480ee83cd310",
        ),
    ),
    addresses=(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    ),
    classes=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    train_counts=(6000,) * 10,
    test_counts=(1000,) * 10,
    source="Xiao, Rasul, Vollgraf 2017: Fashion-MNIST, arXiv 1708.07747, official files and split",
)


def load_idx(published: IdxDataset, root: Path) -> Dataset:
    """Read the four files below ``root``, downloading what is absent.

    Args:
        published: Which data set.
        root: The folder of all data sets.

    Raises:
        ValueError: If a file is not the official one, or is absent and cannot be downloaded.
    """
    train_images, train_labels, test_images, test_labels = (_read(published, file, root) for file in published.files)
    dataset = Dataset(
        name=published.name,
        train_images=train_images.unsqueeze(1),
        train_labels=train_labels.long(),
        test_images=test_images.unsqueeze(1),
        test_labels=test_labels.long(),
        pixel_max=255,
        classes=published.classes,
        checksums={file.name: file.sha256 for file in published.files},
        source=published.source,
    )
    assert_class_counts(dataset.train_labels, published.train_counts)
    assert_class_counts(dataset.test_labels, published.test_counts)
    return dataset


def _read(published: IdxDataset, file: IdxFile, root: Path) -> Tensor:
    folder = root / published.folder
    return read_idx(locate(folder, file) or _fetch(published, file, folder), file)


def _fetch(published: IdxDataset, file: IdxFile, folder: Path) -> Path:
    try:
        return download(f"{file.name}.gz", file.gz_md5, published.addresses, folder)
    except ConnectionError as error:
        raise ValueError(
            f"{published.name} needs {file.name}, which is not in {folder} and could not be downloaded. Either put the "
            f"four official files there, plain or .gz, or set {VARIABLE} to the folder that holds {published.folder}; "
            f"or connect to the network and run again. The data set 'digits' needs neither. Tried {error}"
        ) from error
