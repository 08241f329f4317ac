"""A bias before an activation, inside torch.compile: one operator makes both gradients where that pays."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from tests.kernels.test_lowering import BACKWARD, Opened, nothing_from_before
from zeromean.kernels import bias_gradient

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
__all__ = ["nothing_from_before"]

LIBRARY = torch.library.Library("zeromean_opened", "FRAGMENT")
CALLS: list[torch.Size] = []


def _both(gradient: Tensor, kept: Tensor, signs: Any, p0: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    CALLS.append(p0.shape)
    dx = torch.where(kept > 0, gradient, gradient * (kept + 1))
    return dx, dx.float().sum_to_size(p0.shape), gradient.new_empty(0)


def _fake_both(gradient: Tensor, kept: Tensor, signs: Any, p0: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(kept), torch.empty_like(p0), gradient.new_empty(0)


_TENSORS = "Tensor gradient, Tensor kept, Tensor? signs, Tensor? p0, Tensor? p1, Tensor? seed, Tensor? noisy"
LIBRARY.define(f"both({_TENSORS}, float[] scalars, bool output_kept) -> (Tensor, Tensor, Tensor)")
LIBRARY.impl("both", _both, "CompositeExplicitAutograd")
torch.library.register_fake("zeromean_opened::both", _fake_both, lib=LIBRARY)


@pytest.fixture(scope="module", autouse=True)
def inductor_knows() -> None:
    bias_gradient.sum_in_one_pass(BACKWARD["elu"], torch.ops.zeromean_opened.both.default)


@pytest.fixture(autouse=True)
def every_tensor_is_worthwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    monkeypatch.setattr(bias_gradient, "is_worthwhile", lambda dx: True)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    loss = torch.compile(model, fullgraph=True)(x).square().sum()
    return list(torch.autograd.grad(loss, list(model.parameters())))


def twins(*layers: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The same layers with the operators and with torch's ELU, where Identity stands for the activation."""
    return (
        nn.Sequential(*(Opened() if isinstance(layer, nn.Identity) else layer for layer in layers)),
        nn.Sequential(*(nn.ELU() if isinstance(layer, nn.Identity) else layer for layer in layers)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_behind_matrix_products_one_operator_makes_both(dtype: torch.dtype) -> None:
    layers = (nn.Linear(8, 16), nn.Identity(), nn.Linear(16, 12), nn.Identity(), nn.Linear(12, 4))
    ours, plain = twins(*(layer.to(dtype) for layer in layers))
    x = torch.randn(32, 8, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert_close(gradients(ours, x), gradients(plain, x), rtol=tolerance, atol=tolerance)
    assert CALLS == [(1, 12), (1, 16)]


def test_a_gradient_that_fuses_with_its_source_stays_fused() -> None:
    ours, plain = twins(nn.Linear(8, 16), nn.Identity(), nn.Unflatten(1, (1, 4, 4)), nn.AvgPool2d(2))
    x = torch.randn(32, 8)
    assert_close(gradients(ours, x), gradients(plain, x))
    assert CALLS == []


class BiasPoolActivation(nn.Module):
    """A bias, a max-pooling, an activation, and a convolution that hands back a gradient."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.bias, self.activation, self.last = nn.Parameter(torch.randn(1, 3, 1, 1)), activation, nn.Conv2d(3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.activation(F.max_pool2d(x + self.bias, 2)))
        return y


def test_behind_a_pooling_the_small_tensor_is_summed() -> None:
    x = torch.randn(5, 3, 8, 8)
    assert_close(gradients(BiasPoolActivation(Opened()), x), gradients(BiasPoolActivation(nn.ELU()), x))
    assert CALLS == [(1, 3, 1, 1)]


def test_without_a_bias_nothing_changes() -> None:
    ours, plain = twins(nn.Linear(8, 16, bias=False), nn.Identity(), nn.Linear(16, 4))
    x = torch.randn(32, 8)
    assert_close(gradients(ours, x), gradients(plain, x))
    assert CALLS == []


@pytest.mark.parametrize(("elements", "worthwhile"), [(2**22, True), (2**22 - 1, False)])
def test_only_large_tensors_on_a_gpu_are_worthwhile(
    elements: int, worthwhile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert not bias_gradient.is_worthwhile(torch.empty(elements))
    with torch._subclasses.FakeTensorMode():
        assert bias_gradient.is_worthwhile(torch.empty(elements, device="cuda")) == worthwhile


class GatherActivation(nn.Module):
    """A bias, a choice among channels, an activation, a layer: the gradient of the choice moves between channels."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.bias, self.activation, self.last = nn.Parameter(torch.randn(12)), activation, nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(12).remainder(5).expand(32, 12)
        y: Tensor = self.last(self.activation((x + self.bias).gather(1, index)))
        return y


def test_behind_a_choice_among_channels_nothing_changes() -> None:
    x = torch.randn(32, 12)
    assert_close(gradients(GatherActivation(Opened()), x), gradients(GatherActivation(nn.ELU()), x))
    assert CALLS == []
