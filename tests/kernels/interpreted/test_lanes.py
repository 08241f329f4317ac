"""Calls that are like an earlier one, and so go straight to the launches: what may differ all the same."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tests.kernels.interpreted.calls import CALLS, Call, normal
from tests.kernels.interpreted.device import DEVICE
from zeromean.kernels import launch, operator
from zeromean.nn import functional as zf

# From inside torch: its forward mode loads scripted derivatives.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LEARNING = ["swish:0.7", "prelu:-0.5,auto", "pelu:1.5,0.7,input", "eprelu:quiet,-0.3,output", "eelu:quiet,1.0,auto"]
each_learning = pytest.mark.parametrize("call", [CALLS[name] for name in LEARNING], ids=lambda call: call.name)


def gradients(call: Call, x: Tensor, parameters: list[Tensor], gradient: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (x, *parameters)]
    return list(torch.autograd.grad(call.function(*leaves), leaves, gradient))


def compare(call: Call, x: Tensor, parameters: list[Tensor], gradient: Tensor, rtol: float = 1e-4) -> None:
    """With plain operators in float64; after a call of the same kind."""
    call.function(x, *parameters)
    ours = gradients(call, x, parameters, gradient)
    theirs = gradients(call, x.double(), [p.double() for p in parameters], gradient.double())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=rtol, atol=10 * call.atol)


@each_learning
def test_a_known_kind_only_launches(call: Call, launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters of one value a channel come as they are, and so do their gradients."""
    x, parameters = normal(2, 16, 8), call.tensors(16)
    first = gradients(call, x, parameters, torch.ones_like(x))
    count = len(operator._calls)
    monkeypatch.setattr(operator, "_derive", None)
    monkeypatch.setattr(operator.Operator, "run", None)
    monkeypatch.setattr("zeromean.nn.parameters.align", None)
    second = gradients(call, x, parameters, torch.ones_like(x))
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    assert launched == ["forward_rows", "backward_rows", "finish"] * 2
    assert [len(operator._calls), second[1].shape] == [count, (16,)]


@each_learning
@pytest.mark.parametrize(
    "laid_out",
    [
        lambda g: g[:1, :1].expand_as(g),
        lambda g: g.t().contiguous().t(),
        lambda g: g.repeat(1, 2)[:, ::2],
        lambda g: g.repeat(1, 2)[:, : g.shape[1]],
    ],
    ids=["expanded", "turned", "every second", "narrowed"],
)
def test_gradients_of_other_layouts(call: Call, laid_out: Callable[[Tensor], Tensor]) -> None:
    compare(call, normal(6, 16), call.tensors(16), laid_out(normal(6, 16)))


@each_learning
def test_parameters_of_another_type_or_place(call: Call) -> None:
    x, gradient = normal(4, 16), normal(4, 16)
    for tensors in (
        call.tensors(16),
        call.tensors(1),
        [p.squeeze() for p in call.tensors(1)],
        call.tensors(1, 16),
        call.tensors(4, 1),
        [p.repeat(2)[::2] for p in call.tensors(16)],
        call.tensors(16, dtype=torch.bfloat16),
    ):
        compare(call, x, tensors, gradient, rtol=1e-4 if tensors[0].dtype == torch.float32 else 1e-2)


@each_learning
def test_what_learns_may_change(call: Call) -> None:
    x, parameters = normal(4, 16).requires_grad_(), call.tensors(16)
    call.function(x, *parameters).sum().backward()
    alone, x.grad = x.grad, None
    learning = [p.requires_grad_() for p in parameters]
    call.function(x, *learning).sum().backward()
    torch.testing.assert_close(x.grad, alone)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in learning)
    with torch.no_grad():
        assert not call.function(x, *learning).requires_grad


def test_a_parameter_is_read_at_each_call() -> None:
    x, beta = normal(4, 8), torch.ones(8, device=DEVICE)
    first = zf.swish(x, beta)
    beta.zero_()
    torch.testing.assert_close(zf.swish(x, beta), x / 2)
    assert not torch.equal(first, x / 2)


class _Other(Tensor):
    pass


@pytest.mark.parametrize(
    "unpacked",
    [
        lambda t: t.t().contiguous().t() if t.ndim == 2 else t,
        lambda t: t.repeat_interleave(2)[::2] if t.ndim == 1 else t,
        lambda t: t.as_subclass(_Other),
        lambda t: t.double() if t.is_floating_point() else t,
        lambda t: t.clone(),
    ],
    ids=["turned", "strided", "subclass", "wider", "copied"],
)
@each_learning
def test_hooks_on_saved_tensors_may_return_others(call: Call, unpacked: Callable[[Tensor], Tensor]) -> None:
    x, gradient = normal(6, 16), normal(6, 16)
    leaves = [t.requires_grad_() for t in (x, *call.tensors(16))]
    expected = torch.autograd.grad(call.function(*leaves), leaves, gradient)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpacked):
        y = call.function(*leaves)
    for one, other in zip(torch.autograd.grad(y, leaves, gradient), expected, strict=True):
        torch.testing.assert_close(one.as_subclass(Tensor), other, rtol=1e-4, atol=1e-4)


def test_a_saved_tensor_that_was_overwritten_errs() -> None:
    x, beta = normal(4, 8).requires_grad_(), torch.ones(8, device=DEVICE, requires_grad=True)
    for changed in (0, 1):
        inputs = [x.clone(), beta.clone()]
        y = zf.swish(*inputs)
        inputs[changed].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@each_learning
def test_transforms_of_a_known_kind(call: Call) -> None:
    x, parameters, direction = normal(3, 8), call.tensors(1), normal(3, 8)
    (expected, *_) = gradients(call, x, parameters, torch.ones_like(x))

    def total(x: Tensor) -> Tensor:
        return call.function(x, *parameters).sum()

    torch.testing.assert_close(torch.func.grad(total)(x), expected, rtol=1e-4, atol=1e-4)
    with forward_ad.dual_level():
        y = call.function(forward_ad.make_dual(x, direction), *parameters)
        tangent = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, expected * direction, rtol=1e-4, atol=1e-4)


def test_what_is_no_tensor_errs_after_a_call() -> None:
    x, one = normal(4), torch.ones((), device=DEVICE)
    zf.swish(x, one)
    zf.pelu(x, one, one)
    with pytest.raises(ValueError, match="beta must be a tensor"):
        zf.swish(x, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="b must be a tensor"):
        zf.pelu(x, one, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["eprelu", "eelu", "erelu"])
def test_the_first_call_of_a_kind_draws_one_seed(name: str) -> None:
    x = normal(64, 8).abs()
    parameters = [torch.ones(8, device=DEVICE)] * {"erelu": 0, "eprelu": 1, "eelu": 2}[name]
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append([getattr(zf, name)(x, *parameters, training=True), torch.rand(1, device=DEVICE)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_settings_belong_to_the_kind() -> None:
    x, weight, seed = normal(64), torch.ones(1, device=DEVICE), torch.tensor(4, device=DEVICE)
    wide, narrow, wide_again = (zf.eprelu(x, weight, e, True, seed=seed) for e in (0.8, 0.0, 0.8))
    torch.testing.assert_close(wide, wide_again, rtol=0, atol=0)
    torch.testing.assert_close(narrow, x)
    assert not torch.equal(wide, narrow)


def test_only_so_many_kinds_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    from zeromean.kernels import lane

    monkeypatch.setattr(operator, "_MOST_CALLS", 3)
    monkeypatch.setattr(lane, "_MOST_LANES", 3)
    for size in range(1, 9):
        x = normal(size)
        torch.testing.assert_close(zf.swish(x, torch.zeros(1, device=DEVICE)), x / 2)
        assert max(len(operator._calls), len(lane._lanes)) <= 3


def test_types_and_devices_belong_to_the_kind() -> None:
    """A program is compiled for each, and reads addresses of its own device."""
    x, seed = torch.ones(3), torch.tensor(1)
    places: list[Any] = ["cpu", "meta", torch.float16]
    kinds = {
        operator._kind(x.to(one), x.to(other), x.to(third), seed.to(fourth), None)
        for one in places
        for other in places
        for third in places
        for fourth in ("cpu", "meta")
    }
    assert len(kinds) == 54


@pytest.mark.parametrize(("scratch", "known", "short"), [(0, True, True), (8, True, False), (0, False, False)])
def test_what_starts_a_compiled_program(
    scratch: int, known: bool, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program with scratch memory needs Triton to make it."""
    monkeypatch.setattr(launch, "_LAUNCHER_IS_KNOWN", known)
    run: Any = SimpleNamespace(
        launch=object(), global_scratch_size=scratch, profile_scratch_size=0, launch_cooperative_grid=0, launch_pdl=0
    )
    start = launch._start(SimpleNamespace(run=run, function=7, packed_metadata=(2, 1, 0)))
    assert start[0] is (run.launch if short else run)
    assert start[1] == 7
    assert start[-4:] == ((2, 1, 0), None, None, None)
