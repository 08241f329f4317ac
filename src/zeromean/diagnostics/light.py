"""One measured pass: hooks that read what goes through the layers, and nothing else.

While a pass runs, every number stays where it was computed, as a tensor of one value a unit: nothing waits for a GPU.
Samples of a unit are the batch's inputs, times positions for a convolution and tokens for a sequence. A module that is
called again in the same pass is another layer, ``name#2``; its weights' gradient stays with the first call.

Small layers are measured together, since a net of them takes longer to start an operator than to run it: those whose
tensors nothing overwrote in the first pass wait in the later ones until the forward pass ends. Our choice is up to
2^15 numbers a layer and 2^20 in all on a CPU, and on a GPU 2^25 and 2^26: at most 4 or 256 MiB in float32, most of
which the backward pass keeps anyway, and inputs that no other layer made. One that is overwritten after all is not
read in that pass. The larger ones are measured at once. Of a pass in which all wait, hooks take notes only; one that
repeats the pass before it (`zeromean.diagnostics.routine`) is measured as that was, and a small one is copied and
measured with later ones (`zeromean.diagnostics.slots`).

A hook makes torch call a module the long way, which takes longer than the hook. Layers that only take notes are called
through a function in the place where torch keeps a compiled call instead: copies of a module leave that out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zeromean.diagnostics.gradients import Gathered, Gradients
from zeromean.diagnostics.layers import CALL, OF_A_PROBE, Layer, Role, keeps_input, unit_dimension
from zeromean.diagnostics.moments import count_names, counts, moments
from zeromean.diagnostics.routine import Note, Routine, gradients_wanted
from zeromean.diagnostics.tails import Tails, tails
from zeromean.diagnostics.together import (
    WAIT_ON_CPU,
    WAIT_ON_CUDA,
    Layout,
    Packed,
    Rooms,
    Sight,
    facts,
    flat,
    form,
    version,
)
from zeromean.diagnostics.unseen import FunctionalCalls

GROUPED = frozenset({"cpu", "cuda"})
MOST_LAYOUTS = 64  # batches of many shapes have one each
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
    """

    name: str
    kind: str
    role: Role
    samples: int = 0
    weights: int = 0
    notes: tuple[str, ...] = ()
    of_units: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Learned:
    """What passes tell later ones.

    Attributes:
        calm: names of layers that nothing overwrites.
        trusted: names of layers whose weight's gradient is found in ``.grad``.
        layouts: by the form of the calls that they serve.
        rooms: for layouts to work in.
        gathered: gradients.
        routine: the calls of the last pass, if all of them waited.
        hooks: of passes behind the first, and what they depend on: making them takes longer than hanging them up.
        running: the pass whose hooks hang.
        key: of all hooks.
    """

    calm: set[str] = field(default_factory=set)
    trusted: set[str] = field(default_factory=set)
    layouts: dict[Any, Layout] = field(default_factory=dict)
    rooms: Rooms = field(default_factory=Rooms)
    gathered: Gathered = field(default_factory=Gathered)
    routine: Routine | None = None
    hooks: tuple[list[_Hooks], list[Any]] | None = None
    running: Pass | None = None
    key: int = field(default_factory=lambda: RemovableHandle(OrderedDict()).id)


@dataclass(frozen=True, slots=True)
class _Hooks:
    """Those of a module.

    Attributes:
        module: whose.
        enter: only where its input must be measured before it runs.
        leave: behind it.
        call: what may be called in its place instead.
    """

    module: nn.Module
    enter: Callable[..., None] | None
    leave: Callable[..., None]
    call: Callable[..., Any] | None


class Pass:
    """The hooks of one forward pass and of the backward passes that follow it.

    Attributes:
        seen: by name, of the first pass, and of layers that may be overwritten.
        packed: the others.
        refused: why a layer was not read.
        gradients: those that arrive until `end`.

    Args:
        layers: to read.
        known_tails: of activations without parameters, by name; those of the others are found anew.
        learned: what passes tell later ones.
        first: whether this is the first pass.
        functional: whether to look for activations called as functions, which costs a little in this pass.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        known_tails: Mapping[str, Tails],
        learned: Learned,
        *,
        first: bool,
        functional: bool,
    ) -> None:
        self.seen: dict[str, Seen] = {}
        self.packed: Packed | None = None
        self.refused: dict[str, str] = {}
        self.gradients = Gradients(learned.trusted, learned.gathered, first=first)
        self.functional = FunctionalCalls() if functional else None
        self._layers = layers
        self._tails = known_tails
        self._learned = learned
        self._first = first
        self._calls: dict[str, int] = {}
        self._before: tuple[Layer, int] | None = None
        self._last: tuple[Tensor, tuple[int, int], tuple[Tensor, Tensor]] | None = None
        self._notes: list[Note] = []
        self._waiting: list[Sight] = []
        self._held = 0
        self._entered: dict[str, dict[str, Tensor]] = {}
        self._hooked: Sequence[_Hooks] = ()

    def begin(self) -> None:
        """Put calls in place, or hooks as `register_forward_hook` does, with one key for all and no handles."""
        learned, key = self._learned, self._learned.key
        learned.running = self
        try:
            self._hooked = self._hooks()
            for one in self._hooked:
                module = one.module
                if one.call is not None and is_called_plainly(module):
                    module.__dict__[CALL] = one.call
                    continue
                if one.enter is not None:
                    module._forward_pre_hooks[key] = one.enter
                    module._forward_pre_hooks_with_kwargs[key] = True
                module._forward_hooks[key] = one.leave
                module._forward_hooks_with_kwargs[key] = True
            if self.functional:
                self.functional.__enter__()
        except BaseException:
            self.end_forward()
            raise

    def _hooks(self) -> list[_Hooks]:
        """Those of earlier passes, if no module was told meanwhile to work in place, or not to."""
        if self._first or self.functional:
            return [self._made(layer) for layer in self._layers]
        in_place = [layer.module.__dict__.get("inplace") for layer in self._layers if layer.role == "activation"]
        if self._learned.hooks is None or self._learned.hooks[1] != in_place:
            self._learned.hooks = [self._made(layer) for layer in self._layers], in_place
        return self._learned.hooks[0]

    def _made(self, layer: Layer) -> _Hooks:
        """Those of a layer; no pass runs where they are called on a copy of it that was made within one."""
        learned = self._learned
        calm = layer.role != "activation" or keeps_input(layer.module)
        early = layer.role == "activation" and (self.functional is not None or not calm)
        may_wait = calm and (self._first or layer.name in learned.calm)

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if learned.running is not None:
                learned.running._enter(layer, first_tensor(args or kwargs))

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if learned.running is not None:
                learned.running._leave(layer, first_tensor(args or kwargs), first_tensor(output), early, may_wait)

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            """For what waits anyway: as short as it can be, since every layer pays for it within the pass."""
            running = learned.running
            if running and args and type(x := args[0]) is type(output) is Tensor and running._takes(x, output):
                running._notes.append((layer, x, output, x._version, output._version))
            else:
                leave(module, args, kwargs, output)

        usual: Callable[..., Any] = layer.module._call_impl

        def call(*args: Any, **kwargs: Any) -> Any:
            """As `note`, around the call itself, and written out again: one more call takes back what this saves."""
            output, running = usual(*args, **kwargs), learned.running
            if running and args and type(x := args[0]) is type(output) is Tensor and running._takes(x, output):
                running._notes.append((layer, x, output, x._version, output._version))
            else:
                leave(layer.module, args, kwargs, output)
            return output

        setattr(call, OF_A_PROBE, True)
        noted = may_wait and layer.role != "other" and not self._first and not early
        one_call = call if noted and has_usual_call(layer.module) and not layer.copied else None
        return _Hooks(layer.module, enter if early else None, note if noted else leave, one_call)

    def _unhook(self) -> None:
        hooked, self._hooked, key = self._hooked, (), self._learned.key
        if self._learned.running is self:
            self._learned.running = None
        for one in hooked:
            module = one.module
            if one.call is not None and module.__dict__.get(CALL) is one.call:
                del module.__dict__[CALL]
                continue
            module._forward_hooks.pop(key, None)
            module._forward_hooks_with_kwargs.pop(key, None)
            if one.enter is not None:
                module._forward_pre_hooks.pop(key, None)
                module._forward_pre_hooks_with_kwargs.pop(key, None)

    def end_forward(self) -> None:
        """Remove the forward hooks and measure what waits; the hooks that wait for gradients stay."""
        if self.functional:
            self.functional.close()
        if self._hooked:
            self._unhook()
            if not self._repeats():
                self._look_closer()

    def _repeats(self) -> bool:
        """Measure what was noted, if it is what an earlier pass showed."""
        routine = self._learned.routine
        if routine is None or self._calls or (tensors := routine.tensors(self._notes)) is None:
            return False
        self._notes = []
        self.packed = routine.layout.run(tensors)
        self.gradients.of_pass(routine.gradients, [tensors[place] for place in routine.outputs])
        return True

    def _look_closer(self) -> None:
        all_noted = not self._calls
        self._read_notes()
        waiting, self._waiting = self._waiting, []
        if self._first and not self.gradients.arrived:
            self._learned.calm |= {one.layer.name for one in waiting}
            self._learned.calm -= {one.layer.name for one in waiting if not self._is_calm(one)}
        elif waiting and not self._first:
            unchanged = [one for one in waiting if one.unchanged]
            self.refused |= {one.name: OVERWRITTEN for one in waiting if not one.unchanged}
            layout = self._measure_together(unchanged)
            if all_noted and not self.refused:
                self._learned.routine = Routine(unchanged, layout)
        self._last = None

    def end(self) -> None:
        """Remove all hooks."""
        self.end_forward()
        self.gradients.end()

    @property
    def names(self) -> frozenset[str]:
        """Of the layers that were measured."""
        packed = {told.name for told in self.packed.layout.told} if self.packed else set()
        return frozenset(self.seen.keys() | packed)

    def _is_calm(self, sight: Sight) -> bool:
        """Whether the output is what it was, to autograd's knowledge and by its mean: ``.data`` may change unknown."""
        mean, _ = moments(sight.y.detach(), unit_dimension(sight.layer, sight.y, sight.before))
        return sight.unchanged and torch.equal(mean, self.seen[sight.name].of_units["mean"])

    def _enter(self, layer: Layer, x: Tensor | None) -> None:
        if self.functional:
            self.functional.inside += 1
        self._calls[layer.name] = self._calls.get(layer.name, 0) + 1
        self._entered[self._name(layer)] = self._counts(layer, x, self._before)

    def _leave(self, layer: Layer, x: Tensor | None, y: Tensor | None, entered: bool, may_wait: bool) -> None:
        self._read_notes()
        functional, calls = self.functional, self._calls
        if functional and layer.role == "activation":
            functional.inside -= 1
        if not entered:
            calls[layer.name] = calls.get(layer.name, 0) + 1
        sight = self._sight(layer, x, y, version(x), version(y))
        if sight is None:
            return
        if functional and layer.role == "unit":
            functional.place = sight.name
        waits = may_wait and self._takes(x, sight.y)
        if waits:
            self._waiting.append(sight)
        if self._first or not waits:
            self._measure(sight)

    def _name(self, layer: Layer) -> str:
        """Of its present call."""
        call = self._calls[layer.name]
        return layer.name if call == 1 else f"{layer.name}#{call}"

    def _takes(self, x: Tensor | None, y: Tensor) -> bool:
        """Whether to measure a call later; in the first pass, what could be is looked at again."""
        most, most_together = WAIT_ON_CUDA if y.is_cuda else WAIT_ON_CPU
        held = self._held + (size := y.numel())
        if size > most or held > most_together or y.is_inference() or (x is not None and x.is_inference()):
            return False
        self._held = held
        return True

    def _read_notes(self) -> None:
        """Make sights of what hooks took note of."""
        notes, self._notes = self._notes, []
        for layer, x, y, x_written, y_written in notes:
            self._calls[layer.name] = self._calls.get(layer.name, 0) + 1
            if (sight := self._sight(layer, first_tensor(x), first_tensor(y), x_written, y_written)) is not None:
                self._waiting.append(sight)

    def _sight(self, layer: Layer, x: Tensor | None, y: Tensor | None, x_written: int, y_written: int) -> Sight | None:
        """Of the present call."""
        name = self._name(layer)
        if y is None or y.numel() == 0 or y.ndim == 0:
            self.refused[name] = "its output holds no floating-point numbers, or no units"
            return None
        sight = Sight(layer, name, x, y, x_written, y_written, self._before)
        if layer.role == "unit":
            self._before = (layer, y.ndim)
        return sight

    def _measure_together(self, sights: Sequence[Sight]) -> Layout:
        looks = form(sights)
        layout = self._learned.layouts.get(looks)
        if layout is None:
            if len(self._learned.layouts) >= MOST_LAYOUTS:
                self._learned.layouts.clear()
            layout = self._learned.layouts[looks] = Layout(sights, self._tails, GROUPED, self._learned.rooms)
        self.packed = layout.run(flat(sights))
        for one in sights:
            self._listen(one)
        return layout

    @torch.no_grad()
    def _measure(self, sight: Sight) -> None:
        layer, x, y = sight.layer, sight.x, sight.y
        dimension = unit_dimension(layer, y, sight.before)
        weights, notes = facts(layer)
        samples = y.numel() // y.shape[dimension]
        seen = self.seen[sight.name] = Seen(sight.name, layer.kind, layer.role, samples, weights, notes)
        if layer.role == "activation":
            counted = self._entered.pop(sight.name, None)
            seen.of_units |= self._counts(layer, x, sight.before) if counted is None else counted
        elif layer.role == "unit" and x is not None and x.numel() > 0:
            found = self._moments(x, unit_dimension(layer, x, None))
            seen.of_units["input_mean"], seen.of_units["input_variance"] = found
        seen.of_units["mean"], seen.of_units["variance"] = self._moments(y, dimension)
        self._listen(sight)

    @torch.no_grad()
    def _counts(self, layer: Layer, x: Tensor | None, before: tuple[Layer, int] | None) -> dict[str, Tensor]:
        if x is None or x.ndim == 0:
            return {}
        found = self._tails.get(layer.name) or tails(layer.module)
        return dict(zip(count_names(found), counts(x, unit_dimension(layer, x, before), found).unbind(), strict=True))

    def _moments(self, y: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
        """Of an output, or of an input, which often is the output that was seen last."""
        key = (version(y), dimension)
        if self._last is None or self._last[0] is not y or self._last[1] != key or key[0] < 0:
            self._last = (y, key, moments(y, dimension))
        return self._last[2]

    def _listen(self, sight: Sight) -> None:
        announced, parameters = gradients_wanted(sight)
        if announced:
            self.gradients.of_output((sight.name, "output_gradient"), sight.y)
        if parameters is not None:
            weight = cast(Tensor, parameters["weight"])
            self.gradients.of_weight((sight.name, "weight_gradient"), weight, announced=announced)


def has_usual_call(module: nn.Module) -> bool:
    """Whether its class leaves to torch what a call is."""
    return type(module).__call__ is nn.Module.__call__


def is_called_plainly(module: nn.Module) -> bool:
    """Whether its call may be replaced: nobody did so before, and no hook changes its arguments.

    In evaluation mode torch's TransformerEncoderLayer calls no module unless it finds hooks on them.
    """
    return module.training and CALL not in module.__dict__ and not module._forward_pre_hooks


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor in tuples, lists, mappings and dataclasses, ``logits`` before the others."""
    if type(value) is tuple and len(value) == 1:
        value = value[0]
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
