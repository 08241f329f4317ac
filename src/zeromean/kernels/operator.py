"""An activation as operators of torch: plain formulas everywhere, the fused programs on CUDA.

A compiler sees the operators whole (`registration`), so that what is kept between forward and backward is what they
say, and noise is made again from its seed and never drawn twice. An autograd function around them keeps one tensor. In
eager mode a call that is like an earlier one goes past all that, straight to the launches (`again`, `lane`).
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from zeromean.kernels.memory import dense, laid_out_as, pack, strided, unpack
from zeromean.kernels.modes import PLAIN, differentiates_forward, direct, plain_eager, traced, transformed
from zeromean.kernels.registration import register

# What an activation keeps for its backward pass: its output, its input, or its output and one bit an element that
# tells the side that the input was on.
Keep = Literal["output", "input", "signs"]

Value = Callable[..., Tensor]
Slope = Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
_Function = TypeVar("_Function", bound=Callable[..., Any])

# Largest tensor, in elements, that eager mode on a GPU leaves to torch's own operators: a launch from Python costs
# more than it saves there (docs/kernels.md has the measurement).
SMALL = 2**20
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_TRITON_IS_THERE = importlib.util.find_spec("triton") is not None
_TYPES = (torch.bfloat16, torch.float16, torch.float32)

# What an activation was asked for: its settings, the tensor, the parameters as they were given, seed and flag.
Asked = tuple[Any, ...]
Rest = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

_operators: dict[str, Operator] = {}
# What earlier calls came to, by operator, settings and kind of tensors.
_calls: dict[Any, Call | None] = {}
_MOST_CALLS = 4096


def fused(x: Tensor) -> bool:
    """Whether there are fused programs for a tensor of this kind: CUDA, or Triton's interpreter on any device."""
    on_nvidia = x.is_cuda and torch.version.hip is None
    return (on_nvidia or _INTERPRETED) and x.dtype in _TYPES and _TRITON_IS_THERE


def small(x: Tensor) -> bool:
    """Whether torch's own operators are faster on a GPU: eager mode, and few elements."""
    return x.is_cuda and x.numel() <= SMALL and not torch.compiler.is_compiling()


class Operator:
    """One activation: its plain formulas, its operators, its autograd function.

    Args:
        name: Of the operators, in the namespace ``zeromean``, and of the formula among the programs; without a formula
            of this name the plain ones run everywhere.
        value: Plain value(x, p0, p1, seed, noisy, *scalars).
        slope: Plain gradients slope(gradient, kept, positive, p0, p1, seed, noisy, *scalars, output_kept) of x, p0 and
            p1; positive tells the input's side, or is None if the kept tensor does. Both are made of differentiable
            operators, which a double backward pass runs.
        zero_positive: Whether an input of 0 (or NaN) belongs to the positive side.
        adds: Whether p0 is a tensor of x's shape that is added to the result; its gradient is the incoming one.
    """

    def __init__(
        self, name: str, value: Value, slope: Slope, *, zero_positive: bool = False, adds: bool = False
    ) -> None:
        self.name, self.value, self.slope, self.zero_positive, self.adds = name, value, slope, zero_positive, adds
        _operators[name] = self
        register(name, functools.partial(_run, self), functools.partial(_run_backward, self), _derive, learns=not adds)

    def __call__(
        self,
        x: Tensor,
        p0: Tensor | None = None,
        p1: Tensor | None = None,
        seed: Tensor | None = None,
        noisy: Tensor | None = None,
        *scalars: float,
        keep: Keep,
        record: bool,
        asked: Asked | None = None,
    ) -> Tensor:
        """The activation of x; ``record`` if a backward pass may follow, which then keeps what ``keep`` says.

        With ``asked``, the arguments of `again`, the next call of this kind need not come here.
        """
        if plain_eager() and fused(x):
            y = self._launched(asked or ((keep, scalars), x, p0, p1, seed, noisy), (p0, p1), keep, scalars)
            if y is not None:
                return y
        if not record or (differentiates_forward() and not torch.compiler.is_compiling()):
            return self.run(x, p0, p1, seed, noisy, scalars)
        if traced():
            results = _Activation.apply(self.name, keep, x, p0, p1, seed, noisy, *scalars)  # type: ignore[no-untyped-call]
            return results[0] if keep == "signs" else results  # type: ignore[no-any-return]
        return Call(self, keep, scalars).recorded(x, p0, p1, seed, noisy)

    def again(
        self,
        settings: Any,
        x: Tensor,
        p0: Tensor | None = None,
        p1: Tensor | None = None,
        seed: Tensor | None = None,
        noisy: Tensor | None = None,
    ) -> Tensor | None:
        """The activation, by what an earlier call of the same kind came to; None if there was none.

        ``settings`` is all that decides, together with the kind of tensors, what is kept and the scalars. The
        parameters may lie along x in any way that the earlier call took.
        """
        if not plain_eager() or not _calls:
            return None
        call = _calls.get((self.name, settings, _kind(x, p0, p1, seed, noisy)))
        return None if call is None else call(x, p0, p1, seed, noisy)

    def _launched(
        self, asked: Asked, aligned: tuple[Tensor | None, Tensor | None], keep: Keep, scalars: tuple[float, ...]
    ) -> Tensor | None:
        """As `again`, where this may be the first call of its kind; None if there is more to do than to launch."""
        settings, *tensors = asked
        tensors += [None] * (5 - len(tensors))
        key = (self.name, settings, _kind(*tensors))
        if key not in _calls:
            if len(_calls) >= _MOST_CALLS:
                _calls.clear()
            _calls[key] = None if key[2] is None else _call(self, tensors, aligned, keep, scalars)
        call = _calls[key]
        return None if call is None else call(*tensors)

    def run(
        self,
        x: Tensor,
        p0: Tensor | None,
        p1: Tensor | None,
        seed: Tensor | None,
        noisy: Tensor | None,
        scalars: Sequence[float],
    ) -> Tensor:
        """The value alone, by the fused program or by the plain formula."""
        if not fused(x) or transformed():
            return _own(self.value(x, p0, p1, seed, noisy, *scalars))
        if direct(x, p0, p1):
            return _run(self, False, x, p0, p1, seed, noisy, scalars)[0]
        return getattr(torch.ops.zeromean, self.name)(x, p0, p1, seed, noisy, scalars)  # type: ignore[no-any-return]

    def side(self, x: Tensor) -> Tensor:
        """Which elements are on the positive side."""
        return (x < 0).logical_not() if self.zero_positive else x > 0


def _run_signs(operator: Operator, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The value and the packed signs, by the fused program or by plain formulas."""
    p0, p1, seed, noisy, scalars = rest
    if not fused(x) or transformed():
        return _own(operator.value(x, p0, p1, seed, noisy, *scalars)), pack(operator.side(x))
    if direct(x, p0, p1):
        return _run(operator, True, x, *rest)  # type: ignore[return-value]
    return getattr(torch.ops.zeromean, f"{operator.name}_signs")(x, *rest)  # type: ignore[no-any-return]


@dataclass(eq=False)
class Call:
    """What is the same in all calls of one kind.

    Attributes:
        operator: The activation.
        keep: What it keeps.
        scalars: Its settings.
        lane: The launches, if that is all a call comes to.
        numbers: The scalars as the programs take them.
        shapes: Those of the parameters along x, where they were given in others.
        kind: Of the tensors that the lane's backward pass takes.
    """

    operator: Operator
    keep: Keep
    scalars: tuple[float, ...]
    lane: Any = None
    numbers: tuple[float, ...] = ()
    shapes: tuple[torch.Size | None, torch.Size | None] = (None, None)
    kind: Any = None

    def __call__(
        self, x: Tensor, p0: Tensor | None, p1: Tensor | None, seed: Tensor | None, noisy: Tensor | None
    ) -> Tensor:
        """The activation by the lane alone."""
        if torch.is_grad_enabled() and (
            x.requires_grad or (p0 is not None and p0.requires_grad) or (p1 is not None and p1.requires_grad)
        ):
            return self.recorded(x, p0, p1, seed, noisy)
        return self.lane.forward(self.numbers, x, p0, p1, seed, noisy)[0]  # type: ignore[no-any-return]

    def recorded(self, *tensors: Tensor | None) -> Tensor:
        """The activation as autograd records it."""
        return _EagerActivation.apply(self, *tensors)  # type: ignore[no-untyped-call, no-any-return]


def _call(
    operator: Operator,
    tensors: Sequence[Any],
    aligned: tuple[Tensor | None, Tensor | None],
    keep: Keep,
    scalars: tuple[float, ...],
) -> Call | None:
    """What a call comes to that only launches programs; None if there is more to do."""
    x, p0, p1, seed, noisy = tensors
    if dense(x) is not x:
        return None
    if operator.adds:
        as_they_are = laid_out_as(p0, x) is p0
    else:
        as_they_are = all(tensor is None or tensor.is_contiguous() for tensor in (p0, p1, seed))
    lane = _lane(operator, x, *aligned, seed, keep == "signs", keep != "input") if as_they_are else None
    if lane is None:
        return None
    shapes = tuple(None if p is None else p.shape for p in aligned)
    kept = x if keep == "input" else torch.empty_like(x)
    kind = _kind(kept, None if operator.adds else p0, p1, seed, noisy)
    return Call(operator, keep, scalars, lane, _numbers(operator, scalars), shapes, kind)  # type: ignore[arg-type]


def _kind(x: Tensor, p0: Tensor | None, p1: Tensor | None, seed: Tensor | None, noisy: Tensor | None) -> Any:
    """All of plain tensors that decides what is launched, None of others. Written out, as each pass asks for it."""
    if type(x) not in PLAIN:
        return None
    kind: Any = (x.shape, x.stride(), x.dtype, x.device)
    if p0 is not None:
        if type(p0) not in PLAIN:
            return None
        kind = (kind, p0.shape, p0.stride(), p0.dtype, p0.device)
    if p1 is not None:
        if type(p1) not in PLAIN:
            return None
        kind = (kind, p1.shape, p1.stride(), p1.dtype, p1.device)
    if seed is not None:
        kind = (kind, type(seed), seed.shape, seed.stride(), seed.dtype, seed.device)
    if noisy is not None:
        kind = (kind, type(noisy), noisy.dtype, noisy.device)
    return kind


class _EagerActivation(torch.autograd.Function):
    """As `_Activation`, in the form that costs less in eager mode and that `torch.func` cannot transform."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        x: Tensor,
        p0: Tensor | None,
        p1: Tensor | None,
        seed: Tensor | None,
        noisy: Tensor | None,
    ) -> Tensor:
        operator, signs = call.operator, None
        if call.lane is not None:
            y, signs = call.lane.forward(call.numbers, x, p0, p1, seed, noisy)
        elif call.keep == "signs":
            y, signs = _run_signs(operator, x, p0, p1, seed, noisy, call.scalars)
        else:
            y = operator.run(x, p0, p1, seed, noisy, call.scalars)
        ctx.call, ctx.strides = call, y.stride()
        ctx.save_for_backward(x if call.keep == "input" else y, signs, None if operator.adds else p0, p1, seed, noisy)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        kept, signs, *rest = ctx.saved_tensors
        signs = _contiguous(signs)
        learn = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        if call.lane is not None and _only_launches(call, gradient, kept, rest):
            laid_out = gradient if gradient.stride() == ctx.strides else laid_out_as(gradient, kept)
            dx, d0, d1 = call.lane.backward(call.numbers, laid_out, kept, signs, *rest, learn)
            return None, dx, gradient if learn and call.operator.adds else d0, d1, None, None
        if signs is not None:
            kept = strided(kept, ctx.strides)
        p0, p1 = (_shaped(p, shape) for p, shape in zip(rest[:2], call.shapes, strict=True))
        arguments = (gradient, kept, signs, (p0, p1, *rest[2:]), call.scalars, call.keep != "input", learn)
        dx, d0, d1 = _derive(call.operator.name, *arguments)
        return None, dx, _shaped(d0, rest[0]), _shaped(d1, rest[1]), None, None


def _shaped(tensor: Tensor | None, like: Tensor | torch.Size | None) -> Tensor | None:
    if tensor is None or like is None:
        return tensor
    return tensor.reshape(like.shape if isinstance(like, Tensor) else like)


def _only_launches(call: Call, gradient: Tensor, kept: Tensor, rest: Sequence[Tensor | None]) -> bool:
    """Whether a backward pass is no other than its lane's: hooks on saved tensors may return what they like."""
    if torch.is_grad_enabled() or not plain_eager() or type(gradient) is not Tensor:
        return False
    return gradient.dtype == kept.dtype and _kind(kept, *rest) == call.kind


def _own(y: Tensor) -> Tensor:
    """The result as a tensor that no other step of a compiled function stands for; Inductor makes no copy of it.

    Inside `torch.compile`, torch 2.11 gives a gradient of zero to an autograd function's result that an earlier step
    made already, as before a cast to the type at hand.
    """
    return y.clone() if torch.compiler.is_compiling() else y


class _Activation(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        name: str,
        keep: Keep,
        x: Tensor,
        p0: Tensor | None,
        p1: Tensor | None,
        seed: Tensor | None,
        noisy: Tensor | None,
        *scalars: float,
    ) -> Any:
        operator = _operators[name]
        if keep == "signs":
            return _run_signs(operator, x, p0, p1, seed, noisy, scalars)
        return operator.run(x, p0, p1, seed, noisy, scalars)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name, ctx.keep, x, p0, p1, seed, noisy, *ctx.scalars = inputs
        y, signs = output if ctx.keep == "signs" else (output, None)
        if signs is not None:
            ctx.mark_non_differentiable(signs)
        kept = x if ctx.keep == "input" else y
        if _operators[ctx.name].adds:
            p0 = None
        ctx.save_for_backward(kept, signs, p0, p1, None if seed is None else ~seed, noisy)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        kept, signs, p0, p1, sealed, noisy = ctx.saved_tensors
        seed = None if sealed is None else ~sealed
        rest = (p0, p1, seed, noisy)
        wanted = ctx.needs_input_grad[3:5]
        grads = _derive(ctx.name, gradient, kept, signs, rest, ctx.scalars, ctx.keep != "input", any(wanted))
        return None, None, *grads, None, None, *(None,) * len(ctx.scalars)


def _derive(
    name: str,
    gradient: Tensor,
    kept: Tensor,
    signs: Tensor | None,
    rest: Rest,
    scalars: Sequence[float],
    output_kept: bool,
    learn: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, p0 and p1; by plain operators if they are to be differentiated again."""
    again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if again or not fused(kept) or transformed():
        return _plain_slope(_operators[name], gradient, kept, signs, rest, scalars, output_kept)
    if direct(kept, gradient, *rest[:2]):
        adds = _operators[name].adds
        dx, d0, d1 = _run_backward(
            _operators[name], gradient, kept, signs, rest, scalars, output_kept, learn and not adds
        )
        return dx, gradient if adds and learn else d0, d1
    arguments = (gradient, kept, signs, *rest, scalars, output_kept)
    if not learn or _operators[name].adds:
        dx = getattr(torch.ops.zeromean, f"{name}_backward")(*arguments)
        return dx, gradient if learn else None, None
    dx, d0, d1 = getattr(torch.ops.zeromean, f"{name}_backward_parameters")(*arguments)
    return dx, d0, None if rest[1] is None else d1


def _plain_slope(
    operator: Operator,
    gradient: Tensor,
    kept: Tensor,
    signs: Tensor | None,
    rest: Rest,
    scalars: Sequence[float],
    output_kept: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    positive = None if signs is None else unpack(signs, kept)
    return operator.slope(gradient, kept, positive, *rest, *scalars, output_kept)


def _run(
    operator: Operator, signs: bool, x: Tensor, p0: Any, p1: Any, seed: Any, noisy: Any, scalars: Sequence[float]
) -> tuple[Tensor, Tensor | None]:
    """An operator's forward pass on real tensors."""
    x = dense(x)
    p0, p1, seed = laid_out_as(p0, x) if operator.adds else _contiguous(p0), _contiguous(p1), _contiguous(seed)
    lane = _lane(operator, x, p0, p1, seed, signs, signs)
    if lane is not None:
        return lane.forward(_numbers(operator, scalars), x, p0, p1, seed, noisy)  # type: ignore[no-any-return]
    y = laid_out_as(operator.value(x, p0, p1, seed, noisy, *scalars), x)
    return y, pack(operator.side(x)) if signs else None


def _lane(
    operator: Operator,
    x: Tensor,
    p0: Tensor | None,
    p1: Tensor | None,
    seed: Tensor | None,
    signs: bool,
    output_kept: bool,
) -> Any:
    """The launches on tensors like these, or None where an activation, a device or an empty tensor has none."""
    if not (fused(x) and x.numel() and _recent(x.device)):
        return None
    module = _lane_module()
    if operator.name not in module.FORMULAS:
        return None
    parameters = [p for p in (p0, p1) if p is not None]
    return module.lane_of(operator.name, x, parameters, seed, signs, output_kept)


def _numbers(operator: Operator, scalars: Sequence[float]) -> Any:
    return _lane_module().launch.numbers_of(operator.name, tuple(scalars))


@functools.cache
def _lane_module() -> Any:
    """Imported when first needed, as it needs Triton."""
    from zeromean.kernels import lane

    return lane


@functools.cache
def _recent(device: torch.device) -> bool:
    """Whether a GPU has the instructions that the programs are made of: Ampere (2020) was the first."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _run_backward(
    operator: Operator,
    gradient: Tensor,
    kept: Tensor,
    signs: Tensor | None,
    rest: Rest,
    scalars: Sequence[float],
    output_kept: bool,
    learn: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """An operator's backward pass on real tensors."""
    kept = dense(kept)
    gradient = laid_out_as(gradient, kept)
    p0, p1, seed, noisy = rest
    p0, p1, seed = _contiguous(p0), _contiguous(p1), _contiguous(seed)
    lane = _lane(operator, kept, p0, p1, seed, signs is not None, output_kept)
    if lane is not None:
        return lane.backward(  # type: ignore[no-any-return]
            _numbers(operator, scalars), gradient, kept, signs, p0, p1, seed, noisy, learn
        )
    dx, d0, d1 = _plain_slope(operator, gradient, kept, signs, rest, scalars, output_kept)
    return laid_out_as(dx, kept), d0, d1
