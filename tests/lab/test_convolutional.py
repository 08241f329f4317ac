"""The ELU paper's convolutional networks: what the paper states, and our choices where it is silent."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import zeromean.nn as zmnn
from zeromean.lab.activation import Activation, parse
from zeromean.lab.nets import ConvolutionalNetwork, elu11, elu15, elu18
from zeromean.lab.nets.convolutional import Layer, convolutional_stack, draw_weights, plan
from zeromean.lab.nets.imagenet import SpatialPyramid
from zeromean.lab.recipes.cifar import ELU11_DROPOUT, ELU18_DROPOUT

ELU = Activation("elu")
# (network, padding): map sizes behind each stack, multiply-adds of an image of 32 pixels.
MAPS = {
    (elu11, "alternate"): ([16, 8, 4, 2, 1, 1, 1], 166_074_304),
    (elu11, "one"): ([16, 8, 4, 2, 1, 1, 1], 166_074_304),
    (elu11, "ceil"): ([16, 8, 4, 2, 1, 1, 1], 150_739_904),
    (elu11, "one_ceil"): ([16, 8, 5, 3, 2, 1, 1], 172_899_904),
    (elu18, "alternate"): ([16, 8, 4, 2, 1, 1, 1, 1], 1_701_249_536),
    (elu18, "one"): ([16, 9, 6, 4, 3, 2, 1, 1], 2_794_127_872),
    (elu18, "one_ceil"): ([16, 10, 7, 5, 4, 3, 2, 1], 3_276_703_744),
}
NOT_COMMUTING = {"prelu", "rrelu", "silu", "swish", "gelu", "mish", "erelu", "eprelu", "eelu"}


@dataclass(frozen=True)
class Before:
    """An activation that is kept before the pooling."""

    activation: Activation
    commutes_with_maximum: bool = False

    def build(self, width: int = 1) -> nn.Module:
        return self.activation.build(width)


class Drops(TorchDispatchMode):
    """Collects the rate of every dropout that is computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rates: list[float] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bernoulli_.float:
            kept = args[1] if len(args) > 1 else 0.5
            self.rates.append(round(1 - kept, 6))
        return func(*args, **(kwargs or {}))


def meta(build: Callable[..., ConvolutionalNetwork], *args: Any, **kwargs: Any) -> ConvolutionalNetwork:
    with torch.device("meta"):
        return build(*args, seed=0, **kwargs)


def images(count: int, pixels: int = 32, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, pixels, pixels, generator=generator).to(device)


def size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def dropped(network: nn.Module, pixels: int = 32) -> list[float]:
    drops = Drops()
    with drops:
        network(images(1, pixels, "meta"))
    return drops.rates


@contextmanager
def generator_untouched() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())


def test_the_networks_have_as_many_parameters_as_the_paper_s() -> None:
    assert size(meta(elu11, 100, ELU)) == 1_669_028
    assert size(meta(elu18, 100, ELU)) == 39_330_404
    assert size(meta(elu15, 1000, ELU)) == 164_867_528


@pytest.mark.parametrize(("build", "padding"), MAPS, ids=lambda value: getattr(value, "__name__", value))
def test_maps_and_arithmetic_of_every_padding(build: Any, padding: str) -> None:
    network = meta(build, 100, ELU, padding=padding)
    x, sizes = images(1, device="meta"), []
    with FlopCounterMode(display=False) as counter:
        for stack in network.stacks:
            x = stack(x)
            sizes.append(x.shape[-1])
    assert (sizes, counter.get_total_flops() // 2) == MAPS[build, padding]
    assert x.shape == (1, 100, 1, 1)


@pytest.mark.parametrize(("padding", "poolings"), [("alternate", 6), ("one", 7), ("one_ceil", 8)])
def test_stacks_of_elu18_that_pool(padding: str, poolings: int) -> None:
    stacks = meta(elu18, 10, ELU, padding=padding).stacks
    pooled = [any(isinstance(module, nn.MaxPool2d) for module in stack) for stack in stacks]
    assert pooled == [True] * poolings + [False] * (8 - poolings)


def test_imagenet_maps_end_with_the_finest_level_of_the_pyramid() -> None:
    network = meta(elu15, 1000, ELU)
    x, sizes = images(1, 224, "meta"), []
    for stack in network.stacks[:4]:
        x = stack(x)
        sizes.append(x.shape[-1])
    assert sizes == [28, 14, 7, 4]
    with FlopCounterMode(display=False) as counter:
        assert network(images(2, 224, "meta")).shape == (2, 1000)
    assert counter.get_total_flops() // 4 == 10_314_752_000
    assert network(images(1, 64, "meta")).shape == (1, 1000)


@pytest.mark.parametrize("classes", [1, 10, 100])
def test_outputs_are_classes_whatever_the_image(classes: int) -> None:
    for build in (elu11, elu18):
        network = meta(build, classes, ELU)
        assert network(images(2, device="meta")).shape == (2, classes)
        assert network(images(2, 96, "meta")).shape == (2, classes)


def test_what_is_left_of_the_map_is_averaged() -> None:
    network = elu11(3, ELU, seed=0).eval()
    x = images(1, 64)
    for stack in network.stacks:
        x = stack(x)
    assert x.shape == (1, 3, 2, 2)
    torch.testing.assert_close(network(images(1, 64)), x.mean((2, 3)))


def test_layers_are_named_by_stack_and_number() -> None:
    names = dict(meta(elu18, 100, ELU, "batch").named_modules())
    assert isinstance(names["stack3.conv4"], nn.Conv2d)
    assert isinstance(names["stack3.norm4"], nn.BatchNorm2d)
    assert isinstance(names["stack3.activation4"], zmnn.ELU)
    assert isinstance(dict(meta(elu15, 9, ELU).named_modules())["stack5.linear2"], nn.Linear)


def test_dropout_is_behind_the_last_layer_of_a_stack() -> None:
    assert dropped(meta(elu11, 100, ELU)) == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert dropped(meta(elu18, 100, ELU)) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.5]
    network = meta(elu15, 1000, ELU)
    assert dropped(network, 64) == [0.5, 0.5]
    assert list(network.stacks[4]._modules)[2::3] == ["dropout1", "dropout2"]
    rates = {name: module.p for name, module in meta(elu18, 100, ELU).named_modules() if isinstance(module, nn.Dropout)}
    assert {name: rate for name, rate in rates.items() if rate} == {
        "stack2.dropout4": 0.1,
        "stack3.dropout4": 0.2,
        "stack4.dropout3": 0.3,
        "stack5.dropout3": 0.4,
        "stack6.dropout2": 0.5,
        "stack7.dropout1": 0.5,
    }


def test_dropout_changes_during_training_and_not_the_state() -> None:
    network = meta(elu18, 100, ELU)
    keys = list(network.state_dict())
    network.set_dropout([1.5 * rate for rate in ELU18_DROPOUT], everywhere=True)
    assert dropped(network) == [0.15] * 4 + [0.3] * 4 + [0.45] * 3 + [0.6] * 3 + [0.75] * 3
    network.set_dropout(ELU18_DROPOUT)
    assert dropped(network) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.5]
    assert list(network.state_dict()) == keys
    assert dropped(network.eval()) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inside torch, which makes an instance of a function
def test_new_rates_compile_one_graph_more_and_old_ones_none() -> None:
    network, largest = elu11(100, ELU, seed=0), []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        largest.append(max(node.args[1] for node in graph.graph.nodes if node.target is F.dropout))
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(network, backend=record, fullgraph=True, dynamic=False)
    for factor in (1.0, 1.0, 1.5, 1.0):
        network.set_dropout([factor * rate for rate in ELU11_DROPOUT], everywhere=True)
        step(images(1))
    assert largest == [0.5, 0.75]


@pytest.mark.parametrize("rates", [(0.1,) * 6, (0.0,) * 6 + (0.1,), (1.0,) + (0.0,) * 6, (-0.1,) + (0.0,) * 6])
def test_dropout_rates_that_cannot_be(rates: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="dropout"):
        meta(elu11, 100, ELU).set_dropout(rates)


def test_batch_norm_is_on_every_convolution_but_the_last_and_takes_its_bias() -> None:
    network = meta(elu11, 100, ELU, "batch")
    convolutions = {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    biased = [name for name, module in convolutions.items() if module.bias is not None]
    assert biased == ["stack7.conv1"]
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [norm.num_features for norm in norms] == [module.out_channels for module in convolutions.values()][:-1]
    assert list(network.stacks[0]._modules) == ["conv1", "norm1", "pool", "activation1", "dropout1"]
    assert size(network) == 1_669_028 + sum(norm.num_features for norm in norms)


def test_a_seed_gives_one_set_of_weights_to_all_activations_norms_and_paddings() -> None:
    with generator_untouched():
        networks = [elu11(10, parse(name), seed=3) for name in ("elu", "prelu", "eelu")]
        networks += [elu11(10, ELU, "batch", seed=3), elu11(10, ELU, seed=3, padding="one")]
    expected = networks[0].state_dict()
    assert not torch.equal(expected["stack1.conv1.weight"], elu11(10, ELU, seed=4).state_dict()["stack1.conv1.weight"])
    for network in networks:
        for name, tensor in network.state_dict().items():
            if ".conv" in name:
                assert torch.equal(tensor, expected[name])
            if name.endswith("conv1.bias"):
                assert not tensor.any()


def test_initialization_is_he_s_or_the_activation_s_own() -> None:
    he, own = (
        elu11(10, ELU, seed=0, initialization=kind).get_parameter("stack3.conv2.weight")
        for kind in ("he", "activation")
    )
    assert he.std().item() == pytest.approx((2 / (4 * 240)) ** 0.5, rel=0.01)
    torch.testing.assert_close(own, he * zmnn.gain("elu") / 2**0.5)


@pytest.mark.parametrize("name", zmnn.ACTIVATIONS)
def test_every_activation_trains(name: str) -> None:
    network = elu11(10, parse(name), seed=0)
    network.set_dropout((0.0,) * 7)
    if name in ("eprelu", "eelu"):
        network(images(2))  # the noisy pass, in which slopes do not learn
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    loss = F.cross_entropy(network(images(2)), torch.tensor([3, 5]))
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    for key, parameter in network.named_parameters():
        assert parameter.isfinite().all(), key
        assert parameter.grad is not None, key
        assert parameter.grad.any(), key
    slopes = zmnn.slope_parameters(network)
    assert {slope.numel() for slope in slopes} <= {192, 240, 260, 280, 300}


def test_batch_norm_and_dropout_let_every_gradient_through() -> None:
    network = elu11(10, Activation("mpelu"), "batch", seed=0)
    network(images(4)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


def test_every_gradient_of_the_imagenet_network_is_connected() -> None:
    network = meta(elu15, 10, ELU, "batch")
    network(images(2, 64, "meta")).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_activations_that_commute_never_fall() -> None:
    assert {name for name in zmnn.ACTIVATIONS if not Activation(name).commutes_with_maximum} == NOT_COMMUTING
    assert not parse("leaky_relu:-0.1").commutes_with_maximum
    assert not parse("elu:-1").commutes_with_maximum
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    for name in zmnn.ACTIVATIONS.keys() - NOT_COMMUTING:
        module = Activation(name).build().double()
        for parameter in module.parameters():
            nn.init.constant_(parameter, -1.0)
        assert (module(x).diff() >= 0).all(), name


@pytest.mark.parametrize("name", sorted(zmnn.ACTIVATIONS))
def test_an_activation_follows_the_pooling_only_where_that_is_the_same_function(name: str) -> None:
    (stack,) = plan(((Layer(4, 1), Layer(6, 2)),), "one_ceil", 6)
    modules = list(convolutional_stack(stack, 3, Activation(name), "none")._modules)
    pooled_first = ["conv1", "activation1", "dropout1", "conv2", "pool", "activation2", "dropout2"]
    if name in NOT_COMMUTING:
        pooled_first[4:6] = ["activation2", "pool"]
    assert modules == pooled_first


@pytest.mark.parametrize("name", sorted(zmnn.ACTIVATIONS.keys() - NOT_COMMUTING))
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_both_orders_of_activation_and_pooling_are_one_function(name: str, norm: Any) -> None:
    (stack,) = plan(((Layer(4, 1), Layer(6, 2)),), "one_ceil", 6)
    results = []
    for source in (Activation(name), Before(Activation(name))):
        network = ConvolutionalNetwork(convolutional_stack(stack, 3, source, norm))
        draw_weights(network, source, "he", 0).double()
        if norm == "batch":
            nn.init.constant_(network.get_parameter("0.norm2.weight"), -1.0)
        x = images(5, 6).double().requires_grad_()
        y = network(x)
        y.square().sum().backward()
        assert x.grad is not None
        results.append((y, x.grad, *[parameter.grad for parameter in network.parameters()]))
    torch.testing.assert_close(results[0], results[1])


def test_the_evaluated_network_exports_to_plain_operators() -> None:
    network = elu11(10, Activation("mpelu"), "batch", seed=0).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(network, (images(3),), dynamic_shapes=((batch, None, None, None),))
    assert "zeromean" not in program.graph_module.code
    torch.testing.assert_close(program.module()(images(2)), network(images(2)))


def test_channels_last_changes_nothing() -> None:
    network = elu11(10, ELU, seed=0).eval()
    expected = network(images(2))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = images(2).contiguous(memory_format=torch.channels_last)
    assert network.stacks[0](x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pixels", [1, 3, 4, 7])
def test_the_pyramid_takes_the_maximum_of_each_cell(pixels: int) -> None:
    x = images(2, pixels)
    cells = []
    for level in (4, 2, 1):
        edges = [(i * pixels // level, -(-(i + 1) * pixels // level)) for i in range(level)]
        rows = [[x[..., a:b, c:d].amax((2, 3)) for c, d in edges] for a, b in edges]
        cells.append(torch.stack([torch.stack(row, -1) for row in rows], -2).flatten(1))
    torch.testing.assert_close(SpatialPyramid()(x), torch.cat(cells, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"padding": "same"}, "padding must be one of .* got 'same'"),
        ({"padding": "ceil"}, "stack 4 shrinks from 2 pixels to 0; use 'one_ceil'"),
        ({"norm": "layer"}, "norm must be one of none, batch, got 'layer'"),
        ({"classes": 0}, "classes must be at least 1, got 0"),
    ],
)
def test_errors_name_the_value_and_the_remedy(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        meta(elu18, **{"classes": 10, "activation": ELU, **change})
