"""Calls that repeat from pass to pass: known again at the least cost, so that nothing is worked out anew.

What a hook does in a training's forward pass is paid for by every layer. It only takes a `Note` here; when the pass is
over, its notes are held against those of an earlier one, and only where they differ does anybody look closer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zeromean.diagnostics.gradients import Key, Parameters, Wanted
from zeromean.diagnostics.layers import Layer
from zeromean.diagnostics.together import Layout, Sight, flat

Note = tuple[Layer, Tensor, Tensor, int, int]
"""A call: the layer, its input and output, and how often each of these had been written."""


class Routine:
    """The calls of a pass of which every one was noted.

    Attributes:
        layout: that measures them.
        gradients: that are asked for.
        outputs: of which, by their places among the pass's tensors.

    Args:
        sights: of the pass.
        layout: that measures them.
    """

    def __init__(self, sights: Sequence[Sight], layout: Layout) -> None:
        self.layout = layout
        self.outputs: list[int] = []
        self._layers = tuple(one.layer for one in sights)
        self._modules = [one.layer.module for one in sights]
        self._training = [module.training for module in self._modules]
        self._parameters = [module._parameters for module in self._modules if module._parameters]
        self._learns = [_learns(one) for one in self._parameters]
        self._outputs = [(one.y.shape, one.y.dtype, one.y.requires_grad) for one in sights]
        first: dict[int, int] = {}
        through = [first.setdefault(id(x), place) for place, x in enumerate(flat(sights))]
        self._same = [(place, one) for place, one in enumerate(through) if place != one]
        self._inputs = [place for place, one in enumerate(through) if place == one and place % 2 == 0]
        self._kinds = [_kind(sights[place // 2].x) for place in self._inputs]
        outputs: list[Key] = []
        weights: list[tuple[Key, Parameters, bool]] = []
        for place, one in enumerate(sights):
            announced, parameters = gradients_wanted(one)
            if announced:
                outputs.append((one.name, "output_gradient"))
                self.outputs.append(2 * place + 1)
            if parameters is not None:
                weights.append(((one.name, "weight_gradient"), parameters, announced))
        self.gradients = Wanted(outputs, weights)

    def tensors(self, notes: Sequence[Note]) -> list[Tensor] | None:
        """Inputs and outputs of the calls noted, if they repeat this routine and nothing was overwritten since.

        Where an output lives follows from the inputs that no noted call made.
        """
        if len(notes) != len(self._layers):
            return None
        layers, xs, ys, x_written, y_written = zip(*notes, strict=True)
        through = [tensor for pair in zip(xs, ys, strict=True) for tensor in pair]
        repeats = (
            layers == self._layers
            and [_kind(through[place]) for place in self._inputs] == self._kinds
            and [through[place]._version for place in self._inputs] == [x_written[place // 2] for place in self._inputs]
            and all([through[place] is through[one] for place, one in self._same])  # noqa: C419  (lists are faster)
            and [(y.shape, y.dtype, y.requires_grad) for y in ys] == self._outputs
            and [y._version for y in ys] == list(y_written)
            and [module.training for module in self._modules] == self._training
            and [_learns(one) for one in self._parameters] == self._learns
        )
        return through if repeats else None


def gradients_wanted(sight: Sight) -> tuple[bool, Parameters | None]:
    """Whether the gradient of a call's output is asked for, and the parameters with the weight whose gradient is.

    A weight that two calls share is heard once.
    """
    learns, parameters = sight.y.requires_grad, sight.layer.module._parameters
    of_weight = learns and "#" not in sight.name and _learns(parameters)
    return learns and sight.layer.role != "activation", parameters if of_weight else None


def _kind(x: Tensor | None) -> tuple[Any, ...]:
    return () if x is None or x.is_nested else (x.shape, x.dtype, x.device)


def _learns(parameters: Parameters) -> bool | None:
    """Whether the weight asks for a gradient; None where there is none."""
    weight = parameters.get("weight")
    return None if weight is None else weight.requires_grad
