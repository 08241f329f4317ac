"""The noisy activations: what is random, what is not, and whose turn it is to learn."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zeromean as zm

F = zm.functional
Alternating = zm.nn.EPReLU | zm.nn.EELU
NOISY = ["rrelu", "erelu", "eprelu", "eelu"]
ALTERNATING = ["eprelu", "eelu"]


def alternating(name: str) -> Alternating:
    module = zm.nn.by_name(name)
    assert isinstance(module, zm.nn.EPReLU | zm.nn.EELU)
    return module


def twice(name: str) -> tuple[nn.Module, nn.Module]:
    return zm.nn.by_name(name), zm.nn.by_name(name)


@pytest.mark.parametrize("name", NOISY)
def test_manual_seed_reproduces_training(name: str) -> None:
    x, (one, two) = torch.randn(50, 4), twice(name)
    torch.manual_seed(1)
    first = one(x)
    torch.manual_seed(1)
    torch.testing.assert_close(two(x), first, rtol=0, atol=0)
    assert not torch.equal(zm.nn.by_name(name)(x), first)


@pytest.mark.parametrize("name", NOISY)
def test_evaluation_has_no_noise_and_leaves_no_trace(name: str) -> None:
    module, x = zm.nn.by_name(name).eval(), torch.randn(50, 4)
    state, generator = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    torch.testing.assert_close(module(x), module(x), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(state[k], v) for k, v in module.state_dict().items())


@pytest.mark.parametrize("name", NOISY)
def test_the_noise_does_not_depend_on_the_memory_layout(name: str) -> None:
    """Nor on whether gradients are recorded."""
    one, two = twice(name)
    one.seed = two.seed = torch.tensor(8)
    x = torch.randn(2, 3, 4, 5)
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    torch.testing.assert_close(one(x), two(last).detach())


@pytest.mark.parametrize("name", NOISY)
def test_a_seed_of_each_slice_gives_what_it_would_alone(name: str) -> None:
    x = torch.randn(3, 5, 4, requires_grad=True)
    seeds = torch.tensor([7, 8, 9])
    stacked, alone = twice(name)
    stacked.seed = seeds.reshape(3, 1, 1)
    together = stacked(x)
    (gradient,) = torch.autograd.grad(together.sum(), x)
    for run in range(3):
        alone = zm.nn.by_name(name)
        alone.seed = seeds[run]
        y = alone(x[run])
        torch.testing.assert_close(together[run], y, rtol=0, atol=0)
        torch.testing.assert_close(gradient[run], torch.autograd.grad(y.sum(), x)[0][run], rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", NOISY)
def test_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    """Through two passes, so that both turns are run again."""
    x = torch.randn(30, 4, requires_grad=True)
    plain, repeated = twice(name)
    torch.manual_seed(2)
    expected = [torch.autograd.grad((plain(x) ** 2).sum(), [x, *plain.parameters()]) for _ in range(2)]
    torch.manual_seed(2)
    for grads in expected:
        leaf = x.detach().requires_grad_()
        repeated.zero_grad()
        (checkpoint(repeated, leaf, use_reentrant=reentrant) ** 2).sum().backward()
        for actual, wanted in zip([leaf, *repeated.parameters()], grads, strict=True):
            assert actual.grad is not None
            torch.testing.assert_close(actual.grad, wanted)


@pytest.mark.parametrize("name", ALTERNATING)
def test_turns(name: str) -> None:
    """Noisy first; parameters learn in the quiet passes only; an evaluation in between does not count."""
    module, x = alternating(name), torch.randn(200)
    quiet = zm.nn.by_name(name).eval()(x)
    for turn in range(4):
        y = module.train()(x)
        noisy = turn % 2 == 0
        assert torch.equal(y, quiet) is not noisy
        for gradient in torch.autograd.grad(y.sum(), list(module.parameters())):
            assert (gradient == 0).all() == noisy
        module.eval()(x)


@pytest.mark.parametrize("name", ALTERNATING)
def test_the_turn_is_saved_with_the_model(name: str) -> None:
    module, resumed = alternating(name), alternating(name)
    module(torch.randn(3))
    resumed.load_state_dict(module.state_dict())
    assert not resumed.noisy_next
    resumed.reset_parameters()
    assert resumed.noisy_next


def slopes(name: str, epsilon: float, count: int = 200_000) -> Tensor:
    module = zm.nn.by_name(name, epsilon=epsilon)
    module.seed = torch.tensor(6)
    y: Tensor = module(torch.ones(count))
    return y.detach().double()


@pytest.mark.parametrize("name", ["erelu", "eprelu"])
def test_uniform_slopes(name: str) -> None:
    k = slopes(name, 0.4)
    assert 0.6 <= k.min() < 0.6001
    assert 1.3999 < k.max() <= 1.4
    assert abs(k.mean() - 1) < 4 * 0.4 / 3**0.5 / len(k) ** 0.5


@pytest.mark.parametrize(("epsilon", "deviation"), [(0.2, 0.115), (0.6, 0.335), (1.0, 0.485)])
def test_normal_slopes_have_the_spread_of_many_layer_calls(epsilon: float, deviation: float) -> None:
    """One sigma a call, so many calls: seeds [2000, 1] at once."""
    seeds = torch.arange(2000).reshape(-1, 1)
    k = F.eelu(torch.ones(2000, 200), torch.ones(1), torch.ones(1), epsilon, True, seed=seeds).double()
    assert k.min() >= 0
    assert k.max() <= 2
    assert k.mean() == pytest.approx(1, abs=0.01)
    assert k.std() == pytest.approx(deviation, abs=0.01)
    assert k.std(dim=1).max() < 1.2 * epsilon
    assert k.std(dim=1).std() > 0.2 * epsilon


def test_a_slope_clipped_to_zero_has_a_zero_gradient() -> None:
    """Its output is 0 as at x = 0, and must not be taken for the negative side."""
    x = torch.ones(100, 200, requires_grad=True)
    seeds = torch.arange(100).reshape(-1, 1)
    y = F.eelu(x, torch.tensor([0.25]), torch.tensor([1.0]), 1.0, True, seed=seeds)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert (y == 0).sum() > 100
    torch.testing.assert_close(gradient, y.detach())


def test_rrelu_slopes_lie_between_the_bounds() -> None:
    y = F.rrelu(-torch.ones(100_000), training=True, seed=torch.tensor(2))
    assert -1 / 3 <= y.min() < -0.333
    assert -0.1251 < y.max() <= -0.125
    assert y.double().mean() == pytest.approx(-(1 / 8 + 1 / 3) / 2, abs=1e-3)


def test_a_bool_flag_and_a_tensor_flag_mean_the_same() -> None:
    x, pair, seed = torch.randn(20), (torch.tensor([0.25]), torch.tensor([1.0])), torch.tensor(1)
    for noisy in (True, False):
        one = F.eelu(x, *pair, 1.0, True, seed=seed, noisy=noisy)
        torch.testing.assert_close(one, F.eelu(x, *pair, 1.0, True, seed=seed, noisy=torch.tensor(noisy)))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["eelu", "eprelu"])
def test_checkpointing_inside_a_compiled_function_repeats_the_turn(name: str) -> None:
    slopes: dict[bool, list[Tensor]] = {}
    for compiled in (False, True):
        module = zm.nn.by_name(name)
        module.seed = torch.tensor(5)

        def call(x: Tensor, module: torch.nn.Module = module) -> Tensor:
            return checkpoint(module, x * 1.0, use_reentrant=False)  # type: ignore[no-any-return]

        run = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
        x = torch.linspace(-2, 2, 9, requires_grad=True)
        slopes[compiled] = [torch.autograd.grad(run(x).sum(), x)[0] for _ in range(3)]
    torch.testing.assert_close(slopes[True], slopes[False])
    assert not torch.equal(slopes[True][0], slopes[True][1])


@pytest.mark.parametrize("name", ["eelu", "eprelu"])
def test_turns_are_taken_under_vmap(name: str) -> None:
    modules = [zm.nn.by_name(name) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    x = torch.rand(3, 4)

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        state = (parameters, buffers)
        return torch.func.functional_call(modules[0], state, (x,))  # type: ignore[no-any-return]

    vectorised = torch.func.vmap(call, randomness="different")
    noisy, quiet = (vectorised(parameters, buffers, x) for _ in range(2))
    assert not torch.allclose(noisy, x)
    torch.testing.assert_close(quiet, x)
