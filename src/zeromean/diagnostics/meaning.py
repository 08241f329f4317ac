"""Every number of a report: what it is, its healthy range, what moves it and what to do.

The healthy ranges are our choice, for orientation: through ReLU a unit Gaussian has a shift of 0.68, through ELU 0.21,
through GELU 0.48.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Form = Literal["number", "share", "factor"]


@dataclass(frozen=True)
class Meaning:
    """What a number of a layer says.

    Attributes:
        title: for the head of a column.
        what: definition, in a sentence.
        healthy: lowest and highest value that needs no thought.
        moves: what makes it grow.
        remedy: what to do outside of the healthy range.
        form: how it is printed: a ``share`` in percent, a ``factor`` with a cross behind it.
    """

    title: str
    what: str
    healthy: tuple[float, float]
    moves: str
    remedy: str
    form: Form = "number"

    def print(self, value: float | None) -> str:
        """The value as tables print it."""
        if value is None:
            return "-"
        if self.form == "share":
            return f"{100 * value:.0f} %" if value == 0 or value >= 0.01 else f"{100 * value:.1g} %"
        number = f"{value:.2g}" if abs(value) < 100 or abs(value) >= 1e5 else f"{value:.0f}"
        return f"{number}×" if self.form == "factor" else number

    def is_healthy(self, value: float | None) -> bool:
        """Whether a known value lies in the healthy range."""
        return value is None or self.healthy[0] <= value <= self.healthy[1]


_ANY = (-math.inf, math.inf)
_CENTRE = "use an activation with negative values (ELU), centre the input data, or normalize"

MEANINGS: dict[str, Meaning] = {
    "mean": Meaning(
        "mean",
        "output, averaged over samples and units",
        _ANY,
        "activations without negative values, biases",
        _CENTRE,
    ),
    "shift": Meaning(
        "shift",
        "how far the units' means lie from zero, in spreads: root mean square of the means over that of the spreads",
        (0, 0.5),
        "activations without negative values; every layer behind then sees a common offset",
        _CENTRE,
    ),
    "spread": Meaning(
        "spread",
        "standard deviation of a unit over the samples: root mean square over units",
        (0.05, 20),
        "the scale of the weights, layer by layer",
        "initialize for this activation (zeromean.init_), or scale the input data to variance 1",
    ),
    "saturated": Meaning(
        "saturated",
        "share of units that lie in a flat tail of their activation on at least 90 % of the samples",
        (0, 0.1),
        "large weights or biases; a learning rate that threw the unit there",
        "lower the learning rate or the initial weights",
        "share",
    ),
    "dead": Meaning(
        "dead",
        "share of units that never activate: in the lower flat tail of a rectifier on every sample of the batch",
        (0, 0.01),
        "a learning rate that drove biases down; incoming means far from zero",
        "lower the learning rate, or use an activation with a slope below zero (ELU, LeakyReLU)",
        "share",
    ),
    "never_off": Meaning(
        "never off",
        "share of a rectifier's units that are above its knee on every sample: linear on this batch",
        (0, 0.5),
        "biases large against the spread of the preactivation",
        "check the initialization; a layer that is never off adds no non-linearity",
        "share",
    ),
    "input_mean": Meaning(
        "mean input",
        "input, averaged over samples and inputs: E_p(a) of the paper",
        _ANY,
        "the activation before it, or the data",
        _CENTRE,
    ),
    "input_shift": Meaning(
        "input shift",
        "shift of the layer's inputs; far from zero, every update of a unit's weights moves its mean (bias shift)",
        (0, 0.7),
        "the activation before it, or data that are not centred",
        _CENTRE,
    ),
    "weight_gradient": Meaning(
        "weight gradient",
        "norm of the gradient of the layer's weights, in this process, as it flows (scaled where the loss is)",
        (0, math.inf),
        "depth, saturation, the loss",
        "initialize for this activation; shorten the path with residual connections; clip what explodes",
    ),
    "output_gradient": Meaning(
        "output gradient",
        "norm over the batch of the gradient of the layer's output, in this process, as it flows",
        (0, math.inf),
        "depth, saturation, the loss",
        "as for the weights' gradient",
    ),
    "k": Meaning(
        "k",
        "factor by which the unit natural gradient corrects a bias (Theorem 2 of the ELU paper): median over units",
        (0.5, 2),
        "incoming means that are large against their variance",
        _CENTRE,
    ),
    "bias_ratio": Meaning(
        "bias update",
        "size of the gradient of the biases over that of their unit natural gradient: medians over units",
        (0, 2),
        "incoming means far from zero",
        _CENTRE,
        "factor",
    ),
    "shift_ratio": Meaning(
        "bias shift",
        "change of the units' mean preactivation by the gradient over that by the unit natural gradient: medians",
        (0, 2),
        "incoming means far from zero: each weight's update adds to the same shift",
        _CENTRE,
        "factor",
    ),
    "cosine": Meaning(
        "cosine",
        "between gradient and unit natural gradient, weights and bias together: median over units",
        (0.1, 1),
        "inputs that are correlated, of unequal variance or not centred",
        "whiten or centre the inputs of the layer; a normalization layer, ELU, or a natural-gradient optimizer",
    ),
    "norm_ratio": Meaning(
        "natural length",
        "length of the unit natural gradient over that of the gradient, scaled so that 1 is white inputs: median",
        _ANY,
        "inputs of small variance",
        "scale the inputs to variance 1",
    ),
    "residual": Meaning(
        "residual",
        "relative error of the solve behind the natural gradient: largest over units",
        (0, 1e-3),
        "few samples for many inputs; a large condition number",
        "give more samples or more damping",
    ),
}
