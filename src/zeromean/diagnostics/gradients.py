"""Norms of the gradients that a backward pass brings, found together when it ends.

A hook that computes costs more than it computes: here hooks take note of a gradient, and one operator finds the norms
of all when the engine has finished. Gradients above `HELD` numbers (on a GPU `HELD_ON_CUDA`, since starting an operator
there takes as long as running it on that many; `TOGETHER` in all: our choice) are measured as they arrive, so that no
large one stays alive for the probe's sake. A weight's is read from ``.grad``, without a hook, where the first measured
pass showed that this is what the backward pass left there and where nothing lay before; elsewhere a hook on the weight
hears it. On a GPU the gradients of a small network are copied instead, and the norms of several passes found at once.

Where a pass repeats one whose last output had its gradient first, and whose outputs each had one that nobody wrote to
afterwards, only that of the last output calls a function of ours; the others go into lists, without one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from zeromean.diagnostics.slots import Kept, Slots, passes

HELD, HELD_ON_CUDA = 2**15, 2**23
TOGETHER = 2**25
COPIED = frozenset({"cuda"})
"""Devices on which gradients are copied first: a CPU finds their norms as fast."""

_KEY = RemovableHandle(OrderedDict()).id

Key = tuple[str, Literal["weight_gradient", "output_gradient"]]
Parameters = Mapping[str, Any]
Hook = Callable[[Tensor], Tensor | None]


@dataclass
class Wanted:
    """The gradients of a pass that repeats.

    Attributes:
        outputs: layers and quantities, in the order of the calls.
        weights: layers and quantities, the parameters of their modules, and whether the gradient of the layer's output
            is asked for too.
        orderly: whether lists suffice for the outputs' gradients; None until one pass has shown it.
    """

    outputs: Sequence[Key]
    weights: Sequence[tuple[Key, Parameters, bool]]
    orderly: bool | None = None


class Gradients:
    """The gradients of one measured pass.

    Attributes:
        norms: what was found: layers and quantities, and their norms, a vector where they are several; several of one
            where several backward passes ran.

    Args:
        trusted: names of layers whose weight's ``.grad`` may be read instead.
        gathered: gradients of earlier passes.
        first: whether to find out which are to be trusted.
    """

    def __init__(self, trusted: set[str], gathered: Gathered, *, first: bool) -> None:
        self.norms: list[tuple[tuple[Key, ...], Kept]] = []
        self._trusted = trusted
        self._gathered = gathered
        self._first = first
        self._handles: list[RemovableHandle] = []
        self._hung: list[dict[int, Hook]] = []
        self._weights: list[tuple[Key, Tensor]] = []
        self._held: list[tuple[Key, Tensor, int]] = []
        self._heard: dict[str, int] = {}
        self._size = 0
        self._queued = False
        self._wanted: Wanted | None = None
        self._lists: list[list[Tensor]] = []

    @property
    def arrived(self) -> bool:
        """Whether any has."""
        return self._queued or bool(self.norms)

    def of_output(self, key: Key, y: Tensor) -> None:
        """Listen to an output's."""

        def hear(gradient: Tensor) -> None:
            self._hear(key, gradient, gradient)

        self._hang(y, hear)

    def of_weight(self, key: Key, weight: Tensor, *, announced: bool) -> None:
        """Listen to a weight's.

        Args:
            key: of its layer.
            weight: to listen to.
            announced: whether the gradient of the layer's output, which comes before it, is listened to.
        """
        trusted = announced and not self._first and key[0] in self._trusted
        if trusted or self._first:
            self._weights.append((key, weight))
        if not trusted:
            self._listen(key, weight)

    def of_pass(self, wanted: Wanted, outputs: Sequence[Tensor]) -> None:
        """Listen to all of a pass that repeats, whose outputs are given as `wanted` names them."""
        self._wanted = wanted
        if wanted.orderly and self._list(outputs):
            self._weights = [(key, parameters["weight"]) for key, parameters, _ in wanted.weights]
            return
        for key, y in zip(wanted.outputs, outputs, strict=True):
            self.of_output(key, y)
        for key, parameters, announced in wanted.weights:
            self.of_weight(key, parameters["weight"], announced=announced)

    def end(self) -> None:
        """Remove the hooks, and measure what a backward pass that failed has left."""
        while self._handles:
            self._handles.pop().remove()
        self._unhang()
        if self._queued:
            self._finish()
        elif self._wanted is not None and any(self._lists):
            # The last output had no gradient: by now those of the weights may be something else.
            self._wanted.orderly = False
            self._measure(self._listed())

    def _list(self, outputs: Sequence[Tensor]) -> bool:
        """As `of_output` for each, but that only the last one's gradient calls a function of ours.

        Returns:
            Whether it could be done; nobody listens otherwise.
        """
        lists, hung = list[list[Tensor]](), self._hung
        for y in outputs:
            lists.append([])
            if not _hang(y, lists[-1].append, hung):
                self._unhang()
                return False

        def hear(gradient: Tensor) -> None:
            lists[-1].append(gradient)
            if not self._queued:
                self._begin()

        hung[-1][_KEY] = hear
        self._lists = lists
        return True

    def _unhang(self) -> None:
        while self._hung:
            self._hung.pop().pop(_KEY, None)

    def _listed(self) -> list[tuple[Key, Tensor]]:
        """What came into the lists, but for what was written to since."""
        assert self._wanted is not None
        both = zip(self._wanted.outputs, self._lists, strict=True)
        found = [(key, one) for key, arrived in both for one in arrived if not one._version]
        for arrived in self._lists:
            arrived.clear()
        return found

    def _listen(self, key: Key, weight: Tensor) -> None:
        def hear(gradient: Tensor) -> None:
            if self._first:
                self._heard[key[0]] = 0 if gradient.is_sparse else gradient.data_ptr()
            # An alias, since the engine copies a gradient that somebody else holds.
            self._hear(key, gradient, gradient.detach())

        self._hang(weight, hear)

    def _hear(self, key: Key, gradient: Tensor, alias: Tensor) -> None:
        if not self._queued:
            self._begin()
        size = gradient.numel()
        most = HELD_ON_CUDA if gradient.is_cuda else HELD
        if size <= most and self._size + size <= TOGETHER and not gradient.is_sparse:
            self._size += size
            self._held.append((key, alias, gradient._version))
        else:
            self._measure([(key, gradient)])

    def _hang(self, tensor: Tensor, hear: Hook) -> None:
        if not _hang(tensor, hear, self._hung):
            self._handles.append(tensor.register_hook(hear))

    def _begin(self) -> None:
        """The first gradient of a backward pass: those of weights are still to come."""
        self._queued = True
        if not self._first:
            taken = [(key, weight) for key, weight in self._weights if weight.grad is not None]
            if taken:
                self._weights = [(key, weight) for key, weight in self._weights if weight.grad is None]
                for key, weight in taken:
                    self._listen(key, weight)
        torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _finish(self) -> None:
        if not self._queued:
            return
        self._queued = False
        held, self._held, self._size = self._held, [], 0
        found = [(key, one) for key, one, written in held if one._version == written]
        if self._first:
            self._learn()
        elif self._lists and self._measure_known():
            return
        else:
            if self._lists:
                found += self._listed()
            elif self._wanted is not None and self._wanted.orderly is None:
                self._wanted.orderly = self._is_orderly(held)
            found += [(key, gradient) for key, weight in self._weights if (gradient := weight.grad) is not None]
        self._measure(found)
        if self._wanted is not None and self._lists and len(found) == len(self._lists) + len(self._wanted.weights):
            self._gathered.learn(self._wanted, found)

    def _measure_known(self) -> bool:
        """Measure all gradients of a pass that repeats, if all came: each is of the kind that it was the last time.

        An output's gradient is of the kind of the output, which repeats, and a weight's of the weight's.
        """
        gathered, wanted = self._gathered, self._wanted
        if wanted is None or gathered.known is not wanted or len(self._weights) < len(wanted.weights):
            return False
        of_outputs = [one for arrived in self._lists for one in arrived if not one._version]
        of_weights = [one for _, weight in self._weights if (one := weight.grad) is not None]
        alike = all(self._lists) and len(of_outputs) == len(self._lists)
        if not alike or [one.shape for one in of_weights] != gathered.shapes_of_weights:
            return False
        for arrived in self._lists:
            arrived.clear()
        with torch.set_grad_enabled(False):
            self.norms.append(gathered.take_known((*of_outputs, *of_weights)))
        return True

    def _is_orderly(self, held: Sequence[tuple[Key, Tensor, int]]) -> bool:
        """Whether what hooks heard were new tensors, one of each output and the last one's first, and nothing else."""
        assert self._wanted is not None
        wanted, keys = self._wanted, [key for key, _, _ in held]
        weights = [key for key, _ in self._weights]
        return (
            keys[:1] == list(wanted.outputs[-1:])
            and sorted(keys) == sorted(wanted.outputs)
            and weights == [key for key, _, _ in wanted.weights]
            and not self._handles
            and all(one._version == written == 0 for _, one, written in held)
        )

    def _learn(self) -> None:
        """Trust the weights in whose ``.grad`` lies what their hook heard, by the place in memory."""
        self._trusted |= {
            name
            for (name, _), weight in self._weights
            if weight.grad is not None and self._heard.get(name) == weight.grad.data_ptr()
        }

    def _measure(self, found: Sequence[tuple[Key, Tensor]]) -> None:
        """Those of one type and device by one operator."""
        kinds = {(one.dtype, one.device) for _, one in found}
        with torch.set_grad_enabled(False):
            for kind in kinds:
                alike = found if len(kinds) == 1 else [one for one in found if (one[1].dtype, one[1].device) == kind]
                keys, tensors = zip(*alike, strict=True)
                self.norms.append(self._gathered.take(keys, tensors) or (keys, _norms(tensors)))


class Gathered:
    """Gradients of several passes; small ones are copied, and those of one size lie in one memory.

    Attributes:
        known: the last pass that repeats, if all that is asked for had gradients, of one type and device.
        shapes_of_weights: of its gradients.
    """

    def __init__(self) -> None:
        self.known: Wanted | None = None
        self.shapes_of_weights: list[torch.Size] = []
        self._keys: tuple[Key, ...] = ()
        self._form: Any = None
        self._copies: _Copies | None = None

    def take(self, keys: Sequence[Key], tensors: Sequence[Tensor]) -> tuple[tuple[Key, ...], Kept] | None:
        """Copy gradients whose norms are found later, if they are like those that were given last."""
        self.known = None
        if tensors[0].device.type not in COPIED:
            return None
        form = (keys, tensors[0].dtype, tensors[0].device, [one.shape for one in tensors])
        if form != self._form:
            self._form, self._copies = form, None
            return None
        if self._copies is None:
            count = passes(sum(one.numel() for one in tensors))
            if not count or any(type(one) is not Tensor for one in tensors):
                return None
            self._copies = _Copies(count, keys, tensors)
        return self._copies.keys, self._copies.take(tensors)

    def learn(self, wanted: Wanted, found: Sequence[tuple[Key, Tensor]]) -> None:
        """Know the pass whose gradients were taken last, unless they were of several kinds or are not copied yet."""
        keys, tensors = zip(*found, strict=True)
        first = tensors[0]
        if self._copies is None and first.device.type in COPIED:
            return
        if all(one.dtype == first.dtype and one.device == first.device and not one.is_sparse for one in tensors):
            self.known, self._keys = wanted, keys
            self.shapes_of_weights = [one.shape for one in tensors[len(tensors) - len(wanted.weights) :]]

    def take_known(self, tensors: tuple[Tensor, ...]) -> tuple[tuple[Key, ...], Kept]:
        """As `take`, or at once where they are not copied, of gradients that are like those of the pass it knows."""
        if self._copies is None:
            return self._keys, _norms(tensors)
        return self._copies.keys, self._copies.take(tensors)


class _Copies:
    """Of the gradients of so many passes.

    Attributes:
        keys: in the order of the norms.
    """

    def __init__(self, count: int, keys: Sequence[Key], tensors: Sequence[Tensor]) -> None:
        alike: dict[int, list[int]] = {}
        for which, one in enumerate(tensors):
            alike.setdefault(one.numel(), []).append(which)
        self._order = [which for group in alike.values() for which in group]
        self.keys = tuple(keys[which] for which in self._order)
        self._shapes = [tensors[which].shape for which in self._order]
        self._memory = [tensors[0].new_empty(count, len(group), size) for size, group in alike.items()]
        self._places: list[list[Tensor]] = []
        self._wide = _wide(tensors[0])
        self._slots = Slots(count, self._measure)

    def take(self, tensors: Sequence[Tensor]) -> Kept:
        number = self._slots.next()
        if number == len(self._places):
            rows = (row for one in self._memory for row in one[number].unbind())
            self._places.append([row.view(shape) for row, shape in zip(rows, self._shapes, strict=True)])
        torch._foreach_copy_(self._places[number], [tensors[which] for which in self._order])
        return self._slots.keep()

    def _measure(self, count: int) -> list[Tensor]:
        sizes = [torch.linalg.vector_norm(one[:count], dim=2, dtype=self._wide) for one in self._memory]
        return [torch.cat(sizes, 1).float()]


def _hang(tensor: Tensor, hear: Hook, hung: list[dict[int, Hook]]) -> bool:
    """As `Tensor.register_hook` does, without a handle, which takes most of its time.

    Returns:
        Whether it could be done: not where somebody listens already, or where no operator made the tensor.
    """
    if type(tensor) is not Tensor or tensor._backward_hooks is not None or (node := tensor.grad_fn) is None:
        return False
    hooks: dict[int, Hook] = OrderedDict()
    tensor._backward_hooks = hooks
    node._register_hook_dict(tensor)
    hooks[_KEY] = hear
    hung.append(hooks)
    return True


def _norms(tensors: tuple[Tensor, ...]) -> Kept:
    wide = _wide(tensors[0])
    if len(tensors) == 1:
        sizes = torch.linalg.vector_norm(tensors[0], dtype=wide)
    else:  # one tensor, since many that stay alive keep the memory's keepers busy
        sizes = torch.stack(torch._foreach_norm(tensors, 2, dtype=wide))
    return Kept([sizes.float()])


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32
