"""The activations by name, and the learnable ones among a model's modules."""

from typing import Any

import torch
from torch.nn import Module, Parameter

from zeromean.nn.eelu import EELU
from zeromean.nn.elu import CELU, ELU, SELU
from zeromean.nn.mpelu import MPELU
from zeromean.nn.pelu import PELU
from zeromean.nn.prelu import EPReLU, PReLU
from zeromean.nn.relu import LeakyReLU, ReLU, ShiftedReLU
from zeromean.nn.rrelu import EReLU, RReLU
from zeromean.nn.swish import GELU, Mish, SiLU, Swish
from zeromean.spelling import nearest

ACTIVATIONS: dict[str, type[Module]] = {
    "elu": ELU,
    "selu": SELU,
    "celu": CELU,
    "shifted_relu": ShiftedReLU,
    "relu": ReLU,
    "leaky_relu": LeakyReLU,
    "prelu": PReLU,
    "rrelu": RReLU,
    "silu": SiLU,
    "swish": Swish,
    "gelu": GELU,
    "mish": Mish,
    "pelu": PELU,
    "mpelu": MPELU,
    "erelu": EReLU,
    "eprelu": EPReLU,
    "eelu": EELU,
}

_LEARNABLE = (torch.nn.PReLU, Swish, PELU, MPELU, EPReLU, EELU)


def by_name(name: str, **kwargs: Any) -> Module:
    """Build the activation of a name, such as ``by_name("elu", alpha=0.5)``.

    Args:
        name: A key of `ACTIVATIONS`.
        kwargs: The constructor's arguments.

    Raises:
        ValueError: If no activation has that name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: {nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name](**kwargs)


def slope_parameters(model: Module) -> list[Parameter]:
    """List the parameters of a model's learnable activations, each once, in the order of ``model.modules()``.

    They shape the activation rather than weigh an input, so weight decay must not draw them towards 0.
    """
    slopes = [p for m in model.modules() if isinstance(m, _LEARNABLE) for p in m.parameters(recurse=False)]
    return list(dict.fromkeys(slopes))


def decay_groups(model: Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split a model's parameters for an optimizer: the slopes without weight decay, all others with it.

    Args:
        model: Any module.
        weight_decay: The decay of all parameters but the slopes.

    Returns:
        Two parameter groups as `torch.optim` takes them, or one if the model has no learnable activation.
    """
    slopes = slope_parameters(model)
    exempt = set(slopes)
    others = [p for p in model.parameters() if p not in exempt]
    groups = [{"params": others, "weight_decay": weight_decay}, {"params": slopes, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
