"""What a report says in plain words: each number outside of its range, the gravest first.

A finding's gravity is our choice, in [0, 1]: numbers that are not finite come first, then layers without gradient, then
shares of dead, saturated and never-off units, then means far from zero, then the scale of activations and gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from zeromean.diagnostics.full import MOST_ROWS
from zeromean.diagnostics.meaning import MEANINGS
from zeromean.diagnostics.remedies import remedy

if TYPE_CHECKING:
    from zeromean.diagnostics.report import LayerReport, Report

_UNEQUAL = 1000.0
_VISIBLE = 0.01
_OFF = "are switched off on at least 90 % of this batch"
# Our choice: k of Gaussian inputs of mean 0.5 came out within 4 % (median) with as many rows an input, 20 % with two.
_ROWS_AN_INPUT = 16
_REFERENCE = "a unit Gaussian has 0.68x behind ReLU, 0.21x behind ELU"


@dataclass(frozen=True)
class Finding:
    """One number that needs thought.

    Attributes:
        layer: its name.
        quantity: a key of `zeromean.diagnostics.MEANINGS`.
        value: at the last measured step; None if it is not finite.
        gravity: from 0 to 1; findings are ranked by it.
        text: in plain words.
        remedy: what to do.
    """

    layer: str
    quantity: str
    value: float | None
    gravity: float
    text: str
    remedy: str

    def __str__(self) -> str:
        """Layer, text and remedy in one sentence."""
        return f"layer {self.layer}: {self.text}; {self.remedy}"


def find(report: Report) -> tuple[Finding, ...]:
    """All findings of a report, the gravest first, those of one gravity in the order of the layers."""
    found = [one for layer in report.layers for check in _CHECKS for one in check(report, layer)]
    broken = {one.layer for one in found if one.value is None}
    kept = [one for one in found if one.value is None or one.layer not in broken]
    return tuple(sorted([*kept, *_gradients(report)], key=lambda one: -one.gravity))


def _make(report: Report, layer: LayerReport, quantity: str, gravity: float, text: str) -> Finding:
    told = remedy(report, layer, quantity)
    return Finding(layer.name, quantity, layer.value(quantity), min(1.0, gravity), text, told)


def _since(report: Report, layer: LayerReport, quantity: str) -> str:
    """Where the number was at the first measured step, if that was another one and it differed."""
    first, last = layer.series[quantity][0], layer.value(quantity)
    if len(report.steps) == 1 or first is None or last is None or math.isclose(first, last, rel_tol=0.1):
        return ""
    return f" ({MEANINGS[quantity].print(first)} at step {report.steps[0]})"


def _not_finite(report: Report, layer: LayerReport) -> Iterator[Finding]:
    if None in layer.of_units["mean"]:
        todo = "lower the learning rate, or look for what divides by zero or overflows before it"
        yield Finding(layer.name, "mean", None, 1.0, "outputs are not finite", todo)


def _share(quantity: str, weight: float, words: str) -> Callable[[Report, LayerReport], Iterator[Finding]]:
    def check(report: Report, layer: LayerReport) -> Iterator[Finding]:
        value = layer.value(quantity)
        if value is None or MEANINGS[quantity].is_healthy(value):
            return
        if quantity == "saturated" and value < 1.5 * (layer.value("dead") or 0):
            return
        says = _OFF if quantity == "saturated" and "dead" in layer.series else words
        text = f"{MEANINGS[quantity].print(value)} of units {says}{_since(report, layer, quantity)}"
        yield _make(report, layer, quantity, weight * value, text)

    return check


def _incoming_mean(report: Report, layer: LayerReport) -> Iterator[Finding]:
    shift = layer.value("input_shift")
    if shift is None:
        return
    bias, means = (_excess(layer, quantity) for quantity in ("bias_ratio", "shift_ratio"))
    consequences = [
        f"the update of its bias is {_times(bias)} too large against the natural one" if bias else "",
        f"an update moves its units' means {_times(means)} as far as a natural one" if means else "",
    ]
    told = "; ".join(words for words in consequences if words)
    if MEANINGS["input_shift"].is_healthy(shift) and not told:
        return
    mean = layer.value("input_mean") or 0.0
    text = f"mean input {mean:.2g}, the " if abs(mean) > _VISIBLE else "the "
    text += f"inputs' means are {_times(shift)} their spread"
    excess = max(shift / MEANINGS["input_shift"].healthy[1], bias / 2, means / 2)
    text += f": {told}" if told else f" ({_REFERENCE})"
    yield _make(report, layer, "input_shift", 0.3 * (1 - 1 / (1 + excess)), text + _since(report, layer, "input_shift"))


def _times(factor: float) -> str:
    return f"{factor:.2g}x" if factor < 100 else f"{factor:,.0f}x"


def _excess(layer: LayerReport, quantity: str) -> float:
    """The number if it is too large, else 0."""
    value = layer.value(quantity)
    return value if value is not None and value > MEANINGS[quantity].healthy[1] else 0.0


def _scale(report: Report, layer: LayerReport) -> Iterator[Finding]:
    spread = layer.value("spread")
    if layer.role == "activation" or spread is None or MEANINGS["spread"].is_healthy(spread):
        return
    words = "hardly vary over the samples" if spread < 1 else "vary widely"
    gravity = 0.05 * abs(math.log10(spread)) if spread > 0 else 0.9
    yield _make(
        report, layer, "spread", gravity, f"outputs {words}, spread {spread:.2g}{_since(report, layer, 'spread')}"
    )


def _far_from_natural(report: Report, layer: LayerReport) -> Iterator[Finding]:
    cosine, residual = layer.value("cosine"), layer.value("residual")
    if cosine is not None and not MEANINGS["cosine"].is_healthy(cosine):
        angle = math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
        text = f"the gradient points {angle:.0f} degrees away from the unit natural gradient (cosine {cosine:.2g})"
        yield _make(report, layer, "cosine", 0.1 * (1 - cosine), text)
    if residual is not None and not MEANINGS["residual"].is_healthy(residual):
        yield _make(report, layer, "residual", 0.05, f"its natural gradient is known only to {residual:.1g}")


def _few_rows(report: Report, layer: LayerReport) -> Iterator[Finding]:
    """A covariance of more inputs than rows can tell is mostly damping."""
    if layer.value("k") is None or not layer.units:
        return
    rows, inputs = min(layer.samples, MOST_ROWS), layer.weights // layer.units
    if rows < _ROWS_AN_INPUT * inputs:
        text = f"its k and natural gradient are rough: {rows} rows tell of {inputs} inputs"
        wanted = _ROWS_AN_INPUT * inputs
        todo = f"probe with {wanted} values of each unit"
        if wanted > MOST_ROWS:
            todo = f"measure it with zeromean.diagnostics.measure and max_samples={wanted}"
        yield Finding(layer.name, "k", layer.value("k"), 0.02, text, todo)


def _gradients(report: Report) -> Iterator[Finding]:
    """A layer's gradient against those of the others: root mean square a weight, so that sizes do not matter."""
    sizes = {
        layer.name: value / math.sqrt(layer.weights)
        for layer in report.layers
        if (value := layer.value("weight_gradient")) is not None
    }
    usual = median([size for size in sizes.values() if size > 0] or [0.0])
    for layer in report.layers:
        size = sizes.get(layer.name)
        if size == 0:
            todo = "look for dead units behind it, or for a loss that ignores it"
            yield Finding(layer.name, "weight_gradient", 0.0, 0.95, "its weights get a gradient of zero", todo)
        elif size and not 1 / _UNEQUAL <= size / usual <= _UNEQUAL:
            word = "vanishes" if size < usual else "explodes"
            text = f"the gradient of its weights {word}: {size:.1g} a weight, where {usual:.1g} is the layers' median"
            yield _make(report, layer, "weight_gradient", 0.2, text)


_CHECKS: tuple[Callable[[Report, LayerReport], Iterator[Finding]], ...] = (
    _not_finite,
    _share("dead", 1.0, "never activate on this batch"),
    _share("saturated", 0.8, "are saturated on at least 90 % of this batch"),
    _share("never_off", 0.2, "are never off on this batch: the layer is nearly linear"),
    _incoming_mean,
    _scale,
    _far_from_natural,
    _few_rows,
)
