"""torch.compile without graph breaks, and torch.export to plain operators."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zeromean as zm
from tests.cases import ACTIVATION_CASES, ActivationCase
from tests.nn.test_memory import kept_bytes

# From inside torch: tracing makes an instance of an autograd function, and the code generator imports old modules.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
ONE_OF_EACH = list({case.name.split(":")[0]: case for case in ACTIVATION_CASES}.values())


def results(call: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    y = call(x)
    return [y.detach(), *torch.autograd.grad((y**2).sum(), [x, *module.parameters()])]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.name)
def test_compiled_training_passes_equal_eager_ones(case: ActivationCase) -> None:
    """Two passes, so that the noisy and the quiet turn of an alternating module are both seen."""
    module, twin = case.module(), case.module()
    if hasattr(module, "seed"):
        module.seed, twin.seed = torch.tensor(5), torch.tensor(5)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 4, requires_grad=True)
    for _ in range(2):
        for one, other in zip(results(compiled, module, x), results(twin, twin, x), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["pelu", "eelu"])
def test_generated_code_equals_eager(name: str) -> None:
    module, twin = zm.nn.by_name(name), zm.nn.by_name(name)
    if isinstance(module, zm.nn.EELU) and isinstance(twin, zm.nn.EELU):
        module.seed = twin.seed = torch.tensor(5)
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(5, 7, requires_grad=True)
    for _ in range(2):
        for one, other in zip(results(compiled, module, x), results(twin, twin, x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["elu", "mpelu", "eelu"])
def test_one_graph_for_every_size(name: str) -> None:
    module = zm.nn.by_name(name)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (5, 6, 9):
        x = -torch.rand(3, size)
        torch.testing.assert_close(compiled(x.requires_grad_()), module.eval()(x))
        module.train()


def test_a_changed_alpha_takes_effect_after_compilation() -> None:
    module = zm.nn.ELU(1.0)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.full((3,), -1.0, requires_grad=True)
    compiled(x)
    module.alpha = 2.0
    torch.testing.assert_close(compiled(x), zm.functional.elu(x, 2.0))


@pytest.mark.parametrize("name", ["elu", "selu", "pelu", "mpelu", "rrelu", "erelu", "eelu"])
def test_compiled_training_keeps_the_output_alone(name: str) -> None:
    rows, units = 256, 64
    model = nn.Sequential(nn.Linear(8, units), zm.nn.by_name(name), nn.Linear(units, 8))
    compiled = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
    x = torch.randn(rows, 8)
    compiled(x)
    assert kept_bytes(compiled, model, x) / (4 * rows * units) == pytest.approx(1.0, abs=0.02)


def assert_backward_has_the_forward_noise(module: nn.Module) -> None:
    """On either side of 0 the noisy functions are lines through 0, so dx = y / x."""
    sign = -1.0 if isinstance(module, zm.nn.RReLU) else 1.0
    x = (sign * (torch.rand(2000) + 0.5)).requires_grad_()
    y = torch.compile(module, backend="aot_eager_decomp_partition", fullgraph=True)(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.std() > 0.01
    torch.testing.assert_close(dx, (y / x).detach())


@pytest.mark.parametrize("name", ["rrelu", "erelu", "eprelu", "eelu"])
def test_a_compiled_backward_pass_makes_the_same_noise(name: str) -> None:
    torch.manual_seed(0)
    assert_backward_has_the_forward_noise(zm.nn.by_name(name))


@pytest.mark.parametrize("setting", [{"activation_memory_budget": 0.0}, {"aggressive_recomputation": True}], ids=str)
def test_a_given_seed_survives_recomputation_in_the_backward_pass(setting: dict[str, object]) -> None:
    module = zm.nn.RReLU()
    module.seed = torch.tensor(3)
    with torch._functorch.config.patch(setting):
        assert_backward_has_the_forward_noise(module)


@pytest.mark.parametrize("setting", [{"activation_memory_budget": 0.1}, {"aggressive_recomputation": True}], ids=str)
@pytest.mark.parametrize("name", ["rrelu", "eelu"])
def test_a_drawn_seed_is_not_drawn_again_in_the_backward_pass(name: str, setting: dict[str, object]) -> None:
    """On one side of 0 the function is k z for z = e^x, so k z^2 has the slope 2 k z^2: the result itself, twice."""
    torch.manual_seed(0)
    module, sign = zm.nn.by_name(name), -1.0 if name == "rrelu" else 1.0

    def call(x: Tensor) -> Tensor:
        z = sign * x.exp()
        return module(z) * z  # type: ignore[no-any-return]

    x = torch.rand(2000, requires_grad=True)
    with torch._functorch.config.patch(setting):
        y = torch.compile(call, fullgraph=True)(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, 2 * y.detach())


@pytest.mark.parametrize("name", zm.nn.ACTIVATIONS)
def test_evaluation_exports_to_plain_operators(name: str) -> None:
    module = zm.nn.by_name(name).eval()
    x = torch.randn(2, 3)
    program = torch.export.export(module, (x,))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets
    assert all(isinstance(target, torch._ops.OpOverload) and target.namespace == "aten" for target in targets), targets
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("name", ["elu", "shifted_relu", "leaky_relu", "prelu", "swish", "pelu", "mpelu"])
def test_training_mode_exports_to_plain_operators_too(name: str) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    program = torch.export.export(zm.nn.by_name(name).train(), (x,), strict=True)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert all(isinstance(target, torch._ops.OpOverload) and target.namespace == "aten" for target in targets), targets
