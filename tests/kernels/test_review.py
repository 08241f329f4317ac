"""What the operators must withstand: hooks that change layouts, torch.vmap, two draws of noise in one program."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zeromean as zm
from tests.cases import ACTIVATION_CASES, ActivationCase
from zeromean.kernels import modes, operator
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


ONE_OF_EACH = list({case.name.split(":")[0]: case for case in ACTIVATION_CASES}.values())


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.name)
def test_forward_mode_over_reverse_mode(case: ActivationCase) -> None:
    """As `torch.func.hessian` has it; an autograd function without a rule for forward mode is an error there."""
    x, parameters = torch.linspace(-2, 2, 4, dtype=torch.float64), case.tensors()

    def loss(x: Tensor) -> Tensor:
        return (case.call(x, *parameters) ** 2).sum()

    torch.testing.assert_close(torch.func.hessian(loss)(x), torch.autograd.functional.hessian(loss, x))


def test_a_float16_slope_of_zero_learns_from_a_wider_output() -> None:
    """The smallest slope that is told from 0 would be 0 in float16."""
    x, weight = torch.randn(99), torch.zeros(1, dtype=torch.float16, requires_grad=True)
    zf.prelu(x, weight, save="output").sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, x.clamp(max=0).sum()[None].half(), rtol=4e-3, atol=0)


def test_a_parameter_on_another_device_errs() -> None:
    x, elsewhere = torch.randn(3), torch.ones(3, device="meta")
    with pytest.raises(ValueError, match="must lie on x's device cpu, got meta"):
        zf.prelu(x, elsewhere[:1])
    with pytest.raises(ValueError, match="residual must have"):
        zf.elu_add(x, elsewhere)


def test_tensors_of_other_classes_go_through_the_dispatcher() -> None:
    """They may have no memory of their own."""

    class Other(Tensor):
        pass

    x = torch.randn(3)
    other = x.as_subclass(Other)
    assert modes.direct(x, nn.Parameter(x), None)
    assert not modes.direct(x, other)


@pytest.mark.parametrize(("capability", "recent"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_programs_need_instructions_of_ampere(
    capability: tuple[int, int], recent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert operator._recent.__wrapped__(torch.device("cuda:1")) is recent
    assert operator._recent.__wrapped__(torch.device("cpu"))


def test_signs_of_every_layout_in_one_compiled_program() -> None:
    """A compiler cannot sort dimensions by strides that it knows by name only."""
    weight = torch.full((8,), -0.5)

    def call(x: Tensor) -> Tensor:
        return zf.prelu(x, weight, save="output")

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in [(2, 8, 4, 4), (3, 8, 5, 7)]:
        x = torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()
        gradients = [torch.autograd.grad(function(x).sum(), x) for function in (compiled, call)]
        torch.testing.assert_close(*gradients)
