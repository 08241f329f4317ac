"""An activation as operators of torch: plain formulas everywhere, the fused programs on CUDA.

For each activation there are four operators in the namespace ``zeromean``: NAME, NAME_signs, NAME_backward and
NAME_backward_parameters (not where the one parameter is a residual, whose gradient is the incoming one). A compiler
sees them whole, so that what is kept between forward and backward is what they say, and noise is made again from its
seed and never drawn twice. An autograd function around them keeps one tensor.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from zeromean.kernels.lowering import teach_inductor
from zeromean.kernels.memory import dense, laid_out_as, pack, strided, unpack

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
_PLAIN = (Tensor, torch.nn.Parameter, type(None))
_TYPES = (torch.bfloat16, torch.float16, torch.float32)
_REST = "Tensor? p0, Tensor? p1, Tensor? seed, Tensor? noisy, float[] scalars"
_GRADIENT = f"Tensor gradient, Tensor kept, Tensor? signs, {_REST}, bool output_kept"

_library = torch.library.Library("zeromean", "FRAGMENT")
_operators: dict[str, Operator] = {}


# Private to torch; if they should go, every call takes the slower way.
_transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_modes_active: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


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
        _register(self)

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
    ) -> Tensor:
        """The activation of x; ``record`` if a backward pass may follow, which then keeps what ``keep`` says."""
        if not record or (_differentiates_forward() and not torch.compiler.is_compiling()):
            return self.run(x, p0, p1, seed, noisy, scalars)
        if _traced():
            results = _Activation.apply(self.name, keep, x, p0, p1, seed, noisy, *scalars)  # type: ignore[no-untyped-call]
            return results[0] if keep == "signs" else results  # type: ignore[no-any-return]
        y: Tensor = _EagerActivation.apply(self, keep, x, p0, p1, seed, noisy, *scalars)  # type: ignore[no-untyped-call]
        return y

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
        if not fused(x) or _transformed():
            return _own(self.value(x, p0, p1, seed, noisy, *scalars))
        if _direct(x, p0, p1):
            return _run(self, False, x, p0, p1, seed, noisy, scalars)[0]
        return getattr(torch.ops.zeromean, self.name)(x, p0, p1, seed, noisy, scalars)  # type: ignore[no-any-return]

    def side(self, x: Tensor) -> Tensor:
        """Which elements are on the positive side."""
        return (x < 0).logical_not() if self.zero_positive else x > 0


def _traced() -> bool:
    """Whether a compiler or a transform of `torch.func` follows the call."""
    return torch.compiler.is_compiling() or _transforms_active()


def _differentiates_forward() -> bool:
    """Whether forward-mode differentiation does, which goes through no autograd function of ours."""
    return forward_ad._current_level >= 0


def _transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation does, which take the plain formulas."""
    return not torch.compiler.is_compiling() and (_transforms_active() or _differentiates_forward())


def _direct(*tensors: Tensor | None) -> bool:
    """Whether a call may go past torch's dispatcher, which takes longer than a small kernel: plain eager tensors."""
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return False
    return not _traced() and _modes_active() == 0


def _run_signs(operator: Operator, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The value and the packed signs, by the fused program or by plain formulas."""
    p0, p1, seed, noisy, scalars = rest
    if not fused(x) or _transformed():
        return _own(operator.value(x, p0, p1, seed, noisy, *scalars)), pack(operator.side(x))
    if _direct(x, p0, p1):
        return _run(operator, True, x, *rest)  # type: ignore[return-value]
    return getattr(torch.ops.zeromean, f"{operator.name}_signs")(x, *rest)  # type: ignore[no-any-return]


class _EagerActivation(torch.autograd.Function):
    """As `_Activation`, in the form that costs less in eager mode and that `torch.func` cannot transform."""

    @staticmethod
    def forward(
        ctx: Any,
        operator: Operator,
        keep: Keep,
        x: Tensor,
        p0: Tensor | None,
        p1: Tensor | None,
        seed: Tensor | None,
        noisy: Tensor | None,
        *scalars: float,
    ) -> Tensor:
        signs = None
        if fused(x) and _direct(x, p0, p1):
            y, signs = _run(operator, keep == "signs", x, p0, p1, seed, noisy, scalars)
        elif keep == "signs":
            y, signs = _run_signs(operator, x, p0, p1, seed, noisy, scalars)
        else:
            y = operator.run(x, p0, p1, seed, noisy, scalars)
        ctx.name, ctx.keep, ctx.scalars, ctx.strides = operator.name, keep, scalars, y.stride()
        p0 = None if operator.adds else p0
        ctx.save_for_backward(x if keep == "input" else y, signs, p0, p1, seed, noisy)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept, signs, *rest = ctx.saved_tensors
        if signs is not None:
            kept = strided(kept, ctx.strides)
        wanted = any(ctx.needs_input_grad[3:5])
        grads = _derive(ctx.name, gradient, kept, signs, tuple(rest), ctx.scalars, ctx.keep != "input", wanted)
        return None, None, *grads, None, None, *(None,) * len(ctx.scalars)


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


Rest = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


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
    if again or not fused(kept) or _transformed():
        return _plain_slope(_operators[name], gradient, kept, signs, rest, scalars, output_kept)
    if _direct(kept, gradient, *rest[:2]):
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
    launch = _programs(operator, x)
    if launch is not None:
        parameters = [laid_out_as(p0, x)] if operator.adds else _contiguous(p0, p1)
        view = launch.view_of(x, () if operator.adds else parameters, seed)
        if view is not None and (not signs or view.packs()):
            return launch.forward(operator.name, view, x, parameters, seed, noisy, scalars, signs)  # type: ignore[no-any-return]
    y = laid_out_as(operator.value(x, p0, p1, seed, noisy, *scalars), x)
    return y, pack(operator.side(x)) if signs else None


def _programs(operator: Operator, x: Tensor) -> Any:
    """The module that launches the programs, or None where an activation, a device or an empty tensor has none."""
    if not (fused(x) and x.numel() and _recent(x.device)):
        return None
    launch = _launch_module()
    return launch if operator.name in launch.FORMULAS else None


@functools.cache
def _launch_module() -> Any:
    """Imported when first needed, as it needs Triton."""
    from zeromean.kernels import launch

    return launch


@functools.cache
def _recent(device: torch.device) -> bool:
    """Whether a GPU has the instructions that the programs are made of: Ampere (2020) was the first."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _contiguous(*parameters: Tensor | None) -> list[Tensor]:
    """Those that are there, as the programs read them."""
    return [p.contiguous() for p in parameters if p is not None]


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
    launch = _programs(operator, kept)
    if launch is not None:
        p0, p1, seed, noisy = rest
        parameters = _contiguous(p0, p1)
        view = launch.view_of(kept, parameters, seed)
        if view is not None and (signs is None or view.packs()):
            return launch.backward(  # type: ignore[no-any-return]
                operator.name, view, gradient, kept, signs, parameters, seed, noisy, scalars, output_kept, learn
            )
    dx, d0, d1 = _plain_slope(operator, gradient, kept, signs, rest, scalars, output_kept)
    return laid_out_as(dx, kept), d0, d1


def _register(operator: Operator) -> None:
    """Define the operators of an activation, with all that torch wants to know of them."""
    name = operator.name

    _define(name, f"(Tensor x, {_REST}) -> Tensor", lambda *a: _run(operator, False, *a)[0], _fake_value)
    _define(
        f"{name}_signs", f"(Tensor x, {_REST}) -> (Tensor, Tensor)", lambda *a: _run(operator, True, *a), _fake_signs
    )
    _define(f"{name}_backward", f"({_GRADIENT}) -> Tensor", lambda *a: _backward(operator, a, False)[0], _fake_slope)
    if not operator.adds:
        _define(
            f"{name}_backward_parameters",
            f"({_GRADIENT}) -> (Tensor, Tensor, Tensor)",
            lambda *a: _backward(operator, a, True),
            _fake_slopes,
        )
    torch.library.register_autograd(f"zeromean::{name}", _autograd(name), setup_context=_keep_input, lib=_library)


def _backward(operator: Operator, a: Sequence[Any], learn: bool) -> tuple[Tensor, Tensor, Tensor]:
    gradient, kept, signs, p0, p1, seed, noisy, scalars, output_kept = a
    dx, d0, d1 = _run_backward(operator, gradient, kept, signs, (p0, p1, seed, noisy), scalars, output_kept, learn)
    return dx, dx.new_empty(0) if d0 is None else d0, dx.new_empty(0) if d1 is None else d1


def _define(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.define(name + schema)
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"zeromean::{name}", fake, lib=_library)
    torch.library.register_vmap(f"zeromean::{name}", _vmap(name), lib=_library)


def _vmap(name: str) -> Callable[..., Any]:
    """The rule of an operator: slice by slice. A rule cannot call `torch.vmap` on a plain formula."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        def part(index: int) -> list[Any]:
            pairs = zip(arguments, in_dims, strict=True)
            return [a.select(dim, index) if isinstance(a, Tensor) and dim is not None else a for a, dim in pairs]

        results = [getattr(torch.ops.zeromean, name)(*part(index)) for index in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(same) for same in zip(*results, strict=True)), (0,) * len(results[0])

    return rule


def _fake_value(x: Tensor, *_: Any) -> Tensor:
    teach_inductor()
    return torch.empty_like(x)


def _fake_signs(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


def _fake_slope(gradient: Tensor, kept: Tensor, *_: Any) -> Tensor:
    teach_inductor()
    return torch.empty_like(kept)


def _fake_slopes(gradient: Tensor, kept: Tensor, signs: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    d0, d1 = (gradient.new_empty(0) if p is None else p.new_empty(p.shape) for p in rest[:2])
    return torch.empty_like(kept), d0, d1


def _keep_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, p0, p1, seed, noisy, ctx.scalars = inputs
    ctx.save_for_backward(x, p0, p1, None if seed is None else ~seed, noisy)


def _autograd(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, p0, p1, sealed, noisy = ctx.saved_tensors
        rest = (p0, p1, None if sealed is None else ~sealed, noisy)
        grads = _derive(name, gradient, x, None, rest, ctx.scalars, False, any(ctx.needs_input_grad[1:3]))
        return (*grads, None, None, None)

    return backward
