"""The operators of an activation, with all that torch wants to know of them: shapes, gradients, batches.

For each activation there are four in the namespace ``zeromean``: NAME, NAME_signs, NAME_backward and
NAME_backward_parameters (not where the one parameter is a residual, whose gradient is the incoming one).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zeromean.kernels.lowering import teach_inductor

_REST = "Tensor? p0, Tensor? p1, Tensor? seed, Tensor? noisy, float[] scalars"
_GRADIENT = f"Tensor gradient, Tensor kept, Tensor? signs, {_REST}, bool output_kept"
_library = torch.library.Library("zeromean", "FRAGMENT")

_Run = Callable[..., tuple[Tensor, Tensor | None]]
_Slopes = Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]


def register(name: str, run: _Run, run_backward: _Slopes, derive: _Slopes, *, learns: bool) -> None:
    """Define the operators of an activation.

    Args:
        name: Of the operators.
        run: run(signs, x, p0, p1, seed, noisy, scalars), the value and packed signs of real tensors.
        run_backward: run_backward(gradient, kept, signs, (p0, p1, seed, noisy), scalars, output_kept, learn), the
            gradients of x, p0 and p1 of real tensors.
        derive: derive(name, ...), the same of tensors of any kind.
        learns: Whether gradients of parameters are to be computed.
    """

    def backward(learn: bool) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        def gradients(gradient: Tensor, kept: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
            signs, *tensors, scalars, output_kept = rest
            dx, d0, d1 = run_backward(gradient, kept, signs, tensors, scalars, output_kept, learn)
            return dx, dx.new_empty(0) if d0 is None else d0, dx.new_empty(0) if d1 is None else d1

        return gradients

    _define(name, f"(Tensor x, {_REST}) -> Tensor", lambda *a: run(False, *a)[0], _fake_value)
    _define(f"{name}_signs", f"(Tensor x, {_REST}) -> (Tensor, Tensor)", lambda *a: run(True, *a), _fake_signs)
    _define(f"{name}_backward", f"({_GRADIENT}) -> Tensor", lambda *a: backward(False)(*a)[0], _fake_slope)
    if learns:
        schema = f"({_GRADIENT}) -> (Tensor, Tensor, Tensor)"
        _define(f"{name}_backward_parameters", schema, backward(True), _fake_slopes)
    gradient = _autograd(name, derive)
    torch.library.register_autograd(f"zeromean::{name}", gradient, setup_context=_keep_input, lib=_library)


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


def _autograd(name: str, derive: _Slopes) -> Callable[..., Any]:
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, p0, p1, sealed, noisy = ctx.saved_tensors
        rest = (p0, p1, None if sealed is None else ~sealed, noisy)
        grads = derive(name, gradient, x, None, rest, ctx.scalars, False, any(ctx.needs_input_grad[1:3]))
        return (*grads, None, None, None)

    return backward
