"""What a recipe trains on: split, normalised by its training part alone, with a fixed part to watch."""

import pytest
import torch
from tests.lab.small_images import CPU, recipe

from zeromean.lab.data import Dataset, split_validation
from zeromean.lab.images import Material
from zeromean.lab.images import material as material_of
from zeromean.lab.recipes.images import ImageRecipe


def dataset() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(60) % 4
    return Dataset("made", images[:40], labels[:40], images[40:], labels[40:], 255, tuple("abcd"), {}, "made here")


def material(recipe: ImageRecipe, dataset: Dataset, device: torch.device) -> Material:
    made = material_of(recipe, dataset, device)
    assert isinstance(made, Material)
    return made


def test_without_a_split_all_training_images_are_trained_on() -> None:
    given = material(recipe(normalization="mean-std", probe_samples=10), dataset(), CPU)
    assert (given.validation, given.classes) == (None, 4)
    assert (len(given.train), len(given.test), len(given.probe)) == (40, 20, 10)
    assert torch.equal(given.train_labels, dataset().train_labels)
    assert given.train.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert given.train.std((0, 2, 3), correction=0).tolist() == pytest.approx([1, 1, 1], rel=1e-5)


def test_a_split_parts_the_training_images_and_leaves_the_test_images() -> None:
    chosen = recipe(normalization="mean-std", validation=12, probe_samples=10)
    given, source = material(chosen, dataset(), CPU), dataset()
    kept, held_out = split_validation(source.train_labels, 12)
    pixels = source.train_images[kept].double() / 255
    mean, std = (
        statistic.view(-1, 1, 1) for statistic in (pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0))
    )

    def normalised(images: torch.Tensor) -> torch.Tensor:
        return ((images.double() / 255 - mean) / std).float()

    assert given.validation is not None
    torch.testing.assert_close(given.train, normalised(source.train_images[kept]))
    torch.testing.assert_close(given.validation[0], normalised(source.train_images[held_out]))
    torch.testing.assert_close(given.test, normalised(source.test_images))
    assert torch.equal(given.train_labels, source.train_labels[kept])
    assert torch.equal(given.validation[1], source.train_labels[held_out])
    assert torch.equal(given.test_labels, source.test_labels)


@pytest.mark.parametrize("validation", [0, 12])
def test_the_probe_is_a_fixed_part_of_the_training_images(validation: int) -> None:
    chosen = recipe(normalization="mean-std", validation=validation, probe_samples=10)
    given, again = material(chosen, dataset(), CPU), material(chosen, dataset(), CPU)
    for image, label in zip(given.probe, given.probe_labels, strict=True):
        (place,) = (given.train == image).all(dim=(1, 2, 3)).nonzero()
        assert given.train_labels[place] == label
    assert torch.equal(given.probe, again.probe)
    assert len(given.probe.unique(dim=0)) == 10


def test_a_probe_larger_than_the_training_set_is_all_of_it() -> None:
    assert len(material(recipe(normalization="mean-std", probe_samples=1000), dataset(), CPU).probe) == 40


def test_a_split_that_empties_a_class_is_refused() -> None:
    with pytest.raises(ValueError, match="count must leave every class on both sides"):
        material(recipe(normalization="mean-std", validation=39), dataset(), CPU)
