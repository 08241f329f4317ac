"""One measured pass: hooks that read what goes through the layers, and nothing else.

While a pass runs, every number stays where it was computed, as a tensor of one value a unit: nothing waits for a GPU.
Samples of a unit are the batch's inputs, times positions for a convolution and tokens for a sequence. A module that is
called again in the same pass is another layer, ``name#2``; its weights' gradient stays with the first call.

Small layers are measured together, since a net of them takes longer to start an operator than to run it: those whose
tensors nothing overwrote in the first pass wait in the later ones until the forward pass ends, up to `SMALL` numbers a
layer and `TOGETHER` in all (our choice: at most 4 MiB in float32 are held, and inputs that no other layer made). One
that is overwritten after all is not read in that pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zeromean.diagnostics.layers import Layer, Role, keeps_input, unit_dimension
from zeromean.diagnostics.moments import counts, counts_together, moments, moments_together
from zeromean.diagnostics.tails import Tails, tails
from zeromean.diagnostics.unseen import FunctionalCalls

SMALL = 2**15
TOGETHER = 2**20
GROUPED = frozenset({"cuda"})  # on a CPU, fresh memory for the group costs more than it saves
OVERWRITTEN = "was overwritten, but not in the first measured pass"


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


@dataclass(frozen=True)
class _Sight:
    """A call of a layer: its first input and output, how often each had been written, and the unit layer before it."""

    seen: Seen
    layer: Layer
    x: Tensor | None
    y: Tensor
    written: tuple[int, int]
    before: tuple[Layer, int] | None
    counted: bool

    @property
    def unchanged(self) -> bool:
        """Whether input and output still are what they were."""
        return self.written == (_version(self.x), _version(self.y))


class Pass:
    """The hooks of one forward pass and of the backward passes that follow it.

    Args:
        layers: to read.
        known_tails: of activations without parameters, by name; those of the others are found anew.
        calm: names of layers that may wait; the first pass fills it.
        first: whether this is the first pass.
        functional: whether to look for activations called as functions, which costs a little in this pass.
    """

    def __init__(
        self,
        layers: Iterable[Layer],
        known_tails: Mapping[str, Tails],
        calm: set[str],
        *,
        first: bool,
        functional: bool,
    ) -> None:
        self.seen: dict[str, Seen] = {}
        self.refused: dict[str, str] = {}
        self.functional = FunctionalCalls() if functional else None
        self._layers = layers
        self._tails = known_tails
        self._calm = calm
        self._first = first
        self._calls: dict[str, int] = {}
        self._before: tuple[Layer, int] | None = None
        self._last: tuple[Tensor, tuple[int, int], tuple[Tensor, Tensor]] | None = None
        self._known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._counted: dict[Tails, dict[tuple[int, int], dict[str, Tensor]]] = {}
        self._waiting: list[_Sight] = []
        self._held = 0
        self._gradients_early = False
        self._forward: list[RemovableHandle] = []
        self._backward: list[RemovableHandle] = []

    def begin(self) -> None:
        """Register the forward hooks."""
        try:
            for layer in self._layers:
                early = layer.role == "activation" and (self.functional is not None or not keeps_input(layer.module))
                if early:
                    self._forward.append(
                        layer.module.register_forward_pre_hook(self._entering(layer), with_kwargs=True)
                    )
                hook = layer.module.register_forward_hook(self._leaving(layer, entered=early), with_kwargs=True)
                self._forward.append(hook)
            if self.functional:
                self.functional.__enter__()
        except BaseException:
            self.end_forward()
            raise

    def end_forward(self) -> None:
        """Remove the forward hooks and measure what waits; the hooks that wait for gradients stay."""
        if self.functional:
            self.functional.close()
        _remove(self._forward)
        waiting, self._waiting = self._waiting, []
        if self._first and not self._gradients_early:
            self._calm |= {one.layer.name for one in waiting}
            self._calm -= {one.layer.name for one in waiting if not self._is_calm(one)}
        elif not self._first:
            unchanged = [one for one in waiting if one.unchanged]
            if len(unchanged) < len(waiting):
                self.refused |= {one.seen.name: OVERWRITTEN for one in waiting if not one.unchanged}
            self._measure_together(unchanged)
        self._last = None

    def end(self) -> None:
        """Remove all hooks."""
        self.end_forward()
        _remove(self._backward)

    def _is_calm(self, sight: _Sight) -> bool:
        """Whether the output is what it was, to autograd's knowledge and by its mean: ``.data`` may change unknown."""
        mean, _ = moments(sight.y.detach(), unit_dimension(sight.layer, sight.y, sight.before))
        return sight.unchanged and torch.equal(mean, sight.seen.of_units["mean"])

    def _entering(self, layer: Layer) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.functional:
                self.functional.inside += 1
            self._count(self._open(layer), layer, first_tensor(args or kwargs), self._before)

        return enter

    def _leaving(self, layer: Layer, *, entered: bool) -> Callable[..., None]:
        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.functional and layer.role == "activation":
                self.functional.inside -= 1
            seen = self._current(layer) if entered else self._open(layer)
            x, y = first_tensor(args or kwargs), first_tensor(output)
            if y is None or y.numel() == 0 or y.ndim == 0:
                self.refused[seen.name] = "its output holds no floating-point numbers, or no units"
                return
            sight = _Sight(seen, layer, x, y, (_version(x), _version(y)), self._before, entered)
            if layer.role == "unit":
                self._before = (layer, y.ndim)
                if self.functional:
                    self.functional.place = seen.name
            if not self._waits(sight):
                self._measure(sight)

        return leave

    def _waits(self, sight: _Sight) -> bool:
        """Whether to measure it later; in the first pass, nothing is, but what could be is looked at again."""
        size = sight.y.numel()
        if -1 in sight.written or size > SMALL or self._held + size > TOGETHER:
            return False
        if self._first or sight.layer.name in self._calm:
            self._waiting.append(sight)
            self._held += size
        return not self._first and sight.layer.name in self._calm

    def _measure_together(self, sights: Sequence[_Sight]) -> None:
        """What they have in common at once, then each."""
        grouped = [one for one in sights if one.y.device.type in GROUPED]
        pairs = [(one.y, unit_dimension(one.layer, one.y, one.before)) for one in grouped]
        inputs = [(one, one.x) for one in grouped if one.x is not None and one.x.numel() > 0]
        pairs += [(x, unit_dimension(one.layer, x, None)) for one, x in inputs if one.layer.role == "unit"]
        self._known = moments_together(pairs)
        by_tails: dict[Tails, list[tuple[Tensor, int]]] = {}
        for one, x in inputs:
            if one.layer.name in self._tails and x.ndim > 0:
                wanted = by_tails.setdefault(self._tails[one.layer.name], [])
                wanted.append((x, unit_dimension(one.layer, x, one.before)))
        self._counted = {found: counts_together(xs, found) for found, xs in by_tails.items()}
        for one in sights:
            self._measure(one)
        self._known, self._counted = {}, {}

    def _measure(self, sight: _Sight) -> None:
        seen, layer, x, y = sight.seen, sight.layer, sight.x, sight.y
        if layer.role == "activation" and not sight.counted:
            self._count(seen, layer, x, sight.before)
        dimension = unit_dimension(layer, y, sight.before)
        if layer.role == "unit" and x is not None and x.numel() > 0:
            found = self._moments(x, unit_dimension(layer, x, None))
            seen.of_units["input_mean"], seen.of_units["input_variance"] = found
        seen.samples = y.numel() // y.shape[dimension]
        seen.of_units["mean"], seen.of_units["variance"] = self._moments(y, dimension)
        if y.requires_grad and layer.role != "activation":
            self._listen(seen, "output_gradient", y)
        self._weights(seen, layer.module)

    def _count(self, seen: Seen, layer: Layer, x: Tensor | None, before: tuple[Layer, int] | None) -> None:
        if x is not None and x.ndim > 0:
            found = self._tails.get(layer.name) or tails(layer.module)
            dimension = unit_dimension(layer, x, before)
            known = (
                self._counted[found].get((id(x), dimension)) if self._counted and layer.name in self._tails else None
            )
            seen.of_units |= known or counts(x.detach(), dimension, found)

    def _open(self, layer: Layer) -> Seen:
        call = self._calls[layer.name] = self._calls.get(layer.name, 0) + 1
        name = layer.name if call == 1 else f"{layer.name}#{call}"
        notes = () if layer.module.training else ("in evaluation mode",)
        seen = self.seen[name] = Seen(name, layer.kind, layer.role, notes=notes)
        return seen

    def _current(self, layer: Layer) -> Seen:
        call = self._calls.get(layer.name, 0)
        return self.seen[layer.name if call == 1 else f"{layer.name}#{call}"]

    def _moments(self, y: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
        """Of an output, or of an input, which often is the output that was seen last."""
        if (id(y), dimension) in self._known:
            return self._known[id(y), dimension]
        key = (_version(y), dimension)
        if self._last is None or self._last[0] is not y or self._last[1] != key or key[0] < 0:
            self._last = (y, key, moments(y.detach(), dimension))
        return self._last[2]

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
            self._gradients_early |= bool(self._forward)
            size = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)
            seen.norms[name] = torch.hypot(seen.norms[name], size) if name in seen.norms else size

        self._backward.append(tensor.register_hook(hear))


def _version(x: Tensor | None) -> int:
    """How often it was written; -1 where nobody counts."""
    if x is None:
        return 0
    return -1 if x.is_inference() else x._version


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor in tuples, lists, mappings and dataclasses, ``logits`` before the others."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() and not value.is_nested else None
    for one in value if isinstance(value, (tuple, list)) else _parts(value):
        if (found := first_tensor(one)) is not None:
            return found
    return None


def _parts(value: Any) -> Sequence[Any]:
    if is_dataclass(value) and not isinstance(value, type):
        value = {one.name: getattr(value, one.name) for one in fields(value)}
    if isinstance(value, Mapping):
        return [value["logits"]] if value.get("logits") is not None else list(value.values())
    return ()
