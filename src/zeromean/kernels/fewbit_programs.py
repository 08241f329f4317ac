"""The Triton programs of the few-bit backward pass: a value and its code forward, a level times a gradient backward.

A thread holds 8 neighbouring elements, whose code bits make one byte of each plane, so no thread needs another's. A
program is one tile of 8 x 32 elements a warp, the layout in which the bytes already lie where they are stored.

A bit of the code is the parity of the thresholds that flip it and are not below x, one instruction a threshold:
the compiler by itself takes two.
"""

import struct
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from zeromean.kernels import formulas
from zeromean.kernels.elementary import INTERPRETED
from zeromean.kernels.fewbit_tables import Table, table

_VALUES = {"silu": formulas.silu, "gelu": formulas.gelu, "gelu_tanh": formulas.gelu_tanh, "mish": formulas.mish}
_WARPS = 4
_GROUPS = 32 * _WARPS


def forward(x: Tensor, name: str, bits: int) -> tuple[Tensor, Tensor]:
    """The function of a contiguous, non-empty CUDA tensor, and its bit-planes."""
    steps = table(name, bits)
    y = torch.empty_like(x)
    planes = torch.empty((bits, triton.cdiv(x.numel(), 8)), dtype=torch.uint8, device=x.device)
    with torch.cuda.device_of(x):
        _forward[_grid(x)](
            x,
            y,
            planes,
            x.numel(),
            planes.shape[1],
            VALUE=_VALUES[name],
            THRESHOLDS=steps.thresholds,
            FLIPS=_flips(steps),
            ASSEMBLY=_assembly(steps),
            LAST=steps.codes[-1],
            BITS=bits,
            GROUPS=_GROUPS,
            PART=min(8, 16 // x.element_size()),
            num_warps=_WARPS,
        )
    return y, planes


def backward(gradient: Tensor, planes: Tensor, name: str) -> Tensor:
    """The gradient, contiguous, non-empty and on CUDA, times the level of each element's code."""
    bits = planes.shape[0]
    dx = torch.empty_like(gradient)
    with torch.cuda.device_of(gradient):
        _backward[_grid(gradient)](
            gradient,
            planes,
            dx,
            gradient.numel(),
            planes.shape[1],
            LEVELS=table(name, bits).levels,
            BITS=bits,
            GROUPS=_GROUPS,
            PART=min(8, 16 // gradient.element_size()),
            num_warps=_WARPS,
        )
    return dx


def _grid(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), 8 * _GROUPS),)


@cache
def _flips(steps: Table) -> tuple[int, ...]:
    """The bit that each threshold flips."""
    return tuple((below ^ above).bit_length() - 1 for below, above in zip(steps.codes, steps.codes[1:], strict=False))


@cache
def _assembly(steps: Table) -> str:
    """Instructions that set in $0, for each bit b of odd parity of x = $1, the mask $2 moved up by 8 b."""
    lines = [".reg .pred odd; .reg .b32 word, mask; mov.b32 word, 0;"]
    for bit in range(len(steps.levels).bit_length() - 1):
        lines.append("setp.ne.b32 odd, 0, 0;")
        for threshold, flipped in zip(steps.thresholds, _flips(steps), strict=True):
            if flipped == bit:
                lines.append(f"setp.le.xor.f32 odd, $1, 0f{struct.pack('>f', threshold).hex()}, odd;")
        lines.append(f"shl.b32 mask, $2, {8 * bit}; @odd or.b32 word, word, mask;")
    return "{" + "\n".join([*lines, "mov.b32 $0, word;"]) + "}"


@triton.jit
def _parities(x, mask, THRESHOLDS: tl.constexpr, FLIPS: tl.constexpr, ASSEMBLY: tl.constexpr, BITS: tl.constexpr):
    """For each bit b that an odd number of the thresholds not below x flips, the mask moved up by 8 b; their sum."""
    if INTERPRETED:
        word = tl.zeros_like(mask)
        for b in tl.static_range(BITS):
            odd = tl.zeros_like(mask) != 0
            for i in tl.static_range(len(THRESHOLDS)):
                if FLIPS[i] == b:
                    odd = odd ^ (x <= THRESHOLDS[i])
            word += tl.where(odd, mask << (8 * b), 0)
    else:
        word = tl.inline_asm_elementwise(ASSEMBLY, "=r,f,r", [x, mask], dtype=tl.int32, is_pure=True, pack=1)
    return word


@triton.jit
def _forward_tile(
    x,
    y,
    planes,
    plane_size,
    rest,
    VALUE: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    FLIPS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    LAST: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    PART: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One tile from its first element on; ``rest`` elements of it exist unless WHOLE."""
    group = tl.arange(0, GROUPS)
    word = tl.zeros([GROUPS], tl.int32)
    for part in tl.static_range(8 // PART):
        place = tl.arange(0, PART)[None, :] + part * PART
        at = group[:, None] * 8 + place
        inside = None if WHOLE else at < rest
        value = tl.load(x + at, mask=inside, other=None if WHOLE else 0.0).to(tl.float32)
        tl.store(y + at, VALUE(value, 0, 0, 0, 0, 0, 0).to(y.dtype.element_ty), mask=inside)
        mask = tl.zeros([GROUPS, PART], tl.int32) + (1 << place)
        word += tl.sum(_parities(value, mask, THRESHOLDS, FLIPS, ASSEMBLY, BITS), 1)
    for b in tl.static_range(BITS):
        byte = (word >> (8 * b)) ^ (255 if LAST >> b & 1 else 0)
        tl.store(planes + b * plane_size + group, byte.to(tl.uint8), mask=None if WHOLE else group * 8 < rest)


@triton.jit(do_not_specialize=["size", "plane_size"])
def _forward(
    x,
    y,
    planes,
    size,
    plane_size,
    VALUE: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    FLIPS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    LAST: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    PART: tl.constexpr,
):
    first, plane_size = tl.program_id(0).to(tl.int64) * GROUPS, plane_size.to(tl.int64)
    rest = size - first * 8
    x, y, planes = x + first * 8, y + first * 8, planes + first
    if rest >= GROUPS * 8:
        _forward_tile(
            x, y, planes, plane_size, rest, VALUE, THRESHOLDS, FLIPS, ASSEMBLY, LAST, BITS, GROUPS, PART, True
        )
    else:
        _forward_tile(
            x, y, planes, plane_size, rest, VALUE, THRESHOLDS, FLIPS, ASSEMBLY, LAST, BITS, GROUPS, PART, False
        )


@triton.jit
def _two(bit, LEVELS: tl.constexpr, AT: tl.constexpr):
    return tl.where(bit != 0, LEVELS[AT + 1], LEVELS[AT])


@triton.jit
def _four(low, high, LEVELS: tl.constexpr, AT: tl.constexpr):
    return tl.where(high != 0, _two(low, LEVELS, AT + 2), _two(low, LEVELS, AT))


@triton.jit
def _eight(low, middle, high, LEVELS: tl.constexpr, AT: tl.constexpr):
    return tl.where(high != 0, _four(low, middle, LEVELS, AT + 4), _four(low, middle, LEVELS, AT))


@triton.jit
def _level(bit_0, bit_1, bit_2, bit_3, LEVELS: tl.constexpr):
    """The level of a code of as many of the bits as there are levels for."""
    if len(LEVELS) == 2:
        level = _two(bit_0, LEVELS, 0)
    elif len(LEVELS) == 4:
        level = _four(bit_0, bit_1, LEVELS, 0)
    elif len(LEVELS) == 8:
        level = _eight(bit_0, bit_1, bit_2, LEVELS, 0)
    else:
        level = tl.where(bit_3 != 0, _eight(bit_0, bit_1, bit_2, LEVELS, 8), _eight(bit_0, bit_1, bit_2, LEVELS, 0))
    return level


@triton.jit
def _load_bytes(plane, GROUPS: tl.constexpr, rest, WHOLE: tl.constexpr):
    group = tl.arange(0, GROUPS)
    byte = tl.load(plane + group, mask=None if WHOLE else group * 8 < rest, other=None if WHOLE else 0)
    return byte.to(tl.int32)[:, None]


@triton.jit
def _backward_tile(
    gradient,
    planes,
    dx,
    plane_size,
    rest,
    LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    PART: tl.constexpr,
    WHOLE: tl.constexpr,
):
    byte_0 = _load_bytes(planes, GROUPS, rest, WHOLE)
    byte_1 = _load_bytes(planes + plane_size, GROUPS, rest, WHOLE) if BITS > 1 else byte_0
    byte_2 = _load_bytes(planes + 2 * plane_size, GROUPS, rest, WHOLE) if BITS > 2 else byte_0
    byte_3 = _load_bytes(planes + 3 * plane_size, GROUPS, rest, WHOLE) if BITS > 3 else byte_0
    for part in tl.static_range(8 // PART):
        place = tl.arange(0, PART)[None, :] + part * PART
        at = tl.arange(0, GROUPS)[:, None] * 8 + place
        inside = None if WHOLE else at < rest
        mask = 1 << place
        level = _level(byte_0 & mask, byte_1 & mask, byte_2 & mask, byte_3 & mask, LEVELS)
        slope = tl.load(gradient + at, mask=inside).to(tl.float32) * level
        tl.store(dx + at, slope.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size", "plane_size"])
def _backward(
    gradient,
    planes,
    dx,
    size,
    plane_size,
    LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    PART: tl.constexpr,
):
    first, plane_size = tl.program_id(0).to(tl.int64) * GROUPS, plane_size.to(tl.int64)
    rest = size - first * 8
    gradient, planes, dx = gradient + first * 8, planes + first, dx + first * 8
    if rest >= GROUPS * 8:
        _backward_tile(gradient, planes, dx, plane_size, rest, LEVELS, BITS, GROUPS, PART, True)
    else:
        _backward_tile(gradient, planes, dx, plane_size, rest, LEVELS, BITS, GROUPS, PART, False)
