"""Gradient descent on a network, and the copies of its weights with which a step in half precision computes.

The descent is stochastic gradient descent with momentum, of all parameters or, where the recipe asks for Muon, of those
that are no weights of a layer.

Autocast would round every weight in every step, and turn every gradient back, in launches of their own. Here weights
lie in one piece of memory with their copies in another, and one program updates both. What has one dimension (biases,
scales, slopes) has no copy: it is little, and is wanted in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zeromean.kernels.muon import muon_step
from zeromean.kernels.sgd import Flat, Ledger, sgd_step
from zeromean.lab.recipes.images import ImageRecipe
from zeromean.nn import decay_groups

# Elements at which a tensor may begin: cuDNN's and cuBLAS's fastest programs ask for as much, in bytes.
_ALIGNMENT = 64


class Descent:
    """The optimizer of a network; it changes nothing where a step is void.

    Args:
        recipe: optimizer, momentum and decay.
        network: its weights are moved into memory of their own, and updated there, for copies and for Muon.
        ledger: says at which rate a step is taken, and whether it is void.
        half: the type of the copies, or None for none.

    Attributes:
        parameters: of the network.
    """

    def __init__(
        self,
        recipe: ImageRecipe,
        network: nn.Module,
        ledger: Ledger,
        *,
        half: torch.dtype | None = None,
    ) -> None:
        self.parameters = list(network.parameters())
        self._recipe, self._ledger = recipe, ledger
        groups = decay_groups(network, recipe.weight_decay)
        laid_out = half is not None or recipe.optimizer == "muon"
        decaying = set(groups[0]["params"]) if laid_out else set[Tensor]()
        self._weights: list[Tensor] = [one for one in self.parameters if one in decaying and one.ndim > 1]
        self._others = _without(self.parameters, self._weights)
        self._sgd = self._optimizer(groups)
        self._flat: Flat | None = None
        self._copies: dict[Tensor, Tensor] = {}
        self._views: Mapping[Tensor, Tensor] = {}
        if laid_out:
            self._lay_out(half)

    def _optimizer(self, groups: Sequence[dict[str, Any]]) -> torch.optim.SGD:
        """That of the parameters that are not laid out, with velocities of zero."""
        recipe, ledger = self._recipe, self._ledger
        groups = [{**group, "params": _without(group["params"], self._weights)} for group in groups]
        if not recipe.decay_biases:
            groups = _weights_alone(groups)
        groups = [group for group in groups if group["params"]]
        sgd = torch.optim.SGD(groups, lr=ledger.rate, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True)
        for parameter in self._others:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        sgd.found_inf, sgd.grad_scale = ledger.void, None  # type: ignore[attr-defined]
        return sgd

    def _lay_out(self, half: torch.dtype | None) -> None:
        """Move the weights into one piece of memory, and make the others like it."""
        sizes = [-(-weight.numel() // _ALIGNMENT) * _ALIGNMENT for weight in self._weights]
        device = self._weights[0].device
        own, velocity = (torch.zeros(sum(sizes), device=device) for _ in range(2))
        gradient = torch.zeros(sum(sizes), dtype=half or torch.float32, device=device)
        self._flat = flat = Flat(own, velocity, own if half is None else torch.zeros_like(gradient), gradient)
        for weight, view in zip(self._weights, _views(flat.weight, self._weights, sizes), strict=True):
            view.copy_(weight.detach())
            weight.data = view
        velocities, copies, gradients = (
            dict(zip(self._weights, _views(tensor, self._weights, sizes), strict=True))
            for tensor in (flat.velocity, flat.copy, flat.gradient)
        )
        self._velocities, self._views = velocities, gradients
        # Of a channels_last kernel too; the order of the inputs makes no difference to Muon.
        parts = zip(self._weights, flat.direction.split(sizes), strict=True)
        self._matrices = [part[: weight.numel()].view(len(weight), -1) for weight, part in parts]
        if half is not None:
            self._copies = {weight: copy.requires_grad_() for weight, copy in copies.items()}
        self.refresh()

    @property
    def momenta(self) -> list[Tensor]:
        """The velocity of each parameter."""
        return [
            self._velocities[parameter] if parameter in self._views else self._sgd.state[parameter]["momentum_buffer"]
            for parameter in self.parameters
        ]

    def refresh(self) -> None:
        """Round the copies anew, where something else changed the weights."""
        if self._flat is not None:
            self._flat.copy.copy_(self._flat.weight)

    def copies_of(self, module: nn.Module) -> dict[str, Tensor]:
        """What a step computes with in place of parameters of the network or a part of it, by their names there."""
        named = module.named_parameters()
        return {name: self._copies[parameter] for name, parameter in named if parameter in self._copies}

    def collect(self, module: nn.Module) -> list[Tensor]:
        """Take the gradients that a backward pass left in the network or a part of it.

        Returns:
            What holds them, to be summed over processes and then put: those of all weights that are laid out in one
            piece, in half precision if they have copies, and each of the others.
        """
        own = self._laid_out(module)
        others = _gradients(self._apart(module))
        if not own:
            return others
        torch._foreach_copy_(
            [self._views[weight] for weight in own], _gradients([self._copies.get(weight, weight) for weight in own])
        )
        return [self._piece(own), *others]

    def put(self, module: nn.Module, gradients: Sequence[Tensor]) -> None:
        """Take such gradients, summed, in their place."""
        own, others = self._laid_out(module), self._apart(module)
        if own and not self._copies:
            # What is in half precision was added up in its place.
            self._piece(own).copy_(gradients[0])
        for parameter, gradient in zip(others, gradients[len(gradients) - len(others) :], strict=True):
            parameter.grad = gradient

    def _piece(self, own: Sequence[Tensor]) -> Tensor:
        """The gradients of weights that lie one behind the other."""
        assert self._flat is not None
        first, last = self._views[own[0]], self._views[own[-1]]
        return self._flat.gradient[first.storage_offset() : last.storage_offset() + last.numel()]

    def _laid_out(self, module: nn.Module) -> list[Tensor]:
        return [parameter for parameter in module.parameters() if parameter in self._views]

    def _apart(self, module: nn.Module) -> list[Tensor]:
        return [parameter for parameter in module.parameters() if parameter not in self._views]

    def norms(self) -> Tensor:
        """Those of parts of the whole gradient, float32 ``[parts]``."""
        found = list[Tensor](torch._foreach_norm(_gradients(self._others)))
        if self._flat is not None:
            found.append(torch.linalg.vector_norm(self._flat.gradient, dtype=torch.float32))
        return torch.stack(found)

    def step(self) -> None:
        """Update the parameters with the collected gradients, which are let go of."""
        recipe, ledger = self._recipe, self._ledger
        if recipe.clip or ledger.scales:
            torch._foreach_mul_(_gradients(self._others), ledger.scale)
        if self._flat is not None:
            step = functools.partial(sgd_step, self._flat, ledger)
            if recipe.optimizer == "muon":
                step = functools.partial(muon_step, self._flat, ledger, matrices=self._matrices)
            step(decay=recipe.weight_decay, momentum=recipe.momentum, nesterov=recipe.nesterov)
        self._sgd.step()
        for leaf in (*self.parameters, *self._copies.values()):
            leaf.grad = None


def _gradients(leaves: Sequence[Tensor]) -> list[Tensor]:
    found = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(found) == len(leaves)
    return found


def _without(parameters: Iterable[Tensor], left_out: Sequence[Tensor]) -> list[Tensor]:
    known = set(left_out)
    return [parameter for parameter in parameters if parameter not in known]


def _weights_alone(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups with what has one dimension, biases and scales, moved to one without decay."""
    vectors = [parameter for group in groups for parameter in group["params"] if parameter.ndim < 2]
    kept = [{**group, "params": [one for one in group["params"] if one.ndim > 1]} for group in groups]
    return [*kept, {"params": vectors, "weight_decay": 0.0}]


def _views(flat: Tensor, like: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Tensors of the shapes and strides of others, one behind the other, each with so many elements of its own."""
    views, place = [], 0
    for tensor, size in zip(like, sizes, strict=True):
        views.append(flat.as_strided(tensor.shape, tensor.stride(), place).detach())
        place += size
    return views
