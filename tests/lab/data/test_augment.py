import pytest
import torch
from torch import Tensor

from zeromean.lab.data import Batches, whole_batches
from zeromean.lab.data.augment import draw_crops, draw_flips
from zeromean.lab.order import sample_order

SEED, PAD = 5, 2
DTYPES = [torch.uint8, torch.bfloat16, torch.float32]


@pytest.fixture
def images() -> Tensor:
    return torch.arange(1, 11 * 3 * 5 * 6 + 1).view(11, 3, 5, 6).remainder(251).to(torch.uint8)


@pytest.fixture
def labels() -> Tensor:
    return torch.arange(11) * 10


def by_hand(image: Tensor, top: int, left: int, flipped: int, pad: int = PAD) -> Tensor:
    """One crop, pixel by pixel, from an image that was never padded."""
    channels, height, width = image.shape
    crop = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            i, j = row + top - pad, (width - 1 - column if flipped else column) + left - pad
            if 0 <= i < height and 0 <= j < width:
                for channel in range(channels):
                    crop[channel, row, column] = image[channel, i, j]
    return crop


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batches_are_the_crops_and_flips_of_a_plain_loop(images: Tensor, labels: Tensor, dtype: torch.dtype) -> None:
    batches = Batches(images, labels, 4, seed=SEED, pad=PAD, dtype=dtype)
    assert batches.steps == 2
    for epoch in range(3):
        order = sample_order(torch.tensor([SEED]), epoch, 11)[0]
        top, left, flipped = draw_crops(torch.tensor(SEED), epoch, 8, 2 * PAD + 1)
        for step, (x_bchw, labels_b) in enumerate(batches.epoch(epoch)):
            for place in range(4):
                at = 4 * step + place
                sample = int(order[at])
                expected = by_hand(images[sample], int(top[at]), int(left[at]), int(flipped[at]))
                assert torch.equal(x_bchw[place], expected.to(dtype))
                assert labels_b[place] == labels[sample]


def test_each_image_is_mirrored_in_every_other_epoch(images: Tensor, labels: Tensor) -> None:
    batches = Batches(images, labels, 11, seed=SEED, pad=0, alternate_flip=True)
    mirrored = torch.empty(4, 11, dtype=torch.bool)
    for epoch in range(4):
        ((x_bchw, labels_b),) = batches.epoch(epoch)
        for image, label in zip(x_bchw, labels_b, strict=True):
            own = images[label // 10]
            assert not torch.equal(own, own.flip(2))
            mirrored[epoch, label // 10] = torch.equal(image, own.flip(2))
            assert mirrored[epoch, label // 10] or torch.equal(image, own)
    first = draw_flips(torch.tensor(SEED), 11).bool()
    assert 0 < int(first.sum()) < 11
    assert torch.equal(mirrored, torch.stack([first, ~first, first, ~first]))
    none = Batches(images, labels, 11, seed=SEED, pad=0, flip=False, alternate_flip=True)
    for x_bchw, labels_b in none.epoch(1):
        assert torch.equal(x_bchw, images[labels_b // 10])


def test_half_of_the_images_are_mirrored_in_even_epochs() -> None:
    flips = draw_flips(torch.tensor(3), 10_000)
    assert set(flips.tolist()) == {0, 1}
    assert float(flips.float().mean()) == pytest.approx(0.5, abs=0.03)
    assert float((flips == draw_flips(torch.tensor(4), 10_000)).float().mean()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_memory_format_asked_for(images: Tensor, labels: Tensor, channels_last: bool) -> None:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x_bchw, _ = next(Batches(images, labels, 4, seed=0, channels_last=channels_last).epoch(0))
    assert x_bchw.is_contiguous(memory_format=memory_format)
    whole, _ = next(whole_batches(images, labels, 4, channels_last=channels_last))
    assert whole.is_contiguous(memory_format=memory_format)


def test_the_same_bits_for_a_seed_and_epoch_whatever_came_before(images: Tensor, labels: Tensor) -> None:
    def epoch_three(seed: int, first: int) -> Tensor:
        batches = Batches(images, labels, 5, seed=seed)
        batches.set_epoch(first)
        return torch.stack([x for x, _ in batches.epoch(3)])

    torch.manual_seed(1)
    before = epoch_three(7, 0)
    torch.manual_seed(2)
    assert torch.equal(before, epoch_three(7, 2))
    assert not torch.equal(before, epoch_three(8, 0))
    batches = Batches(images, labels, 5, seed=7)
    assert not torch.equal(before, torch.stack([x for x, _ in batches.epoch(4)]))


def test_the_draws_are_pinned_over_versions() -> None:
    top, left, flipped = draw_crops(torch.tensor(3), 2, 8, 9)
    assert top.tolist() == [8, 8, 2, 7, 0, 3, 6, 0]
    assert left.tolist() == [3, 7, 1, 4, 7, 7, 3, 7]
    assert flipped.tolist() == [1, 1, 1, 0, 0, 1, 1, 1]


def test_every_place_and_both_flips_come_as_often() -> None:
    count, places = 81_000, 9
    top, left, flipped = draw_crops(torch.tensor(11), 4, count, places)
    cells = torch.bincount((flipped * places + top) * places + left, minlength=162)
    chi_square = (cells - count / 162).square().sum() / (count / 162)
    assert len(cells) == 162
    assert chi_square < 245  # 161 degrees of freedom: exceeded once in 2e5


def test_draws_of_an_epoch_differ_from_those_of_others_and_from_the_order() -> None:
    one, other = (torch.stack(draw_crops(torch.tensor(1), epoch, 1000, 9)) for epoch in (0, 1))
    assert (one == other).float().mean() < 0.25
    order = sample_order(torch.tensor([1]), 0, 1000)[0].double()
    assert torch.corrcoef(torch.stack([order, one[0].double()]))[0, 1].abs() < 0.15


def test_without_pad_and_flip_an_epoch_is_a_permutation(images: Tensor, labels: Tensor) -> None:
    batches = Batches(images, labels, 11, seed=0, pad=0, flip=False)
    ((x_bchw, labels_b),) = batches.epoch(1)
    assert torch.equal(x_bchw, images[labels_b // 10])
    assert torch.equal(labels_b.sort().values, labels)


def test_a_step_is_one_graph_without_a_look_at_its_values(images: Tensor, labels: Tensor) -> None:
    batches = Batches(images, labels, 5, seed=0, pad=PAD)
    compiled = torch.compile(batches.take, fullgraph=True, backend="aot_eager")
    for epoch in range(2):
        batches.set_epoch(epoch)
        for step in range(2):
            expected, got = batches.take(torch.tensor([step])), compiled(torch.tensor([step]))
            assert all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))


def test_processes_share_every_batch(images: Tensor, labels: Tensor) -> None:
    alone = list(Batches(images, labels, 4, seed=2).epoch(1))
    shares = [list(Batches(images, labels, 4, seed=2, share=(rank, 2)).epoch(1)) for rank in range(2)]
    for batch, first, second in zip(alone, *shares, strict=True):
        for whole, left, right in zip(batch, first, second, strict=True):
            assert torch.equal(whole, torch.cat([left, right]))


@pytest.mark.parametrize(("batch_size", "processes", "rule"), [(0, 1, "lie in"), (12, 1, "lie in"), (3, 2, "multiple")])
def test_a_batch_size_that_does_not_fit(
    images: Tensor, labels: Tensor, batch_size: int, processes: int, rule: str
) -> None:
    with pytest.raises(ValueError, match=rf"batch_size must .*{rule}.* got {batch_size}"):
        Batches(images, labels, batch_size, seed=0, share=(0, processes))


def test_evaluation_sees_every_sample_once_in_order(images: Tensor, labels: Tensor) -> None:
    batches = list(whole_batches(images, labels, 4, dtype=torch.float32))
    assert [len(x) for x, _ in batches] == [4, 4, 3]
    assert torch.equal(torch.cat([x for x, _ in batches]), images.float())
    assert torch.equal(torch.cat([y for _, y in batches]), labels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_captured_step_on_cuda_has_the_bits_of_the_cpu(images: Tensor, labels: Tensor, dtype: torch.dtype) -> None:
    there = Batches(images.cuda(), labels.cuda(), 5, seed=9, dtype=dtype)
    step, graph = torch.zeros(1, dtype=torch.int64, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = there.take(step)
    here = Batches(images, labels, 5, seed=9, dtype=dtype)
    for epoch in range(3):
        there.set_epoch(epoch)
        for number, batch in enumerate(here.epoch(epoch)):
            step.fill_(number)
            graph.replay()
            assert all(torch.equal(one, other.cpu()) for one, other in zip(batch, captured, strict=True))
