"""Global contrast normalization and ZCA whitening of images, or plain mean and standard deviation of the channels.

Global contrast normalization takes an image's own mean off its pixels and divides them by their norm over a scale s:

    x <- x - mean(x),  x <- x / (||x|| / s),  s = 55; an image whose ||x|| / s is below 1e-8 is not divided.

ZCA takes the mean m of the training images off and multiplies by the symmetric root of their inverse covariance:

    C = X^T X / n + 0.1 I = V diag(lambda) V^T,  P = V diag(1 / sqrt(lambda)) V^T,  x <- (x - m) P

Sources: Goodfellow, Warde-Farley, Mirza, Courville, Bengio 2013, "Maxout networks", arXiv 1302.4389, section 5.2, whose
preprocessing Clevert et al. 2016 took over; the constants are those of its library, pylearn2.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from zeromean.lab.data.dataset import Dataset
from zeromean.lab.data.folder import data_root
from zeromean.lab.data.kept import keep, recall
from zeromean.spelling import nearest

How = Literal["gcn-zca", "mean-std"]
SCALE = 55.0
SMALLEST_DIVISOR = 1e-8
FILTER_BIAS = 0.1
_BLOCK = 5000


@dataclass(frozen=True, eq=False)
class Images:
    """Normalised images, float32 ``[N, C, H, W]``: all training images, held-out ones included, and all test images."""

    train: Tensor
    test: Tensor


@dataclass(frozen=True, eq=False)
class Whitening:
    """What ZCA learns from the training images, in float64: their mean ``[F]`` and the matrix P, ``[F, F]``."""

    mean: Tensor
    matrix: Tensor


def prepare(
    dataset: Dataset,
    how: How,
    *,
    kept: Tensor | None = None,
    root: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
) -> Images:
    """Return the images of a data set normalised by statistics of its training images alone.

    ``gcn-zca`` computes in float64 and rounds the result to float32. Its fit is kept in ``<root>/cache``, under a name
    made from the content of the images that it was fitted on and from the constants. A fit on another kind of device
    differs in the last bits of float64, and whichever was made first is used.

    Args:
        dataset: The images, uint8.
        how: ``gcn-zca``, or ``mean-std``: ``(x / pixel_max - mean) / std`` of each channel.
        kept: Indices of the training images to take the statistics of; without a validation split, all.
        root: The folder of all data sets; see `data_root` for the default.
        device: Where to compute, and where the result lies.

    Raises:
        ValueError: If ``how`` is unknown.
    """
    if how not in ("gcn-zca", "mean-std"):
        raise ValueError(f"unknown normalization {how!r}: {nearest(how, ('gcn-zca', 'mean-std'))}")
    fitted_on = (dataset.train_images if kept is None else dataset.train_images[kept.cpu()]).to(device)
    train, test = dataset.train_images.to(device), dataset.test_images.to(device)
    if how == "mean-std":
        table = standard_table(fitted_on, dataset.pixel_max)
        return Images(look_up(table, train), look_up(table, test))
    whitening = _cached_fit(fitted_on, data_root(root) / "cache")
    return Images(whiten(whitening, train), whiten(whitening, test))


def contrast_normalize(images: Tensor) -> Tensor:
    """Global contrast normalization of each image, in float64.

    Args:
        images: ``[N, C, H, W]``.

    Returns:
        ``[N, C * H * W]``.
    """
    x_nf = images.flatten(1).double()
    x_nf = x_nf - x_nf.mean(1, keepdim=True)
    divisor = x_nf.square().sum(1, keepdim=True).sqrt() / SCALE
    return x_nf / divisor.where(divisor >= SMALLEST_DIVISOR, 1.0)


def fit_whitening(images: Tensor) -> Whitening:
    """Learn ZCA from contrast-normalised images, in float64 on their device.

    Args:
        images: uint8 training images ``[N, C, H, W]``.
    """
    features = images[0].numel()
    total = torch.zeros(features, dtype=torch.float64, device=images.device)
    for x_nf in _blocks(images):
        total += x_nf.sum(0)
    mean = total / len(images)
    covariance = torch.zeros(features, features, dtype=torch.float64, device=images.device)
    for x_nf in _blocks(images):
        x_nf -= mean
        covariance.addmm_(x_nf.T, x_nf, alpha=1 / len(images))
    covariance.diagonal().add_(FILTER_BIAS)
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    return Whitening(mean, (eigenvectors * eigenvalues.rsqrt()) @ eigenvectors.T)


def whiten(whitening: Whitening, images: Tensor) -> Tensor:
    """Contrast-normalise and whiten images: float64 throughout, the result rounded to float32.

    Args:
        whitening: The fit.
        images: uint8 ``[N, C, H, W]``.
    """
    mean, matrix = whitening.mean.to(images.device), whitening.matrix.to(images.device)
    whitened = torch.empty(len(images), images[0].numel(), device=images.device)
    for rows, x_nf in zip(whitened.split(_BLOCK), _blocks(images), strict=True):
        rows.copy_((x_nf - mean) @ matrix)
    return whitened.view(images.shape)


def standard_table(images: Tensor, pixel_max: int) -> Tensor:
    """Return ``(value / pixel_max - mean) / std`` for each channel and each of the 256 values, float32 ``[C, 256]``.

    Pixels are counted, so the statistics are exact and equal on every device. The standard deviation is that of the
    whole population.

    Args:
        images: uint8 training images ``[N, C, H, W]``.
        pixel_max: The value of a full pixel.
    """
    channels = images.transpose(0, 1).flatten(1)
    counts = torch.stack([torch.bincount(channel, minlength=256) for channel in channels]).cpu().double()
    shares = counts / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / pixel_max
    mean = (shares * values).sum(1, keepdim=True)
    std = (shares * (values - mean).square()).sum(1, keepdim=True).sqrt()
    return ((values - mean) / std).float()


def look_up(table: Tensor, images: Tensor) -> Tensor:
    """Replace every pixel of uint8 images ``[N, C, H, W]`` by its channel's entry in a table ``[C, 256]``."""
    table = table.to(images.device)
    looked_up = torch.empty(images.shape, dtype=table.dtype, device=images.device)
    for channel, entries in enumerate(table):
        looked_up[:, channel] = entries[images[:, channel].int()]
    return looked_up


def _blocks(images: Tensor) -> Iterator[Tensor]:
    return (contrast_normalize(block) for block in images.split(_BLOCK))


def _cached_fit(images: Tensor, folder: Path) -> Whitening:
    key = _key(images)
    file = folder / f"zca-{key[:32]}.safetensors"
    if found := recall(file, key, ("mean", "matrix"), "the whitening"):
        return Whitening(*found)
    whitening = fit_whitening(images)
    tensors = {"mean": whitening.mean.cpu(), "matrix": whitening.matrix.cpu().contiguous()}
    keep(file, key, tensors, "the whitening")
    return whitening


def _key(images: Tensor) -> str:
    settings = {"format": 1, "shape": list(images.shape), "constants": [SCALE, SMALLEST_DIVISOR, FILTER_BIAS]}
    return hashlib.sha256(json.dumps(settings).encode() + images.cpu().numpy().tobytes()).hexdigest()
