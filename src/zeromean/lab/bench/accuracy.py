"""How far a contender's results are from the formula in float64, over all elements, a chunk at a time.

A noisy activation's random slope k is read from its own output, as k = y / x. So the forward error covers the side
without noise, and the backward error shows whether the backward pass used the slopes of the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zeromean.lab.bench.contenders import Contender
from zeromean.lab.bench.inputs import Inputs
from zeromean.lab.bench.subjects import Subject, along_channels

# Our choice: a true value below this counts in the absolute error alone.
TINY = 1e-3
_CHUNK = 2**22


@dataclass(frozen=True)
class Error:
    """Of one pass; NaN where the result is NaN and the truth is not.

    Attributes:
        relative: The largest of |value - truth| / |truth| where |truth| > `TINY`.
        absolute: The largest of |value - truth|.
    """

    relative: float
    absolute: float


@dataclass(frozen=True)
class Errors:
    """Of a contender.

    Attributes:
        forward: Of the output.
        backward: Of the input's gradient.
        parameters: The largest error of a parameter's gradient, as a part of the largest of the true ones; None where
            no parameter learns.
    """

    forward: Error
    backward: Error
    parameters: float | None


def errors(contender: Contender, subject: Subject, inputs: Inputs) -> Errors:
    """Run both passes once and compare every element."""
    x, gradient = inputs.xs[0], inputs.gradients[0]
    y = contender.call(x.clone() if contender.inplace else x, *inputs.parameters)
    dx, *found = torch.autograd.grad(y, inputs.wanted, gradient, allow_unused=True)
    if (y.dtype, y.shape) != (x.dtype, x.shape):
        raise ValueError(f"returns {y.dtype} of shape {tuple(y.shape)} for {x.dtype} of shape {tuple(x.shape)}")
    wide = [parameter.detach().double().requires_grad_() for parameter in inputs.parameters]
    true = [torch.zeros_like(parameter) for parameter in wide]
    forward = backward = Error(0.0, 0.0)
    for part in _parts(x):
        truth, slope, slopes = _truth(subject, x[part], y[part], gradient[part], wide)
        forward, backward = _worse(forward, y[part], truth), _worse(backward, dx[part], slope)
        true = [total + (one if one is not None else 0) for total, one in zip(true, slopes, strict=True)]
    return Errors(forward, backward, _of_parameters(found, true) if true and not subject.frozen else None)


def _parts(x: Tensor) -> Iterator[slice]:
    rows = max(1, _CHUNK * x.shape[0] // x.numel())
    for start in range(0, x.shape[0], rows):
        yield slice(start, start + rows)


def _truth(
    subject: Subject, x: Tensor, y: Tensor, gradient: Tensor, parameters: list[Tensor]
) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
    wide = x.detach().double().requires_grad_()
    slopes = [(y.detach().double() / wide).detach()] if subject.draw else []
    truth = subject.formula(wide, *(along_channels(p, x) for p in parameters), *slopes)
    dx, *others = torch.autograd.grad(truth, (wide, *parameters), gradient.double(), allow_unused=True)
    return truth.detach(), dx, others


def _worse(so_far: Error, value: Tensor, truth: Tensor) -> Error:
    known = ~truth.isnan()
    absolute = torch.where(known, (value.detach().double() - truth).abs(), 0.0)
    relative = torch.where(truth.abs() > TINY, absolute / truth.abs(), 0.0)
    return Error(_larger(so_far.relative, relative), _larger(so_far.absolute, absolute))


def _larger(so_far: float, values: Tensor) -> float:
    """The largest, or NaN if there is one."""
    return torch.maximum(values.max(), values.new_tensor(so_far)).item()


def _of_parameters(found: Sequence[Tensor | None], true: Sequence[Tensor]) -> float:
    worst = [
        ((truth if value is None else value.double() - truth).abs().max() / truth.abs().max()).item()
        for value, truth in zip(found, true, strict=True)
    ]
    return max(worst)
