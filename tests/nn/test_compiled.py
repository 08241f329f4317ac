"""torch.compile without graph breaks, and torch.export to plain operators."""

import pytest
import torch
from torch import Tensor, nn

import zeromean as zm
from tests.cases import ACTIVATION_CASES, ActivationCase
from tests.nn.test_memory import kept_bytes

# From inside torch: tracing makes an instance of an autograd function, and the code generator imports old modules.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
each_case = pytest.mark.parametrize("case", ACTIVATION_CASES, ids=lambda case: case.name)


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    return [y.detach(), *torch.autograd.grad((y**2).sum(), [x, *model.parameters()])]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@each_case
def test_compiled_training_passes_equal_eager_ones(case: ActivationCase) -> None:
    """Two passes, so that the noisy and the quiet turn of an alternating module are both seen."""
    module, twin = case.module(), case.module()
    if hasattr(module, "seed"):
        module.seed, twin.seed = torch.tensor(5), torch.tensor(5)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 4, requires_grad=True)
    for _ in range(2):
        for one, other in zip(results(compiled, x), results(twin, x), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["pelu", "eelu"])
def test_generated_code_equals_eager(name: str) -> None:
    module, twin = zm.nn.by_name(name), zm.nn.by_name(name)
    if isinstance(module, zm.nn.EELU) and isinstance(twin, zm.nn.EELU):
        module.seed = twin.seed = torch.tensor(5)
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(5, 7, requires_grad=True)
    for _ in range(2):
        for one, other in zip(results(compiled, x), results(twin, x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_changed_alpha_takes_effect_after_compilation() -> None:
    module = zm.nn.ELU(1.0)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.full((3,), -1.0, requires_grad=True)
    compiled(x)
    module.alpha = 2.0
    torch.testing.assert_close(compiled(x), zm.functional.elu(x, 2.0))


@pytest.mark.parametrize("name", ["elu", "selu", "pelu", "mpelu", "eelu"])
def test_compiled_training_keeps_the_output_alone(name: str) -> None:
    rows, units = 256, 64
    model = nn.Sequential(nn.Linear(8, units), zm.nn.by_name(name), nn.Linear(units, 8))
    compiled = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
    x = torch.randn(rows, 8)
    compiled(x)
    assert kept_bytes(compiled, x) / (4 * rows * units) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("setting", [{"activation_memory_budget": 0.3}, {"aggressive_recomputation": True}], ids=str)
def test_recomputation_never_draws_the_noise_again(setting: dict[str, object]) -> None:
    """The slope in the backward pass is the one of the forward pass: dx = y / x on the positive side."""
    x = (torch.rand(2000) + 0.5).requires_grad_()
    with torch._functorch.config.patch(setting):
        y = torch.compile(zm.nn.EELU(), backend="aot_eager_decomp_partition", fullgraph=True)(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.std() > 0.01
    torch.testing.assert_close(dx, (y / x).detach())


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
    program = torch.export.export(zm.nn.by_name(name).train(), (torch.randn(2, 3, requires_grad=True),))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert all(isinstance(target, torch._ops.OpOverload) and target.namespace == "aten" for target in targets), targets
