"""What follows a call besides plain autograd: a compiler, a transform of `torch.func`, a mode, a tensor's own type."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN = (Tensor, torch.nn.Parameter)

# Private to torch; if they should go, every call takes the slower way.
_transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_modes_active: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


def traced() -> bool:
    """Whether a compiler or a transform of `torch.func` follows the call."""
    return torch.compiler.is_compiling() or _transforms_active()


def differentiates_forward() -> bool:
    """Whether forward-mode differentiation does, which goes through no autograd function of ours."""
    return forward_ad._current_level >= 0


def transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation does, which take the plain formulas."""
    return not torch.compiler.is_compiling() and (_transforms_active() or differentiates_forward())


def plain_eager() -> bool:
    """Whether nothing but plain autograd does."""
    return not (
        torch.compiler.is_compiling() or _transforms_active() or _modes_active() or forward_ad._current_level >= 0
    )


def direct(*tensors: Tensor | None) -> bool:
    """Whether a call may go past torch's dispatcher, which takes longer than a small kernel: plain eager tensors."""
    return all(tensor is None or type(tensor) in PLAIN for tensor in tensors) and plain_eager()
