"""Every activation by the programs, against the same in float64 by plain operators."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import zeromean as zm
from tests.kernels.interpreted.calls import CALLS, Call, assert_exact, normal, results
from tests.kernels.interpreted.device import DEVICE, INTERPRETED

each_call = pytest.mark.parametrize("call", CALLS.values(), ids=lambda call: call.name)
NARROW = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ROWS, UNITS = 6, 24
F = zm.functional


@each_call
def test_value_and_gradients(call: Call, launched: list[str]) -> None:
    """Five tiles, the last with a rest that is no multiple of eight."""
    assert_exact(call, normal(4999), call.tensors(1))
    assert launched == ["forward_rows", "backward_rows", *["finish"] * bool(call.parameters)]


@each_call
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_narrow_types(call: Call, dtype: torch.dtype, launched: list[str]) -> None:
    """Rounded once, from float32. Slopes from the output carry its rounding, times the slopes' own steepness."""
    rounding = NARROW[dtype] * (2 if INTERPRETED else 1)
    x, gradient, parameters = normal(ROWS, UNITS, dtype=dtype), normal(ROWS, UNITS, dtype=dtype), call.tensors(UNITS)
    y, dx, *rest = results(call, x, parameters, gradient)
    exact = results(call, x.double(), [p.double() for p in parameters], gradient.double())
    assert y.dtype == dx.dtype == dtype
    assert all(p.dtype == torch.float32 for p in rest)
    assert launched
    torch.testing.assert_close(y.double(), exact[0], rtol=rounding, atol=call.atol)
    torch.testing.assert_close(dx.double(), exact[1], rtol=rounding, atol=16 * rounding + call.atol)
    for one, other in zip(rest, exact[2:], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=16 * rounding, atol=64 * rounding)


@each_call
def test_edges(call: Call) -> None:
    """Zeros of both signs, the smallest numbers, and ones so large that the other side's formula overflows."""
    values = [0.0, -0.0, 1e-40, -1e-40, 1e-8, -1e-8, -1.0, 88.0, -88.0, 1e4, -1e4, 1e30, -1e30]
    x = torch.tensor(values, device=DEVICE)
    y, dx, *rest = results(call, x, call.tensors(1), torch.ones_like(x))
    exact = results(call, x.double(), [p.double() for p in call.tensors(1)], torch.ones_like(x).double())
    torch.testing.assert_close(y.double(), exact[0], rtol=1e-3 if call.atol > 1e-3 else 4e-6, atol=1e-37)
    torch.testing.assert_close(dx.double(), exact[1], rtol=4e-6, atol=call.atol)
    assert all(p.isfinite().all() for p in rest)


@each_call
def test_slopes_of_the_largest_numbers(call: Call) -> None:
    """Also where a square or the value itself overflows."""
    x = torch.tensor([1e20, -1e20, 3e38, -3e38], device=DEVICE)
    dx, exact = (results(call, x, call.tensors(1), torch.ones_like(x))[1] for x in (x, x.double()))
    torch.testing.assert_close(dx.double(), exact, rtol=4e-6, atol=call.atol)


@each_call
def test_nan_passes_through(call: Call) -> None:
    x = torch.tensor([math.nan, 1.0], device=DEVICE)
    assert call.function(x, *call.tensors(1)).isnan().tolist() == [True, False]


@each_call
@pytest.mark.parametrize("shape", [(), (0, 3), (1, 1, 1)], ids=str)
def test_next_to_nothing(call: Call, shape: tuple[int, ...]) -> None:
    assert_exact(call, normal(*shape), call.tensors(1))


@each_call
def test_the_same_with_and_without_a_backward_pass(call: Call) -> None:
    x, parameters = normal(100), call.tensors(1)
    with torch.no_grad():
        alone = call.function(x, *parameters)
    assert torch.equal(alone, results(call, x, parameters, torch.ones_like(x))[0])


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: F.prelu(x, w, save="output"),
        lambda x, w: F.eprelu(x, w, 0.4, True, noisy=False, save="output"),
    ],
    ids=["prelu", "eprelu"],
)
def test_a_slope_of_zero_learns_from_the_output(
    function: Callable[..., Tensor], dtype: torch.dtype, launched: list[str]
) -> None:
    x, weight = normal(999, dtype=dtype), torch.zeros(1, device=DEVICE)
    y, dx, dweight = results(Call("", function), x, [weight], torch.ones_like(x))
    assert launched == ["forward_rows", "backward_rows", "finish"]
    torch.testing.assert_close(y, x.clamp(min=0), rtol=0, atol=1e-3)
    torch.testing.assert_close(dx, (x > 0).to(dtype), rtol=0, atol=1e-4)
    torch.testing.assert_close(dweight, x.float().clamp(max=0).sum()[None], rtol=4e-3, atol=0)
