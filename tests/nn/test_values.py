import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import zeromean as zm
from tests.cases import ACTIVATION_CASES, ActivationCase
from tests.tolerances import NOISY, SMOOTH_ATOL, TOLERANCES, Tolerance

FINITE = [-1e4, -100.0, -20.0, -8.0, -1.0, -0.5, -1e-8, 0.0, 1e-8, 0.5, 1.0, 20.0, 1e4]

each_case = pytest.mark.parametrize("case", ACTIVATION_CASES, ids=lambda case: case.name)
each_type = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def points(case: ActivationCase, dtype: torch.dtype) -> Tensor:
    """The points as rounded to the type."""
    values = FINITE + ([-math.inf, math.inf] if case.infinite else [])
    if case.explodes:
        values = [v for v in values if v >= -8]
    return torch.tensor(values, dtype=dtype)


def tolerance_of(case: ActivationCase, dtype: torch.dtype) -> Tolerance:
    tolerance = NOISY if case.noisy and dtype == torch.float64 else TOLERANCES[dtype]
    return tolerance if case.infinite else replace(tolerance, atol=SMOOTH_ATOL)


@each_type
@each_case
def test_values_equal_the_oracle(case: ActivationCase, dtype: torch.dtype) -> None:
    x, tolerance = points(case, dtype), tolerance_of(case, dtype)
    parameters = case.tensors(torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.from_numpy(case.value(x.double().numpy(), *case.parameters)).to(dtype)
    actual = case.call(x.requires_grad_(), *parameters)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.detach(), expected, rtol=tolerance.rtol, atol=tolerance.atol, equal_nan=True)


@each_type
@each_case
def test_slopes_equal_the_oracle(case: ActivationCase, dtype: torch.dtype) -> None:
    x, tolerance = points(case, dtype).requires_grad_(), tolerance_of(case, dtype)
    parameters = case.tensors(torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.from_numpy(case.slope(x.detach().double().numpy(), *case.parameters)).to(dtype)
    (dx,) = torch.autograd.grad(case.call(x, *parameters), x, torch.ones_like(x))
    assert dx.dtype == dtype
    torch.testing.assert_close(dx, expected, rtol=tolerance.rtol, atol=tolerance.slope_atol)


@each_case
def test_values_without_grad_equal_those_with(case: ActivationCase) -> None:
    x = points(case, torch.float32)
    parameters = case.tensors(torch.float32)
    torch.testing.assert_close(
        case.call(x, *parameters),
        case.call(x.clone().requires_grad_(), *parameters).detach(),
        rtol=0,
        atol=0,
        equal_nan=True,
    )


@each_case
def test_nan_passes_through(case: ActivationCase) -> None:
    x = torch.tensor([math.nan, 1.0], requires_grad=True)
    assert case.call(x, *case.tensors(torch.float32)).isnan().tolist() == [True, False]


@each_case
def test_first_and_second_derivatives(case: ActivationCase) -> None:
    torch.manual_seed(0)
    x = (torch.randn(3, 4, dtype=torch.float64) * 2).requires_grad_()
    parameters = [p.requires_grad_(not case.noisy) for p in case.tensors()]
    assert torch.autograd.gradcheck(case.call, (x, *parameters))
    assert torch.autograd.gradgradcheck(case.call, (x, *parameters))


@pytest.mark.parametrize("case", [c for c in ACTIVATION_CASES if c.parameters], ids=lambda case: case.name)
def test_parameter_gradients_per_channel_are_summed_in_float32(case: ActivationCase) -> None:
    """Added up in bfloat16, 4096 terms would be off by far more than what rounding each output leaves."""
    torch.manual_seed(0)
    x = torch.randn(4096, 3, 1, 1).bfloat16()
    grads = []
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        parameters = [p.to(wide).repeat(3).requires_grad_() for p in case.tensors()]
        out = case.call(x.to(dtype), *parameters)
        grads.append(torch.autograd.grad(out, parameters, torch.ones_like(out)))
    for narrow, exact in zip(*grads, strict=True):
        assert narrow.shape == (3,)
        torch.testing.assert_close(narrow.double(), exact, rtol=5e-3, atol=1.0)


@pytest.mark.parametrize("case", [c for c in ACTIVATION_CASES if not c.explodes], ids=lambda case: case.name)
def test_gradient_never_turns_nan_at_large_inputs(case: ActivationCase) -> None:
    """Both sides of a choice must stay finite: 0 times infinity on the side not chosen is NaN."""
    x = torch.tensor([-1e30, -1e4, -100.0, 100.0, 1e4, 1e30], requires_grad=True)
    parameters = [p.requires_grad_() for p in case.tensors(torch.float32)]
    for gradient in torch.autograd.grad(case.call(x, *parameters).sum(), [x, *parameters], create_graph=True):
        assert gradient.isfinite().all()


@each_case
def test_evaluation_has_finite_gradients_at_large_inputs(case: ActivationCase) -> None:
    module = case.module().eval()
    x = torch.tensor([-100.0, 100.0, 1e4], requires_grad=True)
    for gradient in torch.autograd.grad(module(x).sum(), [x, *module.parameters()]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("function", [zm.functional.pelu, zm.functional.mpelu])
@pytest.mark.parametrize("save", ["output", "input"])
def test_saturated_units_teach_their_depth_only(function: Callable[..., Tensor], save: str) -> None:
    """At x = -infinity the output is minus the first parameter, whatever the second."""
    depth, width = torch.tensor([1.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    x = torch.full((3,), -math.inf, requires_grad=True)
    dx, ddepth, dwidth = torch.autograd.grad(function(x, depth, width, save=save).sum(), [x, depth, width])
    assert dx.tolist() == [0.0, 0.0, 0.0]
    assert ddepth.item() == -3.0
    assert dwidth.item() == 0.0


def test_expm1_keeps_small_inputs() -> None:
    x = torch.tensor([-1e-6], requires_grad=True)
    for case in ACTIVATION_CASES:
        expected = case.value(x.detach().double().numpy(), *case.parameters)
        actual = case.call(x, *case.tensors(torch.float32)).detach().double().numpy()
        np.testing.assert_allclose(actual, expected, rtol=1e-6, err_msg=case.name)
