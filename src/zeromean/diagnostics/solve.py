r"""Solve with the weighted covariance of every unit of a layer, at a price that a layer of thousands of inputs can pay.

The system of unit u, from centred rows b_n [I] (n = 1 .. N, shared by all units), its weights w_n >= 0 of mean 1, and
their weighted mean d = \sum_n w_n b_n / N, is

    V_u = \sum_n w_n (b_n - d)(b_n - d)^T / N + damping * 1

Three ways, all on the same V_u:

    dense       form V_u, Cholesky                        N I^2 + I^3 / 3 multiplications a unit
    woodbury    through the rows: the Gram matrix         N^3 / 3 a unit, and N^2 I once; needs damping > 0
                b_n^T b_m is shared by all units
    cg          conjugate gradients on all units at       2 N I an iteration, unit and right-hand side: two matrix
                once; V_u v = B^T (w (B v)) / N - ...     products for all units together; preconditioned by the one
                                                          covariance that all units share (w = 1)

A gradient of the layer on the same rows takes 3 N I multiplications a unit (forward, and two products backward), so in
gradients of the layer: dense I / 3 + I^2 / (9 N), woodbury N^2 / (9 I), cg 2/3 an iteration and right-hand side.
`method="auto"` takes the cheapest by this count. Every solution comes with its measured relative residual.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

Method = Literal["dense", "woodbury", "cg"]

_ELEMENTS_AT_ONCE = 2**25
_CAUTION = 3


@dataclass(frozen=True)
class UnitSystems:
    """The matrices V_u of a layer, never formed: see the file's first lines.

    Attributes:
        rows: b [..., N, I].
        weights: w [..., U, N], not negative, of mean 1 over N.
        centre: d [..., U, I], the weighted mean of the rows; 0 for second moments about the origin.
        damping: what is added to the diagonal, in squared units of the rows.
    """

    rows: Tensor
    weights: Tensor
    centre: Tensor
    damping: float

    def apply(self, vectors: Tensor) -> Tensor:
        """V_u times K vectors of each unit: [..., U, K, I] to the same shape."""
        shape = vectors.shape[-3:-1]
        along = (vectors.flatten(-3, -2) @ self.rows.mT).unflatten(-2, shape)
        weighted = along * (self.weights / self.rows.shape[-2])[..., None, :]
        moments = (weighted.flatten(-3, -2) @ self.rows).unflatten(-2, shape)
        centre = self.centre[..., None, :]
        product: Tensor = moments - centre * (vectors * centre).sum(-1, keepdim=True) + self.damping * vectors
        return product

    def chunks(self, elements_a_unit: int) -> Iterator[slice]:
        """Ranges of units, as many at once as memory is meant to hold."""
        units, groups = self.weights.shape[-2], math.prod(self.weights.shape[:-2])
        size = max(1, _ELEMENTS_AT_ONCE // max(1, elements_a_unit * groups))
        for start in range(0, units, size):
            yield slice(start, start + size)

    def take(self, units: slice) -> "UnitSystems":
        """The systems of some units."""
        return UnitSystems(self.rows, self.weights[..., units, :], self.centre[..., units, :], self.damping)


@dataclass(frozen=True)
class Solution:
    """Solutions of a layer's systems.

    Attributes:
        values: x [..., U, K, I].
        residual: the largest |V x - r| / |r| of a unit's right-hand sides [..., U]; 0 where r is 0.
        method: how they were found.
        iterations: the most that conjugate gradients took; 0 for the others.
    """

    values: Tensor
    residual: Tensor
    method: Method
    iterations: int


def expected_iterations(rows: int, fan_in: int) -> float:
    """How many conjugate gradients need for a residual of 1e-8: 22 / (1 - I / N)^2, a fit to random rows and weights.

    With no more rows than inputs nothing evens out the weights' differences, and they need hundreds.
    """
    return 22 / (1 - fan_in / rows) ** 2 if rows > fan_in else math.inf


def _costs(
    rows: int, fan_in: int, units: int, right_hand_sides: int, damping: float
) -> tuple[dict[Method, float], float]:
    """Multiplications a unit: of the direct methods, and of an iteration of conjugate gradients."""
    shared = rows * fan_in**2 + fan_in**3 / 3
    direct: dict[Method, float] = {
        "dense": shared,
        "woodbury": rows**3 / 3 + rows**2 * fan_in / units if damping > 0 else math.inf,
    }
    return direct, right_hand_sides * 2 * rows * fan_in


def price(rows: int, fan_in: int, units: int, damping: float) -> float:
    """Multiplications a unit of the best direct method, which no choice exceeds by much."""
    direct, _ = _costs(rows, fan_in, units, 1, damping)
    return min(direct.values())


def choose_method(rows: int, fan_in: int, units: int, right_hand_sides: int, damping: float) -> Method:
    """The cheapest method by its count of multiplications a unit; conjugate gradients only where they have time.

    On layers in use they took 1 to 15 times `expected_iterations` (8 x 128 networks: ELU 30 to 75 where 29 were
    expected, ReLU 335 to 490), so `_CAUTION` times as many are counted.
    """
    direct, iteration = _costs(rows, fan_in, units, right_hand_sides, damping)
    shared = direct["dense"] / units
    costs = {**direct, "cg": _CAUTION * expected_iterations(rows, fan_in) * iteration + shared}
    return min(costs, key=lambda method: costs[method])


def solve(
    systems: UnitSystems,
    right_hand_sides: Tensor,
    *,
    method: Method | Literal["auto"] = "auto",
    tolerance: float = 1e-8,
    max_iterations: int = 500,
) -> Solution:
    """Solve V_u x = r for K right-hand sides of every unit.

    Args:
        systems: the matrices.
        right_hand_sides: r [..., U, K, I].
        method: "dense", "woodbury", "cg", or "auto" for the cheapest. Conjugate gradients that "auto" chose and that do
            not converge for the price of a direct method give way to that.
        tolerance: relative residual at which conjugate gradients stop, or 16 units of the type's rounding if that is
            more; the direct methods ignore it. Reaching `max_iterations` first is no error: read `Solution.residual`.
        max_iterations: of conjugate gradients.

    Raises:
        ValueError: If the method is unknown or a matrix is singular.
    """
    methods: dict[str, Callable[[UnitSystems, Tensor], Tensor]] = {"dense": _dense, "woodbury": _woodbury}
    if method not in ("auto", *get_args(Method)):
        raise ValueError(f"method must be 'auto' or one of {', '.join(get_args(Method))}, got {method!r}")
    patience, instead = max_iterations, None
    if method == "auto":
        units, count, fan_in = right_hand_sides.shape[-3:]
        method, patience, instead = _planned(systems.rows.shape[-2], fan_in, units, count, systems.damping)
    if method == "woodbury" and systems.damping <= 0:
        raise ValueError(
            f"method 'woodbury' divides by the damping, got {systems.damping}: choose it above 0, or 'dense'"
        )
    iterations = 0
    try:
        if method == "cg":
            most = min(patience, max_iterations)
            values, iterations = _conjugate_gradients(systems, right_hand_sides, tolerance, most)
            if instead is not None and iterations == patience:
                method, iterations = instead, 0
        if method != "cg":
            values = methods[method](systems, right_hand_sides)
    except LinAlgError as error:
        raise ValueError(
            f"the weighted covariance of a unit's {systems.rows.shape[-1]} inputs over {systems.rows.shape[-2]} rows "
            f"is singular with damping {systems.damping:g}: choose a larger damping, or more rows than inputs"
        ) from error
    return Solution(values, _relative_residual(systems, values, right_hand_sides), method, iterations)


def _planned(rows: int, fan_in: int, units: int, right_hand_sides: int, damping: float) -> tuple[Method, int, Method]:
    """The method of "auto"; if that is cg, its iterations for the price of the best direct one, and that one."""
    direct, iteration = _costs(rows, fan_in, units, right_hand_sides, damping)
    best = min(direct, key=lambda method: direct[method])
    return choose_method(rows, fan_in, units, right_hand_sides, damping), int(direct[best] / iteration), best


def _relative_residual(systems: UnitSystems, values: Tensor, right_hand_sides: Tensor) -> Tensor:
    size = right_hand_sides.norm(dim=-1)
    error = torch.empty_like(size)
    for units in systems.chunks(systems.rows.shape[-2] * values.shape[-2]):
        difference = systems.take(units).apply(values[..., units, :, :]) - right_hand_sides[..., units, :, :]
        error[..., units, :] = difference.norm(dim=-1)
    return torch.where(size > 0, error / size, error).amax(-1)


def _dense(systems: UnitSystems, right_hand_sides: Tensor) -> Tensor:
    values = torch.empty_like(right_hand_sides)
    rows, fan_in = systems.rows.shape[-2:]
    for units in systems.chunks(max(rows, fan_in) * fan_in):
        part = systems.take(units)
        deviations = systems.rows[..., None, :, :] - part.centre[..., None, :]
        scaled = deviations * (part.weights / rows).sqrt()[..., None]
        matrix = scaled.mT @ scaled
        matrix.diagonal(dim1=-2, dim2=-1).add_(systems.damping)
        values[..., units, :, :] = _cholesky_solve(matrix, right_hand_sides[..., units, :, :])
    return values


def _cholesky_solve(matrix: Tensor, right_hand_sides: Tensor) -> Tensor:
    """Solve with symmetric matrices [..., n, n] for right-hand sides [..., K, n]."""
    return torch.cholesky_solve(right_hand_sides.mT, torch.linalg.cholesky(matrix)).mT


def _woodbury(systems: UnitSystems, right_hand_sides: Tensor) -> Tensor:
    """Solve x = (r - Y^T (damping + Y Y^T)^-1 Y r) / damping with Y = sqrt(w / N) (B - d), from B's Gram matrix."""
    values = torch.empty_like(right_hand_sides)
    count = systems.rows.shape[-2]
    gram = systems.rows @ systems.rows.mT
    for units in systems.chunks(2 * count**2):
        part, r = systems.take(units), right_hand_sides[..., units, :, :]
        root = (part.weights / count).sqrt()
        across = part.centre @ systems.rows.mT
        centred = gram[..., None, :, :] - across[..., None, :] - across[..., :, None]
        centred = centred + part.centre.square().sum(-1)[..., None, None]
        matrix = centred * root[..., None, :] * root[..., :, None]
        matrix.diagonal(dim1=-2, dim2=-1).add_(systems.damping)
        centre = part.centre[..., None, :]
        shape = r.shape[-3:-1]
        along = (r.flatten(-3, -2) @ systems.rows.mT).unflatten(-2, shape) - (r * centre).sum(-1, keepdim=True)
        inner = _cholesky_solve(matrix, along * root[..., None, :]) * root[..., None, :]
        back = (inner.flatten(-3, -2) @ systems.rows).unflatten(-2, shape) - inner.sum(-1, keepdim=True) * centre
        values[..., units, :, :] = (r - back) / systems.damping
    return values


def _preconditioner(systems: UnitSystems) -> Callable[[Tensor], Tensor]:
    """The inverse of B^T B / N + damping, which is V_u of a unit with equal weights, on vectors [..., M, I]."""
    rows, damping = systems.rows, systems.damping
    count, fan_in = rows.shape[-2:]
    if fan_in <= count or damping <= 0:
        matrix = rows.mT @ rows / count
        matrix.diagonal(dim1=-2, dim2=-1).add_(damping)
        factor = torch.linalg.cholesky(matrix)
        return lambda r: torch.cholesky_solve(r.mT, factor).mT
    gram = rows @ rows.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(count * damping)
    factor = torch.linalg.cholesky(gram)
    return lambda r: (r - torch.cholesky_solve((r @ rows.mT).mT, factor).mT @ rows) / damping


def _conjugate_gradients(
    systems: UnitSystems, right_hand_sides: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, int]:
    precondition = _preconditioner(systems)
    values, most = torch.empty_like(right_hand_sides), 0
    rows, fan_in = systems.rows.shape[-2:]
    for units in systems.chunks(max(rows, fan_in) * right_hand_sides.shape[-2]):
        part, r = systems.take(units), right_hand_sides[..., units, :, :]
        values[..., units, :, :], iterations = _iterate(part, r, precondition, tolerance, max_iterations)
        most = max(most, iterations)
    return values, most


def _iterate(
    systems: UnitSystems,
    right_hand_sides: Tensor,
    precondition: Callable[[Tensor], Tensor],
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, int]:
    """Conjugate gradients on all systems at once; one that has converged stands still."""
    shape = right_hand_sides.shape[-3:-1]
    goal = max(tolerance, 16 * torch.finfo(right_hand_sides.dtype).eps) * right_hand_sides.norm(dim=-1, keepdim=True)
    x, r = torch.zeros_like(right_hand_sides), right_hand_sides.clone()
    z = precondition(r.flatten(-3, -2)).unflatten(-2, shape)
    p, rz = z, (r * z).sum(-1, keepdim=True)
    for iteration in range(max_iterations):
        active = r.norm(dim=-1, keepdim=True) > goal
        if not active.any():
            return x, iteration
        q = systems.apply(p)
        step = torch.where(active, rz / (p * q).sum(-1, keepdim=True), 0)
        x, r = x + step * p, r - step * q
        z = precondition(r.flatten(-3, -2)).unflatten(-2, shape)
        previous, rz = rz, (r * z).sum(-1, keepdim=True)
        p = z + torch.where(active, rz / previous, 0) * p
    return x, max_iterations
