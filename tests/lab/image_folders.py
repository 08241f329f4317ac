"""Folders of tiny images on the disk, in ImageNet's layout and in Tiny ImageNet's, and a small network for them.

As a script, the command line with that network.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from zeromean.lab.nets import imagenet
from zeromean.lab.nets.convolutional import Layer

SIDE, CROP = 32, 24
STACKS = ((Layer(4, 6, stride=4),), (Layer(6, 3),) * 2, (Layer(6, 3),), (Layer(8, 3),))


def pixels_of(label: int, number: int) -> np.ndarray:
    """Noise around a brightness of the class's own."""
    noise = np.random.PCG64(1000 * label + number).random_raw(SIDE * SIDE * 3) % 120
    return (noise + 120 * (label % 2)).astype(np.uint8).reshape(SIDE, SIDE, 3)


def write_folder(root: Path, *, classes: int = 2, train: int = 8, val: int = 2) -> Path:
    """ImageNet's layout: so many images of each class, PNG files that keep every pixel."""
    for label in range(classes):
        for part, count, start in (("train", train, 0), ("val", val, 500)):
            folder = root / part / f"n{label:02d}"
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(pixels_of(label, start + number)).save(folder / f"{part}_{number}.png")
    return root


def write_tiny(root: Path) -> Path:
    """Tiny ImageNet's layout of two classes of eight training images and two for validation, JPEG files."""
    lines = []
    for label in range(2):
        folder = root / "train" / f"n{label:02d}" / "images"
        folder.mkdir(parents=True)
        for number in range(8):
            Image.fromarray(pixels_of(label, number)).save(folder / f"{label}_{number}.JPEG")
    together = root / "val" / "images"
    together.mkdir(parents=True)
    for number in range(4):
        Image.fromarray(pixels_of(number % 2, 500 + number)).save(together / f"val_{number}.JPEG")
        lines.append(f"val_{number}.JPEG\tn{number % 2:02d}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


@contextmanager
def small() -> Iterator[None]:
    """Within, elu15 has few units, and torch one thread."""
    threads, before = torch.get_num_threads(), (imagenet.ELU15, imagenet.HIDDEN)
    torch.set_num_threads(1)
    imagenet.ELU15, imagenet.HIDDEN = STACKS, 8
    try:
        yield
    finally:
        imagenet.ELU15, imagenet.HIDDEN = before
        torch.set_num_threads(threads)


if __name__ == "__main__":
    from zeromean.lab.cli import main

    with small():
        main()
