"""An activation as the command line writes it: ``elu``, ``leaky_relu:0.1``, ``mpelu:alpha=0.25,beta=1``."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import dataclass

from torch import nn

import zeromean.nn as zmnn
from zeromean.spelling import nearest

_SPELLING = re.compile(r"(?P<name>[A-Za-z_]\w*)(?::(?P<colon>.+)|\((?P<parens>.*)\))?")

_NEVER_FALLING = ("elu", "selu", "celu", "shifted_relu", "relu", "leaky_relu", "pelu", "mpelu")


@dataclass(frozen=True)
class Activation:
    """A named activation with its settings.

    Attributes:
        name: key of :data:`zeromean.nn.ACTIVATIONS`.
        settings: keyword arguments of the module, in the order of its signature.
    """

    name: str
    settings: tuple[tuple[str, float], ...] = ()

    def build(self, width: int = 1) -> nn.Module:
        """A new module; a learnable one has ``width`` values of each parameter, one for each channel of its input."""
        settings: dict[str, float] = dict(self.settings)
        if "num_parameters" in inspect.signature(zmnn.ACTIVATIONS[self.name]).parameters:
            settings["num_parameters"] = width
        return zmnn.by_name(self.name, **settings)

    @property
    def commutes_with_maximum(self) -> bool:
        """Whether f(max(x, y)) = max(f(x), f(y)) at all times: f never falls, cannot learn to, and draws no noise.

        Such an activation may follow a max-pooling instead of preceding it. PReLU is none: its slope may turn negative.
        """
        return self.name in _NEVER_FALLING and all(value >= 0 for _, value in self.settings)

    @property
    def text(self) -> str:
        """The canonical spelling, which :func:`parse` reads back."""
        values = ",".join(f"{key}={value:g}" for key, value in self.settings)
        return f"{self.name}:{values}" if values else self.name

    @property
    def slug(self) -> str:
        """A folder's name."""
        return "-".join([self.name, *self._values()])

    @property
    def label(self) -> str:
        """As tables and charts print it: ``LeakyReLU(0.1)``."""
        values = ", ".join(self._values())
        title = zmnn.ACTIVATIONS[self.name].__name__
        return f"{title}({values})" if values else title

    def _values(self) -> list[str]:
        """The settings as short as they can be told apart: values alone where they are the module's first arguments."""
        first = _known(self.name)[: len(self.settings)] == [key for key, _ in self.settings]
        return [f"{value:g}" if first else f"{key}={value:g}" for key, value in self.settings]


def parse(text: str) -> Activation:
    """Read ``name``, ``name:0.1``, ``name(0.1)`` or ``name:alpha=0.5,beta=1``.

    Raises:
        ValueError: unknown activation (names the nearest), unknown setting, or a value that is no number or that
            the activation refuses.
    """
    match = _SPELLING.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"an activation reads name or name:value, got {text!r}: for example leaky_relu:0.1")
    name = match["name"].lower()
    if name not in zmnn.ACTIVATIONS:
        raise ValueError(f"unknown activation {match['name']!r}: {nearest(name, zmnn.ACTIVATIONS)}")
    activation = Activation(name, _settings(name, match["colon"] or match["parens"] or ""))
    activation.build()
    return activation


def _known(name: str) -> list[str]:
    parameters = inspect.signature(zmnn.ACTIVATIONS[name]).parameters
    return [key for key in parameters if key not in ("inplace", "device", "dtype", "num_parameters", "save")]


def _settings(name: str, text: str) -> tuple[tuple[str, float], ...]:
    known = _known(name)
    found: dict[str, float] = {}
    for position, part in enumerate(part for part in text.split(",") if part):
        key, equals, value = part.partition("=")
        if not equals:
            if position >= len(known):
                takes = f"{len(known)} values ({', '.join(known)})" if known else "none"
                raise ValueError(f"{name} got too many settings in {text!r}: it has {takes}")
            key, value = known[position], part
        key = key.strip()
        if key not in known:
            raise ValueError(
                f"{name} has no setting {key!r} in {text!r}: {nearest(key, known) if known else 'it has none'}"
            )
        try:
            found[key] = float(value)
        except ValueError:
            raise ValueError(f"{key} of {name} must be a number, got {value!r}: for example {name}:{key}=0.1") from None
        if not math.isfinite(found[key]):
            raise ValueError(f"{key} of {name} must be finite, got {value!r}: for example {name}:{key}=0.1")
    return tuple((key, found[key]) for key in known if key in found)
