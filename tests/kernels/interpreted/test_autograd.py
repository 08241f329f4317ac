"""What is kept, and the programs under all that builds on autograd."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zeromean as zm
from tests.kernels.interpreted.calls import CALLS, Call, normal
from tests.kernels.interpreted.device import DEVICE
from tests.nn.test_memory import kept_bytes

F = zm.functional
ROWS, UNITS = 64, 64
# Bytes kept for each hidden element in bfloat16: the output, which the next layer keeps as its input, and what else.
KEPT = [
    (zm.nn.ELU(), 2.0),
    (zm.nn.ELU(-2.0), 2.125),
    (zm.nn.ELU(save="input"), 4.0),
    (zm.nn.SELU(), 2.0),
    (zm.nn.CELU(0.5), 2.0),
    (zm.nn.ShiftedReLU(), 2.0),
    (zm.nn.LeakyReLU(0.0), 2.0),
    (zm.nn.LeakyReLU(-0.5), 2.125),
    (zm.nn.PReLU(), 2.125),
    (zm.nn.PReLU(UNITS), 2.125),
    (zm.nn.EPReLU(UNITS), 2.125),
    (zm.nn.RReLU(), 2.0),
    (zm.nn.RReLU(-0.5, 0.5), 2.125),
    (zm.nn.EReLU(), 2.0),
    (zm.nn.PELU(UNITS), 2.0),
    (zm.nn.MPELU(UNITS), 2.0),
    (zm.nn.EELU(UNITS), 2.0),
    (zm.nn.SiLU(), 4.0),
    (zm.nn.SiLU(bits=2), 2.25),
    (zm.nn.GELU(), 4.0),
    (zm.nn.Mish(), 4.0),
    (zm.nn.Swish(UNITS), 4.0),
]
TWICE = [name for name in CALLS if name.split(":")[0] not in ("rrelu", "erelu")]


@pytest.mark.parametrize(("module", "expected"), KEPT, ids=str)
@pytest.mark.parametrize("layers", ["linear", "convolution"])
def test_bytes_kept_for_each_hidden_element(module: nn.Module, expected: float, layers: str) -> None:
    """Of a seed and a turn there are 9 bytes in all."""
    if layers == "linear":
        first, second = nn.Linear(8, UNITS), nn.Linear(UNITS, 8)
        x = torch.randn(ROWS, 8)
    else:
        first, second = nn.Conv2d(3, UNITS, 1), nn.Conv2d(UNITS, 3, 1)  # type: ignore[assignment]
        x = torch.randn(1, 3, 8, 8)
    model = nn.Sequential(first, module.train(), second).to(DEVICE, torch.bfloat16)
    kept = kept_bytes(model, model, x.to(DEVICE, torch.bfloat16))
    assert kept / (ROWS * UNITS) == pytest.approx(expected, abs=0.01)


def test_signs_that_do_not_fill_bytes_are_not_kept() -> None:
    """A plane of 49 elements has bytes in two channels: the input is kept instead, with slopes of a channel."""
    first, second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)
    model = nn.Sequential(first, zm.nn.PReLU(8), second).to(DEVICE, torch.bfloat16)
    assert kept_bytes(model, model, normal(1, 3, 7, 7, dtype=torch.bfloat16)) == 4 * 8 * 49


@pytest.mark.parametrize("call", [CALLS[name] for name in TWICE], ids=lambda call: call.name)
def test_second_derivatives(call: Call) -> None:
    """Of the gradient's square, by x and the parameters; by plain operators, from what the programs kept."""
    x, parameters = normal(40), call.tensors(1)
    seconds = []
    for wide in (False, True):
        leaves = [(t.double() if wide else t).detach().requires_grad_() for t in (x, *parameters)]
        y = call.function(*leaves)
        firsts = torch.autograd.grad((y * torch.linspace(-1, 1, 40, device=DEVICE)).sum(), leaves, create_graph=True)
        penalty = torch.stack([(first**2).sum() for first in firsts]).sum() + y.sum()
        seconds.append(torch.autograd.grad(penalty, leaves))
    for one, other in zip(*seconds, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=10 * call.atol)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "name", ["elu:1.0,auto", "elu:-2.0,output", "prelu:-0.5,auto", "pelu:1.5,0.7,input", "eelu:noisy,1.0,auto", "gelu"]
)
def test_vmap_of_grad(name: str, last: bool) -> None:
    call, x = CALLS[name], normal(2, 8, 3, 4, last=last)
    parameters = call.tensors(1)

    def loss(one: Tensor) -> Tensor:
        return (call.function(one, *parameters) ** 2).sum()

    for dim in range(2):
        each = torch.stack([torch.func.grad(loss)(one) for one in x.unbind(dim)])
        together = torch.func.vmap(torch.func.grad(loss), in_dims=dim)(x)
        torch.testing.assert_close(together, each, rtol=1e-5, atol=max(1e-5, 10 * call.atol))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["prelu", "rrelu", "eprelu", "eelu"])
def test_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    x = normal(30, 8)
    plain, repeated = (zm.nn.by_name(name).to(DEVICE) for _ in range(2))
    for _ in range(2):
        gradients = []
        for module in (plain, repeated):
            leaf = x.detach().requires_grad_()
            torch.manual_seed(2)
            y = module(leaf) if module is plain else checkpoint(module, leaf, use_reentrant=reentrant)
            module.zero_grad()
            (y**2).sum().backward()
            gradients.append([t.grad for t in (leaf, *module.parameters())])
        for one, other in zip(*gradients, strict=True):
            assert torch.equal(one, other)


def test_nothing_is_summed_for_parameters_that_do_not_learn(launched: list[str]) -> None:
    x, weight = normal(100).requires_grad_(), torch.tensor([0.2], device=DEVICE)
    F.prelu(x, weight).sum().backward()
    assert launched == ["forward_rows", "backward_rows"]


def test_parameters_learn_where_the_input_needs_no_gradient() -> None:
    x, weight = normal(100), torch.tensor([0.2], device=DEVICE, requires_grad=True)
    F.prelu(x, weight).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, x.clamp(max=0).sum()[None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_the_input_as_it_is(dtype: torch.dtype, launched: list[str]) -> None:
    module, x = zm.nn.PReLU(8).to(DEVICE), normal(6, 8, dtype=dtype).requires_grad_()
    with torch.autocast(DEVICE.type, dtype):
        y = module(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert module.weight.grad is not None
    assert module.weight.grad.dtype == torch.float32
    assert launched
