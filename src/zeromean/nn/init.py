r"""Gains and initial weights from an activation's own Gaussian moments.

For a standard normal z, E f(z)^2 is computed by Gauss-Legendre quadrature in float64 on panels of length 1, so that the
kinks of the activations, at 0 and -1, lie between panels; no table, and any activation will do.

    forward gain   1 / sqrt(E f(z)^2)     weights N(0, gain^2 / fan_in) keep the second moment from layer to layer
    backward gain  1 / sqrt(E f'(z)^2)    the same for gradients, with fan_out
    variance gain  1 / sqrt(Var f(z))     makes the output's variance 1, as in networks with weight standardization

ReLU's forward gain is sqrt(2) (He), the identity's is 1 (LeCun), ELU's is 1.2452.

Sources: He et al., ICCV 2015; Klambauer et al., NeurIPS 2017; Brock et al., ICML 2021 (variance gain).
"""

import copy
import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from zeromean.nn.registry import by_name

Kind = Literal["forward", "backward", "variance"]

_REACH = 12
_NODES = 32
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Moments:
    """Moments of f(z) for a standard normal z.

    Attributes:
        mean: E f(z).
        variance: Var f(z).
        second: E f(z)^2.
        slope_second: E f'(z)^2.
    """

    mean: float
    variance: float
    second: float
    slope_second: float


def moments(activation: str | nn.Module) -> Moments:
    """Compute the moments of an activation under a standard normal input, in evaluation mode.

    Args:
        activation: A name that `by_name` knows, for its defaults, or a module. One with learnable slopes is measured as
            it stands, averaged over its channels. It is not changed.

    Raises:
        ValueError: If the name is unknown.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        module = by_name(activation) if isinstance(activation, str) else copy.deepcopy(activation)
        return _measure(module.to("cpu", torch.float64).eval())


def _measure(module: nn.Module) -> Moments:
    channels = max((p.numel() for p in module.parameters()), default=1)
    nodes, weights = _normal_quadrature()
    with torch.enable_grad():
        z = nodes[:, None].repeat(1, channels).requires_grad_()
        # A fresh tensor, as the activation may work in place.
        value = module(z.clone())
        (slope,) = torch.autograd.grad(value.sum(), z)
    mean, second, slope_second = (float((weights @ t.detach()).mean()) for t in (value, value**2, slope**2))
    variance = float((weights @ (value.detach() - weights @ value.detach()) ** 2).mean())
    return Moments(mean, variance, second, slope_second)


@cache
def _normal_quadrature() -> tuple[Tensor, Tensor]:
    """Nodes and weights [n] of an integral against the standard normal density over [-12, 12], in float64."""
    order = torch.arange(1, _NODES, dtype=torch.float64)
    off_diagonal = order / torch.sqrt(4 * order**2 - 1)
    points, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    starts = torch.arange(-_REACH, _REACH, dtype=torch.float64)
    nodes = (starts[:, None] + (points + 1) / 2).flatten()
    lengths = (vectors[0] ** 2).repeat(len(starts))
    return nodes, lengths * torch.exp(-(nodes**2) / 2) / math.sqrt(2 * math.pi)


def gain(activation: str | nn.Module, kind: Kind = "forward") -> float:
    """Compute the factor for weights before an activation, see the file's first lines.

    Args:
        activation: A name that `by_name` knows, or a module.
        kind: "forward" 1 / sqrt(E f^2), "backward" 1 / sqrt(E f'^2), "variance" 1 / sqrt(Var f).

    Raises:
        ValueError: If the name or the kind is unknown.
    """
    measured = moments(activation)
    by_kind = {"forward": measured.second, "backward": measured.slope_second, "variance": measured.variance}
    if kind not in by_kind:
        raise ValueError(
            f"kind must be one of {', '.join(by_kind)}, got {kind!r}: 'forward' keeps activations in scale"
        )
    return 1 / math.sqrt(by_kind[kind])


def taylor_gain(alpha: float, beta: float) -> float:
    """Compute sqrt(2 / (1 + alpha^2 beta^2)), published with MPELU and used with EELU.

    It takes the negative side as the line alpha beta x, its Taylor expansion at 0; alpha and beta are the initial
    values. It is He's gain for alpha = 0 and LeCun's for alpha = beta = 1.
    """
    return math.sqrt(2 / (1 + (alpha * beta) ** 2))


@torch.no_grad()
def init_(model: nn.Module, activation: str | nn.Module, *, gain: float | None = None) -> nn.Module:
    """Draw every linear and convolution weight from N(0, gain^2 / fan_in), and set their biases to 0, in place.

    Args:
        model: Holds at least one `torch.nn` linear or convolution layer. All of them are set, the last one too.
        activation: What follows the layers: a name that `by_name` knows, or a module.
        gain: Replaces the activation's forward gain: sqrt(2) for He's, 1 for LeCun's, `taylor_gain` for MPELU's.

    Returns:
        The model.

    Raises:
        ValueError: If the model has no such layer, or the name is unknown.
    """
    chosen = 1 / math.sqrt(moments(activation).second) if gain is None else gain
    layers = [module for module in model.modules() if isinstance(module, (*_WEIGHTED, *_TRANSPOSED))]
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no linear or convolution layer: pass the model that holds them")
    for layer in layers:
        nn.init.normal_(layer.weight, std=chosen / math.sqrt(_fan_in(layer)))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return model


def _fan_in(layer: nn.Module) -> float:
    """How many products are summed into one output; for a transposed convolution, on average over its outputs."""
    weight = layer.get_parameter("weight")
    if isinstance(layer, _TRANSPOSED):
        return weight.shape[0] / layer.groups * weight[0, 0].numel() / math.prod(layer.stride)
    return weight[0].numel()
