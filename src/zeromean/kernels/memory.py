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
    """Dimensions of a dense tensor from the slowest to the fastest.

    By insertion: a compiler that follows the call cannot sort by strides that it knows by name only.
    """
    strides = x.stride()
    order: list[int] = []
    for dim, stride in enumerate(strides):
        place = len(order)
        while place and strides[order[place - 1]] < stride:
            place -= 1
        order.insert(place, dim)
    return order


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


def packs(x: Tensor, parameter: Tensor | None = None, seed: Tensor | None = None) -> bool:
    """Whether the fused programs can pack signs on the way.

    Eight neighbours in memory must belong to one seed, and to one channel or to eight; the latter without a parameter
    too if there is noise in channels_last.
    """
    if parameter is None and seed is None:
        return True
    if not is_dense(x):
        return False
    if seed is not None and not x.is_contiguous():
        return x.shape[1] % 8 == 0
    if seed is not None and seed.numel() > 1:
        return x.numel() // seed.numel() % 8 == 0
    dims = [] if parameter is None else [d for d in range(x.ndim) if parameter.shape[d] > 1]
    return not dims or (len(dims) == 1 and (x.stride(dims[0]) if x.stride(dims[0]) > 1 else x.shape[dims[0]]) % 8 == 0)


def laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """The tensor itself, or a copy with the strides of another dense one of its shape."""
    return x if _has_strides(x, like.stride()) else torch.empty_like(like).copy_(x)


def strided(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor itself, or a copy with these strides: hooks on saved tensors may return another layout."""
    if _has_strides(x, strides):
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def _has_strides(x: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether the elements lie by these strides; that of a dimension of size 1, as in a map of 1x1, says nothing."""
    own = x.stride()
    return own == strides or all(
        size == 1 or one == other for size, one, other in zip(x.shape, own, strides, strict=True)
    )
