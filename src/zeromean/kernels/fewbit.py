"""The operators of the few-bit backward pass: `fewbit_forward` and `fewbit_backward` in torch.library.

    y, planes = zeromean::fewbit_forward(x, name, bits)         dx = zeromean::fewbit_backward(gradient, planes, name)

The code of element m of x, in logical (row-major) order, has its bit b in planes[b, m // 8] at place m % 8. Codes and
levels are those of `fewbit_tables`; NaN falls into the last interval. CUDA tensors of float16, bfloat16 and float32 run
the Triton programs, all others the same in plain operators, with equal planes.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zeromean.kernels.fewbit_tables import FUNCTIONS, table
from zeromean.kernels.operator import fused


def forward(x: Tensor, name: str, bits: int) -> tuple[Tensor, Tensor]:
    """Call `fewbit_forward`.

    Args:
        x: Any shape, a real floating-point type.
        name: A key of `FUNCTIONS`.
        bits: 1 to 4.

    Returns:
        The function of x, contiguous, and the planes: uint8 [bits, numel / 8 rounded up].
    """
    return torch.ops.zeromean.fewbit_forward(x, name, bits)  # type: ignore[no-any-return]


def backward(gradient: Tensor, planes: Tensor, name: str) -> Tensor:
    """Call `fewbit_backward`: the gradient times the level of each element, contiguous."""
    return torch.ops.zeromean.fewbit_backward(gradient, planes, name)  # type: ignore[no-any-return]


def _forward(x: Tensor, name: str, bits: int) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    if _runs_programs(x):
        from zeromean.kernels import fewbit_programs

        return fewbit_programs.forward(x, name, bits)
    return FUNCTIONS[name](x), _planes(x, name, bits)


def _backward(gradient: Tensor, planes: Tensor, name: str) -> Tensor:
    gradient = gradient.contiguous()
    if _runs_programs(gradient):
        from zeromean.kernels import fewbit_programs

        return fewbit_programs.backward(gradient, planes.contiguous(), name)
    wide = _widen(gradient)
    return (wide * _levels(wide, planes, name)).to(gradient.dtype)


def _runs_programs(x: Tensor) -> bool:
    return fused(x) and x.numel() > 0


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _planes(x: Tensor, name: str, bits: int) -> Tensor:
    steps = table(name, bits)
    wide = F.pad(_widen(x).flatten(), (0, -x.numel() % 8))
    interval = torch.bucketize(wide, torch.tensor(steps.thresholds, dtype=wide.dtype, device=x.device), out_int32=True)
    code = torch.tensor(steps.codes, dtype=torch.uint8, device=x.device)[interval].view(-1, 8)
    place = torch.arange(8, dtype=torch.uint8, device=x.device)
    return torch.stack([((code >> bit & 1) << place).sum(1, dtype=torch.uint8) for bit in range(bits)])


def _levels(like: Tensor, planes: Tensor, name: str) -> Tensor:
    """The level of each element, in the shape and type of a tensor."""
    place = torch.arange(8, dtype=torch.uint8, device=planes.device)
    weighted = [((plane[:, None] >> place) & 1) << bit for bit, plane in enumerate(planes)]
    code = torch.stack(weighted).sum(0, dtype=torch.int32).flatten()[: like.numel()]
    return torch.tensor(table(name, len(planes)).levels, dtype=like.dtype, device=like.device)[code].view(like.shape)


def _fake_forward(x: Tensor, name: str, bits: int) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty((bits, (x.numel() + 7) // 8), dtype=torch.uint8)


def _fake_backward(gradient: Tensor, planes: Tensor, name: str) -> Tensor:
    return torch.empty_like(gradient, memory_format=torch.contiguous_format)


def _vmap_forward(
    info: Any, in_dims: tuple[int, None, None], x: Tensor, name: str, bits: int
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Each slice starts on a byte of its own, so that planes can be told apart by slice."""
    x = x.movedim(in_dims[0], 0)
    y, planes = forward(_whole_bytes(x), name, bits)
    return (_as_before(y, x), planes.view(bits, x.shape[0], -1)), (0, 1)


def _vmap_backward(
    info: Any,
    in_dims: tuple[int | None, ...],
    gradient: Tensor,
    planes: Tensor,
    name: str,
) -> tuple[Tensor, int]:
    gradient = _batch_first(gradient, in_dims[0], info.batch_size)
    planes = _batch_first(planes, in_dims[1], info.batch_size).movedim(0, 1)
    dx = backward(_whole_bytes(gradient), planes.flatten(1), name)
    return _as_before(dx, gradient), 0


def _batch_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _whole_bytes(x: Tensor) -> Tensor:
    """[B, ...] as [B, n], n a multiple of 8."""
    return F.pad(x.reshape(x.shape[0], math.prod(x.shape[1:])), (0, -math.prod(x.shape[1:]) % 8))


def _as_before(padded: Tensor, x: Tensor) -> Tensor:
    return padded[:, : math.prod(x.shape[1:])].reshape(x.shape)


def _register() -> None:
    tags = (torch.Tag.pt2_compliant_tag,)
    forward, backward = "zeromean::fewbit_forward", "zeromean::fewbit_backward"
    torch.library.define(forward, "(Tensor x, str name, int bits) -> (Tensor y, Tensor planes)", tags=tags)
    torch.library.define(backward, "(Tensor gradient, Tensor planes, str name) -> Tensor", tags=tags)
    torch.library.impl(forward, "default", _forward)
    torch.library.impl(backward, "default", _backward)
    torch.library.register_fake(forward, _fake_forward)
    torch.library.register_fake(backward, _fake_backward)
    torch.library.register_vmap(forward, _vmap_forward)
    torch.library.register_vmap(backward, _vmap_backward)


_register()
