"""What there is to test, as data: a new entry gets every existing test."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import zeromean as zm
from tests import oracles

SEED = 20201
F = zm.functional


@dataclass(frozen=True)
class ActivationCase:
    """One activation with one setting.

    Attributes:
        name: The key in `zm.nn.ACTIVATIONS`, with the setting behind a colon.
        call: The function of x and the learnable parameters, in training, with a fixed seed if noisy.
        value: The oracle of x and the same parameters.
        slope: The oracle's derivative in x.
        module: Builds the module.
        parameters: Values of the learnable parameters.
        saved_bytes: Kept for the backward pass by layer, activation, layer, for each hidden element in bfloat16.
        infinite: Whether the function is defined at both infinities.
        noisy: Whether `call` adds noise.
    """

    name: str
    call: Callable[..., Tensor]
    value: Callable[..., oracles.Array]
    slope: Callable[..., oracles.Array]
    module: Callable[[], nn.Module]
    parameters: tuple[float, ...] = ()
    saved_bytes: float = 2.0
    infinite: bool = True
    noisy: bool = False

    @property
    def explodes(self) -> bool:
        """CELU with a negative alpha grows as e^|x| on the negative side, by definition."""
        return self.name.startswith("celu:-")

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [torch.tensor([value], dtype=dtype) for value in self.parameters]


def seed(x: Tensor) -> Tensor:
    return torch.tensor(SEED, device=x.device)


def _uniform(x: oracles.Array, low: float, high: float) -> oracles.Array:
    return low + (high - low) * oracles.uniform(SEED, x.size).reshape(x.shape)


def _normal_slope(x: oracles.Array, epsilon: float) -> oracles.Array:
    sigma = epsilon * oracles.uniform(SEED, 1, stream=1)
    return np.clip(1 + sigma * oracles.normal(SEED, x.size).reshape(x.shape), 0, 2)


def _elu(alpha: float, save: Any, saved_bytes: float) -> ActivationCase:
    return ActivationCase(
        f"elu:{alpha},{save}",
        lambda x: F.elu(x, alpha, save=save),
        lambda x: oracles.elu(x, alpha),
        lambda x: oracles.elu_slope(x, alpha),
        lambda: zm.nn.ELU(alpha, save=save),
        saved_bytes=saved_bytes,
    )


def _celu(alpha: float, saved_bytes: float) -> ActivationCase:
    return ActivationCase(
        f"celu:{alpha}",
        lambda x: F.celu(x, alpha),
        lambda x: oracles.celu(x, alpha),
        lambda x: oracles.celu_slope(x, alpha),
        lambda: zm.nn.CELU(alpha),
        saved_bytes=saved_bytes,
    )


def _selu(save: Any, saved_bytes: float) -> ActivationCase:
    return ActivationCase(
        f"selu:{save}",
        lambda x: F.selu(x, save=save),
        oracles.selu,
        oracles.selu_slope,
        lambda: zm.nn.SELU(save=save),
        saved_bytes=saved_bytes,
    )


def _leaky(slope: float, saved_bytes: float) -> ActivationCase:
    return ActivationCase(
        f"leaky_relu:{slope}",
        lambda x: F.leaky_relu(x, slope),
        lambda x: oracles.linear_sides(x, slope, 1.0),
        lambda x: oracles.linear_sides_slope(x, slope, 1.0),
        lambda: zm.nn.LeakyReLU(slope),
        saved_bytes=saved_bytes,
    )


def _prelu(weight: float, save: Any, saved_bytes: float) -> ActivationCase:
    return ActivationCase(
        f"prelu:{weight},{save}",
        lambda x, w: F.prelu(x, w, save=save),
        lambda x, w: oracles.linear_sides(x, w, 1.0),
        lambda x, w: oracles.linear_sides_slope(x, w, 1.0),
        lambda: zm.nn.PReLU(init=weight, save=save),
        (weight,),
        saved_bytes=saved_bytes,
    )


def _rrelu(lower: float, upper: float, saved_bytes: float) -> ActivationCase:
    return ActivationCase(
        f"rrelu:{lower},{upper}",
        lambda x: F.rrelu(x, lower, upper, training=True, seed=seed(x)),
        lambda x: oracles.linear_sides(x, _uniform(x, lower, upper), 1.0),
        lambda x: oracles.linear_sides_slope(x, _uniform(x, lower, upper), 1.0),
        lambda: zm.nn.RReLU(lower, upper),
        saved_bytes=saved_bytes,
        noisy=True,
    )


def _eprelu(noisy: bool, weight: float, save: Any, saved_bytes: float) -> ActivationCase:
    def k(x: oracles.Array) -> Any:
        return _uniform(x, 0.6, 1.4) if noisy else 1.0

    return ActivationCase(
        f"eprelu:{'noisy' if noisy else 'quiet'},{weight},{save}",
        lambda x, w: F.eprelu(x, w, 0.4, True, seed=seed(x), noisy=noisy, save=save),
        lambda x, w: oracles.linear_sides(x, w, k(x)),
        lambda x, w: oracles.linear_sides_slope(x, w, k(x), at_zero="right"),
        lambda: zm.nn.EPReLU(init=weight, save=save),
        (weight,),
        saved_bytes=saved_bytes,
        noisy=noisy,
    )


def _mpelu(alpha: float, beta: float, save: Any, saved_bytes: float) -> ActivationCase:
    return ActivationCase(
        f"mpelu:{alpha},{beta},{save}",
        lambda x, a, b: F.mpelu(x, a, b, save=save),
        oracles.mpelu,
        oracles.mpelu_slope,
        lambda: zm.nn.MPELU(alpha=alpha, beta=beta, save=save),
        (alpha, beta),
        saved_bytes=saved_bytes,
    )


def _pelu(a: float, b: float, save: Any, saved_bytes: float) -> ActivationCase:
    return ActivationCase(
        f"pelu:{a},{b},{save}",
        lambda x, a, b: F.pelu(x, a, b, save=save),
        oracles.pelu,
        oracles.pelu_slope,
        lambda: zm.nn.PELU(a=a, b=b, save=save),
        (a, b),
        saved_bytes=saved_bytes,
    )


def _eelu(noisy: bool, epsilon: float, save: Any, saved_bytes: float) -> ActivationCase:
    def k(x: oracles.Array) -> oracles.Array:
        return _normal_slope(x, epsilon) if noisy else np.ones_like(x)

    return ActivationCase(
        f"eelu:{'noisy' if noisy else 'quiet'},{epsilon},{save}",
        lambda x, a, b: F.eelu(x, a, b, epsilon, True, seed=seed(x), noisy=noisy, save=save),
        lambda x, a, b: oracles.eelu(x, a, b, k(x)),
        lambda x, a, b: oracles.eelu_slope(x, a, b, k(x)),
        lambda: zm.nn.EELU(epsilon=epsilon, save=save),
        (0.25, 1.0),
        saved_bytes=saved_bytes,
        noisy=noisy,
    )


ACTIVATION_CASES = [
    _elu(1.0, "auto", 2.0),
    _elu(0.3, "output", 2.0),
    _elu(0.0, "auto", 2.0),
    _elu(1.0, "input", 4.0),
    _elu(-2.0, "auto", 4.0),
    _elu(-2.0, "output", 2.125),
    _selu("auto", 2.0),
    _selu("input", 4.0),
    _celu(1.0, 2.0),
    _celu(0.3, 2.0),
    _celu(-1.5, 4.0),
    ActivationCase("shifted_relu", F.shifted_relu, oracles.shifted_relu, oracles.shifted_relu_slope, zm.nn.ShiftedReLU),
    ActivationCase(
        "relu",
        F.relu,
        lambda x: np.maximum(x, 0.0),
        lambda x: oracles.linear_sides_slope(x, 0.0, 1.0),
        zm.nn.ReLU,
    ),
    _leaky(0.1, 2.0),
    _leaky(0.0, 2.0),
    _leaky(-0.5, 4.0),
    _prelu(0.25, "auto", 4.0),
    _prelu(-0.5, "auto", 4.0),
    _prelu(0.0, "input", 4.0),
    _prelu(0.25, "output", 2.125),
    _prelu(-0.5, "output", 2.125),
    _rrelu(0.125, 1 / 3, 2.0),
    _rrelu(-0.5, 0.5, 4.0),
    ActivationCase(
        "silu",
        F.silu,
        lambda x: oracles.swish(x, 1.0),
        lambda x: oracles.swish_slope(x, 1.0),
        zm.nn.SiLU,
        saved_bytes=4.0,
        infinite=False,
    ),
    ActivationCase(
        "swish:0.7", F.swish, oracles.swish, oracles.swish_slope, zm.nn.Swish, (0.7,), saved_bytes=4.0, infinite=False
    ),
    ActivationCase(
        "swish:-1.5", F.swish, oracles.swish, oracles.swish_slope, zm.nn.Swish, (-1.5,), saved_bytes=4.0, infinite=False
    ),
    ActivationCase("gelu", F.gelu, oracles.gelu, oracles.gelu_slope, zm.nn.GELU, saved_bytes=4.0, infinite=False),
    ActivationCase("mish", F.mish, oracles.mish, oracles.mish_slope, zm.nn.Mish, saved_bytes=4.0, infinite=False),
    _pelu(1.0, 1.0, "auto", 2.0),
    _pelu(1.5, 0.7, "output", 2.0),
    _pelu(1.5, 0.7, "input", 4.0),
    _mpelu(0.25, 1.0, "auto", 2.0),
    _mpelu(1.5, 0.5, "output", 2.0),
    _mpelu(1.5, 0.5, "input", 4.0),
    ActivationCase(
        "erelu:0.4",
        lambda x: F.erelu(x, 0.4, True, seed=seed(x)),
        lambda x: np.where(x <= 0, 0.0, oracles.linear_sides(x, 0.0, _uniform(x, 0.6, 1.4))),
        lambda x: oracles.linear_sides_slope(x, 0.0, _uniform(x, 0.6, 1.4)),
        zm.nn.EReLU,
        noisy=True,
    ),
    _eprelu(True, 0.1, "auto", 4.0),
    _eprelu(True, 0.1, "output", 2.125),
    _eprelu(False, 0.1, "auto", 4.0),
    _eprelu(False, -0.3, "output", 2.125),
    _eelu(True, 1.0, "auto", 2.0),
    _eelu(True, 0.6, "input", 4.0),
    _eelu(False, 1.0, "auto", 2.0),
]
