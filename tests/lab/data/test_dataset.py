import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeromean.lab.data import Dataset, as_vectors, split_validation
from zeromean.lab.data.dataset import assert_class_counts


def made(pixel_max: int) -> Dataset:
    images = torch.arange(12, dtype=torch.uint8).view(2, 1, 2, 3)
    labels = torch.tensor([0, 1])
    return Dataset("made", images, labels, images[:1], labels[:1], pixel_max, ("a", "b"), {}, "made")


def test_vectors_are_flat_float32_fractions_of_a_full_pixel() -> None:
    train, test = as_vectors(made(pixel_max=11))
    torch.testing.assert_close(train, torch.arange(12, dtype=torch.float32).view(2, 6) / 11)
    torch.testing.assert_close(test, train[:1])


def test_vectors_leave_the_images_alone() -> None:
    dataset = made(pixel_max=2)
    before = dataset.train_images.clone()
    as_vectors(dataset)
    assert torch.equal(dataset.train_images, before)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(4, 40), min_size=2, max_size=6),
    share=st.floats(0.3, 0.7),
    seed=st.integers(0, 2**31),
)
def test_a_split_is_a_partition_in_proportion(sizes: list[int], share: float, seed: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    count = round(share * len(labels))
    train, held_out = split_validation(labels, count, seed=seed)
    assert len(held_out) == count
    assert torch.equal(torch.cat([train, held_out]).sort().values, torch.arange(len(labels)))
    assert train.diff().gt(0).all()
    assert held_out.diff().gt(0).all()
    taken = torch.bincount(labels[held_out], minlength=len(sizes))
    exact = torch.tensor(sizes, dtype=torch.float64) * count / len(labels)
    assert (taken - exact).abs().max() < 1


def test_a_split_depends_on_the_seed_alone() -> None:
    labels = torch.arange(200) % 4
    torch.manual_seed(1)
    first = split_validation(labels, 40)
    torch.manual_seed(2)
    assert all(torch.equal(one, other) for one, other in zip(first, split_validation(labels, 40), strict=True))
    assert not torch.equal(first[1], split_validation(labels, 40, seed=1)[1])


def test_a_split_is_pinned_over_versions() -> None:
    held_out = split_validation(torch.arange(30) % 3, 6)[1]
    assert held_out.tolist() == [1, 3, 11, 13, 20, 21]


@pytest.mark.parametrize("count", [-1, 0, 1, 9, 10, 11])
def test_a_split_without_a_class_on_a_side_is_refused(count: int) -> None:
    labels = torch.tensor([0] * 8 + [1] * 2)
    with pytest.raises(ValueError, match=rf"every class on both sides of the split, got {count} of 10 samples"):
        split_validation(labels, count)


def test_wrong_class_counts_are_our_own_fault() -> None:
    assert_class_counts(torch.tensor([0, 1, 1]), (1, 2))
    with pytest.raises(AssertionError, match=r"\(1, 2\) are not the published \(2, 1\)"):
        assert_class_counts(torch.tensor([0, 1, 1]), (2, 1))
