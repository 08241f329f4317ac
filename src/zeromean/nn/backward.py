"""What a forward pass keeps for the backward pass, and when a backward pass can come at all.

A layer that follows an activation keeps the activation's output anyway, as its own input. So an activation that needs
nothing but its output adds no memory: 2 bytes an element instead of 4 in bfloat16.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from zeromean.kernels import Keep, fused, packs, small

Save = Literal["auto", "output", "input"]
_SAVES = get_args(Save)


def check_save(save: Save) -> None:
    """Raise ValueError for a choice that there is not."""
    if save not in _SAVES:
        raise ValueError(f"save must be one of {', '.join(_SAVES)}, got {save!r}: leave it at 'auto' if unsure")


def what_to_keep(
    save: Save, x: Tensor, output_suffices: bool, parameter: Tensor | None = None, seed: Tensor | None = None
) -> Keep:
    """From what the caller asked for to what is kept.

    Args:
        save: As the caller gave it.
        x: The input.
        output_suffices: Whether the output tells the side of the input; if not, it is kept with a sign bit, by default
            where the fused programs pack those on the way.
        parameter: The learnable slopes, if any, aligned to x.
        seed: Of the noise, if any.
    """
    if save == "input":
        return "input"
    if output_suffices:
        return "output"
    if save == "output" or (fused(x) and packs(x, parameter, seed)):
        return "signs"
    return "input"


def quick(save: Save, x: Tensor) -> bool:
    """Whether to hand a call to torch at once: few elements on a GPU, where each microsecond before a launch counts."""
    return save == "auto" and small(x)


def left_to_torch(save: Save, x: Tensor, keep: Keep, record: bool) -> bool:
    """Whether torch's own operator does what is wanted: for export, few elements, or nothing to save on this device."""
    if exporting() or quick(save, x):
        return True
    return not fused(x) and (keep == "input" or not record)


def exporting() -> bool:
    """Whether `torch.export` is at work, whose programs are to hold ATen operators only.

    `torch.compiler.is_exporting` is not asked: torch 2.11 answers yes inside every compiled function.
    """
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def backward_may_follow(*tensors: Tensor) -> bool:
    """Whether autograd records this call; if not, plain ATen operators do, and an exported program holds only those."""
    if exporting() or not torch.is_grad_enabled():
        return False
    return any(tensor.requires_grad for tensor in tensors)


def widen(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least: half-precision types carry bytes, not arithmetic.

    Raises:
        ValueError: If the tensor is not of a real floating-point type.
    """
    if not tensor.is_floating_point():
        raise ValueError(f"x must be of a real floating-point type, got {tensor.dtype}: use x.float()")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
