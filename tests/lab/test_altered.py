"""Cutout and mixup, alone and in a training."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from tests.lab.small_images import CLASSES, CPU, material, recipe, run
from torch import Tensor

from zeromean.lab.altered import beta_quantiles, cut_out, draw_places, draw_shares, mix
from zeromean.lab.data.augment import draw_crops
from zeromean.lab.recipes.images import ImageRecipe
from zeromean.lab.sharing import ALONE, Share
from zeromean.lab.train import Training

SEED, EPOCH = torch.tensor(3), 5
EACH: list[dict[str, Any]] = [{"cutout": 3}, {"mixup": 0.4}, {"cutout": 3, "mixup": 0.4}]


pytestmark = pytest.mark.usefixtures("small_networks")


@pytest.mark.parametrize("side", [1, 2, 3, 6])
def test_a_square_is_cut_and_nothing_else(side: int) -> None:
    x = torch.rand(6, 3, 5, 5).contiguous(memory_format=torch.channels_last) + 1
    centres = torch.tensor([[0, 0], [2, 2], [4, 4], [0, 3], [4, 1], [2, 0]])
    found = cut_out(x, (centres + 0.5) / 5, side)
    expected = x.clone()
    for image, (row, column) in zip(expected, centres.tolist(), strict=True):
        first_row, first_column = row - side // 2, column - side // 2
        image[:, max(0, first_row) : first_row + side, max(0, first_column) : first_column + side] = 0
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_cuts_are_everywhere_and_of_their_epoch_and_seed() -> None:
    places = draw_places(SEED, EPOCH, 8000)
    cells = (places * 8).long()
    counts = torch.bincount((8 * cells[:, 0] + cells[:, 1]), minlength=64)
    assert len(counts) == 64
    assert counts.min() > 125 - 6 * math.sqrt(125)
    assert counts.max() < 125 + 6 * math.sqrt(125)
    assert torch.equal(places[:9], draw_places(SEED, EPOCH, 9))
    top, _, _ = draw_crops(SEED, EPOCH, 5000, 8)  # three numbers an image, cuts take two
    assert float((top == cells.flatten()[::3][:5000]).float().mean()) == pytest.approx(1 / 8, abs=0.02)
    assert not torch.equal(places, draw_places(SEED, EPOCH + 1, 8000))
    assert not torch.equal(places, draw_places(SEED + 1, EPOCH, 8000))


def test_neighbours_and_their_labels_are_mixed() -> None:
    x = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    labels, shares = torch.tensor([2, 0, 1, 1]), torch.tensor([0.75, 0.5, 1.0, 0.25])
    mixed, targets = mix(x, labels, shares, 3)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    for one, other, share in ((0, 1, 0.75), (1, 0, 0.5), (2, 3, 1.0), (3, 2, 0.25)):
        torch.testing.assert_close(mixed[one], share * x[one] + (1 - share) * x[other])
    assert targets.tolist() == [[0.25, 0, 0.75], [0.5, 0, 0.5], [0, 1, 0], [0, 1, 0]]
    half, sums = mix(x.half(), labels, shares, 3)
    assert (half.dtype, sums.dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(half.float(), mixed, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_a_mixture_is_that_of_both_labels_by_their_shares(smoothing: float) -> None:
    x, logits = torch.zeros(4, 3, 5, 5), torch.randn(4, 10)
    labels, shares = torch.tensor([2, 0, 9, 1]), torch.rand(4)
    _, targets = mix(x, labels, shares, 10)
    both = [
        F.cross_entropy(logits, own, label_smoothing=smoothing, reduction="none")
        for own in (labels, labels[[1, 0, 3, 2]])
    ]
    expected = (shares * both[0] + (1 - shares) * both[1]).mean()
    torch.testing.assert_close(F.cross_entropy(logits, targets, label_smoothing=smoothing), expected)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_shares_have_their_distribution_and_are_of_their_epoch_and_seed(alpha: float) -> None:
    quantiles = beta_quantiles(alpha)
    shares = draw_shares(SEED, EPOCH, 20_000, quantiles)
    for level in (0.001, 0.05, 0.3, 0.5, 0.8, 0.99):
        expected = stats.beta(alpha, alpha).cdf(level)
        within = 5 * math.sqrt(expected * (1 - expected) / 20_000) + 1e-9
        assert float((shares <= level).float().mean()) == pytest.approx(expected, abs=within)
    assert torch.equal(shares[:9], draw_shares(SEED, EPOCH, 9, quantiles))
    places = draw_places(SEED, EPOCH, 10_000).flatten()  # two numbers an image, shares take one
    alike = torch.corrcoef(torch.stack([shares.argsort().argsort().float(), places]))[0, 1]
    assert abs(float(alike)) < 0.03
    for seed, epoch in ((SEED, EPOCH + 1), (SEED + 1, EPOCH)):
        assert float((draw_shares(seed, epoch, 20_000, quantiles) == shares).float().mean()) < 0.01


def epoch_of(chosen: ImageRecipe, epoch: int = 0, share: Share = ALONE) -> tuple[Tensor, Tensor]:
    """All images that a training takes in an epoch, and their labels."""
    update = Training(chosen, run(), material(), CPU, share)._update
    update.batches.set_epoch(epoch)
    found = []
    for place in range(update.batches.steps):
        update.place.fill_(place)
        update.number.fill_(epoch * update.batches.steps + place)
        found += list(update.parts())
    x, labels = zip(*found, strict=True)
    return torch.cat(x), torch.cat(labels)


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_training_takes_altered_images_in_all_its_parts(epoch: int) -> None:
    whole, labels = epoch_of(recipe(), epoch)
    seed = torch.tensor(run().seed)
    cut = cut_out(whole, draw_places(seed, epoch, len(whole)), 3)
    shares = draw_shares(seed, epoch, len(whole), beta_quantiles(0.4))
    expected = [(cut, labels), mix(whole, labels, shares, CLASSES), mix(cut, labels, shares, CLASSES)]
    for changes, wanted in zip(EACH, expected, strict=True):
        for parts in (1, 4, 16):
            assert all(map(torch.equal, epoch_of(recipe(**changes, accumulate=parts), epoch), wanted))
        assert not torch.equal(wanted[0], whole)


@pytest.mark.parametrize("changes", EACH, ids=str)
def test_processes_alter_as_one_does(changes: dict[str, Any]) -> None:
    alone = epoch_of(recipe(**changes), 1)
    shares = [epoch_of(recipe(**changes), 1, Share(rank, 2)) for rank in range(2)]
    for whole, of_each in zip(alone, zip(*shares, strict=True), strict=True):
        by_batch = [own.view(-1, recipe().batch_size // 2, *own.shape[1:]) for own in of_each]
        assert torch.equal(torch.cat(by_batch, 1).flatten(0, 1), whole)


def test_an_odd_part_of_a_batch_has_no_pairs() -> None:
    rule = "each process's part of a batch must be even, got 5: change batch_size in the recipe 'cifar100-elu11'"
    with pytest.raises(ValueError, match=rule):
        epoch_of(recipe(mixup=0.4, batch_size=10), share=Share(0, 2))
    assert len(epoch_of(recipe(mixup=0.4, batch_size=10))[0]) % 10 == 0
