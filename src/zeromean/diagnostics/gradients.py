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
from collections.abc import Callable, Sequence
from typing import Literal

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
        norms: what was found: layers and quantities, and their norms, a vector where they are several; several of one
            where several backward passes ran.

    Args:
        trusted: names of layers whose weight's ``.grad`` may be read instead.
        first: whether to find out which those are.
    """

    def __init__(self, trusted: set[str], *, first: bool) -> None:
        self.norms: list[tuple[tuple[Key, ...], Tensor]] = []
        self._trusted = trusted
        self._first = first
        self._handles: list[RemovableHandle] = []
        self._hung: list[dict[int, Callable[[Tensor], Tensor | None]]] = []
        self._weights: list[tuple[Key, Tensor]] = []
        self._held: list[tuple[Key, Tensor, int]] = []
        self._heard: dict[str, int] = {}
        self._size = 0
        self._queued = False

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

    def end(self) -> None:
        """Remove the hooks, and measure what a backward pass that failed has left."""
        while self._handles:
            self._handles.pop().remove()
        while self._hung:
            self._hung.pop().pop(_KEY, None)
        if self._queued:
            self._finish()

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

    def _hang(self, tensor: Tensor, hear: Callable[[Tensor], Tensor | None]) -> None:
        """As `Tensor.register_hook` does, without a handle, which takes most of its time."""
        if type(tensor) is not Tensor or tensor._backward_hooks is not None or (node := tensor.grad_fn) is None:
            self._handles.append(tensor.register_hook(hear))
            return
        hooks: dict[int, Callable[[Tensor], Tensor | None]] = OrderedDict()
        tensor._backward_hooks = hooks
        node._register_hook_dict(tensor)
        hooks[_KEY] = hear
        self._hung.append(hooks)

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
        else:
            found += [(key, gradient) for key, weight in self._weights if (gradient := weight.grad) is not None]
        self._measure(found)

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
        with torch.no_grad():
            for kind in kinds:
                alike = found if len(kinds) == 1 else [one for one in found if (one[1].dtype, one[1].device) == kind]
                keys, tensors = zip(*alike, strict=True)
                wide = torch.float64 if kind[0] is torch.float64 else torch.float32
                if len(tensors) == 1:
                    sizes = torch.linalg.vector_norm(tensors[0], dtype=wide)
                else:  # one tensor, since many that stay alive keep the memory's keepers busy
                    sizes = torch.stack(torch._foreach_norm(tensors, 2, dtype=wide))
                self.norms.append((keys, sizes.float()))
