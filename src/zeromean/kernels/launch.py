"""From tensors to a program: how memory is seen, how large a tile is, and the launch itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from zeromean.kernels import formulas, programs, tiles

TYPES = (torch.bfloat16, torch.float16, torch.float32)
# Elements of a tile, four warps to a program: one access of 16 bytes a thread. A program with random numbers or sums to
# make goes through several tiles, so that what it does once weighs less.
_TILE, _STEPS, _WARPS, _FORWARD_WARPS, _FINISH_WARPS = 1024, 4, 4, 2, 8
# Where the channel runs fastest: the widest strip of columns, in a forward pass and where sums or noise are made; rows
# that a program takes at a time, and how often.
_FORWARD_WIDTH, _WIDTH = 256, 128
_FORWARD_DEPTH, _SIGNS_DEPTH, _DEPTH, _COLUMN_STEPS, _NOISE_STEPS, _STAGES = 4, 1, 2, 32, 8, 3
# The second axis of a grid is no longer.
_MOST_ROWS = 65535
# Partial sums that a program of the finishing sum reads at a time.
_FINISH = 8192
# Columns into which many shares of one parameter are folded first, so that more than one program sums them.
FOLD = 256
_LONGEST_INT32 = 2**31 - 2**16
# In this version what Triton does in Python at each launch of a program without scratch memory can be left out.
_LAUNCHER_IS_KNOWN = triton.__version__.startswith("3.6.")


@dataclass(frozen=True)
class Formula:
    """One activation as the programs take it.

    Attributes:
        value: The formula of `formulas`.
        slope: Its derivatives.
        zero_positive: Whether 0 belongs to the positive side.
        parameters: How many learnable parameters it has.
        full: Whether its parameter is a whole tensor of x's shape.
        noise: `tiles.NO_NOISE`, `tiles.UNIFORM` or `tiles.NORMAL`.
        flag: Whether there are quiet passes.
        reads_kept: Whether the derivative needs more of the kept tensor than its sign.
        numbers: From the scalars of the call to s0, s1, s2 of the formula, and the two numbers of the noise.
    """

    value: Any
    slope: Any
    zero_positive: bool = False
    parameters: int = 0
    full: bool = False
    noise: int = tiles.NO_NOISE.value
    flag: bool = False
    reads_kept: bool = True
    numbers: Callable[..., tuple[float, float, float, float, float]] = lambda *s: (*s, *(0.0,) * (5 - len(s)))


def _around_one(epsilon: float) -> tuple[float, float]:
    return 1 - epsilon, 2 * epsilon


FORMULAS = {
    "elu": Formula(formulas.elu, formulas.elu_slope),
    "bias_elu": Formula(formulas.bias_elu, formulas.bias_elu_slope, parameters=1),
    "elu_add": Formula(formulas.elu_add, formulas.elu_slope, parameters=1, full=True),
    "shifted_relu": Formula(formulas.shifted_relu, formulas.shifted_relu_slope),
    "leaky_relu": Formula(formulas.leaky_relu, formulas.leaky_relu_slope, reads_kept=False),
    "prelu": Formula(formulas.prelu, formulas.prelu_slope, parameters=1),
    "eprelu": Formula(
        formulas.eprelu,
        formulas.eprelu_slope,
        zero_positive=True,
        parameters=1,
        noise=tiles.UNIFORM.value,
        flag=True,
        numbers=lambda smallest, epsilon: (smallest, 0.0, 0.0, *_around_one(epsilon)),
    ),
    "rrelu": Formula(
        formulas.rrelu,
        formulas.rrelu_slope,
        noise=tiles.UNIFORM.value,
        reads_kept=False,
        numbers=lambda lower, upper: (0.0, 0.0, 0.0, lower, upper - lower),
    ),
    "erelu": Formula(
        formulas.erelu,
        formulas.erelu_slope,
        noise=tiles.UNIFORM.value,
        numbers=lambda epsilon: (0.0, 0.0, 0.0, *_around_one(epsilon)),
    ),
    "pelu": Formula(formulas.pelu, formulas.pelu_slope, zero_positive=True, parameters=2),
    "mpelu": Formula(formulas.mpelu, formulas.mpelu_slope, zero_positive=True, parameters=2),
    "eelu": Formula(
        formulas.eelu,
        formulas.eelu_slope,
        zero_positive=True,
        parameters=2,
        noise=tiles.NORMAL.value,
        flag=True,
        numbers=lambda epsilon: (0.0, 0.0, 0.0, epsilon, 0.0),
    ),
    "silu": Formula(formulas.silu, formulas.silu_slope),
    "swish": Formula(formulas.swish, formulas.swish_slope, parameters=1),
    "gelu": Formula(formulas.gelu, formulas.gelu_slope),
    "gelu_tanh": Formula(formulas.gelu_tanh, formulas.gelu_tanh_slope),
    "mish": Formula(formulas.mish, formulas.mish_slope),
}


@dataclass(frozen=True)
class View:
    """Memory as the programs see it (see `programs`).

    Attributes:
        rows: Runs of one channel in each slice; or rows of ``inner`` channels if ``columns``.
        inner: Elements of a row.
        channels: Parameters of each kind in a slice.
        columns: Whether the channel runs fastest.
        plane: In columns, how many positions lie between one sample and the next.
        slices: Stacked networks with seeds of their own.
        logical: Whether memory's order is the logical one.
    """

    rows: int
    inner: int
    channels: int = 1
    columns: bool = False
    plane: int = 1
    slices: int = 1
    logical: bool = True

    @property
    def count(self) -> int:
        """Elements of a slice."""
        return self.rows * self.inner

    def packs(self) -> bool:
        """Whether eight elements that share a byte of signs always lie in one row, and in one slice."""
        return self.inner % 8 == 0 or (self.rows == 1 and self.slices == 1)


def view_of(x: Tensor, parameters: Sequence[Tensor], seed: Tensor | None) -> View | None:
    """See a dense tensor as rows or columns; None where only plain operators can do it."""
    count, slices = x.numel(), 1 if seed is None else seed.numel()
    logical = x.is_contiguous()
    if seed is not None and not logical and not _channels_last(x):
        return None
    shapes = {tuple(p.shape) for p in parameters if p.numel() > 1}
    if len(shapes) > 1 or (shapes and any(p.numel() == 1 for p in parameters)):
        return None
    if slices > 1:
        assert seed is not None
        alone = not parameters or shapes == {tuple(seed.shape)}
        fits = slices <= _MOST_ROWS and _one_a_slice(seed, x)
        return View(1, count // slices, slices=slices) if logical and alone and fits else None
    if not shapes:
        if logical or seed is None:
            return View(1, count)
        return View(count // x.shape[1], x.shape[1], 1, True, math.prod(x.shape[2:]), logical=False)
    (shape,) = shapes
    if len(shape) != x.ndim or sum(size > 1 for size in shape) > 1:
        return None
    dim = next(d for d, size in enumerate(shape) if size > 1)
    channels, stride = x.shape[dim], x.stride(dim)
    if stride > 1:
        return View(count // stride, stride, channels, logical=logical) if logical or seed is None else None
    plane = 1 if logical else math.prod(x.shape[2:])
    return View(count // channels, channels, channels, True, plane, logical=logical)


def _one_a_slice(seed: Tensor, x: Tensor) -> bool:
    """Whether seeds lie along the leading dimensions; elsewhere the plain formula says what is wrong."""
    leading = max(dim + 1 for dim, size in enumerate(seed.shape) if size > 1)
    return seed.ndim == x.ndim and seed.shape[:leading] == x.shape[:leading]


def _channels_last(x: Tensor) -> bool:
    """Whether dimension 1 runs fastest and the others keep their order."""
    return x.ndim > 2 and x.movedim(1, -1).is_contiguous()


@dataclass(eq=False)
class Plan:
    """All of a launch but its tensors and scalars.

    Attributes:
        program: The Triton program.
        grid: Its grid.
        shape: Its integers.
        constants: Its compile-time arguments, in order.
        warps: To a block.
        kernels: What starts the compiled program, by the type of the first tensor (the lane tells the others).
    """

    program: Any
    grid: tuple[int, ...]
    shape: tuple[int, ...]
    constants: dict[str, Any]
    warps: int = _WARPS
    kernels: dict[torch.dtype, tuple[Any, ...]] = field(default_factory=dict)

    @functools.cached_property
    def rest(self) -> tuple[Any, ...]:
        """The compile-time arguments alone, which a compiled program takes too."""
        return tuple(self.constants.values())


_Layout = tuple[tuple[int, int, int], tuple[int, ...], dict[str, Any]]


@functools.lru_cache(maxsize=1024)
def numbers_of(name: str, scalars: tuple[float, ...]) -> tuple[float, ...]:
    """What the programs take for the scalars of a call."""
    return FORMULAS[name].numbers(*map(float, scalars))


def forward_plan(view: View, name: str, signs: bool) -> Plan:
    """How a forward pass is launched."""
    formula = FORMULAS[name]
    constants = {
        "VALUE": formula.value,
        "ZERO_POSITIVE": formula.zero_positive,
        "PARAMETERS": formula.parameters,
    }
    rest = {"NOISE": formula.noise, "FLAG": formula.flag, "SIGNS": signs}
    if view.columns:
        depth = _SIGNS_DEPTH if signs else _FORWARD_DEPTH
        width, steps = (_WIDTH, _NOISE_STEPS) if formula.noise else (_FORWARD_WIDTH, 1)
        grid, shape, tile = _columns(view, bool(formula.noise), width, depth, steps)
        return Plan(programs.forward_columns, grid, shape, {**constants, "SHARED": view.channels == 1, **rest, **tile})
    grid, shape, tile = _rows(view, _STEPS if formula.noise else 1)
    warps = _WARPS if signs else _FORWARD_WARPS
    return Plan(programs.forward_rows, grid, shape, {**constants, "FULL": formula.full, **rest, **tile}, warps)


def backward_plan(
    view: View, name: str, parameters: int, signs: bool, output_kept: bool, learn: bool
) -> tuple[Plan, tuple[int, int, int, int]]:
    """How a backward pass is launched, and the shape of the shares: parameters, slices, shares, channels."""
    formula = FORMULAS[name]
    constants = {
        "SLOPE": formula.slope,
        "ZERO_POSITIVE": formula.zero_positive,
        "OUTPUT": output_kept,
        "PARAMETERS": parameters,
    }
    rest = {
        "LEARN": programs.SUMS.value if learn else programs.NOTHING.value,
        "NOISE": formula.noise,
        "FLAG": formula.flag,
        "SIGNS": signs,
        "KEPT": not signs or formula.reads_kept,
    }
    if view.columns:
        steps = _NOISE_STEPS if formula.noise else _COLUMN_STEPS if learn else 1
        grid, shape, tile = _columns(view, bool(formula.noise), _WIDTH, _DEPTH, steps)
        plan = Plan(programs.backward_columns, grid, shape, {**constants, "SHARED": view.channels == 1, **rest, **tile})
        shares = shape[4] if view.channels > 1 else shape[4] * view.inner
        return plan, (parameters, 1, shares, view.channels)
    grid, shape, tile = _rows(view, _STEPS if learn or formula.noise else 1)
    chunks = shape[3] if tile["ROWS"] == 1 else 1
    shares = view.rows // view.channels * chunks
    if view.channels == 1 and shares > _FINISH:
        shares = triton.cdiv(shares, FOLD) * FOLD
    plan = Plan(programs.backward_rows, grid, (*shape, shares), {**constants, **rest, **tile})
    return plan, (parameters, view.slices, shares, view.channels)


def finish_plan(kinds: int, slices: int, shares: int, channels: int) -> Plan:
    """How shares of this shape are summed."""
    width = min(triton.next_power_of_2(channels), 8)
    deep = min(_FINISH // width, triton.next_power_of_2(shares))
    constants = {"PARAMETERS": kinds, "STEPS": triton.cdiv(shares, deep), "DEEP": deep, "WIDTH": width}
    grid = (triton.cdiv(channels, width), kinds, slices)
    return Plan(programs.finish, grid, (shares, channels), constants, _FINISH_WARPS)


def _launch(plan: Plan, tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> None:
    """Launch on the tensors' GPU; by the compiled program once there is one, which saves most of Triton's time."""
    x = tensors[0]
    assert x is not None
    device = x.get_device()
    if device >= 0 and device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return _launch(plan, tensors, numbers)
    addresses: list[int | None] = []
    bits = 0
    for tensor in tensors:
        address = None if tensor is None else tensor.data_ptr()
        bits |= address or 0
        addresses.append(address)
    known = plan.kernels.get(x.dtype) if bits % 16 == 0 else None
    if known is not None:
        run, *fixed = known
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(*plan.grid, stream, *fixed, *addresses, *plan.shape, *numbers, *plan.rest)
        return None
    pointers = [_bytes(tensor) for tensor in tensors]
    kernel = plan.program[plan.grid](*pointers, *plan.shape, *numbers, **plan.constants, num_warps=plan.warps)
    if kernel is not None and bits % 16 == 0:
        plan.kernels[x.dtype] = _start(kernel)
    return None


def _start(kernel: Any) -> tuple[Any, ...]:
    """What starts a compiled program, and its arguments between the stream and the tensors."""
    run, rest = kernel.run, (kernel.packed_metadata, None, None, None)
    if _LAUNCHER_IS_KNOWN and getattr(run, "global_scratch_size", 1) == getattr(run, "profile_scratch_size", 1) == 0:
        return run.launch, kernel.function, run.launch_cooperative_grid, run.launch_pdl, None, None, *rest
    return run, kernel.function, *rest


def _bytes(tensor: Tensor | None) -> Tensor | None:
    return tensor.view(torch.uint8) if tensor is not None and tensor.dtype == torch.bool else tensor


def _rows(view: View, steps: int) -> _Layout:
    one, rows, span = view.rows == 1, 1, _TILE
    whole = max(8, triton.next_power_of_2(view.inner))
    if whole <= _TILE * steps and not one:
        rows, span, steps = _TILE * steps // whole, whole, 1
    chunks = triton.cdiv(view.inner, span * steps)
    flat = rows == 1 and view.rows > _MOST_ROWS
    if one:
        grid = (chunks, view.slices, 1)
    elif rows == 1:
        grid = (chunks * view.rows, 1, 1) if flat else (chunks, view.rows, 1)
    else:
        grid = (triton.cdiv(view.rows, rows), 1, 1)
    tile = {
        "ONE_ROW": one,
        "EVEN": view.inner % (span * steps) == 0 and view.rows % rows == 0,
        "GROUPED": one or view.inner % 8 == 0,
        "WIDE": view.count > _LONGEST_INT32,
        "FLAT": flat,
        "ROWS": rows,
        "SPAN": span,
        "STEPS": steps,
    }
    return grid, (view.rows, view.inner, view.channels, chunks), tile


def _columns(view: View, noise: bool, widest: int, depth: int, steps: int) -> _Layout:
    width = max(8, min(widest, triton.next_power_of_2(view.inner)))
    blocks, strips = _TILE // width, triton.cdiv(view.inner, width)
    grouped = tiles.SCATTERED.value
    if noise and view.logical and view.inner % 8 == 0:
        grouped = tiles.BY_ROW.value
    elif noise and not view.logical and view.plane % 8 == 0:
        grouped, depth = tiles.BY_PLANE.value, 8
    total = triton.cdiv(view.rows, depth * blocks)
    shares = triton.cdiv(total, steps)
    even = view.inner % width == 0 and view.rows % (depth * blocks * steps) == 0
    tile = {
        "MASKED": not even,
        "GROUPED": grouped,
        "WIDE": view.count > _LONGEST_INT32,
        "BLOCKS": blocks,
        "WIDTH": width,
        "DEPTH": depth,
        "STEPS": steps,
        "STAGES": _STAGES if steps > 1 else 1,
    }
    return (shares * strips, 1, 1), (view.rows, view.plane, view.inner, strips, shares), tile
