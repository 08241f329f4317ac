"""The theorems and lemmas of the ELU paper, to 1e-10 in float64, on random units."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.diagnostics import oracle
from zeromean.diagnostics import (
    unit_fisher,
    unit_moments,
    unit_natural_gradient,
    unit_quantities,
    weighted_variance,
)

TIGHT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
SHAPES = [(40, 3, 5), (60, 8, 2), (30, 1, 1), (200, 12, 3)]


@pytest.fixture(params=SHAPES, ids=str)
def batch(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, fan_in, units = request.param
    generator = torch.Generator().manual_seed(rows)
    a = torch.randn(rows, fan_in, generator=generator, dtype=torch.float64).clamp(min=-0.3) + 0.5
    deltas = torch.randn(rows, units, generator=generator, dtype=torch.float64) * a[:, :1]
    g = torch.randn(units, fan_in, generator=generator, dtype=torch.float64)
    g0 = torch.randn(units, generator=generator, dtype=torch.float64)
    return a, deltas.square(), g, g0


def test_moments_are_those_of_the_definitions(batch: tuple[Tensor, ...]) -> None:
    a, squares, _, _ = batch
    moments, variance = unit_moments(a, squares), weighted_variance(a, squares)
    for u, unit in enumerate(oracle.units(a, squares)):
        torch.testing.assert_close(moments.mean_input, unit.mean, **TIGHT)
        torch.testing.assert_close(moments.weighted_mean_input[u], unit.mean_q, **TIGHT)
        torch.testing.assert_close(moments.fisher_scale[u], unit.c, **TIGHT)
        torch.testing.assert_close(variance[u], unit.var_q, **TIGHT)


def test_the_weighted_mean_is_the_mean_and_a_covariance(batch: tuple[Tensor, ...]) -> None:
    """E_q(a) = E_p(a) + Cov_p(delta^2, a) / E_p(delta^2)."""
    a, squares, _, _ = batch
    moments = unit_moments(a, squares)
    covariance = ((squares - squares.mean(0)).T @ (a - a.mean(0))) / len(a)
    expected = moments.mean_input + covariance / moments.fisher_scale[:, None]
    torch.testing.assert_close(moments.weighted_mean_input, expected, **TIGHT)


def test_the_fisher_block_has_the_form_of_the_reweighted_inputs(batch: tuple[Tensor, ...]) -> None:
    a, squares, _, _ = batch
    blocks = unit_fisher(a, squares)
    for u, unit in enumerate(oracle.units(a, squares)):
        torch.testing.assert_close(blocks[u], unit.fisher(), **TIGHT)
        torch.testing.assert_close(blocks[u, :-1, :-1], unit.c * unit.second_q, **TIGHT)
        torch.testing.assert_close(blocks[u, -1, :-1], unit.c * unit.mean_q, **TIGHT)
        torch.testing.assert_close(blocks[u, -1, -1], unit.c, **TIGHT)


def test_lemma_2_and_the_two_steps_of_theorem_2(batch: tuple[Tensor, ...]) -> None:
    a, squares, g, g0 = batch
    quantities = unit_quantities(a, squares, g, g0)
    for u, unit in enumerate(oracle.units(a, squares)):
        m, inverse_second = unit.mean_q, torch.linalg.inv(unit.second_q)
        lemma = 1 + m @ torch.linalg.inv(unit.var_q) @ m
        torch.testing.assert_close(1 / (1 - m @ inverse_second @ m), lemma, **TIGHT)
        block = unit.fisher()
        A, b, c = block[:-1, :-1], block[:-1, -1], block[-1, -1]
        s = 1 / (c - b @ torch.linalg.solve(A, b))
        torch.testing.assert_close(s, lemma / c, **TIGHT)
        assert s > 0
        k = quantities.k[u]
        rest = 1 - unit.mean @ torch.linalg.solve(A, b)
        torch.testing.assert_close(rest * s, k / c, **TIGHT)
        torch.testing.assert_close(rest * s * b, k * m, **TIGHT)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_theorem_1_is_the_solution_with_the_block(batch: tuple[Tensor, ...], damping: float) -> None:
    a, squares, g, g0 = batch
    natural = unit_natural_gradient(a, squares, g, g0, damping=damping)
    assert natural.bias is not None
    block = unit_fisher(a, squares, damping=damping)
    step = torch.cat((natural.weight, natural.bias[:, None]), 1)
    torch.testing.assert_close((block @ step[..., None])[..., 0], torch.cat((g, g0[:, None]), 1), **TIGHT)
    if damping == 0:
        for u, unit in enumerate(oracle.units(a, squares)):
            weight, bias = unit.theorem_1(g[u], g0[u])
            torch.testing.assert_close(natural.weight[u], weight, **TIGHT)
            torch.testing.assert_close(natural.bias[u], bias, **TIGHT)


def test_units_without_a_bias_solve_with_the_weights_alone(batch: tuple[Tensor, ...]) -> None:
    a, squares, g, _ = batch
    natural = unit_natural_gradient(a, squares, g, None, damping=0.1)
    block = unit_fisher(a, squares, damping=0.1)[:, :-1, :-1]
    assert natural.bias is None
    torch.testing.assert_close((block @ natural.weight[..., None])[..., 0], g, **TIGHT)


def test_scale_damping_scales_the_whole_block(batch: tuple[Tensor, ...]) -> None:
    a, squares, g, g0 = batch
    plain = unit_natural_gradient(a, squares, g, g0)
    damped = unit_natural_gradient(a, squares, g, g0, scale_damping=0.5)
    c = unit_moments(a, squares).fisher_scale
    torch.testing.assert_close(damped.weight, plain.weight * (c / (c + 0.5))[:, None], **TIGHT)


def test_theorem_2(batch: tuple[Tensor, ...]) -> None:
    a, squares, g, g0 = batch
    quantities = unit_quantities(a, squares, g, g0)
    for u, unit in enumerate(oracle.units(a, squares)):
        weight, bias = unit.theorem_1(g[u], g0[u])
        for value, expected in (
            (quantities.k, unit.k),
            (quantities.natural_bias_shift, unit.mean @ weight + bias),
            (quantities.natural_bias_shift, unit.theorem_2(g[u], g0[u])),
            (quantities.natural_bias, bias),
            (quantities.bias_gradient, g0[u] / unit.c),
            (quantities.bias_shift, (unit.mean @ g[u] + g0[u]) / unit.c),
            (
                quantities.uncorrected_bias_shift,
                unit.mean @ torch.linalg.solve(unit.second_q, g[u]) / unit.c + g0[u] / unit.c,
            ),
        ):
            assert value is not None
            torch.testing.assert_close(value[u], expected, **TIGHT)


def test_cosine_and_norm_ratio(batch: tuple[Tensor, ...]) -> None:
    a, squares, g, g0 = batch
    quantities = unit_quantities(a, squares, g, g0)
    for u, unit in enumerate(oracle.units(a, squares)):
        plain = torch.cat((g[u], g0[u, None]))
        natural = torch.linalg.solve(unit.fisher(), plain)
        assert quantities.cosine is not None
        assert quantities.norm_ratio is not None
        torch.testing.assert_close(quantities.cosine[u], torch.cosine_similarity(plain, natural, dim=0), **TIGHT)
        torch.testing.assert_close(quantities.norm_ratio[u], unit.c * natural.norm() / plain.norm(), **TIGHT)


def test_damping_is_independent_noise_on_the_inputs() -> None:
    """Rows a + sigma e_j and a - sigma e_j, each as likely, have the noise's exact moments."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(20, 3, generator=generator, dtype=torch.float64) + 1
    squares = torch.rand(20, 2, generator=generator, dtype=torch.float64)
    g, g0 = torch.randn(2, 3, generator=generator).double(), torch.randn(2, generator=generator).double()
    sigma = (3 * 0.2) ** 0.5
    noise = sigma * torch.cat((torch.eye(3), -torch.eye(3))).double()
    noisy = (a[:, None] + noise).flatten(0, 1)
    damped = unit_quantities(a, squares, g, g0, damping=0.2)
    expected = unit_quantities(noisy, squares.repeat_interleave(6, 0), g, g0)
    for name in ("k", "natural_bias_shift", "uncorrected_bias_shift", "cosine", "norm_ratio"):
        torch.testing.assert_close(getattr(damped, name), getattr(expected, name), **TIGHT)


def test_inputs_that_are_centred_where_they_matter_need_no_correction() -> None:
    """E_q(a) = 0 gives k = 1, and c V^-1 apart: no correction of the bias."""
    generator = torch.Generator().manual_seed(2)
    half = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    squares = torch.rand(50, 2, generator=generator, dtype=torch.float64).repeat(2, 1)
    g, g0 = torch.randn(2, 4, generator=generator).double(), torch.randn(2, generator=generator).double()
    quantities = unit_quantities(torch.cat((half, -half)), squares, g, g0)
    torch.testing.assert_close(quantities.k, torch.ones(2).double(), **TIGHT)
    torch.testing.assert_close(quantities.natural_bias, quantities.bias_gradient, **TIGHT)
    torch.testing.assert_close(quantities.natural_bias_shift, quantities.uncorrected_bias_shift, **TIGHT)


def test_a_common_shift_of_all_inputs_moves_k_but_not_the_natural_update() -> None:
    """The natural gradient belongs to the function, not to its origin: net changes alike for shifted inputs."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(80, 4, generator=generator, dtype=torch.float64)
    delta = torch.randn(80, 3, generator=generator, dtype=torch.float64) * (1 + a[:, :1])
    changes, ks = [], []
    for shift in (0.0, 5.0):
        moved = a + shift
        natural = unit_natural_gradient(moved, delta.square(), delta.T @ moved, delta.sum(0))
        assert natural.bias is not None
        changes.append(moved @ natural.weight.T + natural.bias)
        ks.append(unit_quantities(moved, delta.square()).k)
    torch.testing.assert_close(changes[0], changes[1], rtol=1e-8, atol=1e-8)
    assert (ks[0] - ks[1]).abs().min() > 0.01


def test_a_unit_without_any_delta_is_named_nan_and_stands_still() -> None:
    a, squares = torch.randn(20, 3).double(), torch.rand(20, 2).double()
    squares[:, 1] = 0
    quantities = unit_quantities(a, squares, torch.zeros(2, 3).double(), torch.zeros(2).double())
    assert quantities.k[1].isnan()
    assert quantities.k[0].isfinite()
    assert quantities.weighted_mean_input is not None
    assert quantities.weighted_mean_input[1].isnan().all()
    natural = unit_natural_gradient(a, squares, torch.ones(2, 3).double(), torch.ones(2).double())
    assert natural.bias is not None
    assert not natural.weight[1].any()
    assert not natural.bias[1].any()


def test_groups_are_layers_of_their_own() -> None:
    a, squares = torch.randn(3, 30, 4).double(), torch.rand(3, 30, 2).double()
    g, g0 = torch.randn(3, 2, 4).double(), torch.randn(3, 2).double()
    together = unit_quantities(a, squares, g, g0, damping=0.1)
    for group in range(3):
        alone = unit_quantities(a[group], squares[group], g[group], g0[group], damping=0.1)
        torch.testing.assert_close(together.k[group], alone.k, **TIGHT)
        assert together.cosine is not None
        torch.testing.assert_close(together.cosine[group], alone.cosine, **TIGHT)


def test_without_a_gradient_there_is_no_bias_shift() -> None:
    quantities = unit_quantities(torch.randn(20, 3).double(), torch.rand(20, 2).double())
    assert quantities.bias_shift is None
    assert quantities.natural_bias_shift is None
    assert quantities.cosine is None
