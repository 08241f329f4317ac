"""What recipes may ask of a training beyond the published one: biases without decay, LeCun's weights, order."""

import math
from typing import Any

import pytest
import torch
from tests.lab.small_images import CPU, DROPOUT, NO_DROPOUT, material, recipe, run
from torch import Tensor, nn

from zeromean.lab.activation import parse
from zeromean.lab.nets import elu11
from zeromean.lab.recipes.images import ImageRecipe, Phase
from zeromean.lab.train import Training, build

ELU = parse("elu")


pytestmark = pytest.mark.usefixtures("small_networks")


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
    assert [list(stack._modules)[-1] for stack in network.stacks] == ["dropout1", "pool", "conv1"]


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
    "changes",
    [
        {"cutout": 3},
        {"mixup": 0.4},
        {"alternate_flip": True},
        {"decay_biases": False},
        {"initialization": "lecun"},
        {"drop_before_pooling": True},
    ],
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
