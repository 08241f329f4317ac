r"""The unit natural gradient as an optimizer for small nets.

Every unit of every Linear and convolution layer moves by its own (dw, dw_0) = F^-1 (g, g_0), Theorem 1, from the
Fisher block of the batch at hand:

    F = (c + scale_damping) [[E_q(a a^T) + damping, E_q(a)], [E_q(a)^T, 1]]          c = E_p(delta^2)

Units without a bias solve with the weights' part alone. What is no weight or bias of such a layer (scales and shifts of
normalization, learnable slopes, embeddings) moves by plain gradient descent, with its own rate `other_lr`.

A unit's step is natural while all others stand still, but all move at once and towards the same end. So all steps are
shrunk by one factor, where needed, to keep at `max_kl` nats the sum of what each unit would change alone: the KL
divergence between the net's outputs before and after, lr^2 / 2 (g, g_0) F^-1 (g, g_0) to second order.

A convolution's Fisher takes patches as samples: see `zeromean.diagnostics.fisher`. The net runs in the mode it is in:
in training mode batch normalization ties inputs together, and a delta is that of the whole batch's ln p. A step costs
the passes of `squared_deltas` and a solve of every unit: nets of some hundred inputs a unit.

Source: Clevert, Unterthiner, Hochreiter, ICLR 2016, section 2, which uses no such optimizer: damping, bounds, the
Fisher of one batch and the defaults are our choice.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from zeromean.diagnostics.collect import (
    Fisher,
    LayerRows,
    Output,
    check_options,
    collect,
    deltas,
    squared_deltas,
    target_score,
)
from zeromean.diagnostics.patches import Layer, yields_net_inputs
from zeromean.diagnostics.units import unit_natural_gradient


class UnitNaturalGradient(torch.optim.Optimizer):
    """Descend along each unit's natural gradient: `loss = optimizer.step(inputs, targets)`.

    There is no closure and no `backward()`: a step runs the net itself, forward once, backward once for the loss, and
    backward again for the Fisher: C times ("exact", C classes) or once ("sampled", "empirical").

    Args:
        model: its Linear, Conv1d, Conv2d and Conv3d layers must each be called once in a forward pass.
        lr: learning rate of the units; 1 is the full natural step.
        damping: added to the variance of every input of a unit, in its squared units.
        max_kl: bound of the sum over units of the KL divergence that each one's step would cause alone; inf for none.
        scale_damping: added to c = E_p(delta^2), in squared units of delta, so that units with hardly any delta in the
            batch do not fly away; 0 suits the exact Fisher, not the sampled one.
        fisher: "exact", "sampled" or "empirical": see `zeromean.diagnostics.collect`.
        output: "softmax" for logits and class targets, "gaussian" for means with variance 1 and targets of their shape.
        momentum: v = momentum v + update; the parameters move by - lr v.
        other_lr: learning rate of all other parameters, which move by plain gradient descent.
        generator: draws the sampled labels. Its state is part of `state_dict`.

    Raises:
        ValueError: If there is no such layer, two share a parameter, or a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        damping: float = 0.1,
        *,
        max_kl: float = 1e-3,
        scale_damping: float = 1e-3,
        fisher: Fisher = "exact",
        output: Output = "softmax",
        momentum: float = 0.0,
        other_lr: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        settings = {
            "lr": lr,
            "damping": damping,
            "max_kl": max_kl,
            "scale_damping": scale_damping,
            "momentum": momentum,
        }
        for name, value in (*settings.items(), ("other_lr", other_lr)):
            if not value >= 0 or (name == "momentum" and value >= 1):
                raise ValueError(f"{name} must be 0 or more{', and below 1' * (name == 'momentum')}, got {value}")
        check_options(fisher, output, torch.empty(0))
        self.model, self.fisher, self.output, self.generator = model, fisher, output, generator
        self.layers = _trainable_layers(model)
        owned = {id(p) for layer in self.layers.values() for p in _parameters(layer)}
        others = [p for p in model.parameters() if id(p) not in owned and p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": [p for a in self.layers.values() for p in _parameters(a)]}]
        if others:
            groups.append({"params": others, "lr": other_lr})
        super().__init__(groups, settings)

    def step(self, inputs: Any, targets: Tensor) -> Tensor:  # type: ignore[override]
        """Make one step on a batch and return its loss before the step: -ln p(targets | inputs), mean over inputs.

        The constant of the gaussian's ln p is left out: the loss is half the squared error.

        Args:
            inputs: see `zeromean.diagnostics.measure`.
            targets: classes [N, ...], or values shaped as the output.

        Raises:
            ValueError: If a layer is not called once, the targets do not fit, or a unit's block is singular.
        """
        outputs, records = collect(self.model, self.layers, inputs)
        squares = squared_deltas(
            outputs, records, fisher=self.fisher, output=self.output, targets=targets, generator=self.generator
        )
        score = -target_score(outputs.detach(), targets, self.output) / len(outputs)
        losses = deltas(outputs, records, score)
        others = self.param_groups[1]["params"] if len(self.param_groups) > 1 else []
        gradients = torch.autograd.grad(outputs, others, score.to(outputs), allow_unused=True) if others else ()
        updates: list[tuple[Tensor, Tensor | None]] = []
        squared_length = 0.0
        for name, record in records.items():
            layer_updates, layer_length = self._natural(record, squares[name], losses[name], len(outputs))
            updates += layer_updates
            squared_length += layer_length
        self._move(updates, self.param_groups[0], self._shrinkage(squared_length))
        self._move(zip(others, gradients, strict=True), self.param_groups[-1])
        return _loss(outputs.detach(), targets, self.output)

    def _natural(
        self, record: LayerRows, squares: Tensor, loss_deltas: Tensor, count: int
    ) -> tuple[list[tuple[Tensor, Tensor | None]], float]:
        """A layer's parameters with their natural gradients, and the sum of g^T F^-1 g over its units."""
        layer, group = record.layer, self.param_groups[0]
        bias = next(iter(_parameters(layer)[1:]), None)
        gradient, bias_gradient = loss_deltas.mT @ record.inputs, loss_deltas.sum(-2)
        natural = unit_natural_gradient(
            record.inputs,
            squares,
            gradient,
            None if bias is None else bias_gradient,
            damping=group["damping"],
            scale_damping=group["scale_damping"],
            places=record.available / count,
        )
        length = (gradient * natural.weight).sum()
        updates: list[tuple[Tensor, Tensor | None]] = [(layer.weight, natural.weight.reshape(layer.weight.shape))]
        if bias is not None and natural.bias is not None:
            length = length + (bias_gradient * natural.bias).sum()
            updates.append((bias, natural.bias.flatten()))
        return updates, float(length)

    def _shrinkage(self, squared_length: float) -> float:
        """The factor that keeps lr^2 / 2 times the squared length at `max_kl`."""
        group = self.param_groups[0]
        divergence = group["lr"] ** 2 * squared_length / 2
        return min(1.0, math.sqrt(group["max_kl"] / divergence)) if divergence > 0 else 1.0

    @torch.no_grad()
    def _move(
        self, updates: Iterable[tuple[Tensor, Tensor | None]], group: dict[str, Any], factor: float = 1.0
    ) -> None:
        for parameter, update in updates:
            if update is None:
                continue
            direction = factor * update.to(parameter)
            if group["momentum"] > 0:
                state = self.state[parameter]
                direction = direction + group["momentum"] * state.get("velocity", 0)
                state["velocity"] = direction
            parameter.sub_(direction, alpha=group["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Return torch's dictionary, and the generator's state."""
        state = super().state_dict()
        return state if self.generator is None else state | {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        super().load_state_dict(state_dict)
        if self.generator is not None and "generator" in state_dict:
            self.generator.set_state(state_dict["generator"])


def _parameters(layer: Layer) -> list[nn.Parameter]:
    """The layer's weight, and its bias if it learns."""
    bias = layer._parameters.get("bias")
    return [layer.get_parameter("weight"), *([bias] if bias is not None and bias.requires_grad else [])]


def _trainable_layers(model: nn.Module) -> dict[str, Layer]:
    """Layers whose weight is a parameter that learns; one computed from others (weight normalization) is not."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if yields_net_inputs(module)
        and (weight := module._parameters.get("weight")) is not None
        and weight.requires_grad
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__} holds no Linear or convolution layer that learns: use a torch optimizer"
        )
    seen: dict[int, str] = {}
    for name, layer in layers.items():
        for parameter in _parameters(layer):
            if id(parameter) in seen:
                raise ValueError(
                    f"layers {seen[id(parameter)]!r} and {name!r} share a parameter: a unit must own its own"
                )
            seen[id(parameter)] = name
    return layers


def _loss(f: Tensor, targets: Tensor, output: Output) -> Tensor:
    if output == "gaussian":
        return (f - targets).square().sum() / (2 * len(f))
    return nn.functional.cross_entropy(f.flatten(0, -2), targets.flatten().long(), reduction="sum") / len(f)
