"""Muon's programs against plain formulas, and its matrices against the singular value decomposition."""

from dataclasses import fields

import pytest
import torch

from tests.kernels.interpreted.device import DEVICE
from tests.kernels.interpreted.test_sgd import flat, ledger
from zeromean.kernels import muon
from zeromean.kernels.muon import muon_step, orthogonalize
from zeromean.kernels.sgd import Flat


def copied(own: Flat) -> Flat:
    return Flat(*(getattr(own, field.name).clone() for field in fields(Flat)))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_step_is_that_of_the_formulas(nesterov: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    own = flat(3072, dtype)
    other, start = copied(own), copied(own)
    gradient = 0.25 * own.gradient.float()
    for one, programs in ((own, True), (other, False)):
        with monkeypatch.context() as patch:
            if not programs:
                patch.setattr(muon, "fused", lambda x: False)
            matrix = one.direction[:3000].view(50, 60)
            muon_step(one, ledger(scale=0.25), matrices=[matrix], decay=0.05, momentum=0.9, nesterov=nesterov)
    velocity = 0.9 * start.velocity + gradient
    torch.testing.assert_close(own.velocity, velocity, rtol=1e-5, atol=1e-6)
    way = (gradient + 0.9 * velocity if nesterov else velocity).to(own.direction.dtype)
    orthogonalize(way[:3000].view(50, 60))
    stepped = start.weight * (1 - 0.1 * 0.05) - 0.1 * way.float()
    for one in (own, other):
        torch.testing.assert_close(one.weight, stepped, rtol=1e-4, atol=2e-3 if dtype != torch.float32 else 1e-5)
        assert torch.equal(one.copy, one.weight.half())


@pytest.mark.parametrize("programs", [False, True])
def test_a_void_step_changes_nothing_whatever_the_gradient(programs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not programs:
        monkeypatch.setattr(muon, "fused", lambda x: False)
    own = flat(3072)
    own.gradient.fill_(torch.nan)
    before = copied(own)
    matrices = [own.direction.view(48, 64)]
    muon_step(own, ledger(void=1.0), matrices=matrices, decay=0.05, momentum=0.9, nesterov=True)
    for name in ("weight", "velocity", "copy"):
        assert torch.equal(getattr(own, name), getattr(before, name)), name


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("shape", [(40, 40), (30, 90), (90, 30), (7, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_becomes_nearly_orthogonal(shape: tuple[int, int], size: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator).double()
    left, values, right = torch.linalg.svd(noise, full_matrices=False)
    # From 1 to a twentieth.
    values = torch.logspace(0, -1.3, len(values), dtype=torch.float64)
    matrix = (size * left @ values.diag() @ right).to(DEVICE, dtype)
    orthogonalize(matrix)
    found = matrix.double().cpu() / max(1, shape[0] / shape[1]) ** 0.5
    assert 0.6 < torch.linalg.svdvals(found).min() <= torch.linalg.svdvals(found).max() < 1.25
    # The factors are kept: what is left between them is diagonal.
    inner = left.mT @ found @ right.mT
    assert (inner - inner.diag().diag()).abs().max() < (0.1 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("programs", [False, True])
def test_a_direction_too_small_for_float16_is_kept(programs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not programs:
        monkeypatch.setattr(muon, "fused", lambda x: False)
    own = flat(3072)
    own.velocity.zero_()
    before = own.weight.clone()
    matrices = [own.direction.view(48, 64)]
    muon_step(own, ledger(scale=1e-12), matrices=matrices, decay=0.0, momentum=0.9, nesterov=False)
    sizes = torch.linalg.svdvals((own.weight - before).view(48, 64)) / 0.1
    assert 0.6 < sizes.min() < sizes.max() < 1.25


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_has_no_length_in_float32_moves_nothing_far(size: float, dtype: torch.dtype) -> None:
    matrix = (size * torch.randn(30, 90, device=DEVICE)).to(dtype)
    orthogonalize(matrix)
    assert matrix.abs().max() < 1


def test_zeros_stay_zeros() -> None:
    matrix = torch.zeros(4, 8, device=DEVICE)
    orthogonalize(matrix)
    assert torch.equal(matrix, torch.zeros_like(matrix))
