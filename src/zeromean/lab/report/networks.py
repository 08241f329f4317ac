"""The section on what a probe found inside the trained networks: in words, over the layers, and every number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from zeromean.diagnostics import MEANINGS, Finding, LayerReport, Meaning, Report
from zeromean.diagnostics.report import NOTHING
from zeromean.lab.inside import Inside
from zeromean.lab.report import charts, drawing
from zeromean.lab.report.charts import Curve
from zeromean.lab.report.curves import Point
from zeromean.lab.report.sections import Figure, Group, Table, groups
from zeromean.lab.summary import Arm, Summary

PROFILES = ("input_shift", "k", "shift_ratio", "saturated", "dead", "cosine")
MOST_FINDINGS = 3
_WIDE = 10.0


@dataclass(frozen=True)
class ArmInside:
    """What is said of an arm.

    Attributes:
        label: of the arm.
        look: number of its colour.
        sentences: the gravest findings, or why there are none.
    """

    label: str
    look: int
    sentences: Sequence[str]


@dataclass(frozen=True)
class Profiles:
    """The layers of one group of arms; the title may be empty."""

    title: str
    figures: Sequence[Figure]
    numbers: Table


@dataclass(frozen=True)
class Networks:
    """The whole section.

    Attributes:
        measured: what was measured, in a sentence.
        arms: the findings.
        remedies: what helps, a sentence a quantity that was found wanting.
        groups: the profiles.
    """

    measured: str
    arms: Sequence[ArmInside]
    remedies: Sequence[str]
    groups: Sequence[Profiles]


def networks(summary: Summary, inside: Mapping[str, Inside]) -> Networks | None:
    """The section; None where no network of the study was measured."""
    if not inside:
        return None
    looks = drawing.looks(summary.arms)
    told = {name: _gravest(found.report) for name, found in inside.items()}
    return Networks(
        _measured(inside),
        [ArmInside(arm.label, looks[arm.name], _sentences(arm, inside.get(arm.name))) for arm in summary.arms],
        _remedies(told, {arm.name: arm.label for arm in summary.arms}),
        [found for group in groups(summary) if (found := _profiles(summary, group, inside))],
    )


def _remedies(told: Mapping[str, Sequence[Sequence[Finding]]], labels: Mapping[str, str]) -> list[str]:
    """A sentence for each remedy; where networks need different ones for a quantity, it names them."""
    of = dict[str, dict[str, list[str]]]()
    for arm, kinds in told.items():
        for first in (one[0] for one in kinds):
            of.setdefault(first.quantity, {}).setdefault(first.remedy, []).append(labels[arm])
    sentences = []
    for quantity, remedies in of.items():
        for remedy, arms in remedies.items():
            whose = f" ({', '.join(arms)})" if len(remedies) > 1 else ""
            sentences.append(f"{_name(MEANINGS[quantity])}{whose}: {remedy}.")
    return sentences


def _measured(inside: Mapping[str, Inside]) -> str:
    found = list(inside.values())
    seeds = sorted({one.seed for one in found})
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}, as others did not end well"
    light = any(one.report.preset == "light" for one in found)
    cost = ", without natural gradients, which would have cost more than a tenth of the training" if light else ""
    return f"{which}, on {max(one.samples for one in found)} training samples{cost}"


def _sentences(arm: Arm, found: Inside | None) -> list[str]:
    if found is None and arm.count("ok"):
        return ["Its network was not measured."]
    if found is None:
        done = arm.count("diverged", "failed") == len(arm.runs)
        return ["No run ended well, so there is no trained network." if done else "No run has ended well yet."]
    kinds = _gravest(found.report)
    return [_sentence(found.report, kind) for kind in kinds] or [NOTHING]


def _gravest(report: Report) -> list[list[Finding]]:
    """The findings of up to three quantities: those of the gravest ones, each led by its gravest layer."""
    kinds: dict[str, list[Finding]] = {}
    for one in report.findings:
        kinds.setdefault(one.quantity, []).append(one)
    return list(kinds.values())[:MOST_FINDINGS]


def _sentence(report: Report, kind: Sequence[Finding]) -> str:
    places = {layer.name: place for place, layer in _places(report)}
    others = len({places[one.layer] for one in kind} - {places[kind[0].layer]})
    likewise = f" Less so in {others} other layer{'s' if others > 1 else ''}." if others else ""
    return f"Layer {places[kind[0].layer]}: {kind[0].text}.{likewise}"


def _places(report: Report) -> list[tuple[int, LayerReport]]:
    """The layers with their number from input to output; an activation has that of the weights before it."""
    numbers = accumulate(int(layer.role == "unit") for layer in report.layers)
    return list(zip(numbers, report.layers, strict=True))


def _profiles(summary: Summary, group: Group, inside: Mapping[str, Inside]) -> Profiles | None:
    known = [(arm, inside[arm.name].report) for arm in group.arms if arm.name in inside]
    if not known:
        return None
    looks = drawing.looks(summary.arms)
    drawn = {
        quantity: [Curve(arm.label, looks[arm.name], _points(report, quantity), []) for arm, report in known]
        for quantity in PROFILES
    }
    figures = [_figure(quantity, curves) for quantity, curves in drawn.items() if _worth(quantity, curves)]
    return Profiles(group.title, figures, _numbers(known))


def _points(report: Report, quantity: str) -> list[Point]:
    values = [(place, _value(layer, quantity)) for place, layer in _places(report)]
    return [Point(place, value, value, value) for place, value in values if value is not None]


def _value(layer: LayerReport, quantity: str) -> float | None:
    """As charts and tables have it: shares in percent."""
    value = layer.value(quantity)
    return value if value is None else _scaled(MEANINGS[quantity], value)


def _scaled(meaning: Meaning, value: float) -> float:
    return 100 * value if meaning.form == "share" else value


def _worth(quantity: str, drawn: Sequence[Curve]) -> bool:
    """A line needs two layers; units that nobody lost need no chart."""
    return any(len(curve.points) > 1 for curve in drawn) and (
        quantity != "dead" or any(point.mean for curve in drawn for point in curve.points)
    )


def _figure(quantity: str, drawn: Sequence[Curve]) -> Figure:
    meaning = MEANINGS[quantity]
    healthy = (_scaled(meaning, meaning.healthy[0]), _scaled(meaning, meaning.healthy[1]))
    values = [point.mean for curve in drawn for point in curve.points]
    logs = (True, False) if charts.can_log(drawn) and max(values) >= _WIDE * min(values) else (False,)
    drawings = {}
    for log in logs:
        scale = charts.scale_of(drawn, log=log, healthy=healthy)
        drawings["log" if log else "linear"] = [
            charts.panel(drawn, label=_label(meaning, drawn), scale=scale, against="layer")
        ]
    return Figure(_title(meaning), drawings, reading=_reading(meaning))


def _title(meaning: Meaning) -> str:
    return f"{_name(meaning)} (%)" if meaning.form == "share" else _name(meaning)


def _name(meaning: Meaning) -> str:
    """With a capital, except for what is a symbol."""
    return meaning.title if len(meaning.title) == 1 else _capital(meaning.title)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _label(meaning: Meaning, drawn: Sequence[Curve]) -> str:
    ends = "; ".join(
        f"{curve.label} {curve.points[0].mean:.3g} to {curve.points[-1].mean:.3g}" for curve in drawn if curve.points
    )
    return f"{_title(meaning)} of every layer of one trained network an arm. First to last layer: {ends}."


def _reading(meaning: Meaning) -> str:
    low, high = (meaning.print(bound) for bound in meaning.healthy)
    return f"{_capital(meaning.what)}. Shaded: {low} to {high}."


def _numbers(known: Sequence[tuple[Arm, Report]]) -> Table:
    shown = [name for name in PROFILES if any(layer.value(name) is not None for _, r in known for layer in r.layers)]
    rows = [
        (arm.label, layer.name, str(place), str(layer.units), *(_text(_value(layer, name)) for name in shown))
        for arm, report in known
        for place, layer in _places(report)
    ]
    head = ("arm", "name", "layer", "units", *(_title(MEANINGS[name]) for name in shown))
    return Table("Every layer of the measured networks", head, rows, left=2)


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
