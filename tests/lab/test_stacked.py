"""A stack of networks computes and learns what each of its networks would alone."""

import pytest
import torch
from torch import nn

import zeromean.nn as zmnn
from zeromean.lab.activation import parse
from zeromean.lab.nets import StackedNetwork, mlp

WIDTHS = (12, 16, 16, 5)
ARMS = ["elu", "elu", "prelu", "prelu", "relu", "mpelu", "leaky_relu:0.1"]


def networks() -> list[nn.Sequential]:
    return [mlp(WIDTHS, parse(arm), seed=seed).double() for seed, arm in enumerate(ARMS)]


def test_outputs_and_gradients_are_those_of_each_network() -> None:
    alone = networks()
    stack = StackedNetwork(networks())
    x = torch.randn(len(alone), 9, 12, dtype=torch.float64)
    outputs = stack(x)
    outputs.square().sum().backward()
    for run, network in enumerate(alone):
        own = network(x[run])
        torch.testing.assert_close(outputs[run], own)
        own.square().sum().backward()
    for slope, rows in stack.slopes():
        assert slope.grad is not None
        assert len(slope.grad) == rows.stop - rows.start
    first = torch.stack([network[0].weight.grad for network in alone])  # type: ignore[misc]
    torch.testing.assert_close(stack.layers[0].weight.grad, first)
    slopes = torch.stack([network[1].weight.grad for network in alone[2:4]])  # type: ignore[misc]
    torch.testing.assert_close(stack.layers[1].blocks[1].slopes["weight"].grad.view(2, 1), slopes)  # type: ignore[union-attr, index]


def test_descending_takes_the_step_of_plain_gradient_descent() -> None:
    alone, stack = networks(), StackedNetwork(networks())
    x = torch.randn(len(alone), 9, 12, dtype=torch.float64)
    rates = torch.linspace(0.01, 0.1, len(alone), dtype=torch.float64)
    stack.descend(x, rates.view(-1, 1, 1)).square().sum().backward()
    for run, network in enumerate(alone):
        network(x[run]).square().sum().backward()
        torch.optim.SGD(network.parameters(), rates[run].item()).step()
        for name, weight in stack.weights(run).items():
            if network.get_parameter(name).ndim == 2 or name.endswith("bias"):
                torch.testing.assert_close(weight, network.get_parameter(name).detach())


def test_a_runs_weights_load_into_its_plain_network() -> None:
    stack = StackedNetwork(networks())
    x = torch.randn(1, 4, 12, dtype=torch.float64)
    outputs = stack(x.expand(len(ARMS), -1, -1))
    for run, arm in enumerate(ARMS):
        fresh = mlp(WIDTHS, parse(arm), seed=99).double()
        fresh.load_state_dict(stack.weights(run))
        torch.testing.assert_close(fresh(x[0]), outputs[run])


def test_stacked_networks_stay_as_they_were() -> None:
    given = [*networks(), mlp(WIDTHS, parse("eelu"), seed=7).double()]
    stack = StackedNetwork(given)
    stack.set_seeds(torch.arange(2 * len(given)).view(2, -1))
    assert all(parameter.requires_grad for network in given for parameter in network.parameters())
    assert given[-1][1].seed is None


def test_hidden_activations_are_reported_layer_by_layer() -> None:
    stack = StackedNetwork(networks())
    x = torch.randn(len(ARMS), 4, 12, dtype=torch.float64)
    outputs, hidden = stack.activations(x)
    assert [layer.shape for layer in hidden] == [(7, 4, 16), (7, 4, 16)]
    assert stack.hidden_layers == 2
    assert torch.equal(outputs, stack(x))
    torch.testing.assert_close(hidden[0][0], networks()[0][:2](x[0]))


def test_noise_of_a_run_does_not_depend_on_its_neighbours() -> None:
    def noisy(seeds: range) -> StackedNetwork:
        return StackedNetwork([mlp(WIDTHS, parse("eelu"), seed=seed) for seed in seeds])

    together, alone = noisy(range(4)), noisy(range(2, 3))
    x = torch.randn(4, 9, 12)
    seeds = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])
    together.set_seeds(seeds)
    alone.set_seeds(seeds[:, 2:3])
    outputs = together(x)
    torch.testing.assert_close(outputs[2], alone(x[2:3])[0])
    together.set_seeds(seeds + 1)
    assert together.noisy
    assert not torch.allclose(outputs, together(x))


def test_the_same_seed_gives_the_same_weights_whatever_the_activation() -> None:
    elu, relu, other = (mlp(WIDTHS, parse(arm), seed=seed) for arm, seed in [("elu", 1), ("relu", 1), ("relu", 2)])
    assert torch.equal(elu[0].weight, relu[0].weight)  # type: ignore[arg-type]
    assert not torch.equal(relu[0].weight, other[0].weight)  # type: ignore[arg-type]


def test_building_a_network_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    mlp(WIDTHS, parse("elu"), seed=5)
    assert torch.equal(before, torch.get_rng_state())


def test_initial_weights_have_the_stated_variance() -> None:
    he, own = (mlp((500, 400, 2), parse("elu"), seed=0, initialization=kind) for kind in ("he", "activation"))
    assert he.get_parameter("0.weight").std().item() == pytest.approx((2 / 500) ** 0.5, rel=0.01)
    assert own.get_parameter("0.weight").std().item() == pytest.approx(zmnn.gain("elu") / 500**0.5, rel=0.01)
    assert not he.get_parameter("0.bias").any()


def test_networks_that_differ_cannot_be_stacked() -> None:
    with pytest.raises(ValueError, match="equal layers"):
        StackedNetwork([mlp((4, 3, 2), parse("elu"), seed=0), mlp((4, 5, 2), parse("elu"), seed=0)])
    with pytest.raises(ValueError, match="cannot be stacked"):
        StackedNetwork([nn.Sequential(nn.Linear(4, 4), zmnn.PReLU(4), nn.Linear(4, 2))])
    with pytest.raises(ValueError, match="bias"):
        StackedNetwork([nn.Sequential(nn.Linear(4, 4, bias=False))])
