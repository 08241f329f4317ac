"""The programs inside a compiled function, where a partitioner decides what is kept."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zeromean as zm
from tests.kernels.interpreted.calls import CALLS
from tests.kernels.interpreted.device import DEVICE
from tests.nn.test_memory import kept_bytes

# From inside torch: tracing makes an instance of an autograd function.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
BACKEND = "aot_eager_decomp_partition"
ROWS, UNITS = 64, 64
NOISY = ["rrelu", "erelu", "eprelu", "eelu"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def build(name: str) -> nn.Module:
    """The activation of a name with a seed of its own, if it takes one."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, UNITS), zm.nn.by_name(name), nn.Linear(UNITS, 8)).to(DEVICE)
    if name in NOISY:
        model[1].seed = torch.tensor(5, device=DEVICE)
    return model


def gradients(model: Callable[[Tensor], Tensor], learning: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    return [y.detach(), *torch.autograd.grad((y**2).sum(), list(learning.parameters()))]


@pytest.mark.parametrize("name", [name for name in zm.nn.ACTIVATIONS if name != "relu"])
def test_compiled_equals_eager(name: str, launched: list[str]) -> None:
    """In two passes, a noisy one and a quiet one of those that take turns."""
    model, twin = build(name), build(name)
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True)
    x = torch.randn(ROWS, 8, device=DEVICE)
    for _ in range(2):
        launched.clear()
        actual = gradients(compiled, model, x)
        assert {program.split("_")[0] for program in launched} >= {"forward", "backward"}
        for one, other in zip(actual, gradients(twin, twin, x), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        *[(name, 4.0) for name in ("elu", "shifted_relu", "rrelu", "pelu", "eelu")],
        ("prelu", 4.125),
        ("eprelu", 4.125),
        ("gelu", 8.0),
    ],
)
def test_bytes_kept_for_each_hidden_element(name: str, kept: float) -> None:
    """In float32: the output, and a bit for the sign where it is needed."""
    model = build(name)
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True)
    x = torch.randn(ROWS, 8, device=DEVICE)
    compiled(x)
    assert kept_bytes(compiled, model, x) / (ROWS * UNITS) == pytest.approx(kept, abs=0.01)


@pytest.mark.parametrize("budget", [0.0, 1.0])
@pytest.mark.parametrize("name", ["rrelu:-0.5,0.5", "erelu:0.4", "eprelu:noisy,0.1,auto", "eelu:noisy,1.0,auto"])
def test_the_backward_pass_has_the_noise_of_the_forward_pass(name: str, budget: float) -> None:
    """Also if everything is made again; on the noisy side the function is a line through 0."""
    call = CALLS[name]
    parameters = call.tensors(1)
    x = (-1.0 if name.startswith("rrelu") else 1.0) * (torch.rand(2000, device=DEVICE) + 0.5)
    with torch._functorch.config.patch(activation_memory_budget=budget):
        y = torch.compile(call.function, backend=BACKEND, fullgraph=True)(x.requires_grad_(), *parameters)
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.std() > 0.01
    torch.testing.assert_close(dx, (y / x).detach())


@pytest.mark.parametrize("name", ["elu", "prelu", "eelu"])
def test_one_graph_for_every_size(name: str) -> None:
    module, twin = (zm.nn.by_name(name).to(DEVICE) for _ in range(2))
    compiled = torch.compile(module, backend=BACKEND, fullgraph=True, dynamic=True)
    for size in (5, 6, 9, 1030):
        x = -torch.rand(3, size, device=DEVICE)
        results = []
        for call in (compiled, twin):
            leaf = x.detach().requires_grad_()
            y = call(leaf)
            results.append((y.detach(), *torch.autograd.grad(y.sum(), leaf)))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


def test_a_changed_alpha_takes_effect() -> None:
    module = zm.nn.ELU(1.0)
    compiled = torch.compile(module, backend=BACKEND, fullgraph=True)
    x = torch.full((3,), -1.0, device=DEVICE, requires_grad=True)
    for alpha in (1.0, 2.0, -1.0):
        module.alpha = alpha
        y = compiled(x)
        torch.testing.assert_close(y.detach(), alpha * torch.expm1(x.detach()))
        (dx,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(dx, alpha * torch.exp(x.detach()))


@pytest.mark.parametrize("name", ["elu:-2.0,output", "prelu:-0.5,auto", "rrelu:-0.5,0.5", "eprelu:noisy,0.1,auto"])
def test_one_program_for_every_size_and_layout(name: str) -> None:
    """Without a graph break: whether signs are packed, and in which order, is asked of symbolic sizes."""
    call, slopes = CALLS[name], CALLS[name].tensors(8)
    compiled = torch.compile(lambda x: call.function(x, *slopes), backend=BACKEND, fullgraph=True, dynamic=True)
    for shape in [(2, 8, 4, 4), (3, 8, 5, 7)]:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape, device=DEVICE).to(memory_format=layout).requires_grad_()
            ys = [compiled(x), call.function(x, *slopes)]
            torch.testing.assert_close(*ys)
            gradient = torch.randn(shape, device=DEVICE)
            torch.testing.assert_close(*(torch.autograd.grad(y, x, gradient) for y in ys))
