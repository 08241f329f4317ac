"""Shapes, memory layouts, types, in-place work, and layers used twice."""

import pytest
import torch
from torch import Tensor, nn

import zeromean as zm
from tests.cases import ACTIVATION_CASES, ActivationCase

each_case = pytest.mark.parametrize("case", ACTIVATION_CASES, ids=lambda case: case.name)
IN_PLACE = [
    zm.nn.ELU(inplace=True),
    zm.nn.SELU(inplace=True),
    zm.nn.CELU(0.7, inplace=True),
    zm.nn.ReLU(inplace=True),
    zm.nn.LeakyReLU(0.1, inplace=True),
    zm.nn.RReLU(inplace=True),
    zm.nn.SiLU(inplace=True),
    zm.nn.Mish(inplace=True),
]


def run(case: ActivationCase, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = case.call(x, *case.tensors(torch.promote_types(x.dtype, torch.float32)))
    (dx,) = torch.autograd.grad(y, x, gradient)
    return y.detach(), dx


@each_case
@pytest.mark.parametrize("shape", [(), (0,), (5,), (0, 3), (2, 3), (2, 3, 4), (2, 3, 1, 2, 2)], ids=str)
def test_any_shape(case: ActivationCase, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    y, dx = run(case, x, torch.ones(shape))
    assert y.shape == dx.shape == x.shape
    if not case.noisy:
        flat, flat_dx = run(case, x.reshape(-1), torch.ones(x.numel()))
        torch.testing.assert_close(y.reshape(-1), flat)
        torch.testing.assert_close(dx.reshape(-1), flat_dx)


@each_case
def test_channels_last_is_kept_and_changes_no_value(case: ActivationCase) -> None:
    x, gradient = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    y, dx = run(case, x, gradient)
    layout = torch.channels_last
    y_last, dx_last = run(case, x.to(memory_format=layout), gradient.to(memory_format=layout))
    assert y_last.is_contiguous(memory_format=layout)
    assert dx_last.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y_last, y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dx_last, dx, rtol=1e-6, atol=1e-6)


@each_case
def test_strided_inputs_and_expanded_gradients(case: ActivationCase) -> None:
    x = torch.randn(6, 8)
    sparse = x.t()[::2, ::3]
    y, dx = run(case, sparse.contiguous(), torch.full(sparse.shape, 2.0))
    y_strided, dx_strided = run(case, sparse, torch.tensor(2.0).expand(sparse.shape))
    torch.testing.assert_close(y_strided, y)
    torch.testing.assert_close(dx_strided, dx)


@each_case
def test_narrow_inputs_with_float32_parameters_under_autocast(case: ActivationCase) -> None:
    torch.manual_seed(0)
    linear, module = nn.Linear(6, 4), case.module()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(linear(torch.randn(3, 6)))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    for parameter in (*linear.parameters(), *module.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("module", IN_PLACE, ids=lambda module: type(module).__name__)
@pytest.mark.parametrize("training", [True, False])
def test_in_place_overwrites_and_differentiates_alike(module: nn.Module, training: bool) -> None:
    module.train(training)
    if isinstance(module, zm.nn.RReLU):
        module.seed = torch.tensor(3)
    leaf = torch.randn(4, 5, requires_grad=True)
    results = []
    for inplace in (True, False):
        module.inplace = inplace  # type: ignore[assignment]
        x = leaf * 1
        y = module(x)
        assert (y.data_ptr() == x.data_ptr()) is inplace
        results.append((y.detach().clone(), *torch.autograd.grad(y.sum(), leaf)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "case", [case for case in ACTIVATION_CASES if not hasattr(case.module(), "seed")], ids=lambda case: case.name
)
def test_a_module_used_twice_in_one_graph(case: ActivationCase) -> None:
    """The gradient through both uses is the product of the two slopes, and parameters collect from both."""
    module, shared = case.module().eval().double(), case.module().train().double()
    x = torch.randn(7, dtype=torch.float64, requires_grad=True)
    twice = torch.autograd.grad(shared(shared(x)).sum(), [x, *shared.parameters()])
    expected = torch.autograd.grad(module(module(x)).sum(), [x, *module.parameters()])
    for one, other in zip(twice, expected, strict=True):
        torch.testing.assert_close(one, other)


@each_case
def test_vmap_of_grad(case: ActivationCase) -> None:
    x, parameters = torch.randn(5, 4, dtype=torch.float64), case.tensors()

    def loss(row: Tensor) -> Tensor:
        return (case.call(row, *parameters) ** 2).sum()

    each = torch.stack([torch.func.grad(loss)(row) for row in x])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), each)
