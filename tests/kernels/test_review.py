"""What the operators must withstand: hooks that change layouts, torch.vmap, two draws of noise in one program."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zeromean as zm
from zeromean.nn import functional as zf

# From inside torch: tracing makes an instance of an autograd function, and the code generator imports old modules.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SEED = torch.tensor(3)


def test_a_hook_on_saved_tensors_may_change_their_layout() -> None:
    """As `torch.autograd.graph.save_on_cpu` does with pinned memory; the packed signs are in the order of memory."""
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.full((1,), -0.5)
    with torch.autograd.graph.saved_tensors_hooks(Tensor.contiguous, lambda kept: kept):
        y = zf.prelu(x, weight, save="output")
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.where(x > 0, 1.0, -0.5))


CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "below their bound": lambda x, p: zf.mpelu(x, p, p),
    "in a noisy pass": lambda x, p: zf.eelu(x, p, p, training=True, seed=SEED),
    "in a noisy pass of eprelu": lambda x, p: zf.eprelu(x, p, training=True, seed=SEED),
}


@pytest.mark.parametrize("where", CALLS)
def test_gradients_of_parameters_through_vmap(where: str) -> None:
    call = CALLS[where]
    x = torch.randn(3, 8)
    parameters = torch.full((3,), 1e-5).requires_grad_()
    one_by_one = torch.stack([call(x[index], parameters[index]) for index in range(3)])
    at_once = torch.vmap(call)(x, parameters)
    gradients = [torch.autograd.grad(y.sum(), parameters)[0] for y in (at_once, one_by_one)]
    torch.testing.assert_close(*gradients)


def test_a_flag_for_each_slice_errs() -> None:
    x, alpha = torch.randn(2, 3), torch.ones(2, 1)
    with pytest.raises(ValueError, match="noisy must be"):
        zf.eelu(x, alpha, alpha, training=True, noisy=torch.tensor([[True], [False]]))


def test_a_compiled_program_draws_noise_for_each_layer() -> None:
    """Two layers on the same input look like one expression."""
    x = torch.full((64,), -1.0).requires_grad_()
    layers = nn.ModuleList([zm.nn.RReLU(), zm.nn.RReLU()])
    first, second = torch.compile(lambda x: [layer(x) for layer in layers], fullgraph=True, backend="aot_eager")(x)
    assert not torch.equal(first, second)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["pelu", "mpelu", "eelu"])
def test_evaluation_can_be_traced(name: str) -> None:
    module, x = zm.nn.by_name(name).eval(), torch.randn(5)
    torch.testing.assert_close(torch.jit.trace(module, x)(x), module(x))


def test_autocast_leaves_float64_alone_in_a_linear_layer() -> None:
    x, weight = torch.randn(2, 8, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="always"):
        zf.linear_act(x, weight, fused="always")
