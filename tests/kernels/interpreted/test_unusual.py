"""The fused programs where a caller does what is allowed and seldom done."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from tests.kernels.interpreted.device import DEVICE
from zeromean.kernels import launch, operator
from zeromean.nn import functional as zf

# From inside torch: its forward mode loads scripted derivatives.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
CHANNELS = 16
SHAPES = [(4, CHANNELS, 6), (4, CHANNELS)]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "weight",
    [random(CHANNELS, 2)[:, 0], random(1).expand(CHANNELS), random(CHANNELS).flip(0)],
    ids=["column", "expanded", "flipped"],
)
def test_parameters_that_are_views(shape: tuple[int, ...], weight: Tensor) -> None:
    x, gradient = random(*shape).requires_grad_(), random(*shape)
    results = [
        torch.autograd.grad(zf.prelu(x, w), (x, w), gradient)
        for w in (weight.detach().requires_grad_(), weight.contiguous().detach().requires_grad_())
    ]
    torch.testing.assert_close(zf.prelu(x, weight), F.prelu(x, weight.contiguous()))
    torch.testing.assert_close(*results)


def test_seeds_that_are_views() -> None:
    x, seed = random(3, 2, 8), torch.tensor([[[5]]], device=DEVICE).expand(3, 1, 1)
    noise = [zf.rrelu(x, training=True, seed=s) for s in (seed, seed.contiguous())]
    torch.testing.assert_close(*noise, rtol=0, atol=0)


@pytest.mark.parametrize("seeds", [(1, 6), (4, 6), (2, 1)], ids=str)
def test_seeds_that_do_not_fit_err(seeds: tuple[int, int]) -> None:
    seed = torch.arange(seeds[0] * seeds[1], device=DEVICE).view(seeds)
    x = random(4, 6) if seeds != (4, 6) else random(4, 12)
    with pytest.raises(ValueError, match="does not fit"):
        zf.rrelu(x, training=True, seed=seed)


CALLS: dict[str, Callable[..., Tensor]] = {
    "elu": zf.elu,
    "celu": zf.celu,
    "leaky_relu": zf.leaky_relu,
    "rrelu": lambda x, number: zf.rrelu(x, 0, number, training=True, seed=torch.tensor(3, device=x.device)),
    "erelu": lambda x, number: zf.erelu(x, number / 4, True, seed=torch.tensor(3, device=x.device)),
}


@pytest.mark.parametrize("name", CALLS)
def test_settings_given_as_whole_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program would be compiled for the number 1 alone and then run for every other."""
    given: list[Any] = []
    original = launch._launch

    def spy(plan: launch.Plan, tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> None:
        given.extend(numbers)
        original(plan, tensors, numbers)

    monkeypatch.setattr(launch, "_launch", spy)
    x = random(64)
    whole = [CALLS[name](x, number) for number in (1, 2, 3)]
    broken = [CALLS[name](x, number) for number in (1.0, 2.0, 3.0)]
    torch.testing.assert_close(whole, broken, rtol=0, atol=0)
    assert not torch.equal(whole[0], whole[1])
    assert given
    assert all(isinstance(number, float) for number in given)


@pytest.mark.parametrize("name", ["elu", "gelu", "silu", "mish", "selu", "shifted_relu"])
def test_forward_mode_runs_the_plain_formula(name: str) -> None:
    function = getattr(zf, name)
    x, direction = random(20), random(20)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent
    assert tangent is not None
    torch.testing.assert_close(tangent, torch.func.jvp(function, (x,), (direction,))[1])


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("function", [zf.pelu, zf.mpelu])
def test_a_parameter_that_is_nan_shows(function: Callable[..., Tensor], place: int) -> None:
    parameters = [torch.ones(1, device=DEVICE), torch.ones(1, device=DEVICE)]
    parameters[place].fill_(torch.nan)
    assert function(torch.tensor([-1.0], device=DEVICE), *parameters).isnan().all()


@pytest.mark.parametrize("lacking", ["formula", "instructions"])
def test_plain_operators_run_where_there_are_no_programs(
    lacking: str, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For an activation without a formula of its name, and on a GPU before Ampere."""
    if lacking == "formula":
        monkeypatch.delitem(launch.FORMULAS, "prelu")
    else:
        monkeypatch.setattr(operator, "_recent", lambda device: False)
    x, weight, gradient = random(4, 8).requires_grad_(), random(8).requires_grad_(), random(4, 8)
    ours, theirs = (
        [y, *torch.autograd.grad(y, (x, weight), gradient)] for y in (zf.prelu(x, weight), F.prelu(x, weight))
    )
    torch.testing.assert_close(ours, theirs)
    assert launched == []


@pytest.mark.parametrize(
    "function", [zf.elu, zf.gelu, lambda x: zf.pelu(x, torch.ones(1, device=DEVICE), x.new_ones(1))]
)
def test_forward_mode_of_what_a_backward_pass_follows(function: Callable[[Tensor], Tensor]) -> None:
    x, direction = random(20).requires_grad_(), random(20)
    with forward_ad.dual_level():
        y = function(forward_ad.make_dual(x, direction))
        tangent = forward_ad.unpack_dual(y).tangent
        (slope,) = torch.autograd.grad(y.sum(), x)
    assert tangent is not None
    torch.testing.assert_close(tangent, slope * direction)
