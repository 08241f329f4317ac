"""Copies of the weights in half precision, and the gradient descent that keeps them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.lab.small_images import CPU, halved, material, poisoned, recipe, run, small, trained
from torch import Tensor

from zeromean.lab.images import Material
from zeromean.lab.train import Training

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with small():
        yield


def training(half: torch.dtype | None, norm: str = "none", images: Material | None = None, **changes: Any) -> Training:
    """A training in bfloat16, with copies or with autocast's own casts."""
    made = Training(recipe(weight_decay=0.05, **changes), run("prelu", norm=norm), images or material(), CPU)
    return halved(made, half)


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"nesterov": True, "clip": 0.5}, {"decay_biases": False, "ema": 0.5}],
    ids=["plain", "nesterov, clip", "biases keep, average"],
)
def test_copies_change_nothing_but_roundings(norm: str, changes: dict[str, Any]) -> None:
    own, other = (trained(training(half, norm=norm, **changes))._update.tensors() for half in (HALF, None))
    assert own.keys() == other.keys()
    assert own["number"] == 10
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6)


def test_weights_keep_their_values_and_places_in_memory() -> None:
    plain, copied = (training(half).network for half in (None, HALF))
    for (name, weight), own in zip(plain.named_parameters(), copied.parameters(), strict=True):
        assert torch.equal(weight, own), name
        assert weight.stride() == own.stride(), name
    assert copied.get_parameter("stack2.conv2.weight").is_contiguous(memory_format=torch.channels_last)


def copies(made: Training) -> dict[str, Tensor]:
    return made._update._descent.copies_of(made.network)


def test_every_weight_has_a_copy_and_no_vector() -> None:
    made = training(HALF)
    named = dict(made.network.named_parameters())
    assert set(copies(made)) == {name for name, parameter in named.items() if parameter.ndim > 1}
    part = made._update._descent.copies_of(made.network[1:])
    assert set(part) == {name for name in copies(made) if not name.startswith("stack1")}


def test_copies_follow_the_weights_in_a_step_and_when_they_are_loaded() -> None:
    made, other = trained(training(HALF), epochs=1), training(HALF)
    other.load({name: tensor.clone() for name, tensor in made.state()[0].items()}, made.state()[1])
    for one in (made, other):
        for name, copy in copies(one).items():
            assert torch.equal(copy, one.network.get_parameter(name).to(HALF)), name
    rest, straight = trained(other, epochs=1), trained(made, epochs=1)
    for name, tensor in straight.state()[0].items():
        assert torch.equal(tensor, rest.state()[0][name]), name


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    own, other = (trained(training(half, images=poisoned(60))) for half in (HALF, None))
    assert own.diverged == other.diverged
    assert own.diverged is not None
    for name, tensor in own._update.tensors().items():
        if name.startswith(("network", "momentum")):
            torch.testing.assert_close(tensor, other._update.tensors()[name], rtol=1e-5, atol=1e-6)
            assert tensor.isfinite().all(), name
    for name, copy in copies(own).items():
        assert torch.equal(copy, own.network.get_parameter(name).to(HALF)), name
