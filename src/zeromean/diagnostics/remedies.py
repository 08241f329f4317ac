"""What to do about a finding, told to this network: `MEANINGS` would tell one of ELUs to use ELU.

The activation before a layer is known if it ran just before it and the mean of its outputs is that of the layer's
inputs, to a twentieth of their spread (our choice: dropout moves it a little, a gate or a residual sum more), or if it
was called as a function behind the unit layer before. The one behind a layer is what ran next.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from zeromean.diagnostics.meaning import MEANINGS

if TYPE_CHECKING:
    from zeromean.diagnostics.report import LayerReport, Report

_SAME = 0.05
_FUNCTION = re.compile(r"(\w+) called as a function behind (.*?)(, \d+ times)?")
# Kinds and functions whose outputs of a unit Gaussian have a mean of at most 0.21 spreads, as ELU's.
_CENTRED = frozenset(
    (
        *("elu", "selu", "celu", "eelu", "pelu", "mpelu", "shiftedrelu"),
        *("tanh", "softsign", "hardtanh", "tanhshrink", "softshrink", "hardshrink"),
    )
)


def remedy(report: Report, layer: LayerReport, quantity: str) -> str:
    """What to do about a layer's number outside of its healthy range."""
    usual = MEANINGS[quantity].remedy
    match quantity:
        case "input_shift":
            return _centre(_before(report, layer))
        case "cosine":
            return _whiten(_before(report, layer))
        case "dead" if layer.kind.lower() in _CENTRED:
            return (
                f"lower the learning rate or the initial weights: {layer.kind} is flat far below zero, where LeakyReLU "
                "still has a slope"
            )
        case "spread" | "weight_gradient" if behind := _behind(report, layer):
            return usual.replace("this activation", behind)
    return usual


def _centre(before: str) -> str:
    if not before:
        return "centre its inputs: the data if it is the first layer, else by normalizing in front of it"
    if before.lower() in _CENTRED:
        return (
            f"the {before} before it has negative values already: normalize between the two, or lower the learning "
            "rate or the initial biases if they drove the means away"
        )
    return f"use an activation with negative values (ELU) in place of the {before} before it, or normalize behind it"


def _whiten(before: str) -> str:
    if not before or before.lower() in _CENTRED:
        return "whiten or normalize the inputs of the layer, or use a natural-gradient optimizer"
    return f"normalize the inputs of the layer, use ELU in place of {before}, or a natural-gradient optimizer"


def _before(report: Report, layer: LayerReport) -> str:
    """Kind of the activation whose outputs are the layer's inputs; empty if it is not known."""
    place = report.layers.index(layer)
    if place == 0:
        return ""
    previous = report.layers[place - 1]
    if previous.role != "activation":
        return _function_behind(report, previous)
    mean, seen, spread = previous.value("mean"), layer.value("input_mean"), previous.value("spread")
    if mean is None or seen is None or spread is None or abs(mean - seen) > _SAME * spread:
        return ""
    return previous.kind


def _behind(report: Report, layer: LayerReport) -> str:
    """Kind of the activation that the layer's outputs go through; empty if it is not known."""
    following = report.layers[report.layers.index(layer) + 1 :][:1]
    if following and following[0].role == "activation":
        return following[0].kind
    return _function_behind(report, layer)


def _function_behind(report: Report, layer: LayerReport) -> str:
    """The only activation called as a function behind a layer, or nothing."""
    found = [match for one in report.unseen if (match := _FUNCTION.fullmatch(one)) and match[2] == layer.name]
    return str(found[0][1]) if len(found) == 1 else ""
