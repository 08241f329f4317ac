r"""Measure the natural-gradient quantities of a model's layers on a batch: which Fisher, on which rows, at what price.

The net is measured in evaluation mode, where inputs do not act on each other, on the inputs given. For a linear layer
that is called once an input, the blocks are the diagonal blocks of the net's own Fisher matrix. For a convolution, and
for a linear layer that is called at many places of an input, ln p depends on the weights through all places, and

    Fisher of the net     E( (\sum_s delta_s a_s) (\sum_s delta_s a_s)^T )
    measured here         E( \sum_s delta_s^2 a_s a_s^T )                      (patches as samples)

The second leaves out the products of different places, which is the Fisher where the deltas of different places are
uncorrelated given the inputs. It has the form that the theorems need; c, g and g_0 are summed over the places likewise,
so that g / c does not depend on their number.

Price, in gradients of the whole net on the batch: 1/3 forward, and 2/3 at most for each pass backward (no weight
gradients are made): one pass for the plain gradient, and one ("sampled", "empirical") or C ("exact", C classes) for the
Fisher. The solves are priced in `solve`, on at most `max_samples` rows.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zeromean.diagnostics.collect import (
    Fisher,
    LayerRows,
    Output,
    check_options,
    deltas,
    observe,
    squared_deltas,
    target_score,
)
from zeromean.diagnostics.solve import Method, price
from zeromean.diagnostics.units import UnitQuantities, unit_quantities

OnLayer = Callable[[str, float], None]
WEIGHTED_MEAN_LIMIT = 2**24
"""Numbers of E_q(a) above which `measure` leaves it out of a layer's result."""


def measure(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Any,
    *,
    targets: Tensor | None = None,
    fisher: Fisher = "exact",
    output: Output = "softmax",
    damping: float = 1e-3,
    max_samples: int | None = 4096,
    method: Method | Literal["auto"] = "auto",
    dtype: torch.dtype = torch.float64,
    generator: torch.Generator | None = None,
) -> dict[str, UnitQuantities]:
    """Measure layers on a batch, in evaluation mode, and leave the model as it was: see `untouched`.

    Args:
        model: the model.
        layers: its Linear, Conv1d, Conv2d and Conv3d layers to measure, by name; each called once in a forward pass.
        inputs: a tensor, a tuple of arguments or a mapping of keyword arguments, of N inputs.
        targets: classes [N, ...] (gaussian: values shaped as the output), for the quantities of the plain gradient,
            which is that of -ln p(targets | inputs), averaged over inputs and summed over an input's outputs. Without
            targets these are None.
        fisher: "exact", "sampled" or "empirical": see `collect`.
        output: what the model's outputs are: "softmax", logits [N, ..., C]; "gaussian", means with variance 1.
        damping: added to the variance of every input, as a fraction of the layer's mean square input. With 0, Var_q(a)
            is often singular: a constant input or fewer rows than inputs suffice.
        max_samples: rows of a layer to use, drawn at random from inputs x places; None for all. The layer's gradient
            is that of these rows too. It bounds memory at max_samples x inputs of a unit, for each layer. k wants 16
            rows for each input of a unit, or more: from fewer rows than inputs it says little but the damping.
        method: of the solves: see `solve`.
        dtype: of the solves.
        generator: draws rows and sampled labels; by default a new one with seed 0.

    Returns:
        The quantities of each layer, by name; `samples` is the number of rows used.

    Raises:
        ValueError: If a layer cannot be measured (it is named), a number is not finite, or an argument is unknown.
    """
    measured, wrong = attempt(
        model,
        layers,
        inputs,
        targets=targets,
        fisher=fisher,
        output=output,
        damping=damping,
        max_samples=max_samples,
        method=method,
        dtype=dtype,
        generator=generator,
    )
    for name, reason in wrong.items():
        raise ValueError(f"layer {name!r}: {reason}")
    return measured


def attempt(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Any,
    *,
    targets: Tensor | None,
    fisher: Fisher,
    output: Output,
    damping: float,
    max_samples: int | None,
    method: Method | Literal["auto"] = "auto",
    dtype: torch.dtype = torch.float64,
    generator: torch.Generator | None = None,
    on_layer: OnLayer | None = None,
) -> tuple[dict[str, UnitQuantities], dict[str, str]]:
    """As `measure`, but layers that cannot be measured are returned with the reason, and are no error.

    ``on_layer`` is told each layer before its solves, and the share of all solves' work that is done.
    """
    check_options(fisher, output, targets)
    if damping < 0:
        raise ValueError(f"damping must be 0 or more, got {damping}: it is a fraction of the mean square input")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    with untouched(model):
        model.eval()
        outputs, records, wrong = observe(
            model, layers, inputs, dtype=dtype, max_samples=max_samples, generator=generator
        )
        if not records:
            return {}, wrong
        squares = squared_deltas(outputs, records, fisher=fisher, output=output, targets=targets, generator=generator)
        losses = {} if targets is None else deltas(outputs, records, -target_score(outputs.detach(), targets, output))
    work = {name: _work(record, squares[name], damping) for name, record in records.items()}
    measured, done, whole = {}, 0.0, sum(work.values())
    for name, record in records.items():
        if on_layer is not None:
            on_layer(name, done / whole)
        done += work[name]
        try:
            measured[name] = _quantities(
                record, squares.pop(name), losses.pop(name, None), len(outputs), damping, method
            )
        except ValueError as error:
            wrong[name] = str(error)
    return measured, wrong


def _work(record: LayerRows, squares: Tensor, damping: float) -> float:
    """Of the layer's solves, in multiplications."""
    groups, rows, fan_in = record.inputs.shape
    units = squares.shape[-1]
    return groups * units * price(rows, fan_in, units, damping)


def _quantities(
    record: LayerRows, squares: Tensor, loss_deltas: Tensor | None, count: int, damping: float, method: Any
) -> UnitQuantities:
    inputs, places = record.inputs, record.available / count
    for what, values in (("inputs", inputs), ("squared deltas", squares)):
        if not values.isfinite().all():
            raise ValueError(f"its {what} must be finite, got nan or infinity: measure before training diverges")
    gradient = bias_gradient = None
    if loss_deltas is not None:
        scale = places / inputs.shape[-2]
        gradient, bias_gradient = scale * loss_deltas.mT @ inputs, scale * loss_deltas.sum(-2)
    absolute = damping * (float(inputs.square().mean()) or 1.0)
    numbers = squares.shape[0] * squares.shape[-1] * inputs.shape[-1]
    quantities = unit_quantities(
        inputs,
        squares,
        gradient,
        bias_gradient,
        damping=absolute,
        places=places,
        method=method,
        keep_weighted_mean=numbers <= WEIGHTED_MEAN_LIMIT,
    )
    flat: dict[str, Any] = {
        field.name: value.flatten(0, 1)
        for field in fields(quantities)
        if isinstance(value := getattr(quantities, field.name), Tensor)
    }
    return replace(quantities, **flat)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore what running a model may change: modes, buffers, and torch's random numbers on the model's devices.

    A buffer is written only if its values differ. What modules keep in plain Python attributes is not seen.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for module, name, buffer, before in buffers:
                if not torch.equal(buffer, before):
                    with torch.no_grad():
                        buffer.copy_(before)
                module._buffers[name] = buffer
