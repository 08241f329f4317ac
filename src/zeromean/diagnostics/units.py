r"""Fisher block, natural gradient and bias shift of a layer's units, exactly, from a batch.

A unit has net = w^T a + w_0 and delta = d ln p / d net. Inputs z of the net come from p; the labels are averaged over,
so that delta^2 below is E(delta^2 | z). With q(z) = p(z) delta^2(z) / E_p(delta^2), the distribution that draws inputs
the more often the more the unit's net matters there,

    F = c [[E_q(a a^T), E_q(a)], [E_q(a)^T, 1]]     c = E_p(delta^2)           (the bias is the last row and column)

    natural gradient   dw = V^-1 (g - g_0 E_q(a)) / c      dw_0 = g_0 / c - E_q(a)^T dw        V = Var_q(a)
    bias shift         E_p(a)^T dw + dw_0   of an update (dw, dw_0): the change of the unit's mean net
    k                  1 + (E_q(a) - E_p(a))^T V^-1 E_q(a)

which is Theorem 1, written for inputs that are centred at E_q(a) (where F is block diagonal), and Theorem 2: the bias
shift of the natural gradient is (E_p(a) - k E_q(a))^T A^-1 g + k g_0 / c with A = c E_q(a a^T).

Damping adds `damping` to the diagonal of V, nothing to the bias: F is then that of inputs with independent noise of
this variance, and both theorems hold as they stand, with the noise counted in E_q(a a^T) and Var_q(a).

Tensors are inputs [..., N, I], squared deltas [..., N, U], and per unit [..., U] or [..., U, I]; leading dimensions are
groups that share nothing. A unit with c = 0 has no q: its quantities are nan, its natural gradient 0.

Source: Clevert, Unterthiner, Hochreiter, ICLR 2016, section 2. The damping is our choice.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from zeromean.diagnostics.solve import Method, Solution, UnitSystems, solve


@dataclass(frozen=True)
class UnitMoments:
    """First moments of a layer's inputs, as its units see them.

    Attributes:
        mean_input: E_p(a) [..., I].
        weighted_mean_input: E_q(a) [..., U, I]; E_p(a) where c = 0.
        fisher_scale: c = E_p(delta^2) [..., U], a sample being an input of the net: summed over its places.
        weights: delta^2 / E(delta^2) [..., U, N]; 1 where c = 0.
    """

    mean_input: Tensor
    weighted_mean_input: Tensor
    fisher_scale: Tensor
    weights: Tensor


@dataclass(frozen=True)
class NaturalGradient:
    """The unit natural gradient of a layer: Theorem 1.

    Attributes:
        weight: dw [..., U, I].
        bias: dw_0 [..., U]; None for units without a bias.
        residual: relative residual of the solve [..., U].
        method: of the solve.
    """

    weight: Tensor
    bias: Tensor | None
    residual: Tensor
    method: Method


@dataclass(frozen=True)
class UnitQuantities:
    """What the theory says about a layer's units on a batch; tensors are per unit [..., U] unless said.

    Those of a gradient are None without one. Bias shifts are for an update by the gradient itself: a training step
    moves the mean net by - learning rate x the number.

    Attributes:
        samples: rows used: inputs, or inputs x places of a convolution.
        damping: what was added to the variance of every input.
        mean_input: E_p(a) [..., I].
        weighted_mean_input: E_q(a) [..., U, I], or None where it was not asked for.
        fisher_scale: c = E_p(delta^2).
        k: factor of Theorem 2; 1 means that the bias needs no correction.
        bias_gradient: g_0 / c.
        natural_bias: dw_0 of the natural gradient.
        bias_shift: of the plain gradient, (E_p(a)^T g + g_0) / c: divided by c so that it compares with the others.
        uncorrected_bias_shift: E_p(a)^T A^-1 g + g_0 / c: natural in weights and bias apart, Theorem 2 without k.
        natural_bias_shift: of the unit natural gradient.
        cosine: of the angle between (g, g_0) and the unit natural gradient.
        norm_ratio: c |(dw, dw_0)| / |(g, g_0)|: 1 for uncorrelated inputs of mean 0 and variance 1.
        residual: relative residual of the solve.
        method: of the solve: "dense", "woodbury" or "cg".
    """

    samples: int
    damping: float
    mean_input: Tensor
    weighted_mean_input: Tensor | None
    fisher_scale: Tensor
    k: Tensor
    bias_gradient: Tensor | None
    natural_bias: Tensor | None
    bias_shift: Tensor | None
    uncorrected_bias_shift: Tensor | None
    natural_bias_shift: Tensor | None
    cosine: Tensor | None
    norm_ratio: Tensor | None
    residual: Tensor
    method: Method


def unit_moments(inputs: Tensor, squared_deltas: Tensor, *, places: float = 1) -> UnitMoments:
    """Compute E_p(a), E_q(a) and E_p(delta^2).

    Args:
        inputs: a [..., N, I], without the bias input.
        squared_deltas: E(delta^2 | input) [..., N, U].
        places: rows that an input of the net has: 1, or the number of places where a convolution puts its kernel.
    """
    mean_square = squared_deltas.mean(-2)
    alive = mean_square > 0
    weights = torch.where(alive[..., None], squared_deltas.mT / mean_square[..., None], 1)
    return UnitMoments(
        mean_input=inputs.mean(-2),
        weighted_mean_input=weights @ inputs / inputs.shape[-2],
        fisher_scale=places * mean_square,
        weights=weights,
    )


def weighted_variance(inputs: Tensor, squared_deltas: Tensor) -> Tensor:
    """Compute Var_q(a) [..., U, I, I], which only small layers can hold."""
    moments = unit_moments(inputs, squared_deltas)
    deviations = inputs[..., None, :, :] - moments.weighted_mean_input[..., None, :]
    weighted = deviations * moments.weights[..., None]
    return weighted.mT @ deviations / inputs.shape[-2]


def unit_fisher(inputs: Tensor, squared_deltas: Tensor, *, damping: float = 0.0, places: float = 1) -> Tensor:
    """Compute the unit Fisher blocks [..., U, I + 1, I + 1], the bias last, which only small layers can hold."""
    ones = torch.ones_like(inputs[..., :1])
    extended = torch.cat((inputs, ones), -1)
    weighted = extended[..., None, :, :] * squared_deltas.mT[..., None]
    block = places / inputs.shape[-2] * weighted.mT @ extended[..., None, :, :]
    noise = damping * places * squared_deltas.mean(-2)
    block.diagonal(dim1=-2, dim2=-1)[..., :-1] += noise[..., None]
    return block


def _centred(inputs: Tensor, moments: UnitMoments, damping: float) -> UnitSystems:
    """The systems of V = Var_q(a) + damping, with rows centred at E_p(a), which changes no variance."""
    shift = moments.weighted_mean_input - moments.mean_input[..., None, :]
    return UnitSystems(inputs - moments.mean_input[..., None, :], moments.weights, shift, damping)


def unit_natural_gradient(
    inputs: Tensor,
    squared_deltas: Tensor,
    gradient: Tensor,
    bias_gradient: Tensor | None,
    *,
    damping: float = 0.0,
    scale_damping: float = 0.0,
    places: float = 1,
    method: Method | Literal["auto"] = "auto",
) -> NaturalGradient:
    """Solve F (dw, dw_0) = (g, g_0) for every unit.

    Args:
        inputs: a [..., N, I].
        squared_deltas: E(delta^2 | input) [..., N, U].
        gradient: g [..., U, I].
        bias_gradient: g_0 [..., U]; None for units without a bias, whose block is A = c E_q(a a^T) alone.
        damping: added to the variance of every input, in its squared units.
        scale_damping: added to c, so that the whole block is scaled by 1 + scale_damping / c.
        places: see `unit_moments`.
        method: see `solve`.

    Raises:
        ValueError: If a block is singular.
    """
    moments = unit_moments(inputs, squared_deltas, places=places)
    inverse_scale = _inverse(moments.fisher_scale + scale_damping)[..., None]
    if bias_gradient is None:
        raw = UnitSystems(inputs, moments.weights, torch.zeros_like(moments.weighted_mean_input), damping)
        solution = solve(raw, gradient[..., None, :], method=method)
        weight, bias = solution.values[..., 0, :] * inverse_scale, None
    else:
        centred = gradient - bias_gradient[..., None] * moments.weighted_mean_input
        solution = solve(_centred(inputs, moments, damping), centred[..., None, :], method=method)
        weight = solution.values[..., 0, :] * inverse_scale
        bias = bias_gradient * inverse_scale[..., 0] - (weight * moments.weighted_mean_input).sum(-1)
    return NaturalGradient(weight, bias, solution.residual, solution.method)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1 / scale, 0)


def unit_quantities(
    inputs: Tensor,
    squared_deltas: Tensor,
    gradient: Tensor | None = None,
    bias_gradient: Tensor | None = None,
    *,
    damping: float = 0.0,
    places: float = 1,
    method: Method | Literal["auto"] = "auto",
    keep_weighted_mean: bool = True,
) -> UnitQuantities:
    """Compute k, and for a gradient the bias shifts and how far it is from the unit natural gradient.

    Args:
        inputs: a [..., N, I].
        squared_deltas: E(delta^2 | input) [..., N, U].
        gradient: g [..., U, I].
        bias_gradient: g_0 [..., U]; a layer without biases is measured as if it had them, at 0: the mean delta.
        damping: added to the variance of every input, in its squared units.
        places: see `unit_moments`.
        method: see `solve`.
        keep_weighted_mean: whether the result holds E_q(a), which is as large as the weights.

    Raises:
        ValueError: If a unit's Var_q(a) + damping is singular.
    """
    moments = unit_moments(inputs, squared_deltas, places=places)
    mean = moments.weighted_mean_input
    systems = _centred(inputs, moments, damping)
    wanted = [mean]
    if gradient is not None and bias_gradient is not None:
        wanted.append(gradient - bias_gradient[..., None] * mean)
    solution = solve(systems, torch.stack(wanted, -2), method=method)
    dead = moments.fisher_scale <= 0
    whitened_mean = solution.values[..., 0, :]
    values = {"k": 1 + (systems.centre * whitened_mean).sum(-1)}
    if gradient is not None and bias_gradient is not None:
        values |= _of_gradient(moments, systems.centre, solution, gradient, bias_gradient)
    known = {name: torch.where(dead, torch.nan, value) for name, value in values.items()}
    return UnitQuantities(
        samples=inputs.shape[-2],
        damping=damping,
        mean_input=moments.mean_input,
        weighted_mean_input=torch.where(dead[..., None], torch.nan, mean) if keep_weighted_mean else None,
        fisher_scale=moments.fisher_scale,
        k=known["k"],
        bias_gradient=known.get("bias_gradient"),
        natural_bias=known.get("natural_bias"),
        bias_shift=known.get("bias_shift"),
        uncorrected_bias_shift=known.get("uncorrected_bias_shift"),
        natural_bias_shift=known.get("natural_bias_shift"),
        cosine=known.get("cosine"),
        norm_ratio=known.get("norm_ratio"),
        residual=solution.residual,
        method=solution.method,
    )


def _of_gradient(
    moments: UnitMoments, shift: Tensor, solution: Solution, gradient: Tensor, bias_gradient: Tensor
) -> dict[str, Tensor]:
    """Everything about (g, g_0), given V^-1 E_q(a) and V^-1 (g - g_0 E_q(a)), times c where it is a step."""
    scale, mean = moments.fisher_scale, moments.weighted_mean_input
    whitened_mean, weight = solution.values.unbind(-2)
    bias = bias_gradient - (mean * weight).sum(-1)
    # E_q(a a^T)^-1 g from V^-1 g, by Sherman and Morrison.
    whitened = weight + bias_gradient[..., None] * whitened_mean
    along = (whitened_mean * gradient).sum(-1) / (1 + (mean * whitened_mean).sum(-1))
    uncorrected = whitened - along[..., None] * whitened_mean
    mean_input = moments.mean_input[..., None, :]
    length = torch.cat((gradient, bias_gradient[..., None]), -1).norm(dim=-1)
    natural_length = torch.cat((weight, bias[..., None]), -1).norm(dim=-1)
    product = (gradient * weight).sum(-1) + bias_gradient * bias
    return {
        "bias_gradient": bias_gradient / scale,
        "natural_bias": bias / scale,
        "bias_shift": ((mean_input * gradient).sum(-1) + bias_gradient) / scale,
        "uncorrected_bias_shift": ((mean_input * uncorrected).sum(-1) + bias_gradient) / scale,
        "natural_bias_shift": (bias_gradient - (shift * weight).sum(-1)) / scale,
        "cosine": product / (length * natural_length),
        "norm_ratio": natural_length / length,
    }
