"""The preset ``full``: from the natural-gradient quantities of single units to numbers of a layer."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from zeromean.diagnostics import fisher
from zeromean.diagnostics.fisher import OnLayer
from zeromean.diagnostics.generators import generators_put_back
from zeromean.diagnostics.layers import Layer
from zeromean.diagnostics.patches import yields_net_inputs
from zeromean.diagnostics.shield import eagerly
from zeromean.diagnostics.units import UnitQuantities

Fisher = Literal["auto", "exact", "sampled", "empirical"]

OF_UNITS = ("k", "cosine", "norm_ratio", "bias_shift", "natural_bias_shift", "bias_gradient", "natural_bias")
MOST_CLASSES = 100
MOST_ROWS = 4096


def measurable(layers: Sequence[Layer], seen: Container[str]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Linear and convolution layers that ran once: a Fisher block needs their preactivation, and one input a sample.

    Returns:
        Those by name, and why the other unit layers that ran are left out.
    """
    ran = [layer for layer in layers if layer.role == "unit" and layer.name in seen]
    left_out = {layer.name: why for layer in ran if (why := _left_out(layer, f"{layer.name}#2" in seen))}
    return {layer.name: layer.module for layer in ran if layer.name not in left_out}, left_out


def _left_out(layer: Layer, again: bool) -> str:
    if not yields_net_inputs(layer.module):
        return f"a {layer.kind} yields no net inputs of Linear or Conv units"
    return "it was called more than once in a forward pass" if again else ""


def natural(
    root: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Any,
    targets: Tensor | None,
    scores: Tensor,
    *,
    which: Fisher,
    damping: float,
    on_layer: OnLayer | None = None,
) -> tuple[dict[str, UnitQuantities], dict[str, str]]:
    """Measure those layers, and say why some could not be; see `zeromean.diagnostics.measure`.

    Args:
        root: the model.
        layers: of it, by name.
        inputs: of the model.
        targets: of the plain gradient.
        scores: what the model returned for the inputs.
        which: ``auto`` takes the exact Fisher of up to 100 classes or outputs, since it costs a backward pass for each,
            and the sampled one of more.
        damping: see `zeromean.diagnostics.measure`.
        on_layer: see `zeromean.probe`.
    """
    regression = targets is not None and targets.is_floating_point()
    outputs = scores[0].numel() if regression else scores.shape[-1]
    few = outputs <= MOST_CLASSES and (regression or scores.ndim == 2)
    with generators_put_back(root), eagerly(root):
        return fisher.attempt(
            root,
            layers,
            tuple(inputs) if isinstance(inputs, list) else inputs,
            targets=targets,
            fisher=("exact" if few else "sampled") if which == "auto" else which,
            output="gaussian" if regression else "softmax",
            damping=damping,
            max_samples=MOST_ROWS,
            on_layer=on_layer,
        )


def of_units(found: UnitQuantities) -> dict[str, Tensor]:
    """What a report keeps of every unit."""
    return {name: value for name in OF_UNITS if (value := getattr(found, name)) is not None}


def of_layer(found: UnitQuantities) -> dict[str, Tensor]:
    """The numbers of a layer, as tensors without dimensions: medians over units that pass gradients."""
    values = of_units(found)
    sizes = {name: value.abs().nanmedian() for name, value in values.items()}
    numbers: dict[str, Tensor] = {
        name: values[name].nanmedian() for name in ("k", "cosine", "norm_ratio") if name in values
    }
    if "bias_shift" in sizes:
        numbers["bias_ratio"] = sizes["bias_gradient"] / sizes["natural_bias"]
        numbers["shift_ratio"] = sizes["bias_shift"] / sizes["natural_bias_shift"]
    return numbers | {"residual": found.residual.nan_to_num(0).amax()}


def notes(step: int, left_out: Mapping[str, str]) -> tuple[str, ...]:
    """A line for each reason, with the layers that have no natural gradient because of it."""
    names: dict[str, list[str]] = {}
    for name, why in left_out.items():
        names.setdefault(why, []).append(name)
    return tuple(
        f"natural gradients were not measured at step {step} of {', '.join(of)}: {why}" for why, of in names.items()
    )
