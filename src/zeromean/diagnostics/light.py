"""One measured pass: hooks that read what goes through the layers, and nothing else.

While a pass runs, every number stays where it was computed, as a tensor of one value a unit: nothing waits for a GPU.
Samples of a unit are the batch's inputs, times positions for a convolution and tokens for a sequence. A module that is
called again in the same pass is another layer, ``name#2``; its weights' gradient stays with the first call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zeromean.diagnostics.layers import Layer, Role, unit_dimension
from zeromean.diagnostics.tails import Tails, tails
from zeromean.diagnostics.unseen import FunctionalCalls


@dataclass
class Seen:
    """What one call of a layer showed.

    Attributes:
        name: of the layer, ``#2`` added at its second call.
        kind: name of its class.
        role: of the layer.
        samples: how many values of each unit were seen.
        notes: what the reader must know, such as frozen weights.
        of_units: tensors of one value a unit: ``mean``, ``variance``; of activations ``low``, ``high`` and ``off``, the
            samples in the lower tail, the upper tail and, of rectifiers, up to the knee; of unit layers ``input_mean``
            and ``input_variance``, one value an input.
        weights: numbers in its weight.
        norms: ``weight_gradient`` and ``output_gradient``, of several backward passes the root of the sum of squares.
    """

    name: str
    kind: str
    role: Role
    samples: int = 0
    weights: int = 0
    notes: tuple[str, ...] = ()
    of_units: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)


class Pass:
    """The hooks of one forward pass and of the backward passes that follow it.

    Args:
        layers: to read.
        known_tails: of activations without parameters, by name; those of the others are found anew.
        functional: whether to look for activations called as functions, which costs a little in this pass.
    """

    def __init__(self, layers: Iterable[Layer], known_tails: Mapping[str, Tails], *, functional: bool) -> None:
        self.seen: dict[str, Seen] = {}
        self.refused: dict[str, str] = {}
        self.functional = FunctionalCalls() if functional else None
        self._layers = layers
        self._tails = known_tails
        self._calls: dict[str, int] = {}
        self._before: tuple[Layer, int] | None = None
        self._last: tuple[Tensor, tuple[int, ...], tuple[Tensor, Tensor]] | None = None
        self._forward: list[RemovableHandle] = []
        self._backward: list[RemovableHandle] = []

    def begin(self) -> None:
        """Register the forward hooks."""
        try:
            for layer in self._layers:
                if layer.role == "activation":
                    self._forward.append(
                        layer.module.register_forward_pre_hook(self._entering(layer), with_kwargs=True)
                    )
                hook = layer.module.register_forward_hook(self._leaving(layer), with_kwargs=True)
                self._forward.append(hook)
            if self.functional:
                self.functional.__enter__()
        except BaseException:
            self.end_forward()
            raise

    def end_forward(self) -> None:
        """Remove the forward hooks; those that wait for gradients stay."""
        if self.functional:
            self.functional.close()
        self._last = None
        _remove(self._forward)

    def end(self) -> None:
        """Remove all hooks."""
        self.end_forward()
        _remove(self._backward)

    def _entering(self, layer: Layer) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.functional:
                self.functional.inside += 1
            x, seen = first_tensor(args or kwargs), self._open(layer)
            if x is not None:
                self._count(seen, layer, x.detach(), unit_dimension(layer, x, self._before))

        return enter

    def _leaving(self, layer: Layer) -> Callable[..., None]:
        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.functional and layer.role == "activation":
                self.functional.inside -= 1
            y = first_tensor(output)
            if y is None:
                self.refused[layer.name] = "its output holds no floating-point numbers"
                return
            dimension = unit_dimension(layer, y, self._before)
            seen = self._current(layer) if layer.role == "activation" else self._open(layer)
            if layer.role == "unit":
                self._before = (layer, y.ndim)
                self._inputs(seen, layer, args or kwargs)
                if self.functional:
                    self.functional.place = seen.name
            self._moments(seen, y, dimension)
            if y.requires_grad and layer.role != "activation":
                self._listen(seen, "output_gradient", y)
            self._weights(seen, module)

        return leave

    def _open(self, layer: Layer) -> Seen:
        call = self._calls[layer.name] = self._calls.get(layer.name, 0) + 1
        name = layer.name if call == 1 else f"{layer.name}#{call}"
        notes = () if layer.module.training else ("in evaluation mode",)
        seen = self.seen[name] = Seen(name, layer.kind, layer.role, notes=notes)
        return seen

    def _current(self, layer: Layer) -> Seen:
        call = self._calls.get(layer.name, 0)
        return self.seen[layer.name if call == 1 else f"{layer.name}#{call}"]

    def _count(self, seen: Seen, layer: Layer, x: Tensor, dimension: int) -> None:
        found = self._tails.get(layer.name) or tails(layer.module)
        others = _others(x, dimension)

        def count(compare: Callable[..., Tensor], limit: float | Tensor) -> Tensor:
            if isinstance(limit, float) and math.isinf(limit):
                return torch.zeros(x.shape[dimension], device=x.device)
            ones = torch.empty_like(x, dtype=torch.float32)
            return compare(x, _of_channels(limit, x), out=ones).sum(others)

        seen.of_units["low"] = low = count(torch.le, found.lower)
        seen.of_units["high"] = count(torch.ge, found.upper)
        if isinstance(found.knee, Tensor) or found.knee > -math.inf:
            same = isinstance(found.knee, float) and found.knee == found.lower
            seen.of_units["off"] = low if same else count(torch.le, found.knee)

    def _moments(self, seen: Seen, y: Tensor, dimension: int, prefix: str = "") -> None:
        """Of an output, or of an input, which often is the output that was seen last."""
        if y.numel() == 0:
            self.refused[seen.name] = "its output is empty"
            return
        key = (-1 if y.is_inference() else y._version, dimension)
        if self._last is None or self._last[0] is not y or self._last[1] != key or key[0] < 0:
            self._last = (y, key, _moments(y.detach(), _others(y, dimension)))
        mean, variance = self._last[2]
        seen.of_units |= {f"{prefix}mean": mean, f"{prefix}variance": variance}
        if not prefix:
            seen.samples = y.numel() // y.shape[dimension]

    def _inputs(self, seen: Seen, layer: Layer, arguments: Any) -> None:
        x = first_tensor(arguments)
        if x is not None:
            self._moments(seen, x, unit_dimension(layer, x, None), "input_")

    def _weights(self, seen: Seen, module: nn.Module) -> None:
        """A weight that is computed from others (weight norm) is no parameter, and not asked for: asking computes."""
        weight = module._parameters.get("weight")
        seen.weights = 0 if weight is None else weight.numel()
        if seen.role == "unit" and weight is None:
            seen.notes += ("weights are computed from other parameters",)
        elif weight is not None and not weight.requires_grad:
            seen.notes += ("weights are frozen",)
        elif weight is not None and torch.is_grad_enabled() and "#" not in seen.name:
            self._listen(seen, "weight_gradient", weight)

    def _listen(self, seen: Seen, name: str, tensor: Tensor) -> None:
        def hear(gradient: Tensor) -> None:
            size = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)
            seen.norms[name] = torch.hypot(seen.norms[name], size) if name in seen.norms else size

        self._backward.append(tensor.register_hook(hear))


def _others(x: Tensor, dimension: int) -> list[int]:
    return [place for place in range(x.ndim) if place != dimension]


def _moments(y: Tensor, others: list[int]) -> tuple[Tensor, Tensor]:
    """Mean and variance in at least float32; torch.var_mean is slow on a CPU."""
    wide = y.float() if y.dtype in (torch.float16, torch.bfloat16) else y
    if wide.is_cuda:
        variance, mean = torch.var_mean(wide, others, correction=0)
        return mean, variance
    mean = wide.mean(others, keepdim=True)
    return mean.flatten(), (wide - mean).square_().mean(others)


def _of_channels(limit: float | Tensor, x: Tensor) -> float | Tensor:
    """Limits ``[C]`` against the channels of x, which for every activation with parameters are dimension 1."""
    if not isinstance(limit, Tensor) or limit.numel() == 1:
        return limit
    return limit.view([-1 if place == min(1, x.ndim - 1) else 1 for place in range(x.ndim)])


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor in tuples, lists, mappings and dataclasses, ``logits`` before the others."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() and not value.is_nested else None
    if not isinstance(value, tuple | list):
        value = _parts(value)
    return next((found for one in value if (found := first_tensor(one)) is not None), None)


def _parts(value: Any) -> Sequence[Any]:
    if is_dataclass(value) and not isinstance(value, type):
        value = {one.name: getattr(value, one.name) for one in fields(value)}
    if isinstance(value, Mapping):
        return [value["logits"]] if value.get("logits") is not None else list(value.values())
    return ()
