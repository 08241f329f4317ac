"""A forward pass, and the gradient of a loss, that leave a model and its surroundings as they were.

The pass runs on copies of the buffers and on aliases of the parameters, so that no running statistic moves, no
``.grad`` is written and no hook on a parameter fires; the state of every random generator is put back. Hooks of modules
run, and what a module keeps in attributes of its own is its own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from zeromean.diagnostics.generators import generators_put_back
from zeromean.diagnostics.layers import runs_compiled
from zeromean.diagnostics.light import first_tensor

Loss = Callable[[Any, Any], Tensor]


def forward_and_backward(
    root: nn.Module, inputs: Any, targets: Any, loss: Loss | None, *, after_forward: Callable[[], None]
) -> Any:
    """Run a model once, and its loss backward if there is one, in the mode that it is in.

    Args:
        root: the model.
        inputs: a tensor, positional arguments as a tuple or list, or keyword arguments as a mapping.
        targets: of the loss; None runs no backward pass, unless a loss is given.
        loss: takes the model's output and the targets; see `default_loss`.
        after_forward: called between the two, whatever happens.

    Returns:
        The model's output.
    """
    aliases = {one: one.detach().requires_grad_(one.requires_grad) for one in root.parameters()}
    state = _by_place(root, aliases | {one: one.clone() for one in root.buffers()})
    args, kwargs = arguments(inputs)
    with generators_put_back(root), eagerly(root), torch.inference_mode(False), torch.enable_grad():
        try:
            output = functional_call(root, state, args, kwargs, tie_weights=False)
        finally:
            after_forward()
        wanted = [one for one in aliases.values() if one.requires_grad]
        if (loss is not None or targets is not None) and wanted:
            value = (loss or default_loss)(output, targets)
            torch.autograd.grad(value, wanted, allow_unused=True)
        return output


def _by_place(root: nn.Module, copies: Mapping[Tensor, Tensor]) -> dict[str, Tensor]:
    """The copies by the names of the places that hold the originals, each place once.

    `functional_call` ties all names of a tensor. Where a module has two names, it would put back the original under the
    first and its own copy under the second, which is the same place: the model would be left with the copy.
    """
    return {
        f"{name}.{key}" if name else key: copies[one]
        for name, module in root.named_modules()
        for key, one in (*module._parameters.items(), *module._buffers.items())
        if one is not None
    }


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a model."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def default_loss(output: Any, targets: Tensor) -> Tensor:
    """Cross entropy for class indices, half the mean squared error for targets that are floating-point numbers.

    Args:
        output: of the model; the first tensor in it counts, ``logits`` before others. ``[N, C]`` or ``[N, C, ...]``; or
            ``[..., C]`` where the targets have that shape without C.
        targets: indices ``[N]`` or ``[N, ...]``, or numbers of the output's shape.

    Raises:
        ValueError: If the output holds no floating-point numbers.
    """
    scores = first_tensor(output)
    if scores is None:
        raise ValueError(f"a loss needs floating-point outputs, got {type(output).__name__}: give your own as loss=")
    if targets.is_floating_point():
        return 0.5 * F.mse_loss(scores, targets)
    if targets.ndim > 1 and scores.shape[:-1] == targets.shape:
        scores, targets = scores.flatten(0, -2), targets.flatten()
    return F.cross_entropy(scores, targets)


def eagerly(root: nn.Module) -> AbstractContextManager[Any]:
    """Run what torch.compile was applied to as it was written, where there is such a module."""
    if any(runs_compiled(module) for module in root.modules()):
        stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return nullcontext()
