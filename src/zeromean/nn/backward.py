"""What a forward pass keeps for the backward pass, and when a backward pass can come at all.

A layer that follows an activation keeps the activation's output anyway, as its own input. So an activation that needs
nothing but its output adds no memory: 2 bytes an element instead of 4 in bfloat16.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

Save = Literal["auto", "output", "input"]


def check_save(save: Save) -> None:
    """Raise ValueError for a choice that there is not."""
    if save not in get_args(Save):
        raise ValueError(f"save must be one of {', '.join(get_args(Save))}, got {save!r}: leave it at 'auto' if unsure")


def keeps_output(save: Save, output_suffices: bool) -> bool:
    """Whether to keep the output: asked for, or left to us where the output is known to suffice."""
    return save == "output" or (save == "auto" and output_suffices)


def backward_may_follow(*tensors: Tensor) -> bool:
    """Whether autograd records this call; if not, plain ATen operators do, and an exported program holds only those."""
    if torch.compiler.is_exporting() or not torch.is_grad_enabled():
        return False
    return any(tensor.requires_grad for tensor in tensors)


def apply(function: type[torch.autograd.Function], *inputs: Any) -> Tensor:
    """Call an autograd function of one output, with a type."""
    output: Tensor = function.apply(*inputs)
    return output


def widen(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least: half-precision types carry bytes, not arithmetic.

    Raises:
        ValueError: If the tensor is not of a real floating-point type.
    """
    if not tensor.is_floating_point():
        raise ValueError(f"x must be of a real floating-point type, got {tensor.dtype}: use x.float()")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
