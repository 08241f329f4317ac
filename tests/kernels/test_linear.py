"""The fused linear layer: programs in the interpreter against float64, operators' registration, function and module."""

import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zeromean as zm
from tests import oracles
from tests.nn.test_memory import kept_bytes
from zeromean.kernels import linear as kernels
from zeromean.nn.linear import Formula, LinearAct, _Fused, linear_act

SCALARS = {"elu": (1.3, 1.1, 0.9), "leaky_relu": (0.2, 0.0, 0.0), "shifted_relu": (0.0, 0.0, 0.0)}
SETTINGS: list[tuple[str, dict[str, float]]] = [
    ("elu", {}),
    ("elu", {"alpha": 1.5}),
    ("selu", {}),
    ("celu", {"alpha": 0.7}),
    ("relu", {}),
    ("leaky_relu", {"negative_slope": 0.2}),
    ("shifted_relu", {}),
]
ROUNDING = 2.0**-11  # of float16


class Case(NamedTuple):
    """What the interpreter runs, on tiles of 32 by 32 summed 16 at a time; most sizes are no multiples of those."""

    rows: int
    inner: int
    units: int
    activation: str = "elu"
    bias: bool = True
    round_preact: bool = True
    parts: int = 1
    unit: bool = False


class Result(NamedTuple):
    """Tensors in and out of the programs."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    gradient: Tensor
    y: Tensor
    dz: Tensor
    db: Tensor


CASES = [
    Case(200, 136, 72),
    Case(200, 136, 72, parts=2),
    Case(200, 136, 72, round_preact=False),
    Case(200, 136, 72, unit=True),
    Case(160, 64, 256, unit=True),
    Case(97, 72, 40, bias=False),
    Case(97, 72, 40, "leaky_relu"),
    Case(97, 72, 40, "shifted_relu"),
    Case(64, 16, 32),
    Case(1, 64, 8),
]


FAR = ("far",)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    pytest.importorskip("triton")
    path: Path = tmp_path_factory.mktemp("interpreter") / "results.pt"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.kernels.linear_program", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[tuple[Any, ...], tuple[Any, ...]] = torch.load(path)
    return results


def scalars_of(case: Case) -> tuple[float, float, float]:
    return (1.0, 1.0, 1.0) if case.unit else SCALARS[case.activation]


def oracle_value(z: Tensor, case: Case) -> Tensor:
    alpha, scale, input_scale = scalars_of(case)
    if case.activation == "elu":
        return torch.from_numpy(scale * oracles.elu((input_scale * z).numpy(), alpha)).where(z <= 0, scale * z)
    return z.where(z > 0, alpha * z) if case.activation == "leaky_relu" else z.clamp(min=-1)


def oracle_slope(y: Tensor, case: Case) -> Tensor:
    alpha, scale, input_scale = scalars_of(case)
    if case.activation == "elu":
        return torch.where(y > 0, scale, input_scale * (y + scale * alpha))
    return torch.where(y > 0, 1.0, alpha) if case.activation == "leaky_relu" else (y > -1).double()


def distance(result: Tensor, expected: Tensor) -> float:
    """Of the whole, relative to its size: the largest of many single ones would be a tail, not an error."""
    return float((result.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_forward_program_against_float64(case: Case, interpreted: dict[tuple[Any, ...], tuple[Any, ...]]) -> None:
    result = Result(*interpreted[case])
    z = result.x.double() @ result.weight.double().t() + (0.0 if result.bias is None else result.bias.double())
    expected = oracle_value(z, case)
    assert distance(result.y, expected) < ROUNDING * (1.0 if case.round_preact else 0.7)
    assert (result.y.double() - expected).abs().max() < 3 * ROUNDING * expected.abs().max()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_backward_program_against_float64(case: Case, interpreted: dict[tuple[Any, ...], tuple[Any, ...]]) -> None:
    result = Result(*interpreted[case])
    dz = result.gradient.double() * oracle_slope(result.y.double(), case)
    assert distance(result.dz, dz) < 0.7 * ROUNDING
    assert result.db.dtype == torch.float16
    torch.testing.assert_close(result.db.double(), dz.sum(0) if case.bias else dz.new_empty(0), rtol=1e-3, atol=1e-3)


def test_rounding_the_preactivation_matters(interpreted: dict[tuple[Any, ...], tuple[Any, ...]]) -> None:
    shape = (200, 136, 72)
    whole, halves, exact = (
        Result(*interpreted[Case(*shape, **how)]).y for how in ({}, {"parts": 2}, {"round_preact": False})
    )
    assert torch.equal(whole, halves)
    assert not torch.equal(whole, exact)


def test_far_and_missing_preactivations(interpreted: dict[tuple[Any, ...], tuple[Any, ...]]) -> None:
    z, y = interpreted[FAR]
    torch.testing.assert_close(y.double(), F.elu(z.double()), equal_nan=True, rtol=2 * ROUNDING, atol=1e-7)


def operands(rows: int = 5, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(rows, 16).to(dtype), torch.randn(8, 16).div(4).to(dtype), torch.randn(8).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wanted", [[True, True, True], [False, True, False], [True, False, False]], ids=str)
def test_opcheck(bias: bool, wanted: list[bool]) -> None:
    x, weight, offset = operands()
    settings = ("elu", SCALARS["elu"])
    forward = (x, weight, offset if bias else None, *settings, True)
    torch.library.opcheck(torch.ops.zeromean.linear_act.default, forward)
    y = torch.ops.zeromean.linear_act(*forward)
    backward = (torch.randn_like(y), y, x, weight, *settings, wanted)
    torch.library.opcheck(torch.ops.zeromean.linear_act_backward.default, backward)


@pytest.mark.parametrize("activation", SCALARS)
def test_derivatives(activation: str) -> None:
    inputs = [tensor.requires_grad_() for tensor in operands(dtype=torch.float64)]
    formula = Formula(activation, SCALARS[activation])
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda *tensors: _Fused.apply(*tensors, formula, True), inputs)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(("activation", "settings"), SETTINGS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_fused_and_plain_results_are_equal(activation: str, settings: dict[str, float], bias: bool) -> None:
    x, weight, offset = operands(rows=20)
    inputs = [x.view(4, 5, 16), weight, *([offset] if bias else [])]
    results = []
    for fused in ("always", "never"):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        y = linear_act(*leaves, activation=activation, fused=fused, **settings)  # type: ignore[arg-type, misc]
        results.append([y.detach(), *torch.autograd.grad(y.sum(), leaves)])  # an expanded gradient
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    assert torch.equal(results[0][0], results[1][0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inside torch, which makes an instance of the function
def test_compiles_without_a_break() -> None:
    x, weight, bias = (tensor.requires_grad_() for tensor in operands())
    call = torch.compile(lambda *inputs: linear_act(*inputs, fused="always"), backend="aot_eager", fullgraph=True)
    expected = linear_act(x, weight, bias, fused="always")
    for one, other in zip(
        [call(x, weight, bias), *torch.autograd.grad(call(x, weight, bias).sum(), (x, weight, bias))],
        [expected, *torch.autograd.grad(expected.sum(), (x, weight, bias))],
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_autocast_chooses_the_type() -> None:
    x, weight, bias = (tensor.requires_grad_() for tensor in operands(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        y = linear_act(x, weight, bias, fused="always")
        plain = F.elu(F.linear(x, weight, bias))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, plain)
    gradients, expected = (torch.autograd.grad(out.float().sum(), (x, weight, bias)) for out in (y, plain))
    for one, other in zip(gradients, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("batched", [(0, None, None), (None, 0, None), (1, 0, 0), (None, None, 0)], ids=str)
def test_batches_of_torch_func(batched: tuple[int | None, ...]) -> None:
    """Gradients of a layer, of a stack of them at once, and one after another."""

    def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
        def loss(*leaves: Tensor) -> Tensor:
            x, weight, bias = leaves
            return linear_act(x, weight, bias, fused="always").float().square().mean()

        made: tuple[Tensor, ...] = torch.func.grad(loss, argnums=(0, 1, 2))(*inputs)
        return made

    def pick(which: int) -> list[Tensor]:
        pairs = zip(inputs, batched, strict=True)
        return [tensor if dim is None else tensor.select(dim, which) for tensor, dim in pairs]

    pairs = zip(operands(), batched, strict=True)
    inputs = [tensor if dim is None else torch.stack([tensor, -tensor], dim) for tensor, dim in pairs]
    together = torch.vmap(gradients, batched)(*inputs)
    apart = zip(*(gradients(*pick(which)) for which in range(2)), strict=True)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, torch.stack(other), rtol=2e-2, atol=2e-2)


def test_only_what_the_neighbours_keep_is_kept() -> None:
    rows = 256
    model = nn.Sequential(
        nn.Linear(8, 16, dtype=torch.bfloat16),
        LinearAct(16, 64, fused="always", dtype=torch.bfloat16),
        nn.Linear(64, 8, dtype=torch.bfloat16),
    )
    assert kept_bytes(model, model, torch.randn(rows, 8, dtype=torch.bfloat16)) == 2 * rows * (16 + 64)


def test_what_the_programs_take() -> None:
    x, weight, bias = operands()
    assert kernels.supported(x, weight, bias)
    assert kernels.supported(x, weight, None)
    assert not kernels.supported(x.float(), weight.float(), None)
    assert not kernels.supported(x, weight.half(), None)
    assert not kernels.supported(x, weight, bias.float())
    assert not kernels.supported(x, weight, bias[:1])
    assert not kernels.supported(x[:, :8], weight, bias)
    assert not kernels.supported(x[:, :12], weight[:, :12], bias)
    assert not kernels.supported(x, weight[:4], bias[:4])
    assert not kernels.supported(x[:0], weight, bias)
    assert not kernels.pays(x, weight, bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "unknown activation 'gelu'"),
        ({"fused": "yes"}, "fused must be one of"),
        ({"fused": "always", "dtype": torch.float32}, "needs float16 or bfloat16"),
        ({"fused": "always", "alpha": -1.0}, ">= 0"),
        ({"alpha": math.inf}, "finite"),
        ({"alpha": True}, "must be a number"),
        ({"activation": "celu", "alpha": 0.0}, "must not be 0"),
    ],
    ids=str,
)
def test_errors_name_the_value(change: dict[str, Any], message: str) -> None:
    inputs = operands(dtype=change.pop("dtype", torch.bfloat16))
    with pytest.raises(ValueError, match=message):
        linear_act(*inputs, **change)


def test_module_is_a_linear_layer_with_an_activation() -> None:
    torch.manual_seed(0)
    layer = LinearAct(16, 8, activation="celu", alpha=0.5)
    plain = nn.Linear(16, 8)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(3, 16)
    assert torch.equal(layer(x), zm.functional.celu(plain(x), 0.5))
    assert torch.equal(layer(x), pickle.loads(pickle.dumps(layer))(x))
    assert repr(layer) == "LinearAct(in_features=16, out_features=8, bias=True, activation='celu', alpha=0.5)"
    with pytest.raises(ValueError, match="must not be 0"):
        LinearAct(16, 8, activation="celu", alpha=0.0)


@pytest.mark.parametrize("training", [True, False])
def test_export_is_plain(training: bool) -> None:
    layer = LinearAct(16, 8, dtype=torch.bfloat16, fused="always" if not training else "auto").train(training)
    program = torch.export.export(layer, (operands()[0],))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert names == {"aten.linear.default", "aten.elu.default"}
