"""What recipes may ask of a training beyond the published one: cutout, biases without decay, LeCun's weights, order."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.lab.small_images import CPU, DROPOUT, NO_DROPOUT, material, recipe, run, small
from torch import Tensor, nn

from zeromean.lab.activation import parse
from zeromean.lab.data.augment import cut_out, draw_crops, draw_cuts
from zeromean.lab.nets import elu11
from zeromean.lab.recipes.images import ImageRecipe, Phase
from zeromean.lab.sharing import ALONE, Share
from zeromean.lab.train import Training, build
from zeromean.lab.update import Update

ELU = parse("elu")
SEED, STEP = torch.tensor(3), torch.tensor(5)


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with small():
        yield


@pytest.mark.parametrize("side", [1, 2, 3, 6])
def test_a_square_is_cut_and_nothing_else(side: int) -> None:
    x = torch.rand(6, 3, 5, 5).contiguous(memory_format=torch.channels_last) + 1
    centres = torch.tensor([[0, 0], [2, 2], [4, 4], [0, 3], [4, 1], [2, 0]])
    found = cut_out(x, centres, side)
    expected = x.clone()
    for image, (row, column) in zip(expected, centres.tolist(), strict=True):
        first_row, first_column = row - side // 2, column - side // 2
        image[:, max(0, first_row) : first_row + side, max(0, first_column) : first_column + side] = 0
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_cuts_are_everywhere_and_of_their_step_and_seed() -> None:
    centres = draw_cuts(SEED, STEP, 8000, 8)
    counts = torch.bincount((8 * centres[:, 0] + centres[:, 1]), minlength=64)
    assert len(counts) == 64
    assert counts.min() > 125 - 6 * math.sqrt(125)
    assert counts.max() < 125 + 6 * math.sqrt(125)
    assert torch.equal(centres[:9], draw_cuts(SEED, STEP, 9, 8))
    top, _, _ = draw_crops(SEED, int(STEP), 5000, 8)  # three numbers an image, cuts take two
    assert float((top == centres.flatten()[::3][:5000]).float().mean()) == pytest.approx(1 / 8, abs=0.02)
    assert not torch.equal(centres, draw_cuts(SEED, STEP + 1, 8000, 8))
    assert not torch.equal(centres, draw_cuts(SEED + 1, STEP, 8000, 8))


def parts(chosen: ImageRecipe, share: Share = ALONE) -> Tensor:
    """The images that an update trains on in its first step."""
    images = material()
    training = Training(chosen, run(), images, CPU)
    source = images.source(chosen, seed=0, dtype=torch.float32, share=share)
    update = Update(chosen, training.network, source, seed=0, share=share)
    return torch.cat([x for x, _ in update.parts()])


def test_training_images_are_cut_in_all_their_parts() -> None:
    whole, cut = parts(recipe()), parts(recipe(cutout=3))
    centres = draw_cuts(torch.tensor(0), torch.tensor(0), len(whole), whole.shape[-1])
    assert torch.equal(cut, cut_out(whole, centres, 3))
    assert not torch.equal(cut, whole)
    assert torch.equal(parts(recipe(cutout=3, accumulate=4)), cut)


def test_processes_cut_as_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zeromean.lab.update.cut", lambda network: (network, network))
    shares = [parts(recipe(cutout=3), Share(rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat(shares), parts(recipe(cutout=3)))


def decayed(chosen: ImageRecipe, activation: str = "elu", norm: str = "none") -> dict[str, float]:
    """What a step leaves of each parameter, from a value and a gradient of 1."""
    training = Training(chosen, run(activation, norm=norm), material(), CPU)
    with torch.no_grad():
        for parameter in training.network.parameters():
            parameter.fill_(1.0)
    update = training._update
    update._descent.put(training.network, [torch.ones_like(parameter) for parameter in update.parameters])
    update._ledger.rate.fill_(0.5)
    update._descent.step()
    return {name: float(parameter.detach().mean()) for name, parameter in training.network.named_parameters()}


@pytest.mark.parametrize(("activation", "norm"), [("elu", "none"), ("prelu", "none"), ("elu", "batch")])
def test_biases_and_scales_decay_only_if_asked(activation: str, norm: str) -> None:
    slopes = {name for name in decayed(recipe(), activation, norm) if "activation" in name}
    for keeps, chosen in ((False, recipe(weight_decay=0.1)), (True, recipe(weight_decay=0.1, decay_biases=False))):
        for name, left in decayed(chosen, activation, norm).items():
            alone = name in slopes or (keeps and (name.endswith("bias") or "norm" in name))
            assert left == pytest.approx(0.5 if alone else 0.45), name


def test_lecun_draws_hes_weights_smaller() -> None:
    he, lecun = (elu11(10, ELU, seed=1, initialization=how).state_dict() for how in ("he", "lecun"))
    for name, weight in he.items():
        torch.testing.assert_close(lecun[name] * math.sqrt(2), weight)


@pytest.mark.parametrize("activation", ["elu", "gelu", "relu"])
def test_dropout_can_come_before_the_pooling(activation: str) -> None:
    network = elu11(10, parse(activation), seed=0)
    keys = list(network.state_dict())
    network.drop_before_pooling()
    assert list(network.state_dict()) == keys
    orders = [list(stack._modules) for stack in network.stacks]
    assert orders[1][-3:] == ["activation2", "dropout2", "pool"]
    assert {"pool", "activation1", "dropout1"} == set(orders[0][1:])
    assert orders[0][-1] == "dropout1", "where nothing is dropped, the pooling comes first, which is faster"
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(network.eval()(x), elu11(10, parse(activation), seed=0).eval()(x))


def test_a_recipe_drops_before_the_pooling_where_any_phase_drops() -> None:
    phases = (Phase(1, NO_DROPOUT), Phase(1, (0.0, 0.5, 0.0)))
    network = build(recipe(phases=phases, drop_before_pooling=True), run(), 10)
    assert [list(stack._modules)[-1] for stack in network.stacks] == ["dropout1", "pool", "dropout1"]


def test_a_maximum_outlives_most_of_what_is_dropped_before_it() -> None:
    lost = []
    for first in (False, True):
        network = elu11(10, parse("relu"), seed=0)
        network.set_dropout((0.5,) + (0.0,) * 6)
        if first:
            network.drop_before_pooling()
        seen: list[Tensor] = []
        network.stacks[0].register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        nn.init.constant_(network.get_parameter("stack1.conv1.bias"), 100.0)
        network(torch.randn(1, 3, 32, 32))
        lost.append(float((seen[0] == 0).float().mean()))
    assert lost[0] == pytest.approx(1 / 2, abs=0.02)
    assert lost[1] == pytest.approx(1 / 16, abs=0.02)


@pytest.mark.parametrize(
    "changes", [{"cutout": 3}, {"decay_biases": False}, {"initialization": "lecun"}, {"drop_before_pooling": True}]
)
def test_a_training_with_it_resumes_with_the_same_bits(changes: dict[str, Any]) -> None:
    chosen = recipe(phases=(Phase(15, DROPOUT),), **changes)

    def epochs(training: Training, until: int) -> Training:
        while training.epoch < until:
            training.begin_epoch()
            while training.steps_left:
                training.advance()
            training.finish_epoch()
        return training

    whole = epochs(Training(chosen, run(), material(), CPU), 3).state()[0]
    half = epochs(Training(chosen, run(), material(), CPU), 1)
    rest = Training(chosen, run(), material(), CPU)
    rest.load({name: tensor.clone() for name, tensor in half.state()[0].items()}, half.state()[1])
    for name, tensor in epochs(rest, 3).state()[0].items():
        assert torch.equal(tensor, whole[name]), name
    plain = epochs(Training(recipe(phases=(Phase(15, NO_DROPOUT),)), run(), material(), CPU), 1).state()[0]
    assert not all(torch.equal(tensor, whole[name]) for name, tensor in plain.items())
