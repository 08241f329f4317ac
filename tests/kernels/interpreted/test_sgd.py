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


def ledger(rate: float = 0.1, scale: float = 1.0, void: float = 0.0, *, scales: bool = False) -> Ledger:
    opened = Ledger.opened(torch.tensor([0.3, 0.2, 0.1], device=DEVICE), scales=scales)
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


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("clip", [0.0, 0.5, 100.0])
@pytest.mark.parametrize("bad", [(), ("loss", 1, math.inf), ("norm", 1, math.nan), ("norm", 0, -math.inf)], ids=str)
def test_a_step_is_settled_as_formulas_do(
    clip: float, bad: tuple[str, int, float], scales: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = ledger(scales=scales), ledger(scales=scales)
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
    overflows = scales and bad[:1] == ("norm",)
    assert int(own.first_void) == (bad[1] if bad and not overflows else 3)
    assert (int(own.number), int(own.place)) == (3, 3)
    assert float(own.rate) == pytest.approx(0.1)


@pytest.mark.parametrize("programs", [False, True])
def test_the_scale_of_the_loss_falls_with_an_overflow_and_rises_after_calm(
    programs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sgd, "_CALM", 3)
    if not programs:
        monkeypatch.setattr(sgd, "fused", lambda x: False)
    own = Ledger.opened(torch.full((60,), 0.1, device=DEVICE), scales=True)
    first, fine, seen = float(own.loss_scale), torch.ones(2, device=DEVICE), list[float]()
    loss = torch.ones((), device=DEVICE)

    def settle(norms: torch.Tensor) -> float:
        own.settle(loss, norms, 0.5)
        seen.append(float(own.loss_scale) / first)
        return float(own.void)

    assert [settle(fine), settle(fine), settle(math.inf * fine)] == [0, 0, 1]
    # The gradient that comes next was scaled by half as much, and clipped as it would have been without.
    assert [settle(first / 2 * fine) for _ in range(3)] == [0, 0, 0]
    assert float(own.scale) == pytest.approx(0.5 / math.sqrt(2) / (first / 2))
    assert seen == [1, 1, 0.5, 0.5, 0.5, 1]
    for _ in range(18):
        settle(fine)
    assert seen[-1] == 2.0**16 / first
    assert [settle(math.nan * fine) for _ in range(16)] == [1] * 16
    assert (float(own.loss_scale), int(own.first_void)) == (1, 60)
    # Where there is nothing left to scale, a gradient that is not finite ends the training.
    assert [settle(fine), settle(math.inf * fine), settle(fine)] == [0, 1, 1]
    assert (int(own.first_void), int(own.overflows)) == (41, 17)
