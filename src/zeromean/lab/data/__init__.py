"""Data sets, checked byte for byte before use: digits (no download), MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100.

Folders of images, such as ImageNet's, are listed instead and read while a network trains.
"""

from zeromean.lab.data.augment import Batches as Batches
from zeromean.lab.data.augment import whole_batches as whole_batches
from zeromean.lab.data.catalog import Description as Description
from zeromean.lab.data.catalog import available as available
from zeromean.lab.data.catalog import describe as describe
from zeromean.lab.data.catalog import load as load
from zeromean.lab.data.dataset import Dataset as Dataset
from zeromean.lab.data.dataset import as_vectors as as_vectors
from zeromean.lab.data.dataset import split_validation as split_validation
from zeromean.lab.data.folder import data_root as data_root
from zeromean.lab.data.imagenet import FolderDataset as FolderDataset
from zeromean.lab.data.imagenet import describe_folders as describe_folders
from zeromean.lab.data.imagenet import is_folder as is_folder
from zeromean.lab.data.imagenet import load_folder as load_folder
from zeromean.lab.data.whiten import Images as Images
from zeromean.lab.data.whiten import prepare as prepare

AnyDataset = Dataset | FolderDataset


def load_any(name: str) -> AnyDataset:
    """A data set by its name, or a folder of images by its name or path: `load` or `load_folder`, with their errors."""
    return load_folder(name) if is_folder(name) else load(name)
