r"""Collect the inputs and deltas of a model's layers, by hooks that are gone before the backward pass.

delta = d ln p(y | x) / d net is a gradient of the output f, pulled back by the net's own backward pass:

    softmax     ln p(y | x) = ln softmax(f)_y        d ln p / d f = e_y - softmax(f)
    gaussian    ln p(y | x) = -|y - f|^2 / 2 + ...   d ln p / d f = y - f          (variance 1 of each output)

Every Fisher here averages delta^2 over the given inputs x, and over labels y in one of three ways:

    exact       the expectation over the model's own p(y | x): softmax a pass backward for each class, with
                sqrt(p_y) (e_y - p); gaussian a pass for each output, with its unit vector
    sampled     one label y ~ p(y | x) for each input: unbiased, one pass
    empirical   the labels of the data: not the Fisher, as they are not the model's; often far from it. One pass

A row's delta is that of its own input only where inputs do not act on each other: not with batch statistics.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from zeromean.diagnostics.patches import Layer, check_layer, input_rows, output_rows, row_count

Fisher = Literal["sampled", "exact", "empirical"]
Output = Literal["softmax", "gaussian"]


@dataclass(frozen=True)
class LayerRows:
    """What one layer saw in one forward pass.

    Attributes:
        layer: the layer.
        inputs: [groups, rows, inputs of a unit].
        offset: zeros that were added to the net inputs: their gradient is the deltas, whatever follows in place.
        index: the chosen rows [rows], all of them if None.
        available: rows that the layer's output holds.
    """

    layer: Layer
    inputs: Tensor
    offset: Tensor
    index: Tensor | None
    available: int

    def rows(self, gradient: Tensor | None) -> Tensor:
        """The chosen rows [groups, rows, units of a group] of a gradient of `offset`; None stands for zeros."""
        full = torch.zeros_like(self.offset) if gradient is None else gradient
        return output_rows(self.layer, full, self.index).to(self.inputs.dtype)


def forward(model: nn.Module, inputs: Any) -> Tensor:
    """The model's outputs [N, ...]: a tuple is spread over its arguments, a mapping over its keyword arguments.

    Raises:
        ValueError: If the model returns neither a tensor nor an object with a tensor `logits`.
    """
    match inputs:
        case tuple():
            output = model(*inputs)
        case Mapping():
            output = model(**inputs)
        case _:
            output = model(inputs)
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise ValueError(
            f"the model must return a tensor, or an object with .logits, got {type(output).__name__}: wrap it in a "
            "module that returns the logits"
        )
    return output


def collect(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Any,
    *,
    dtype: torch.dtype = torch.float64,
    max_samples: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, LayerRows]]:
    """Run the model forward once and return its outputs, with their graph, and what its layers saw.

    Args:
        model: run in the mode it is in.
        layers: the layers by name; each must be called once.
        inputs: see `forward`.
        dtype: of the rows.
        max_samples: rows of a layer to keep, drawn at random; all if None.
        generator: draws them.

    Raises:
        ValueError: If a layer is of the wrong kind, is not called or is called more than once, or no layer is given.
    """
    outputs, records, wrong = observe(model, layers, inputs, dtype=dtype, max_samples=max_samples, generator=generator)
    for name, reason in wrong.items():
        raise ValueError(f"layer {name!r}: {reason}")
    return outputs, records


def observe(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Any,
    *,
    dtype: torch.dtype,
    max_samples: int | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, dict[str, LayerRows], dict[str, str]]:
    """As `collect`, but layers that were not called exactly once are returned with the reason, and are no error."""
    if not layers:
        raise ValueError(
            "layers must hold at least one layer, got none: name Linear or convolution layers of the model"
        )
    records: dict[str, list[LayerRows]] = {name: [] for name in layers}

    def record(name: str, layer: Layer, seen: Tensor, output: Tensor) -> Tensor:
        offset = torch.zeros_like(output, requires_grad=True)
        available = row_count(layer, output)
        index = None
        if max_samples is not None and max_samples < available:
            device = generator.device if generator is not None else seen.device
            index = torch.randperm(available, generator=generator, device=device)[:max_samples].to(seen.device)
        rows = input_rows(layer, seen.detach(), index).to(dtype)
        records[name].append(LayerRows(layer, rows, offset, index, available))
        return output + offset

    with torch.inference_mode(False), torch.enable_grad(), _hooked(layers, record):
        outputs = forward(model, inputs)
    wrong = {
        name: f"it must be called once in a forward pass, got {len(seen)} calls: leave out layers that "
        "are unused, shared between places, or used through their weight alone"
        for name, seen in records.items()
        if len(seen) != 1
    }
    return outputs, {name: seen[0] for name, seen in records.items() if len(seen) == 1}, wrong


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], record: Any) -> Iterator[None]:
    handles = []
    try:
        for name, layer in layers.items():
            check_layer(name, layer)

            def hook(module: Any, args: Any, kwargs: Any, output: Tensor, name: str = name) -> Tensor:
                recorded: Tensor = record(name, module, args[0] if args else kwargs["input"], output)
                return recorded

            handles.append(layer.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_options(fisher: str, output: str, targets: Tensor | None) -> None:
    """Refuse what is no Fisher and no output distribution.

    Raises:
        ValueError: If a name is unknown, or the empirical Fisher has no targets.
    """
    for name, value, known in (("fisher", fisher, get_args(Fisher)), ("output", output, get_args(Output))):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if fisher == "empirical" and targets is None:
        raise ValueError("fisher 'empirical' needs targets, got None: pass the data's labels, or choose 'exact'")


def squared_deltas(
    outputs: Tensor,
    records: Mapping[str, LayerRows],
    *,
    fisher: Fisher,
    output: Output,
    targets: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """E(delta^2 | input) of each layer's rows [groups, rows, units of a group]: see the file's first lines.

    Args:
        outputs: f [N, C], from `collect`. Softmax: [N, ..., C], the joint distribution of independent places, except
            for the exact Fisher. Gaussian: any shape.
        records: from `collect`.
        fisher: "exact", "sampled" or "empirical".
        output: "softmax" or "gaussian".
        targets: of the empirical Fisher: see `target_score`.
        generator: draws the labels.

    Raises:
        ValueError: If the exact Fisher is asked of softmax outputs with places.
    """
    totals: dict[str, Tensor] = {}
    for score in _scores(outputs.detach(), fisher, output, targets, generator):
        for name, delta in deltas(outputs, records, score).items():
            square = delta.square()
            totals[name] = totals[name].add_(square) if name in totals else square
    return totals


def deltas(outputs: Tensor, records: Mapping[str, LayerRows], score: Tensor) -> dict[str, Tensor]:
    """Deltas of each layer's rows [groups, rows, units of a group] for one gradient d ln p / d f; keeps the graph."""
    offsets = [record.offset for record in records.values()]
    gradients = torch.autograd.grad(outputs, offsets, score.to(outputs), retain_graph=True, allow_unused=True)
    return {name: record.rows(g) for (name, record), g in zip(records.items(), gradients, strict=True)}


def _scores(
    f: Tensor, fisher: Fisher, output: Output, targets: Tensor | None, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Gradients d ln p / d f whose squares, pulled back, add up to E(delta^2 | input)."""
    match fisher, output:
        case "exact", "softmax":
            if f.dim() != 2:
                raise ValueError(
                    f"fisher 'exact' needs outputs [inputs, classes], got {tuple(f.shape)}: choose 'sampled', which "
                    "draws the labels of all places at once"
                )
            p = f.softmax(-1)
            for label in range(f.shape[1]):
                one = nn.functional.one_hot(torch.full_like(p[:, 0], label, dtype=torch.long), f.shape[1])
                yield p[:, label, None].sqrt() * (one - p)
        case "exact", "gaussian":
            for place in range(f[0].numel()):
                unit = torch.zeros_like(f).flatten(1)
                unit[:, place] = 1
                yield unit.view_as(f)
        case "sampled", _:
            yield target_score(f, _sample(f, output, generator), output)
        case _:
            assert targets is not None
            yield target_score(f, targets, output)


def _sample(f: Tensor, output: Output, generator: torch.Generator | None) -> Tensor:
    """One label of each input from the model's own distribution, drawn where the generator lives."""
    device = generator.device if generator is not None else f.device
    if output == "gaussian":
        return f + torch.randn(f.shape, generator=generator, device=device, dtype=f.dtype).to(f.device)
    if not f.isfinite().all():
        raise ValueError("labels are drawn from finite outputs, got nan or infinity: measure before training diverges")
    p = f.softmax(-1).flatten(0, -2).to(device)
    return torch.multinomial(p, 1, generator=generator).view(f.shape[:-1]).to(f.device)


def target_score(f: Tensor, targets: Tensor, output: Output) -> Tensor:
    """Compute d ln p(targets | x) / d f, of each input.

    Args:
        f: outputs [N, ..., C], or of any shape if gaussian.
        targets: classes [N, ...], -100 where there is none; gaussian: values shaped as `f`.
        output: "softmax" or "gaussian".

    Raises:
        ValueError: If the shapes do not fit, or a class does not exist.
    """
    expected = f.shape if output == "gaussian" else f.shape[:-1]
    if targets.shape != expected:
        raise ValueError(
            f"targets of a {output} output {tuple(f.shape)} must have the shape {tuple(expected)}, "
            f"got {tuple(targets.shape)}"
        )
    if output == "gaussian":
        return targets - f
    known = targets != -100
    labels = torch.where(known, targets, 0).long()
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < f.shape[-1]:
        raise ValueError(
            f"targets must be classes from 0 to {f.shape[-1] - 1}, got {int(labels.min())} to {int(labels.max())}"
        )
    score = nn.functional.one_hot(labels, f.shape[-1]) - f.softmax(-1)
    return score * known[..., None]
