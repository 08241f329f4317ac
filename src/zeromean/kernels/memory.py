"""How a tensor lies in memory, and flags packed as bits in that order."""

import torch
from torch import Tensor


def pack(flags: Tensor) -> Tensor:
    """Flags as bits, in the order in which a dense tensor like this one lies in memory: bit m % 8 of byte m // 8."""
    flat = _in_memory_order(flags)
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, (8 - flat.numel() % 8) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=flags.device)).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, like: Tensor) -> Tensor:
    """The flags that `pack` packed, laid out as ``like``."""
    flat = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    flags = flat.view(-1)[: like.numel()].bool()
    order = _by_stride(like)
    return flags.view([like.shape[d] for d in order]).permute([order.index(d) for d in range(like.ndim)])


def _by_stride(x: Tensor) -> list[int]:
    """Dimensions of a dense tensor from the slowest to the fastest."""
    return sorted(range(x.ndim), key=lambda d: (-x.stride()[d], d))


def _in_memory_order(x: Tensor) -> Tensor:
    return x.permute(_by_stride(x)).reshape(-1)


def dense(x: Tensor) -> Tensor:
    """The tensor itself, or a copy laid out as `torch.empty_like` would."""
    return x if is_dense(x) else torch.empty_like(x).copy_(x)


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill a stretch of memory without gaps, in some order of the dimensions."""
    if x.is_contiguous():
        return True
    step = 1
    for dim in reversed(_by_stride(x)):
        if x.shape[dim] != 1 and x.stride(dim) != step:
            return False
        step *= x.shape[dim]
    return True


def packs(x: Tensor, parameter: Tensor) -> bool:
    """Whether the fused programs can pack signs: eight neighbours in memory must belong to one channel, or to eight."""
    if not is_dense(x):
        return False
    dims = [d for d in range(x.ndim) if parameter.shape[d] > 1]
    return not dims or (len(dims) == 1 and (x.stride(dims[0]) if x.stride(dims[0]) > 1 else x.shape[dims[0]]) % 8 == 0)


def laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """The tensor itself, or a copy with the strides of another dense one."""
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def strided(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor itself, or a copy with these strides: hooks on saved tensors may return another layout."""
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
