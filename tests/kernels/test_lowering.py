"""The operators inside torch.compile: right values, one kernel with their neighbours, nothing but the output kept."""

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from tests.nn.test_memory import kept_bytes
from tests.tolerances import SMOOTH_ATOL, TOLERANCES
from zeromean.kernels import lowering
from zeromean.nn import ELU

# From inside torch: tracing makes an instance of an autograd function, and the code generator imports old modules.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
# What an operator returns if it is called instead of opened.
CLOSED = 77.0
INPUTS = "Tensor? p0, Tensor? p1, Tensor? seed, Tensor? noisy, float[] scalars"
LIBRARY = torch.library.Library("zeromean_opened", "DEF")


@dataclass(frozen=True)
class Case:
    """An operator with one setting, and the float64 function that it must equal."""

    name: str
    operator: str
    scalars: tuple[float, ...]
    reference: Callable[[Tensor, Tensor, Tensor], Tensor]
    parameters: int = 0
    from_output: bool = True


def _exponential(x: Tensor) -> Tensor:
    return torch.expm1(x.clamp(max=0))


CASES = [
    Case("elu", "elu", (0.7, 1.0, 1.0), lambda x, p, q: F.elu(x, 0.7)),
    Case("selu", "elu", (1.6732632423543772, 1.0507009873554805, 1.0), lambda x, p, q: F.selu(x)),
    Case("celu", "elu", (0.5, 1.0, 2.0), lambda x, p, q: F.celu(x, 0.5)),
    Case("celu:-32", "elu", (-32.0, 1.0, -1 / 32), lambda x, p, q: F.celu(x, -32.0), from_output=False),
    Case("shifted_relu", "shifted_relu", (), lambda x, p, q: F.threshold(x, -1.0, -1.0)),
    Case("leaky_relu", "leaky_relu", (0.1,), lambda x, p, q: F.leaky_relu(x, 0.1)),
    Case("prelu", "prelu", (0.0,), lambda x, p, q: torch.where(x > 0, x, p * x), 1),
    Case("prelu:bounded", "prelu", (0.9,), lambda x, p, q: torch.where(x > 0, x, p.clamp(min=0.9) * x), 1),
    Case("pelu", "pelu", (), lambda x, p, q: p * torch.where(x < 0, _exponential(x / q), x / q), 2),
    Case("mpelu", "mpelu", (), lambda x, p, q: torch.where(x < 0, p * _exponential(q * x), x), 2),
    Case("silu", "silu", (), lambda x, p, q: F.silu(x), from_output=False),
    Case("swish", "swish", (), lambda x, p, q: x * torch.sigmoid(p * x), 1, from_output=False),
    Case("gelu", "gelu", (), lambda x, p, q: F.gelu(x), from_output=False),
    Case("gelu_tanh", "gelu_tanh", (), lambda x, p, q: F.gelu(x, approximate="tanh"), from_output=False),
    Case("mish", "mish", (), lambda x, p, q: F.mish(x), from_output=False),
]


def _call_closed(x: Tensor, *rest: Any) -> Tensor:
    return torch.full_like(x, CLOSED)


def _define(name: str, schema: str) -> Any:
    LIBRARY.define(f"{name}({schema}) -> Tensor")
    LIBRARY.impl(name, _call_closed, "CompositeExplicitAutograd")
    torch.library.register_fake(f"zeromean_opened::{name}", lambda x, *rest: torch.empty_like(x), lib=LIBRARY)
    return getattr(torch.ops.zeromean_opened, name).default


FORWARD = {name: _define(name, f"Tensor x, {INPUTS}") for name in lowering.FORMULAS}
BACKWARD = {
    name: _define(f"{name}_backward", f"Tensor gradient, Tensor kept, Tensor? signs, {INPUTS}, bool output_kept")
    for name in lowering.FORMULAS
}
for _name, _formula in lowering.FORMULAS.items():
    lowering.register(_formula, FORWARD[_name], BACKWARD[_name])


@pytest.fixture(autouse=True)
def nothing_from_before() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False):
        yield


def inputs(dtype: torch.dtype) -> Tensor:
    """[2, 3, 49], with the sides of every bend, both ends, and values near 0."""
    torch.manual_seed(1)
    near = torch.tensor([0.0, 1e-3, -1e-3, -0.29, -0.31, 0.29, 0.31, -1.0, -30.0, 30.0, -1e-20, -90.0])
    return torch.cat([near.expand(6, -1), 3 * torch.randn(6, 37)], 1).reshape(2, 3, 49).to(dtype)


def parameters(case: Case) -> list[Tensor | None]:
    values = [torch.tensor([0.25, 1.0, 1.5]).reshape(1, 3, 1), torch.tensor([0.5, 1.0, 2.0]).reshape(1, 3, 1)]
    return [*values[: case.parameters], None, None][:2]


def expected(case: Case, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient of x in float64."""
    wide = x.double().requires_grad_()
    p0, p1 = (torch.ones(()).double() if p is None else p.double() for p in parameters(case))
    y = case.reference(wide, p0, p1)
    (dx,) = torch.autograd.grad(y, wide, gradient.double())
    return y.detach(), dx


Results = dict[str, tuple[Tensor, Tensor, Tensor]]


def everything(x: Tensor, gradient: Tensor) -> Results:
    """Of each case: y, dx from the input, dx from the output."""
    results = {}
    for case in CASES:
        p0, p1 = parameters(case)
        y = FORWARD[case.operator](x, p0, p1, None, None, case.scalars)
        from_input, from_output = (
            BACKWARD[case.operator](gradient, kept, None, p0, p1, None, None, case.scalars, output_kept)
            for kept, output_kept in ((x, False), (y, True))
        )
        results[case.name] = (y, from_input, from_output)
    return results


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def compiled(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Results]:
    x = inputs(request.param)
    gradient = torch.randn(x.shape, dtype=x.dtype)
    with torch._inductor.config.patch(fx_graph_cache=False):
        return x, gradient, torch.compile(everything, fullgraph=True)(x, gradient)


def check(case: Case, x: Tensor, gradient: Tensor, results: tuple[Tensor, Tensor, Tensor]) -> None:
    y, dx = expected(case, x, gradient)
    tolerance = TOLERANCES[x.dtype]
    atol = SMOOTH_ATOL if case.operator in ("silu", "swish", "gelu", "gelu_tanh", "mish") else tolerance.atol
    assert_close(results[0].double(), y, rtol=tolerance.rtol, atol=atol)
    for index in (1, 2) if case.from_output else (1,):
        slope_atol = tolerance.slope_atol * float(gradient.abs().max()) * 2
        assert_close(results[index].double(), dx, rtol=tolerance.rtol, atol=slope_atol)
    assert {result.dtype for result in results} == {x.dtype}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_opened_operators_equal_float64(case: Case, compiled: tuple[Tensor, Tensor, Results]) -> None:
    x, gradient, results = compiled
    check(case, x, gradient, results[case.name])


class TorchOperators:
    """Inductor's operators on tensors, with NVIDIA's approximate instructions played by exact ones."""

    where, maximum, minimum, abs = torch.where, torch.maximum, torch.minimum, torch.abs

    def constant(self, value: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor(value, dtype=dtype)

    def inline_asm_elementwise(self, x: Tensor, *, asm: str, **rest: Any) -> Tensor:
        return {"ex2": torch.exp2, "rcp": torch.reciprocal}[asm.split(".")[0]](x)


GPU = lowering.Arithmetic(TorchOperators(), approximate=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_arithmetic_for_a_gpu_equals_float64(case: Case) -> None:
    x = inputs(torch.float32)
    gradient = torch.randn(x.shape)
    p0, p1 = parameters(case)
    formula = lowering.FORMULAS[case.operator]
    y = formula.forward(GPU, x, lowering.Given(p0, p1, case.scalars, False))
    slopes = [
        formula.backward(GPU, gradient, kept, lowering.Given(p0, p1, case.scalars, output_kept))
        for kept, output_kept in ((x, False), (y, True))
    ]
    check(case, x, gradient, (y, slopes[0], slopes[1]))


def slopes_from_the_input(operators: dict[str, Any], x: Tensor) -> dict[str, Tensor]:
    """Of each case; where x is far from 0 an output does not tell it any more."""
    return {
        case.name: operators[case.operator](
            torch.ones_like(x), x, None, *parameters(case), None, None, case.scalars, False
        )
        for case in CASES
        if case.name != "celu:-32"
    }


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slopes_where_squares_and_products_overflow(device: str, dtype: torch.dtype) -> None:
    """By Inductor's code for a CPU, and by the arithmetic for a GPU."""

    def for_a_gpu(name: str) -> Callable[..., Tensor]:
        def call(g: Tensor, v: Tensor, signs: None, p0: Any, p1: Any, seed: None, noisy: None, *rest: Any) -> Tensor:
            given = lowering.Given(p0, p1, *rest)
            return lowering.FORMULAS[name].backward(GPU, g.float(), v.float(), given).to(g.dtype)  # type: ignore[no-any-return]

        return call

    x = torch.tensor([1e4, -1e4, 3e19, -3e19, 3e38, -3e38], dtype=dtype).expand(1, 3, 6).contiguous()
    if device == "cpu":
        actual = torch.compile(lambda x: slopes_from_the_input(BACKWARD, x), fullgraph=True)(x)
    else:
        actual = slopes_from_the_input({name: for_a_gpu(name) for name in lowering.FORMULAS}, x)
    for case in CASES:
        if case.name in actual:
            dx = expected(case, x, torch.ones_like(x))[1]
            assert_close(actual[case.name].double(), dx, rtol=TOLERANCES[dtype].rtol, atol=1e-30, msg=case.name)


def test_expm1_for_a_gpu_is_accurate_over_its_range() -> None:
    x = torch.cat([-torch.logspace(-37, 2, 200_001), torch.linspace(-1, 1, 200_001)])
    true = torch.expm1(x.double())
    error = (GPU.expm1(x).double() - true).abs() / true.abs().clamp(min=1e-300)
    assert float(error.max()) < 6e-7


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nan_passes_through(case: Case) -> None:
    p0, p1 = (torch.ones(()) if p is not None else None for p in parameters(case))
    given = lowering.Given(p0, p1, case.scalars, False)
    assert lowering.FORMULAS[case.operator].forward(GPU, torch.tensor(torch.nan), given).isnan()


class Opened(nn.Module):
    """ELU by the operators, the output kept; they are defined in this file and so need no part of the library."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _FromOutput.apply(x)  # type: ignore[no-untyped-call]
        return y


class _FromOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y: Tensor = FORWARD["elu"](x, None, None, None, None, [1.0, 1.0, 1.0])
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return BACKWARD["elu"](gradient, y, None, None, None, None, None, [1.0, 1.0, 1.0], True)


def kernels(call: Callable[..., Any], *arguments: Any) -> int:
    """How many kernels Inductor writes for a function."""
    torch._inductor.metrics.reset()
    torch.compile(call, fullgraph=True)(*arguments)
    return int(torch._inductor.metrics.generated_kernel_count)


def test_one_kernel_with_bias_and_cast() -> None:
    x, bias = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16), torch.randn(1, 3, 1, 1)

    def layer(x: Tensor) -> Tensor:
        y: Tensor = Opened()(x + bias)
        return y.float() * 2

    assert kernels(layer, x) == 1


def test_memory_format_is_kept() -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    y = torch.compile(Opened(), fullgraph=True)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, F.elu(x))


def test_compiled_layers_keep_the_output_alone() -> None:
    rows, units = 64, 32
    model = nn.Sequential(nn.Linear(8, units), Opened(), nn.Linear(units, 8)).to(torch.bfloat16)
    step, x = torch.compile(model, fullgraph=True), torch.randn(rows, 8, dtype=torch.bfloat16)
    plain = nn.Sequential(model[0], nn.ELU(), model[2])
    assert kept_bytes(step, model, x) == 2 * rows * units
    assert kept_bytes(torch.compile(plain, fullgraph=True), model, x) == 2 * 2 * rows * units


def test_a_compiled_activation_is_not_taken_for_an_exported_one() -> None:
    """An exported one is torch's own, which would keep two tensors."""
    rows, units = 64, 32
    model = nn.Sequential(nn.Linear(8, units), ELU(), nn.Linear(units, 8)).to(torch.bfloat16)
    x = torch.randn(rows, 8, dtype=torch.bfloat16)
    assert kept_bytes(torch.compile(model, fullgraph=True), model, x) == 2 * rows * units


def test_gradients_through_compiled_layers() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 2, 2)]
    x = torch.randn(2, 3, 10, 10)
    gradients = []
    for activation in (Opened(), nn.ELU()):
        model = nn.Sequential(layers[0], activation, *layers[1:])
        loss = torch.compile(model, fullgraph=True)(x).square().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert_close(*gradients)


def test_the_library_has_an_operator_for_every_formula() -> None:
    from torch._inductor.lowering import lowerings

    lowering.teach_inductor()
    for name in lowering.FORMULAS:
        operators = torch.ops.zeromean
        assert getattr(operators, name).default in lowerings
        assert getattr(operators, f"{name}_backward").default in lowerings


def test_what_no_formula_covers_stays_closed() -> None:
    x, signs, seed = torch.randn(4, 8), torch.zeros(4, dtype=torch.uint8), torch.tensor(1)
    forward, backward = FORWARD["leaky_relu"], BACKWARD["leaky_relu"]
    calls: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda x: forward(x + 0, None, None, None, None, [0.1]), x.double()),
        (lambda x: forward(x + 0, None, None, seed, None, [0.1]), x),
        (lambda x: backward(x + 0, x, signs, None, None, None, None, [0.1], True), x),
    ]
    for call, argument in calls:
        y = torch.compile(call, fullgraph=True)(argument)
        assert_close(y, torch.full_like(argument, CLOSED))


def test_a_torch_without_this_interface_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, lowering.__name__)
    monkeypatch.delattr("torch._inductor.lowering.register_lowering")
    lowering._register_all.cache_clear()
    lowering.teach_inductor()
    lowering.teach_inductor()
    monkeypatch.undo()
    lowering._register_all.cache_clear()
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert torch.__version__ in caplog.text


def test_importing_the_library_does_not_load_inductor() -> None:
    code = """
import sys, zeromean, zeromean.kernels.lowering
zeromean.kernels.lowering.teach_inductor()
sys.exit("torch._inductor.lowering" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0
