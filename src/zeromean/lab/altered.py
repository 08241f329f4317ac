"""Cutout and mixup: what may happen to a batch of training images after its crops and flips, on the device alone.

Cutout sets a square at a random place of each image to 0. Mixup mixes images and their labels in pairs,

    x_i <- share_i x_i + (1 - share_i) x_j,   and the labels, as probabilities of the classes, alike

with shares from a Beta(alpha, alpha) distribution. The pairs are neighbours in the batch, 0 and 1, 2 and 3, and so on:
batches are composed anew in every epoch, and processes that share one mix as a single process does. Places and shares
are drawn for a whole epoch, as crops are, from seed, epoch and position in the epoch alone.

Sources: DeVries, Taylor 2017, "Improved regularization of convolutional neural networks with cutout", arXiv 1708.04552;
Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: beyond empirical risk minimization", ICLR 2018. There one share is drawn for a
whole batch, and the other image from a permutation of it.
"""

import numpy as np
import torch
from torch import Tensor

from zeromean.lab.data.augment import Batch, Source
from zeromean.lab.recipes.images import ImageRecipe
from zeromean.lab.sharing import Share
from zeromean.nn.noise import uniform

# Apart from those of `zeromean.lab.data.augment`.
_CUTS = (1 << 61) + (1 << 60)
_SHARES = _CUTS + (1 << 59)
_LEVELS = 1 << 16  # as many as there are different numbers of `uniform`


def draw_places(seed: Tensor, epoch: int, count: int) -> Tensor:
    """Where every image of an epoch is cut, down and across, float32 ``[count, 2]``, uniform between 0 and 1.

    Args:
        seed: int64, 0-d, below 2^16.
        epoch: Every epoch has its own draws.
        count: How many; the first ones do not depend on it.
    """
    return uniform(_CUTS + (seed << 32) + epoch, (count, 2))


def beta_quantiles(alpha: float) -> Tensor:
    """The quantiles, float32 ``[65536]``, of a Beta(alpha, alpha) distribution at the numbers that `uniform` gives."""
    from scipy import special  # no other part of a training needs it

    levels = (np.arange(_LEVELS) + 0.5) / _LEVELS
    return torch.from_numpy(special.betaincinv(alpha, alpha, levels)).float()


def draw_shares(seed: Tensor, epoch: int, count: int, quantiles: Tensor) -> Tensor:
    """How much of every image of an epoch is its own, float32 ``[count]``.

    Args:
        seed: int64, 0-d, below 2^16.
        epoch: Every epoch has its own draws.
        count: How many; the first ones do not depend on it.
        quantiles: Of their distribution, as `beta_quantiles` gives them, on the seed's device.
    """
    return quantiles[(uniform(_SHARES + (seed << 32) + epoch, (count,)) * _LEVELS).long()]


def cut_out(x_bchw: Tensor, places_b2: Tensor, side: int) -> Tensor:
    """Set a square of each image to 0; its part beyond the edge is lost.

    Args:
        x_bchw: Square images, normalised to a mean of 0.
        places_b2: Of each square's middle, down and across, from 0 to 1; of an even side, of the pixel behind it.
        side: In pixels.
    """
    pixels = torch.arange(x_bchw.shape[-1], device=x_bchw.device)
    centres_b2 = (places_b2 * len(pixels)).long()
    from_edge_b2j = pixels - (centres_b2 - side // 2).unsqueeze(-1)
    rows_bi, columns_bj = ((from_edge_b2j >= 0) & (from_edge_b2j < side)).unbind(1)
    kept_bij = ~(rows_bi.unsqueeze(2) & columns_bj.unsqueeze(1))
    return x_bchw * kept_bij.unsqueeze(1)


def mix(x_bchw: Tensor, labels_b: Tensor, shares_b: Tensor, classes: int) -> Batch:
    """Mix each image and its label with those of its neighbour.

    Args:
        x_bchw: An even number of images.
        labels_b: Theirs.
        shares_b: float32.
        classes: How many labels there are.

    Returns:
        The images, and the probabilities ``[B, classes]`` in float32.
    """
    neighbours = torch.arange(len(x_bchw), device=x_bchw.device) ^ 1
    targets_bk = (labels_b.unsqueeze(1) == torch.arange(classes, device=labels_b.device)).float()
    mixed_bchw = torch.lerp(x_bchw[neighbours], x_bchw, shares_b.to(x_bchw.dtype).view(-1, 1, 1, 1))
    return mixed_bchw, torch.lerp(targets_bk[neighbours], targets_bk, shares_b.unsqueeze(1))


class Altered:
    """The batches of a source with what a recipe does to them; labels become probabilities if it mixes.

    Args:
        source: of the same seed and share.
        recipe: batch size, cutout and mixup; it fits the processes, see `ImageRecipe.check_parts`.
        classes: how many labels there are.
        seed: below 2^16.
        share: this process's place among several.
        device: that of the source's batches.

    Attributes:
        steps: batches in an epoch.
    """

    def __init__(
        self, source: Source, recipe: ImageRecipe, classes: int, *, seed: int, share: Share, device: torch.device
    ) -> None:
        own = recipe.batch_size // share.processes
        self._source, self._recipe, self._classes, self._share = source, recipe, classes, share
        self._seed = torch.tensor(seed, device=device)
        self.steps = source.steps
        self._places = torch.empty(self.steps, own, 2, device=device)
        self._quantiles = beta_quantiles(recipe.mixup).to(device) if recipe.mixup else None
        self._shares = torch.empty(self.steps, own, device=device)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the places and the shares of an epoch, into the buffers that `take` reads."""
        self._source.set_epoch(epoch)
        count = self.steps * self._recipe.batch_size
        if self._recipe.cutout:
            self._places.copy_(self._own(draw_places(self._seed, epoch, count)))
        if self._quantiles is not None:
            self._shares.copy_(self._own(draw_shares(self._seed, epoch, count, self._quantiles)))

    def _own(self, drawn: Tensor) -> Tensor:
        """This process's part of every batch."""
        by_step = drawn.view(self.steps, self._recipe.batch_size, *drawn.shape[1:])
        return by_step.chunk(self._share.processes, 1)[self._share.rank]

    def ready(self, place: int) -> None:
        """Get what the source needs for the batch at that place of the epoch."""
        self._source.ready(place)

    def take(self, step: Tensor) -> Batch:
        """The batch of a step, int64 ``[1]``, of the epoch that was set."""
        x_bchw, labels = self._source.take(step)
        if self._recipe.cutout:
            x_bchw = cut_out(x_bchw, self._places.index_select(0, step)[0], self._recipe.cutout)
        if self._recipe.mixup:
            return mix(x_bchw, labels, self._shares.index_select(0, step)[0], self._classes)
        return x_bchw, labels
