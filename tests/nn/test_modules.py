import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zeromean as zm
from tests.cases import ACTIVATION_CASES, ActivationCase

each_case = pytest.mark.parametrize("case", ACTIVATION_CASES, ids=lambda case: case.name)
TWINS: list[tuple[nn.Module, nn.Module]] = [
    (zm.nn.ELU(0.7), nn.ELU(0.7)),
    (zm.nn.SELU(), nn.SELU()),
    (zm.nn.CELU(0.7), nn.CELU(0.7)),
    (zm.nn.ReLU(), nn.ReLU()),
    (zm.nn.LeakyReLU(0.2), nn.LeakyReLU(0.2)),
    (zm.nn.PReLU(3, 0.1), nn.PReLU(3, 0.1)),
    (zm.nn.RReLU(0.1, 0.2), nn.RReLU(0.1, 0.2)),
    (zm.nn.SiLU(), nn.SiLU()),
    (zm.nn.GELU("tanh"), nn.GELU("tanh")),
    (zm.nn.Mish(), nn.Mish()),
]


def test_cases_cover_every_activation_and_every_function() -> None:
    assert {case.name.split(":")[0] for case in ACTIVATION_CASES} == set(zm.nn.ACTIVATIONS)
    for name, module in zm.nn.ACTIVATIONS.items():
        assert callable(getattr(zm.functional, name))
        assert getattr(zm.nn, module.__name__) is module


@pytest.mark.parametrize("case", [case for case in ACTIVATION_CASES if not case.noisy], ids=lambda case: case.name)
def test_evaluation_equals_quiet_training_in_float64(case: ActivationCase) -> None:
    """Without noise, both modes give the same values and the same gradients."""
    module = case.module().double()
    if isinstance(module, zm.nn.EPReLU | zm.nn.EELU):
        module.noisy_next.fill_(False)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    results = []
    for training in (True, False):
        y = module.train(training)(x)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), [x, *module.parameters()])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@each_case
def test_copies_and_pickles(case: ActivationCase) -> None:
    module = case.module().eval()
    x = torch.randn(3, 4)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(twin(x), module(x), rtol=0, atol=0)
        assert repr(twin) == repr(module)


@pytest.mark.parametrize(("ours", "theirs"), TWINS, ids=lambda module: type(module).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_as_torch(ours: nn.Module, theirs: nn.Module, dtype: torch.dtype) -> None:
    """State dict both ways, representation, and values bit for bit, in training where there is no noise."""
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = (torch.randn(4, 3, 2) * 3).to(dtype)
    for training in (True, False):
        if training and isinstance(ours, zm.nn.RReLU):
            continue
        ours, theirs = ours.to(dtype).train(training), theirs.to(dtype).train(training)
        assert torch.equal(ours(x.requires_grad_()), theirs(x))
    ours.float()
    theirs.float()


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (zm.nn.ELU(0.5), "ELU(alpha=0.5)"),
        (zm.nn.ShiftedReLU(), "ShiftedReLU()"),
        (zm.nn.Swish(3), "Swish(num_parameters=3, beta=1.0)"),
        (zm.nn.PELU(), "PELU(num_parameters=1, a=1.0, b=1.0)"),
        (zm.nn.MPELU(2, 1.0), "MPELU(num_parameters=2, alpha=1.0, beta=1.0)"),
        (zm.nn.EReLU(0.2), "EReLU(epsilon=0.2)"),
        (zm.nn.EPReLU(), "EPReLU(num_parameters=1, init=0.1, epsilon=0.4)"),
        (zm.nn.EELU(), "EELU(num_parameters=1, alpha=0.25, beta=1.0, epsilon=1.0)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_representation(module: nn.Module, text: str) -> None:
    assert repr(module) == text


def call_at(x: Tensor, function: Callable[..., Tensor], *arguments: object) -> Callable[[], Tensor]:
    return lambda: function(x, *arguments)


X = torch.randn(2, 3)
MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: zm.nn.ELU(True), "alpha of elu must be a number, got True: write inplace=True"),
    (lambda: zm.nn.CELU(True), "alpha of celu must be a number, got True"),
    (lambda: zm.nn.LeakyReLU(True), "negative_slope must be a number, got True"),
    (lambda: zm.nn.RReLU(True), "lower and upper must be numbers, got True"),
    (lambda: zm.nn.RReLU(0.3, 0.2), "lower must not exceed upper, got 0.3 and 0.2"),
    (lambda: zm.nn.ELU(-1.0, inplace=True), "alpha of elu must be >= 0 where only the output is kept, got -1.0"),
    (lambda: zm.nn.CELU(-1.0, save="output"), "alpha of celu must be >= 0"),
    (lambda: zm.nn.SELU(inplace=True, save="input"), "selu cannot keep the input that it overwrites"),
    (lambda: zm.nn.SiLU(inplace=True, bits=2), "silu cannot keep bits=2 of an input that it overwrites"),
    (lambda: zm.nn.Mish(inplace=True, bits=2), "mish cannot keep bits=2 of an input that it overwrites"),
    (lambda: zm.nn.SiLU(bits=5), "bits must be a whole number from 1 to 4, got 5"),
    (lambda: zm.nn.GELU(bits=0), "bits must be a whole number from 1 to 4, got 0"),
    (lambda: zm.functional.mish(X, bits=True), "bits must be a whole number from 1 to 4, got True"),
    (lambda: zm.functional.gelu(X, "exact"), "approximate must be 'none' or 'tanh', got 'exact'"),
    (lambda: zm.nn.LeakyReLU(-0.1, inplace=True), "negative_slope must be >= 0 in place, got -0.1"),
    (lambda: zm.functional.elu(X, save="y"), "save must be one of auto, output, input, got 'y'"),  # type: ignore[arg-type]
    (lambda: zm.functional.celu(X, 0.0), "alpha of celu must not be 0"),
    (lambda: zm.nn.EELU(epsilon=1.5), r"epsilon must lie in \[0, 1\], got 1.5: it is the largest standard deviation"),
    (lambda: zm.nn.EReLU(-0.1), r"epsilon must lie in \[0, 1\], got -0.1: it is how far"),
    (lambda: zm.nn.EPReLU(epsilon=2), r"epsilon must lie in \[0, 1\], got 2"),
    (lambda: zm.nn.PReLU(4)(X), r"weight must hold one value.*got shape \(4,\) for x of shape \(2, 3\)"),
    (lambda: zm.nn.MPELU(4)(X), r"alpha must hold one value.*set num_parameters"),
    (
        lambda: zm.functional.rrelu(X, training=True, seed=torch.tensor(1.0)),
        "seed must be an int64 tensor, got torch.fl",
    ),
    (lambda: zm.functional.rrelu(X, training=True, seed=torch.tensor([1])), "seed must have 0 dimensions, or 2 as x"),
    (lambda: zm.functional.erelu(X, training=True, seed=torch.zeros(3, 1).long()), r"seed of shape \(3, 1\) does not"),
    (
        lambda: zm.functional.rrelu(X.to("meta"), training=True, seed=torch.tensor(1)),
        "seed must lie on x's device meta",
    ),
    (lambda: zm.nn.ELU(math.nan), "alpha of elu must be a finite number, got nan"),
    (lambda: zm.nn.CELU(0.0), "alpha of celu must not be 0"),
    (lambda: zm.nn.LeakyReLU(math.inf), "negative_slope must be a finite number"),
    (lambda: zm.nn.RReLU(math.nan, 0.3), "lower and upper must be finite"),
    (lambda: zm.nn.MPELU(alpha=-1.0), "the initial alpha must be at least 0.000976"),
    (lambda: zm.nn.EELU(beta=0.0), "the initial beta must be at least"),
    (lambda: zm.nn.PELU(b=0.0), "the initial b must be at least 0.1"),
    (lambda: zm.nn.PReLU(init=math.nan), "the initial slope must be a finite number"),
    (lambda: zm.nn.ELU(inplace=True, save="y"), "save must be one of"),  # type: ignore[arg-type]
    (lambda: zm.nn.EELU(save="y"), "save must be one of"),  # type: ignore[arg-type]
    (lambda: zm.functional.rrelu(X, training=True, seed=7), "use torch.tensor"),  # type: ignore[arg-type]
    (lambda: zm.functional.mpelu(X, 0.25, 1.0), "alpha must be a tensor, got 0.25"),  # type: ignore[arg-type]
    (lambda: zm.nn.MPELU().eval()(torch.tensor([-2, 1])), "real floating-point type, got torch.int64"),
    (lambda: zm.nn.by_name("leakyrelu"), "unknown activation 'leakyrelu': did you mean 'leaky_relu'"),
    (lambda: zm.nn.by_name("qqq"), "unknown activation 'qqq': Choose one of elu, selu"),
    (lambda: zm.gain("elu", "sideways"), "kind must be one of forward, backward, variance, got 'sideways'"),  # type: ignore[arg-type]
    (lambda: zm.init_(nn.ReLU(), "elu"), "ReLU holds no linear or convolution layer"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_named_with_its_remedy(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()


def test_by_name_passes_arguments_on() -> None:
    module = zm.nn.by_name("elu", alpha=0.5)
    assert isinstance(module, zm.nn.ELU)
    assert module.alpha == 0.5


def test_slope_parameters_are_listed_once_and_exempt_from_weight_decay() -> None:
    shared = zm.nn.MPELU(4)
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared, nn.PReLU(), zm.nn.Swish(), zm.nn.ELU())
    slopes = zm.nn.slope_parameters(model)
    assert [id(p) for p in slopes] == [id(p) for p in (shared.alpha, shared.beta, model[4].weight, model[5].beta)]
    decayed, exempt = zm.nn.decay_groups(model, 0.1)
    assert [p.shape for p in decayed["params"]] == [(4, 4), (4,), (4, 4), (4,)]
    assert exempt["params"] == slopes
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    assert len(zm.nn.decay_groups(nn.Linear(2, 2), 0.1)) == 1


@pytest.mark.parametrize("name", ["prelu", "swish", "pelu", "mpelu", "eprelu", "eelu"])
def test_every_learnable_activation_lists_its_slopes(name: str) -> None:
    module = zm.nn.by_name(name, num_parameters=3)
    assert all(p.shape == (3,) for p in module.parameters())
    assert zm.nn.slope_parameters(module) == list(module.parameters())
    assert module(torch.randn(2, 3, 4)).shape == (2, 3, 4)


@pytest.mark.parametrize(("name", "bound"), [("pelu", 0.1), ("mpelu", 2.0**-10), ("eelu", 2.0**-10)])
def test_a_parameter_below_its_bound_reads_as_the_bound_and_still_learns(name: str, bound: float) -> None:
    module = zm.nn.by_name(name)
    first, second = module.parameters()
    if isinstance(module, zm.nn.EELU):
        module.noisy_next.fill_(False)
    nn.init.constant_(first, -0.3)
    x = torch.randn(50)
    below = module(x)
    gradient = torch.autograd.grad(below.sum(), [first, second])
    nn.init.constant_(first, bound)
    if isinstance(module, zm.nn.EELU):
        module.noisy_next.fill_(False)
    at_bound = module(x)
    torch.testing.assert_close(below, at_bound, rtol=0, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(at_bound.sum(), [first, second]))
    assert gradient[0].abs() > 1
