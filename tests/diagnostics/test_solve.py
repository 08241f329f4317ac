"""Three ways to solve the same systems agree, say how well they solved, and refuse what is singular."""

import pytest
import torch
from torch import Tensor

from zeromean.diagnostics import solve as module
from zeromean.diagnostics.solve import Method, UnitSystems, choose_method, expected_iterations, solve

METHODS: list[Method] = ["dense", "woodbury", "cg"]


def problem(
    rows: int,
    fan_in: int,
    units: int,
    *,
    groups: tuple[int, ...] = (),
    damping: float = 0.1,
    dtype: torch.dtype = torch.float64,
) -> tuple[UnitSystems, Tensor]:
    generator = torch.Generator().manual_seed(rows + fan_in)
    inputs = torch.randn(*groups, rows, fan_in, generator=generator, dtype=dtype)
    weights = torch.randn(*groups, units, rows, generator=generator, dtype=dtype).square()
    weights = weights / weights.mean(-1, keepdim=True)
    r = torch.randn(*groups, units, 2, fan_in, generator=generator, dtype=dtype)
    return UnitSystems(inputs, weights, weights @ inputs / rows, damping), r


def dense_matrices(systems: UnitSystems) -> Tensor:
    """V_u, a row at a time."""
    count, fan_in = systems.rows.shape
    matrices = []
    for w, d in zip(systems.weights, systems.centre, strict=True):
        matrix = systems.damping * torch.eye(fan_in).to(systems.rows)
        for b, weight in zip(systems.rows, w, strict=True):
            matrix = matrix + weight * torch.outer(b - d, b - d) / count
        matrices.append(matrix)
    return torch.stack(matrices)


@pytest.mark.parametrize(("rows", "fan_in", "units"), [(30, 6, 4), (8, 20, 3), (12, 12, 1)])
@pytest.mark.parametrize("method", METHODS)
def test_methods_agree_with_the_matrix(method: Method, rows: int, fan_in: int, units: int) -> None:
    systems, r = problem(rows, fan_in, units)
    matrix = dense_matrices(systems)
    solution = solve(systems, r, method=method, tolerance=1e-13)
    torch.testing.assert_close(solution.values, torch.linalg.solve(matrix, r.mT).mT, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(systems.apply(r), r @ matrix, rtol=1e-10, atol=1e-10)
    assert solution.method == method
    assert solution.residual.shape == (units,)
    assert (solution.residual < 1e-11).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rows", "fan_in"), [(20, 5), (5, 20)])
def test_groups_and_chunks_change_nothing(
    method: Method, rows: int, fan_in: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    systems, r = problem(rows, fan_in, 7, groups=(3,))
    whole = solve(systems, r, method=method, tolerance=1e-13).values
    monkeypatch.setattr(module, "_ELEMENTS_AT_ONCE", 2 * 3 * 400)
    torch.testing.assert_close(solve(systems, r, method=method, tolerance=1e-13).values, whole, rtol=1e-10, atol=1e-10)
    for group in range(3):
        alone = UnitSystems(systems.rows[group], systems.weights[group], systems.centre[group], systems.damping)
        single = solve(alone, r[group], method=method, tolerance=1e-13).values
        torch.testing.assert_close(single, whole[group], rtol=1e-10, atol=1e-10)


def test_without_damping_more_rows_than_inputs_suffice() -> None:
    systems, r = problem(40, 6, 3, damping=0)
    direct = solve(systems, r, method="dense").values
    torch.testing.assert_close(solve(systems, r, method="cg", tolerance=1e-13).values, direct, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["dense", "cg"])
def test_singular_systems_are_refused(method: Method) -> None:
    systems, r = problem(5, 8, 2, damping=0)
    with pytest.raises(ValueError, match="is singular with damping 0: choose a larger damping"):
        solve(systems, r, method=method)


def test_woodbury_needs_damping_and_methods_have_names() -> None:
    systems, r = problem(5, 8, 2, damping=0)
    with pytest.raises(ValueError, match="divides by the damping, got 0"):
        solve(systems, r, method="woodbury")
    with pytest.raises(ValueError, match="method must be 'auto' or one of dense, woodbury, cg, got 'lu'"):
        solve(systems, r, method="lu")  # type: ignore[arg-type]


def test_the_residual_is_measured_not_believed() -> None:
    systems, r = problem(60, 40, 3, damping=1e-4)
    stopped = solve(systems, r, method="cg", max_iterations=3)
    assert stopped.iterations == 3
    error = (systems.apply(stopped.values) - r).norm(dim=-1) / r.norm(dim=-1)
    torch.testing.assert_close(stopped.residual, error.amax(-1))
    assert (stopped.residual > 1e-3).all()


def test_a_zero_right_hand_side_has_the_solution_zero() -> None:
    systems, r = problem(10, 4, 2)
    r[1] = 0
    solution = solve(systems, r, method="cg")
    assert not solution.values[1].any()
    assert solution.residual[1] == 0


def test_conjugate_gradients_stop_in_single_precision_too() -> None:
    systems, r = problem(40, 30, 5, dtype=torch.float32)
    solution = solve(systems, r, method="cg", tolerance=0)
    assert solution.iterations < 100
    assert (solution.residual < 1e-4).all()


def test_equal_weights_are_solved_by_the_preconditioner() -> None:
    """All units share V = B^T B / N + damping: one iteration."""
    systems, r = problem(30, 6, 4)
    even = UnitSystems(systems.rows, torch.ones_like(systems.weights), torch.zeros_like(systems.centre), 0.1)
    assert solve(even, r, method="cg", tolerance=1e-10).iterations == 1


def test_the_choice_is_by_size() -> None:
    assert choose_method(4096, 27, 64, 2, 1e-3) == "dense"
    assert choose_method(64, 784, 128, 2, 1e-3) == "woodbury"
    assert choose_method(4096, 1152, 512, 2, 1e-3) == "cg"
    assert choose_method(2048, 4608, 512, 2, 1e-3) == "woodbury"
    assert choose_method(64, 784, 128, 2, 0) != "woodbury"


@pytest.mark.parametrize(("rows", "fan_in"), [(600, 150), (300, 150)])
def test_conjugate_gradients_need_the_iterations_that_the_choice_expects(rows: int, fan_in: int) -> None:
    systems, r = problem(rows, fan_in, 8, damping=1e-3)
    solution = solve(systems, r, method="cg", tolerance=1e-8)
    assert solution.iterations == pytest.approx(expected_iterations(rows, fan_in), rel=0.35)
    assert (solution.residual < 2e-8).all()


def test_conjugate_gradients_that_take_too_long_give_way() -> None:
    rows, fan_in, units = 2000, 600, 16
    systems, r = problem(rows, fan_in, units, damping=1e-3)
    assert solve(systems, r).method == "cg"
    noise = torch.randn(units, rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    uneven = torch.exp(4 * noise)
    weights = uneven / uneven.mean(-1, keepdim=True)
    solution = solve(UnitSystems(systems.rows, weights, weights @ systems.rows / rows, 1e-3), r)
    assert (solution.method, solution.iterations) == ("dense", 0)
    assert (solution.residual < 1e-8).all()
