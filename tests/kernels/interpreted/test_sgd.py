"""The programs of gradient descent against torch's own optimizer and torch's own operators."""

import math
from dataclasses import fields

import pytest
import torch

from tests.kernels.interpreted.device import DEVICE
from zeromean.kernels import sgd
from zeromean.kernels.sgd import Flat, Ledger, sgd_step


def flat(count: int, gradient: torch.dtype = torch.float16) -> Flat:
    weight, velocity = torch.randn(2, count, device=DEVICE)
    return Flat(weight, velocity, weight.half(), torch.randn(count, device=DEVICE).to(gradient))


def ledger(rate: float = 0.1, scale: float = 1.0, void: float = 0.0) -> Ledger:
    opened = Ledger.opened(torch.tensor([0.3, 0.2, 0.1], device=DEVICE))
    opened.rate.fill_(rate)
    opened.scale.fill_(scale)
    opened.void.fill_(void)
    return opened


@pytest.mark.parametrize(("nesterov", "scale"), [(False, 1.0), (True, 1.0), (True, 0.25)])
@pytest.mark.parametrize(("count", "dtype"), [(5000, torch.float16), (64, torch.float32)])
def test_a_step_is_torch_s_and_rounds_the_copies(nesterov: bool, scale: float, count: int, dtype: torch.dtype) -> None:
    own = flat(count, dtype)
    other = own.weight.clone().requires_grad_()
    optimizer = torch.optim.SGD([other], lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=nesterov)
    optimizer.state[other]["momentum_buffer"] = own.velocity.clone()
    for _ in range(2):
        sgd_step(own, ledger(scale=scale), decay=0.05, momentum=0.9, nesterov=nesterov)
        other.grad = scale * own.gradient.float()
        optimizer.step()
    torch.testing.assert_close(own.weight, other.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own.velocity, optimizer.state[other]["momentum_buffer"], rtol=1e-5, atol=1e-6)
    assert torch.equal(own.copy, own.weight.half())


def test_a_void_step_changes_nothing_whatever_the_gradient() -> None:
    own = flat(3000)
    own.gradient.fill_(torch.nan)
    before = [tensor.clone() for tensor in (own.weight, own.velocity, own.copy)]
    sgd_step(own, ledger(void=1.0), decay=0.05, momentum=0.9, nesterov=True)
    for old, new in zip(before, (own.weight, own.velocity, own.copy), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("clip", [0.0, 0.5, 100.0])
@pytest.mark.parametrize("bad", [(), ("loss", 1, math.inf), ("norm", 1, math.nan), ("norm", 0, -math.inf)], ids=str)
def test_a_step_is_settled_as_formulas_do(
    clip: float, bad: tuple[str, int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = ledger(), ledger()
    for step in range(3):
        loss, norms = torch.randn((), device=DEVICE), torch.rand(3, device=DEVICE)
        if bad and bad[1] == step:
            (loss if bad[0] == "loss" else norms[1]).fill_(bad[2])
        own.settle(loss, norms, clip)
        with monkeypatch.context() as patch:
            patch.setattr(sgd, "fused", lambda x: False)
            other.settle(loss, norms, clip)
        for field in fields(Ledger):
            if not (field.name == "scale" and own.void):
                torch.testing.assert_close(getattr(own, field.name), getattr(other, field.name), equal_nan=True)
    assert int(own.first_void) == (bad[1] if bad else 3)
    assert (int(own.number), int(own.place)) == (3, 3)
    assert float(own.rate) == pytest.approx(0.1)
