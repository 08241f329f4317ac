"""Activations that a network calls as functions: no module, so no hook sees them, but a function mode can name them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

_NAMES = (
    *(
        "relu",
        "relu_",
        "relu6",
        "leaky_relu",
        "leaky_relu_",
        "prelu",
        "rrelu",
        "rrelu_",
        "elu",
        "elu_",
        "selu",
        "selu_",
    ),
    *("celu", "celu_", "gelu", "silu", "mish", "softplus", "softsign", "tanh", "tanh_", "sigmoid", "sigmoid_"),
    *("logsigmoid", "hardtanh", "hardtanh_", "hardsigmoid", "hardswish", "threshold", "threshold_"),
)
_FUNCTIONS: dict[Any, str] = {
    getattr(place, name): name.rstrip("_")
    for place in (F, torch, torch.Tensor)
    for name in _NAMES
    if hasattr(place, name)
}


class FunctionalCalls(TorchFunctionMode):
    """Counts the activations called as functions, by what ran before them; changes nothing.

    Attributes:
        inside: how many activation modules are running: what they call is theirs.
        place: name of the unit layer that ran last.
        found: how often each function was called behind each layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0
        self.place = ""
        self.found: Counter[tuple[str, str]] = Counter()
        self._entered = False

    def __enter__(self) -> FunctionalCalls:
        self._entered = True
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def close(self) -> None:
        """Leave the mode, if it was entered."""
        if self._entered:
            self._entered = False
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the function and take note of it if it is an activation."""
        if self.inside == 0 and func in _FUNCTIONS:
            self.found[_FUNCTIONS[func], self.place] += 1
        return func(*args, **(kwargs or {}))

    def sentences(self) -> tuple[str, ...]:
        """What was found, a line for each."""
        return tuple(
            f"{name} called as a function{f' behind {place}' if place else ''}{f', {count} times' if count > 1 else ''}"
            for (name, place), count in self.found.items()
        )
