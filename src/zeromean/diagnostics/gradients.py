"""Norms of the gradients that a backward pass brings, found together when it ends.

A hook that computes costs more than it computes: here hooks take note of a gradient, and one operator finds the norms
of all when the engine has finished. Gradients above `HELD` numbers (on a GPU `HELD_ON_CUDA`, since starting an operator
there takes as long as running it on that many; `TOGETHER` in all: our choice) are measured as they arrive, so that no
large one stays alive for the probe's sake. A weight's is read from ``.grad``, without a hook, where the first measured
pass showed that this is what the backward pass left there and where nothing lay before; elsewhere a hook on the weight
hears it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

HELD, HELD_ON_CUDA = 2**15, 2**23
TOGETHER = 2**25

_KEY = RemovableHandle(OrderedDict()).id

Key = tuple[str, Literal["weight_gradient", "output_gradient"]]


class Gradients:
    """The gradients of one measured pass.

    Attributes:
        norms: what was found, tensors without dimensions, with the layer and the quantity of each; several of one
            where several backward passes ran.

    Args:
        trusted: names of layers whose weight's ``.grad`` may be read instead.
        first: whether to find out which those are.
    """

    def __init__(self, trusted: set[str], *, first: bool) -> None:
        self.norms: list[tuple[tuple[Key, ...], Sequence[Tensor]]] = []
        self._trusted = trusted
        self._first = first
        self._handles: list[RemovableHandle] = []
        self._hung: list[dict[int, Callable[[Tensor], Tensor | None]]] = []
        self._weights: list[tuple[str, Tensor]] = []
        self._fresh: list[tuple[str, Tensor]] = []
        self._held: list[tuple[Key, Tensor, int]] = []
        self._heard: dict[str, int] = {}
        self._size = 0
        self._queued = False

    @property
    def arrived(self) -> bool:
        """Whether any has."""
        return self._queued or bool(self.norms)

    def of_output(self, name: str, y: Tensor) -> None:
        """Listen to an output's."""
        self._listen((name, "output_gradient"), y)

    def of_weight(self, name: str, weight: Tensor, *, announced: bool) -> None:
        """Listen to a weight's.

        Args:
            name: of its layer.
            weight: to listen to.
            announced: whether the gradient of the layer's output, which comes before it, is listened to.
        """
        if announced and not self._first and name in self._trusted:
            self._weights.append((name, weight))
            return
        if self._first:
            self._fresh.append((name, weight))
        self._listen((name, "weight_gradient"), weight)

    def end(self) -> None:
        """Remove the hooks, and measure what a backward pass that failed has left."""
        while self._handles:
            self._handles.pop().remove()
        while self._hung:
            self._hung.pop().pop(_KEY, None)
        if self._queued:
            self._finish()

    def _listen(self, key: Key, tensor: Tensor) -> None:
        def hear(gradient: Tensor) -> Tensor | None:
            if not self._queued:
                self._begin()
            if self._first and key[1] == "weight_gradient":
                self._heard[key[0]] = 0 if gradient.is_sparse else gradient.data_ptr()
            if gradient.is_sparse or not self._holds(gradient):
                self._measure(((key, gradient),))
            else:  # an alias, since the engine copies a gradient that somebody else holds
                alias = gradient.detach() if key[1] == "weight_gradient" else gradient
                self._held.append((key, alias, gradient._version))
            return None

        self._hang(tensor, hear)

    def _hang(self, tensor: Tensor, hear: Callable[[Tensor], Tensor | None]) -> None:
        """As `Tensor.register_hook` does, without a handle, which takes most of its time."""
        if type(tensor) is not Tensor or tensor._backward_hooks is not None or tensor.grad_fn is None:
            self._handles.append(tensor.register_hook(hear))
            return
        hooks: dict[int, Callable[[Tensor], Tensor | None]] = OrderedDict()
        tensor._backward_hooks = hooks
        tensor.grad_fn._register_hook_dict(tensor)
        hooks[_KEY] = hear
        self._hung.append(hooks)

    def _holds(self, gradient: Tensor) -> bool:
        size = gradient.numel()
        if size > (HELD_ON_CUDA if gradient.is_cuda else HELD) or self._size + size > TOGETHER:
            return False
        self._size += size
        return True

    def _begin(self) -> None:
        """The first gradient of a backward pass: those of weights are still to come."""
        self._queued = True
        if not self._first:
            self._fresh = [(name, weight) for name, weight in self._weights if weight.grad is None]
            if len(self._fresh) < len(self._weights):
                for name, weight in self._weights:
                    if weight.grad is not None:
                        self._listen((name, "weight_gradient"), weight)
                self._weights = self._fresh
        torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _finish(self) -> None:
        if not self._queued:
            return
        self._queued = False
        held, self._held, self._size = self._held, [], 0
        found: list[tuple[Key, Tensor]] = [(key, one) for key, one, version in held if one._version == version]
        if self._first:
            self._learn()
        else:
            found += [
                ((name, "weight_gradient"), grad) for name, weight in self._fresh if (grad := weight.grad) is not None
            ]
        self._measure(found)

    def _learn(self) -> None:
        """Trust the weights in whose ``.grad`` lies what their hook heard, by the place in memory."""
        self._trusted |= {
            name
            for name, weight in self._fresh
            if weight.grad is not None and self._heard.get(name) == weight.grad.data_ptr()
        }

    def _measure(self, found: Sequence[tuple[Key, Tensor]]) -> None:
        with torch.no_grad():
            for alike in _alike(found):
                tensors = [one for _, one in alike]
                if len(tensors) == 1:
                    sizes: Sequence[Tensor] = (torch.linalg.vector_norm(tensors[0], dtype=torch.float32),)
                else:
                    sizes = torch._foreach_norm(tensors, 2, dtype=torch.float32)
                self.norms.append((tuple(key for key, _ in alike), sizes))


def _alike(found: Sequence[tuple[Key, Tensor]]) -> Iterator[list[tuple[Key, Tensor]]]:
    """Of one type and device."""
    groups: dict[Any, list[tuple[Key, Tensor]]] = {}
    for one in found:
        groups.setdefault((one[1].dtype, one[1].device), []).append(one)
    yield from groups.values()
