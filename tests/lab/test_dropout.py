"""Dropout of a strength that changes, against torch's own."""

import pytest
import torch
from torch import nn

from zeromean.lab.nets.dropout import Dropout


def dropout(rate: float, strength: float | None) -> Dropout:
    made = Dropout(rate)
    made.strength = None if strength is None else torch.tensor(strength)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rate", "strength"), [(0.5, 1.0), (0.8, 0.25), (0.9, 0.5)])
def test_so_many_elements_are_dropped_and_the_others_grow(rate: float, strength: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (1 + torch.rand(400, 500)).to(dtype).requires_grad_()
    y = dropout(rate, strength)(x)
    share = rate * strength
    kept = y != 0
    assert 1 - kept.float().mean().item() == pytest.approx(share, abs=0.005)
    torch.testing.assert_close(y[kept], (x[kept].float() / (1 - share)).to(dtype))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient.float(), kept / (1 - share), rtol=0.01, atol=0)
    assert y.dtype == gradient.dtype == dtype


@pytest.mark.parametrize(("rate", "strength"), [(0.5, None), (0.0, 1.0)])
def test_without_a_strength_it_is_torch_s_own(rate: float, strength: float | None) -> None:
    x, results = torch.randn(50, 60), []
    for layer in (dropout(rate, strength), nn.Dropout(rate)):
        torch.manual_seed(1)
        results.append(layer(x))
    assert torch.equal(*results)


def test_nothing_is_dropped_at_no_strength_nor_in_evaluation_mode() -> None:
    x = torch.randn(50, 60)
    assert torch.equal(dropout(0.9, 0.0)(x), x)
    assert torch.equal(dropout(0.9, 1.0).eval()(x), x)


def test_the_strength_is_no_state_and_another_one_needs_no_new_program() -> None:
    layer = dropout(0.9, 0.0)
    assert not layer.state_dict()
    counts: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        counts.append(len(inputs))
        return graph

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)
    x = torch.ones(100, 100)
    assert torch.equal(compiled(x), x)
    assert layer.strength is not None
    layer.strength.fill_(1.0)
    assert (compiled(x) == 0).float().mean().item() == pytest.approx(0.9, abs=0.02)
    assert counts == [2]
