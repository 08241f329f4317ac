"""Copies of the weights in half precision, and the gradient descent that keeps them."""

from typing import Any

import pytest
import torch
from tests.lab.small_images import CPU, HALVES, MUON, halved, material, overflown, poisoned, recipe, run, trained
from torch import Tensor

from zeromean.lab.images import Material
from zeromean.lab.train import Training

HALF = torch.bfloat16


pytestmark = pytest.mark.usefixtures("small_networks")


def training(
    dtype: torch.dtype = HALF,
    *,
    copies: bool = True,
    norm: str = "none",
    images: Material | None = None,
    **changes: Any,
) -> Training:
    """A training in half precision, with copies or with autocast's own casts."""
    made = Training(recipe(**{"weight_decay": 0.05, **changes}), run("prelu", norm=norm), images or material(), CPU)
    return halved(made, dtype, copies=copies)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"nesterov": True, "clip": 0.5}, {"decay_biases": False, "ema": 0.5}],
    ids=["plain", "nesterov, clip", "biases keep, average"],
)
def test_copies_change_nothing_but_roundings(norm: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    made = (training(dtype, copies=copies, norm=norm, **changes) for copies in (True, False))
    own, other = (trained(one)._update.tensors() for one in made)
    assert own.keys() == other.keys()
    assert own["number"] == 10
    for name, tensor in own.items():
        if dtype == torch.bfloat16 or not tensor.is_floating_point():
            torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6)
        else:
            # A weight between two numbers of float16 may be rounded either way, as the optimizers differ in float32.
            assert (tensor - other[name]).norm() <= 0.01 * other[name].norm(), name


def test_weights_keep_their_values_and_places_in_memory() -> None:
    plain, copied = (training(copies=copies).network for copies in (False, True))
    for (name, weight), own in zip(plain.named_parameters(), copied.parameters(), strict=True):
        assert torch.equal(weight, own), name
        assert weight.stride() == own.stride(), name
    assert copied.get_parameter("stack2.conv2.weight").is_contiguous(memory_format=torch.channels_last)


def copies_of(made: Training) -> dict[str, Tensor]:
    return made._update._descent.copies_of(made.network)


def test_every_weight_has_a_copy_and_no_vector() -> None:
    made = training()
    named = dict(made.network.named_parameters())
    assert set(copies_of(made)) == {name for name, parameter in named.items() if parameter.ndim > 1}
    part = made._update._descent.copies_of(made.network[1:])
    assert set(part) == {name for name in copies_of(made) if not name.startswith("stack1")}


def test_copies_follow_the_weights_in_a_step_and_when_they_are_loaded() -> None:
    made, other = trained(training(), epochs=1), training()
    other.load({name: tensor.clone() for name, tensor in made.state()[0].items()}, made.state()[1])
    for one in (made, other):
        for name, copy in copies_of(one).items():
            assert torch.equal(copy, one.network.get_parameter(name).to(HALF)), name
    rest, straight = trained(other, epochs=1), trained(made, epochs=1)
    for name, tensor in straight.state()[0].items():
        assert torch.equal(tensor, rest.state()[0][name]), name


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    own, other = (trained(training(copies=copies, images=poisoned(60))) for copies in (True, False))
    assert own.diverged == other.diverged
    assert own.diverged is not None
    for name, tensor in own._update.tensors().items():
        if name.startswith(("network", "momentum")):
            torch.testing.assert_close(tensor, other._update.tensors()[name], rtol=1e-5, atol=1e-6)
            assert tensor.isfinite().all(), name
    for name, copy in copies_of(own).items():
        assert torch.equal(copy, own.network.get_parameter(name).to(HALF)), name


@pytest.mark.parametrize("changes", [{}, {"clip": 0.5, "accumulate": 2}], ids=["plain", "clip, parts"])
def test_gradients_in_float16_are_closer_to_float32_than_in_bfloat16(changes: dict[str, Any]) -> None:
    exact = Training(recipe(**changes), run(), material(), CPU)
    halves = [halved(Training(recipe(**changes), run(), material(), CPU), dtype) for dtype in HALVES]
    for one in (exact, *halves):
        one.begin_epoch()
        one.advance()
    # After one step from zero, velocities are the gradient, clipped and with the decay.
    found = [torch.cat([velocity.flatten() for velocity in one._update._descent.momenta]) for one in (exact, *halves)]
    rough, fine = ((found[0] - other).norm() / found[0].norm() for other in found[1:])
    assert 0 < fine < rough / 2
    assert rough < 0.1
    losses = [float(one._update.loss_sum) for one in (exact, *halves)]
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("dtype", HALVES)
def test_muon_moves_copied_weights_as_it_moves_others(dtype: torch.dtype) -> None:
    own, other = (training(dtype, copies=copies, clip=0.5, **{**MUON, "weight_decay": 0.0}) for copies in (True, False))
    before = {name: weight.detach().clone() for name, weight in own.network.named_parameters()}
    for one in (own, other):
        one.begin_epoch()
        one.advance()
    for name, weight in own.network.named_parameters():
        moved, wanted = weight.detach() - before[name], other.network.get_parameter(name) - before[name]
        # The classes' gradients add up to zero, but for roundings, and those become a direction like others.
        assert (moved - wanted).norm() <= (0.4 if name == "stack3.conv1.weight" else 0.1) * wanted.norm(), name
        if weight.ndim > 1:
            sizes = torch.linalg.svdvals(moved.flatten(1)) / 0.02 / max(1, len(weight) / weight[0].numel()) ** 0.5
            assert sizes.max() == pytest.approx(1, abs=0.3)
    for name, copy in copies_of(own).items():
        assert torch.equal(copy, own.network.get_parameter(name).to(dtype)), name


@pytest.mark.parametrize("copies", [True, False], ids=["copies", "casts"])
@pytest.mark.parametrize("changes", [{}, {"clip": 0.5, "ema": 0.5}, {**MUON, "clip": 0.5}], ids=["sgd", "clip", "muon"])
def test_an_overflow_costs_a_step_and_half_the_scale(changes: dict[str, Any], copies: bool) -> None:
    made = overflown(training(torch.float16, copies=copies, **changes))
    assert bool(copies_of(made)) == copies


def test_the_scale_is_kept_in_checkpoints() -> None:
    made, other = trained(training(torch.float16), epochs=1), training(torch.float16)
    made._update._ledger.loss_scale.fill_(8)
    other.load({name: tensor.clone() for name, tensor in made.state()[0].items()}, made.state()[1])
    assert (float(other._update._ledger.loss_scale), int(other._update._ledger.calm)) == (8, 5)


def test_muon_leaves_units_alone_that_no_gradient_reaches_any_more() -> None:
    made = Training(recipe(**MUON), run("relu"), material(), CPU)
    bias = made.network.get_parameter("stack1.conv1.bias")
    bias.data.fill_(-1e3)
    before = made.network.get_parameter("stack1.conv1.weight").clone()
    # As if it had once been reached, long ago.
    made._update._descent.momenta[0].fill_(1e-30)
    trained(made, epochs=1)
    assert made.diverged is None
    assert made.network.get_parameter("stack1.conv1.weight").isfinite().all()
    kept = made.network.get_parameter("stack1.conv1.weight") / before
    assert kept.min() > 0.9
