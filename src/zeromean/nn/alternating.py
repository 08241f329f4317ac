"""Training passes that are noisy and quiet by turns, as EPReLU and EELU need them."""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("zeromean::take_turn", mutates_args={"noisy_next"})
def take_turn(noisy_next: Tensor) -> Tensor:
    """Return a copy of the flag and flip the flag; run again by a backward pass, return the latest turn.

    An operator of its own, because a compiler may put off a plain copy to the backward pass, and then copies the
    flipped flag; and so that a recomputation is recognised in a compiled backward pass too.
    """
    if _inside_backward():
        return noisy_next.logical_not()
    noisy = noisy_next.clone()
    noisy_next.logical_not_()
    return noisy


@take_turn.register_fake
def _(noisy_next: Tensor) -> Tensor:
    return torch.empty_like(noisy_next)


@take_turn.register_vmap
def _(info: Any, in_dims: tuple[int | None], noisy_next: Tensor) -> tuple[Tensor, int | None]:
    return take_turn(noisy_next), in_dims[0]


class AlternatingPasses(torch.nn.Module):
    """Base of the activations whose training passes take turns: noisy slopes first, then learnable parameters.

    The turn is a bool buffer, changed in place by each training forward pass, so it is saved with the model and changes
    inside a compiled graph too. The published code changes it in evaluation passes as well; here an evaluation leaves
    no trace (our choice). A pass run again by activation checkpointing repeats the latest turn, which is right as long
    as the layer is used once in the checkpointed part.

    Attributes:
        seed: If set, the noise's seed (see `zeromean.functional.eelu`); if None, each pass draws one.
        noisy_next: Whether the next training pass is a noisy one.
    """

    noisy_next: Tensor

    def __init__(self, device: Any = None) -> None:
        super().__init__()
        self.seed: Tensor | None = None
        self.register_buffer("noisy_next", torch.ones((), dtype=torch.bool, device=device))

    def take_turn(self) -> Tensor:
        """Whether this training pass is noisy; the next one will be the opposite."""
        noisy: Tensor = take_turn(self.noisy_next)
        return noisy


def _inside_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
