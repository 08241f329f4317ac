"""SiLU, GELU and Mish with a few-bit backward pass: values, steps, bytes, layouts, transforms, refusals."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.nn.test_memory import kept_bytes
from tests.tolerances import TOLERANCES
from zeromean.kernels.fewbit_tables import FUNCTIONS, table
from zeromean.nn.fewbit import fewbit

# From inside torch: tracing makes an instance of an autograd function, and the code generator imports old modules.
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")
each_name = pytest.mark.parametrize("name", FUNCTIONS)
each_bits = pytest.mark.parametrize("bits", [1, 2, 3, 4])


class FewBit(nn.Module):
    """The function as a module."""

    def __init__(self, name: str, bits: int) -> None:
        super().__init__()
        self.name, self.bits = name, bits

    def forward(self, x: Tensor) -> Tensor:
        return fewbit(x, self.name, self.bits)


def run(x: Tensor, gradient: Tensor, name: str = "gelu", bits: int = 3) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = fewbit(x, name, bits)
    return y.detach(), torch.autograd.grad(y, x, gradient)[0]


def steps(x: Tensor, name: str, bits: int) -> Tensor:
    """The derivative in steps, counted out."""
    entry = table(name, bits)
    interval = sum((x.double() > threshold).long() for threshold in entry.thresholds)
    return torch.tensor(entry.levels, dtype=torch.float64)[torch.tensor(entry.codes)[interval]]


@each_bits
@each_name
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_values_are_the_functions_and_slopes_the_steps(name: str, bits: int, dtype: torch.dtype) -> None:
    x, gradient = (3 * torch.randn(2, 501, generator=torch.Generator().manual_seed(0))).to(dtype)
    y, dx = run(x, gradient, name, bits)
    torch.testing.assert_close(y, FUNCTIONS[name](x), rtol=TOLERANCES[dtype].rtol, atol=1e-6)
    expected = (steps(x, name, bits) * gradient.double()).to(dtype)
    torch.testing.assert_close(dx, expected, rtol=TOLERANCES[dtype].rtol, atol=0)


@each_bits
def test_bytes_kept_for_each_hidden_element(bits: int) -> None:
    x = torch.randn(256, 8, dtype=torch.bfloat16)
    model = nn.Sequential(nn.Linear(8, 64), FewBit("silu", bits), nn.Linear(64, 8)).bfloat16()
    assert kept_bytes(model, model, x) / (256 * 64) == 2 + bits / 8


def test_bytes_kept_between_convolutions() -> None:
    x = torch.randn(2, 3, 16, 16, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), FewBit("mish", 3), nn.Conv2d(8, 4, 3, padding=1))
    model = model.bfloat16()
    assert kept_bytes(model, model, x) / (2 * 8 * 16 * 16) == 2 + 3 / 8


@compiles
def test_compiled_training_keeps_the_planes_and_the_output() -> None:
    torch._dynamo.reset()
    x = torch.randn(256, 8)
    model = nn.Sequential(nn.Linear(8, 64), FewBit("gelu", 2), nn.Linear(64, 8))
    compiled = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
    compiled(x)
    assert kept_bytes(compiled, model, x) / (256 * 64) == pytest.approx(4 + 2 / 8, abs=0.1)


def test_nothing_is_kept_without_a_backward_pass() -> None:
    assert kept_bytes(FewBit("gelu", 3), nn.Identity(), torch.randn(4, 4)) == 0
    with torch.no_grad():
        assert not fewbit(torch.randn(3, requires_grad=True), "gelu", 3).requires_grad


@pytest.mark.parametrize("shape", [(), (0,), (5,), (0, 3), (2, 3), (2, 3, 4), (2, 3, 1, 2, 2)], ids=str)
def test_any_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    y, dx = run(x, torch.ones(shape))
    assert y.shape == dx.shape == shape
    flat, flat_dx = run(x.flatten(), torch.ones(x.numel()))
    torch.testing.assert_close(y.flatten(), flat)
    torch.testing.assert_close(dx.flatten(), flat_dx)


@pytest.mark.parametrize("order", [(0, 2, 3, 1), (3, 1, 0, 2), (1, 0, 2, 3)], ids=str)
@pytest.mark.parametrize("same", [True, False])
def test_a_dense_layout_is_kept_and_changes_no_value(order: tuple[int, ...], same: bool) -> None:
    x, gradient = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    back = [order.index(dim) for dim in range(4)]
    laid_out = x.permute(order).contiguous().permute(back)
    y, dx = run(x, gradient)
    y_laid, dx_laid = run(laid_out, gradient.permute(order).contiguous().permute(back) if same else gradient)
    assert y_laid.stride() == dx_laid.stride() == laid_out.stride()
    torch.testing.assert_close(y_laid, y)
    torch.testing.assert_close(dx_laid, dx, rtol=0, atol=0)


def test_strided_and_expanded_inputs_and_expanded_gradients() -> None:
    for x in (torch.randn(6, 8).t()[::2, ::3], torch.randn(1, 5).expand(3, 5), torch.randn(2, 3, 1, 4)[:, :2]):
        y, dx = run(x.contiguous(), torch.full(x.shape, 2.0))
        y_strided, dx_strided = run(x, torch.tensor(2.0).expand(x.shape))
        torch.testing.assert_close(y_strided, y)
        torch.testing.assert_close(dx_strided, dx, rtol=0, atol=0)


def test_not_a_number_stays_one_and_infinity_has_the_outermost_level() -> None:
    y, dx = run(torch.tensor([torch.nan, torch.inf]), torch.ones(2), "silu")
    assert y[0].isnan()
    assert dx.tolist() == pytest.approx([table("silu", 3).levels[table("silu", 3).codes[-1]]] * 2)


@pytest.mark.parametrize("columns", [4, 8, 13])
def test_vmap_of_grad(columns: int) -> None:
    x = torch.randn(5, columns, dtype=torch.float64)

    def loss(row: Tensor) -> Tensor:
        return (fewbit(row, "silu", 3) ** 2).sum()

    each = torch.stack([torch.func.grad(loss)(row) for row in x])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), each)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss), in_dims=1)(x.t().contiguous()), each)
    scalars = torch.func.vmap(torch.func.vmap(torch.func.grad(loss)))(x)
    torch.testing.assert_close(scalars, each)


def test_vmap_over_gradients_alone() -> None:
    x, gradients = torch.randn(3, 5), torch.randn(4, 3, 5)
    pull = torch.func.vjp(lambda x: fewbit(x, "mish", 2), x)[1]
    torch.testing.assert_close(torch.func.vmap(pull)(gradients)[0], gradients * steps(x, "mish", 2).float())


@compiles
@each_name
def test_compiled_passes_equal_eager_ones(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fewbit, backend="aot_eager", fullgraph=True, dynamic=True)
    last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for x in (torch.randn(3, 5), torch.randn(4, 9), last):
        x.requires_grad_()
        y, y_compiled = fewbit(x, name, 3), compiled(x, name, 3)
        assert y.stride() == y_compiled.stride()
        torch.testing.assert_close(y_compiled, y)
        torch.testing.assert_close(
            torch.autograd.grad((y_compiled**2).sum(), x)[0], torch.autograd.grad((y**2).sum(), x)[0]
        )


@compiles
def test_generated_code_equals_eager() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 16), FewBit("gelu_tanh", 3), nn.Linear(16, 4))
    x = torch.randn(5, 8, requires_grad=True)
    results = [
        torch.autograd.grad((call(x) ** 2).sum(), [x, *model.parameters()]) for call in (model, torch.compile(model))
    ]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_a_checkpointed_pass_has_the_same_gradient() -> None:
    x = torch.randn(7, requires_grad=True)
    plain = torch.autograd.grad(fewbit(x, "gelu", 2).sum(), x)[0]
    again = checkpoint(fewbit, x, "gelu", 2, use_reentrant=False)
    assert isinstance(again, Tensor)
    torch.testing.assert_close(torch.autograd.grad(again.sum(), x)[0], plain)


@each_name
def test_export_holds_plain_operators_alone(name: str) -> None:
    program = torch.export.export(FewBit(name, 3), (torch.randn(2, 3, requires_grad=True),))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert all(isinstance(target, torch._ops.OpOverload) and target.namespace == "aten" for target in targets), targets


@pytest.mark.parametrize("linear_in_x", [True, False])
def test_a_second_backward_pass_is_refused(linear_in_x: bool) -> None:
    """Also where the incoming gradient depends on nothing: a penalty on the gradient must not count for nothing."""
    x = torch.randn(4, requires_grad=True)
    y = fewbit(x, "gelu", 3)
    (dx,) = torch.autograd.grad(y.sum() if linear_in_x else (y**2).sum(), x, create_graph=True)
    with pytest.raises(ValueError, match=r"few-bit gradient of gelu is a step function.*bits=None"):
        (dx**2).sum().backward()


def test_second_order_transforms_are_refused() -> None:
    with pytest.raises(ValueError, match="step function"):
        torch.func.grad(lambda x: torch.func.grad(lambda v: fewbit(v, "mish", 3))(x))(torch.tensor(0.3))


@pytest.mark.parametrize("bits", [0, 5, 2.5, True])
def test_unknown_numbers_of_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits must be a whole number from 1 to 4, got {bits}"):
        fewbit(torch.randn(3), "gelu", bits)


def test_unknown_names_and_types_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown few-bit activation 'gleu': did you mean 'gelu'"):
        fewbit(torch.randn(3), "gleu", 3)
    with pytest.raises(ValueError, match=r"real floating-point type, got torch.int64: use x.float\(\)"):
        fewbit(torch.arange(3), "gelu", 3)
    with pytest.raises(ValueError, match="complex64"):
        fewbit(torch.randn(3, dtype=torch.complex64), "gelu", 3)
