"""Many networks of one architecture trained as one.

R plain ``nn.Sequential`` networks of Linear layers and activations become one network on inputs ``[R, B, F]``: the R
weights of a layer are one tensor ``[R, out, in]`` and its R products one batched product. Nothing mixes the runs: run r
computes what its own network would, so R small networks cost the launches of one. Runs with the same activation must be
neighbours; each such block applies its activation to its slice, with learnable parameters ``[r, 1, 1]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call


class StackedLinear(nn.Module):
    """``y[r] = x[r] W[r]^T + b[r]`` for ``x [R, B, in]``, ``W [R, out, in]``, ``b [R, 1, out]``."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]).unsqueeze(1))

    def forward(self, x_rbi: Tensor) -> Tensor:
        """All R products at once."""
        return torch.baddbmm(self.bias, x_rbi, self.weight.transpose(1, 2))

    def descend(self, x_rbi: Tensor, rates_r11: Tensor) -> Tensor:
        """The same, and the backward pass takes the step of gradient descent on weights and biases."""
        y: Tensor = _Descend.apply(x_rbi, self.weight, self.bias, rates_r11)  # type: ignore[no-untyped-call]
        return y


class _Descend(torch.autograd.Function):
    """A linear layer whose backward pass computes ``W <- W - rate g^T x`` as one product.

    The gradient is never written to memory: a third of the memory traffic of a step, which is what a step of many
    small networks is bound by.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, rates: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias, rates)
        return torch.baddbmm(bias, x, weight.transpose(1, 2))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, weight, bias, rates = ctx.saved_tensors
        towards_input = torch.bmm(gradient, weight) if ctx.needs_input_grad[0] else None
        step = gradient * -rates
        weight.baddbmm_(step.transpose(1, 2), x)
        bias.add_(step.sum(1, keepdim=True))
        return towards_input, None, None, None


class _Block(nn.Module):
    """Neighbouring runs with one activation: a template module and its parameters, one row a run."""

    def __init__(self, modules: Sequence[nn.Module], first: int) -> None:
        super().__init__()
        self.template = deepcopy(modules[0])
        self.rows = slice(first, first + len(modules))
        self.slopes = nn.ParameterDict()
        for name, parameter in self.template.named_parameters():
            stacked = torch.stack([module.get_parameter(name).detach() for module in modules])
            self.slopes[name] = nn.Parameter(stacked.reshape(len(modules), 1, 1))
            parameter.requires_grad_(False)

    def forward(self, x_rbf: Tensor) -> Tensor:
        activated: Tensor = functional_call(self.template, dict(self.slopes), (x_rbf,))
        return activated


class StackedActivation(nn.Module):
    """Each block's activation on its slice of ``[R, B, F]``."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        blocks, first = [], 0
        for _, group in groupby(modules, key=repr):
            same = list(group)
            blocks.append(_Block(same, first))
            first += len(same)
        self.modules_of_blocks = nn.ModuleList(blocks)
        self.sizes = [block.rows.stop - block.rows.start for block in blocks]

    def forward(self, x_rbf: Tensor) -> Tensor:
        """The activated input."""
        parts = [block(part) for block, part in zip(self.blocks, x_rbf.split(self.sizes), strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def blocks(self) -> list[_Block]:
        """The blocks in the order of their runs."""
        return cast("list[_Block]", list(self.modules_of_blocks))

    def set_seeds(self, seeds_r: Tensor) -> None:
        """Give noisy activations the seed of each run for the next forward pass."""
        for block in self.blocks:
            if hasattr(block.template, "seed"):
                block.template.seed = seeds_r[block.rows].view(-1, 1, 1)


class StackedNetwork(nn.Module):
    """R networks as one.

    Args:
        networks: ``nn.Sequential`` of Linear layers with biases and activations, equal but for weights and
            activations; those with the same activation must be neighbours to share its launch.

    Raises:
        ValueError: the networks differ in their layers, or hold a module that cannot be stacked.
    """

    def __init__(self, networks: Sequence[nn.Sequential]) -> None:
        super().__init__()
        shapes = {tuple(_shape(layer) for layer in network) for network in networks}
        if len(shapes) != 1:
            raise ValueError(
                f"networks must have equal layers to be stacked, got {len(shapes)} kinds: stack each kind alone"
            )
        self.runs = len(networks)
        layers: list[nn.Module] = []
        for same in zip(*networks, strict=True):
            linear = isinstance(same[0], nn.Linear)
            layers.append(StackedLinear(same) if linear else StackedActivation(same))
        self.layers = nn.ModuleList(layers)

    def forward(self, x_rbi: Tensor) -> Tensor:
        """Outputs ``[R, B, out]`` of inputs ``[R, B, in]``."""
        for layer in self.layers:
            x_rbi = layer(x_rbi)
        return x_rbi

    def activations(self, x_rbi: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The output and the output of every activation, each ``[R, B, units]``."""
        hidden = []
        for layer in self.layers:
            x_rbi = layer(x_rbi)
            if isinstance(layer, StackedActivation):
                hidden.append(x_rbi)
        return x_rbi, hidden

    def descend(self, x_rbi: Tensor, rates_r11: Tensor) -> Tensor:
        """As the forward pass; the backward pass then takes the step on weights and biases (not on slopes)."""
        for layer in self.layers:
            x_rbi = layer.descend(x_rbi, rates_r11) if isinstance(layer, StackedLinear) else layer(x_rbi)
        return x_rbi

    def set_seeds(self, seeds_lr: Tensor) -> None:
        """Seeds ``[layers, R]`` of the noise in the next forward pass."""
        for layer, seeds_r in zip(self._activations(), seeds_lr, strict=True):
            layer.set_seeds(seeds_r)

    @property
    def noisy(self) -> bool:
        """Whether an activation draws noise in training."""
        return any(hasattr(module, "seed") for module in self.modules())

    @property
    def hidden_layers(self) -> int:
        """How many activations there are."""
        return len(self._activations())

    def slopes(self) -> list[tuple[nn.Parameter, slice]]:
        """Every learnable parameter of an activation, with the runs that its leading dimension holds."""
        blocks = [block for layer in self._activations() for block in layer.blocks]
        return [(slope, block.rows) for block in blocks for slope in block.slopes.values()]

    def _activations(self) -> list[StackedActivation]:
        return [layer for layer in self.layers if isinstance(layer, StackedActivation)]

    def weights(self, run: int) -> dict[str, Tensor]:
        """The state of one run's own ``nn.Sequential``."""
        state: dict[str, Tensor] = {}
        for position, layer in enumerate(self.layers):
            if isinstance(layer, StackedLinear):
                state[f"{position}.weight"] = layer.weight[run].detach()
                state[f"{position}.bias"] = layer.bias[run, 0].detach()
            elif isinstance(layer, StackedActivation):
                block = next(block for block in layer.blocks if block.rows.start <= run < block.rows.stop)
                own = {name: slope[run - block.rows.start].detach() for name, slope in block.slopes.items()}
                for name, tensor in block.template.state_dict().items():
                    state[f"{position}.{name}"] = own[name].reshape(tensor.shape) if name in own else tensor
        return state


def _shape(layer: nn.Module) -> tuple[int, int] | str:
    if isinstance(layer, nn.Linear):
        if layer.bias is None:
            raise ValueError("a Linear without bias cannot be stacked: give it a bias")
        return layer.in_features, layer.out_features
    if any(parameter.numel() != 1 for parameter in layer.parameters()) or list(layer.children()):
        raise ValueError(f"{layer} cannot be stacked: only Linear and activations with one value a parameter can")
    return "activation"
