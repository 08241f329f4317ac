"""Stacks of convolutions as a compiled step in half precision computes them: the same function as module by module."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from zeromean.lab.activation import parse
from zeromean.lab.nets import aligned
from zeromean.lab.nets.aligned import AlignedStack
from zeromean.lab.nets.convolutional import ConvolutionalNetwork, Layer, convolutional_stack, draw_weights, plan

STACKS = ((Layer(12, 5),), (Layer(12, 1), Layer(20, 3)), (Layer(9, 2),))


def network(activation: str = "elu", norm: Any = "none", padding: Any = "one_ceil") -> ConvolutionalNetwork:
    modules: dict[str, nn.Module] = {}
    channels = 3
    for number, stack in enumerate(plan(STACKS, padding, 12), 1):
        modules[f"stack{number}"] = convolutional_stack(stack, channels, parse(activation), norm)
        channels = stack.layers[-1].units
    modules["last"] = AlignedStack(nn.Conv2d(channels, 10, 1))
    built = draw_weights(ConvolutionalNetwork(OrderedDict(modules)), parse(activation), "he", 0).double()
    for name, parameter in built.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    for position, module in enumerate(built.modules()):
        if hasattr(module, "seed"):
            module.seed = torch.tensor(position)
    return built


def images() -> Tensor:
    x = torch.randn(3, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return x.contiguous(memory_format=torch.channels_last)


def results(net: nn.Module, x: Tensor) -> list[Tensor]:
    y = net(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(net.parameters()))]


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA in a compiled function, but in the type at hand."""
    monkeypatch.setattr(aligned, "half_precision", lambda x: x.dtype)


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("padding", ["alternate", "one", "ceil", "one_ceil"])
@pytest.mark.parametrize("activation", ["elu", "relu", "shifted_relu", "leaky_relu", "mpelu", "prelu", "rrelu", "mish"])
def test_it_is_the_same_function(
    activation: str, norm: str, padding: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = results(network(activation, norm, padding), images())
    request.getfixturevalue("forced")
    torch.testing.assert_close(results(network(activation, norm, padding), images()), expected)


@pytest.mark.usefixtures("forced")
def test_maps_carry_a_multiple_of_eight_channels_through_what_has_none_of_its_own() -> None:
    x, widths = images(), []
    for stack in network().stacks:
        x = stack(x)
        widths.append(x.shape[1])
    assert widths == [16, 24, 16]
    widths = []
    for name, norm in (("elu", "none"), ("mpelu", "none"), ("rrelu", "none"), ("elu", "batch")):
        stack = network(name, norm).stacks[1]
        widths.append(stack(torch.randn(2, 12, 8, 8).double()).shape[1])
    assert widths == [24, 20, 20, 20]
    assert network()(images()).shape[1] == 10


@pytest.mark.usefixtures("forced")
def test_images_that_ask_for_a_gradient_get_it() -> None:
    x = images().requires_grad_()
    network()(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.any()


def test_only_half_precision_compiled_on_cuda_takes_this_way(monkeypatch: pytest.MonkeyPatch) -> None:
    class Somewhere:
        def __init__(self, dtype: torch.dtype, cuda: bool) -> None:
            self.dtype, self.is_cuda = dtype, cuda

    def asked(dtype: torch.dtype, cuda: bool = True) -> torch.dtype | None:
        return aligned.half_precision(Somewhere(dtype, cuda))  # type: ignore[arg-type]

    assert asked(torch.bfloat16) is None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert asked(torch.bfloat16) is torch.bfloat16
    assert asked(torch.bfloat16, cuda=False) is None
    assert asked(torch.float32) is None
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.float16)
    assert asked(torch.float32) is torch.float16


@pytest.mark.usefixtures("forced")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inside torch
def test_networks_of_one_kind_share_a_compiled_graph() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    step = torch.compile(lambda net, x: net(x).square().sum(), backend=counter, fullgraph=True, dynamic=False)
    for _ in range(3):
        net = network()
        step(net, images()).backward()
        gradients = [parameter.grad for parameter in net.parameters()]
        torch.testing.assert_close(gradients, results(network(), images())[1:])
    assert counter.frame_count == 1
