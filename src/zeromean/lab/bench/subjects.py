"""What is measured: every activation as this library runs it, as torch runs it, and as a paper's reader writes it.

The formula serves twice: in the input's type it is the textbook contender, in float64 it is the truth that all results
are held against. Noisy activations take their random slope k as the formula's last argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zeromean.nn import functional as zf
from zeromean.spelling import nearest

Call = Callable[..., Tensor]

_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805
_LEAK = 0.01
_LOWER, _UPPER = 1 / 8, 1 / 3
_REACH = 0.4


@dataclass(frozen=True)
class Subject:
    """An activation in one of its passes, with the parameters' defaults of `zeromean.functional`.

    Attributes:
        name: Of the function in `zeromean.functional`, with ``:quiet`` behind it for the pass without noise.
        zeromean: Our function of x and the learnable parameters.
        formula: Its definition in plain operators, of x, the learnable parameters and, if noisy, the random slope k.
        eager: torch's function of the same arguments, where there is one.
        inplace: The same, overwriting x.
        ranges: Between which values each learnable parameter lies.
        draw: Draws k for x.
        noisy: Which pass of an activation with noisy and quiet ones this is; the parameters learn in the quiet one.
    """

    name: str
    zeromean: Call
    formula: Call
    eager: Call | None = None
    inplace: Call | None = None
    ranges: tuple[tuple[float, float], ...] = ()
    draw: Call | None = None
    noisy: bool | None = None

    @property
    def frozen(self) -> bool:
        """Whether the parameters get no gradient in this pass."""
        return self.noisy is True

    def textbook(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """The formula with everything that it needs, in x's type."""
        aligned = [along_channels(p.detach() if self.frozen else p, x) for p in parameters]
        slopes = [self.draw(x)] if self.draw else []
        return self.formula(x, *aligned, *slopes)

    def on(self, device: torch.device) -> Call:
        """Our function, with its turn as a tensor on the device, as the module keeps it."""
        if self.noisy is None:
            return self.zeromean
        return partial(self.zeromean, noisy=torch.tensor(self.noisy, device=device))


def along_channels(parameter: Tensor, x: Tensor) -> Tensor:
    """One value, or the values of the channels in dimension 1, so that they broadcast to x."""
    return parameter.reshape(1, -1, *(1,) * (x.ndim - 2)) if x.ndim > 1 else parameter


def _elu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1.0 * (torch.exp(x) - 1))


def _selu(x: Tensor) -> Tensor:
    return _SELU_SCALE * torch.where(x > 0, x, _SELU_ALPHA * (torch.exp(x) - 1))


def _linear(x: Tensor, slope: Any) -> Tensor:
    return torch.where(x > 0, x, slope * x)


def _linear_from_zero(x: Tensor, slope: Any) -> Tensor:
    return torch.where(x >= 0, x, slope * x)


def _mpelu(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.where(x >= 0, x, alpha * (torch.exp(beta * x) - 1))


def _pelu(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(x >= 0, a / b * x, a * (torch.exp(x / b) - 1))


def _eelu(x: Tensor, alpha: Tensor, beta: Tensor, k: Tensor) -> Tensor:
    return torch.where(x >= 0, k * x, alpha * (torch.exp(beta * x) - 1))


def _eprelu(x: Tensor, weight: Tensor, k: Tensor) -> Tensor:
    return torch.where(x >= 0, k * x, weight * x)


def _erelu(x: Tensor, k: Tensor) -> Tensor:
    return torch.where(x > 0, k * x, 0.0)


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x * 0.5**0.5))


def _normal_slope(x: Tensor) -> Tensor:
    sigma = torch.rand((), device=x.device, dtype=x.dtype)
    return (1 + sigma * torch.randn_like(x)).clamp(0, 2)


def _uniform_slope(x: Tensor) -> Tensor:
    return 1 - _REACH + 2 * _REACH * torch.rand_like(x)


def _uniform_leak(x: Tensor) -> Tensor:
    return _LOWER + (_UPPER - _LOWER) * torch.rand_like(x)


_SLOPE = (0.1, 0.4)
_DEPTH, _DECAY = (0.2, 1.0), (0.5, 1.5)
_NEAR_ONE = (0.8, 1.25)

_ALL = (
    Subject("relu", zf.relu, lambda x: torch.where(x > 0, x, 0.0), F.relu, F.relu_),
    Subject("elu", zf.elu, _elu, F.elu, F.elu_),
    Subject("selu", zf.selu, _selu, F.selu, F.selu_),
    Subject("celu", zf.celu, _elu, F.celu, F.celu_),
    Subject(
        "shifted_relu",
        zf.shifted_relu,
        lambda x: torch.where(x > -1, x, -1.0),
        partial(F.threshold, threshold=-1.0, value=-1.0),
        partial(F.threshold, threshold=-1.0, value=-1.0, inplace=True),
    ),
    Subject("leaky_relu", zf.leaky_relu, lambda x: _linear(x, _LEAK), F.leaky_relu, F.leaky_relu_),
    Subject("silu", zf.silu, lambda x: x * torch.sigmoid(x), F.silu, partial(F.silu, inplace=True)),
    Subject("gelu", zf.gelu, _gelu, F.gelu),
    Subject("mish", zf.mish, lambda x: x * torch.tanh(F.softplus(x)), F.mish, partial(F.mish, inplace=True)),
    Subject("swish", zf.swish, lambda x, beta: x * torch.sigmoid(beta * x), ranges=(_DECAY,)),
    Subject("prelu", zf.prelu, _linear, F.prelu, ranges=(_SLOPE,)),
    Subject("pelu", zf.pelu, _pelu, ranges=(_NEAR_ONE, _NEAR_ONE)),
    Subject("mpelu", zf.mpelu, _mpelu, ranges=(_DEPTH, _DECAY)),
    Subject(
        "rrelu",
        partial(zf.rrelu, training=True),
        _linear,
        partial(F.rrelu, training=True),
        partial(F.rrelu_, training=True),
        draw=_uniform_leak,
    ),
    Subject("erelu", partial(zf.erelu, training=True), _erelu, draw=_uniform_slope),
    Subject("eprelu", partial(zf.eprelu, training=True), _eprelu, ranges=(_SLOPE,), draw=_uniform_slope, noisy=True),
    Subject("eprelu:quiet", partial(zf.eprelu, training=True), _linear_from_zero, ranges=(_SLOPE,), noisy=False),
    Subject("eelu", partial(zf.eelu, training=True), _eelu, ranges=(_DEPTH, _DECAY), draw=_normal_slope, noisy=True),
    Subject("eelu:quiet", partial(zf.eelu, training=True), _mpelu, ranges=(_DEPTH, _DECAY), noisy=False),
)
SUBJECTS = {subject.name: subject for subject in _ALL}


def find(name: str) -> Subject:
    """The subject of that name.

    Raises:
        ValueError: If there is none.
    """
    if name not in SUBJECTS:
        raise ValueError(f"unknown activation {name!r}: {nearest(name, SUBJECTS)}")
    return SUBJECTS[name]
