"""The report's charts: every seed, every difference, the curves and the learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
from markupsafe import Markup

from zeromean.lab.report import drawing
from zeromean.lab.report.curves import Point
from zeromean.lab.report.drawing import INK, PAPER, QUIET, Width
from zeromean.lab.stats import Comparison, Interval
from zeromean.lab.summary import Arm, Tuning, interval, number, p_value

Looks = Mapping[str, int]
Row = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """An arm's line and band, and the epochs at which runs of it diverged."""

    label: str
    look: int
    points: Sequence[Point]
    losses: Sequence[int]


def seeds(arms: Sequence[Arm], looks: Looks, title: str, decimals: int, width: Width) -> Markup:
    """A dot for every seed's test error, and below the dots the mean with its interval."""
    labels = [{"row": arm.name, "name": arm.label, "note": _counts(arm)} for arm in arms]
    dots = [row for arm in arms for row in _dots(arm, looks[arm.name], decimals)]
    means = [_mean(arm, looks[arm.name], decimals) for arm in arms if arm.test_error.n]
    y, colour = _rows(labels), _colours(looks)
    x = _value_axis("x", title, {row["x"] for row in dots})
    scattered = alt.Chart(drawing.data(dots)).mark_circle(size=46, opacity=0.55)
    scattered = scattered.encode(x=x, y=y, yOffset=_lift(), color=colour, description="text:N")
    layers = [*_row_labels(labels, y), scattered, *_intervals(means, title, y, colour)]
    label = f"{title}: a dot a seed, mean and 95 % interval. {' '.join(_mean_text(arm, decimals) for arm in arms)}"
    return drawing.draw(layers, height=46 + 64 * len(arms), label=label, width=width)


def _dots(arm: Arm, look: int, decimals: int) -> list[Row]:
    found = sorted((run.test_error, run.seed) for run in arm.runs if run.test_error is not None)
    lifts = _stacked([error for error, _ in found])
    return [
        {"row": arm.name, "look": look, "x": error, "lift": lift}
        | {"text": f"{arm.label}, seed {seed}: {number(error, decimals)}"}
        for (error, seed), lift in zip(found, lifts, strict=True)
    ]


def _stacked(ascending: Sequence[float]) -> list[float]:
    """Nearly equal values stand on each other, closer the more there are, so that none hides another."""
    near = 0.02 * (ascending[-1] - ascending[0] or 1) if ascending else 0.0
    stacks: list[list[float]] = []
    for value in ascending:
        if stacks and value - stacks[-1][-1] < near:
            stacks[-1].append(value)
        else:
            stacks.append([value])
    return [0.26 - min(0.19, 0.62 / len(stack)) * place for stack in stacks for place in range(len(stack))]


def _mean(arm: Arm, look: int, decimals: int) -> Row:
    row = {"row": arm.name, "look": look, "lift": 0.6, "text": _mean_text(arm, decimals)}
    return row | _limits(arm.test_error.mean, arm.test_error.interval)


def _limits(value: float, found: Interval) -> Row:
    """The value and its interval; no bar where the interval is not finite."""
    finite = math.isfinite(found.low) and math.isfinite(found.high)
    return {"x": value, "low": found.low if finite else value, "high": found.high if finite else value}


def _mean_text(arm: Arm, decimals: int) -> str:
    if arm.test_error.n == 0:
        return f"{arm.label}: no run ended well."
    bounds = interval(arm.test_error.interval, decimals)
    return f"{arm.label}: mean {number(arm.test_error.mean, decimals)}, 95 % interval {bounds}, n = {arm.test_error.n}."


def _counts(arm: Arm) -> str:
    missing = f"{arm.count('missing')} not done" if arm.count("missing") else ""
    return ", ".join(part for part in (f"n = {arm.test_error.n}", arm.losses, missing) if part)


def differences(found: Sequence[Comparison], looks: Looks, title: str, decimals: int, width: Width) -> Markup:
    """The paired difference of every comparison with its interval, against zero; ``looks`` are by label here."""
    labels = [
        {
            "row": str(place),
            "name": _pair(one, width),
            "note": f"adjusted p {_equals(p_value(one.p_adjusted))}",
        }
        for place, one in enumerate(found)
    ]
    rows = [
        {"row": str(place), "look": looks[one.arm], "lift": 0.2, "text": difference_text(one, decimals)}
        | _limits(one.difference, one.interval)
        for place, one in enumerate(found)
        if one.n_pairs
    ]
    y, colour = _rows(labels), _colours(looks)
    zero = (
        alt.Chart(drawing.data([{"x": 0}]))
        .mark_rule(color=INK, strokeWidth=1, aria=False)
        .encode(x=_value_axis("x", title))
    )
    layers = [zero, *_row_labels(labels, y), *_intervals(rows, title, y, colour)]
    texts = " ".join(difference_text(one, decimals) for one in found)
    label = f"{title}: paired differences with 95 % intervals; left of zero the arm is better. {texts}"
    return drawing.draw(layers, height=46 + 54 * len(found), label=label, width=width)


def _pair(one: Comparison, width: Width) -> str:
    """On a narrow page the baseline of a long name has a line of its own, beside which there is room for the note."""
    name = f"{one.arm} − {one.baseline}"
    return name if width == "wide" or len(name) < 28 else f"{one.arm}\n− {one.baseline}"


def difference_text(one: Comparison, decimals: int) -> str:
    """One comparison in words."""
    bounds = interval(one.interval, decimals, sign=True)
    size = number(one.difference, decimals, sign=True) or "unknown"
    return f"{one.arm} minus {one.baseline}: {size}, 95 % interval {bounds}, n = {one.n_pairs}."


def _equals(p: str) -> str:
    return p if p.startswith("<") else f"= {p}"


def _row_labels(labels: Sequence[Row], y: alt.Y) -> list[alt.Chart]:
    """Name on the left and note on the right above each row, so that a narrow page keeps its width for the data."""
    base = alt.Chart(drawing.data([{**row, "lift": -0.72} for row in labels])).encode(y=y, yOffset=_lift())
    name = base.mark_text(align="left", fontSize=13, fontWeight=600, color=INK, aria=False, lineBreak="\n")
    note = base.mark_text(align="right", fontSize=12, color=QUIET, aria=False)
    return [
        name.encode(text="name:N", x=alt.value(0)),
        note.encode(text="note:N", x=alt.value(alt.expr("width"))),
    ]


def _intervals(rows: Sequence[Row], title: str, y: alt.Y, colour: alt.Color) -> list[alt.Chart]:
    base = alt.Chart(drawing.data(rows)).encode(y=y, yOffset=_lift(), color=colour)
    bar = base.mark_rule(strokeWidth=3, aria=False)
    mean = base.mark_point(shape="diamond", size=110, filled=True, opacity=1, stroke=PAPER, strokeWidth=1.5)
    return [
        bar.encode(x=_value_axis("low", title), x2="high:Q"),
        mean.encode(x=_value_axis("x", title), description="text:N"),
    ]


def _rows(labels: Sequence[Row]) -> alt.Y:
    order = [row["row"] for row in labels]
    return alt.Y("row:N", sort=order, axis=None, scale=alt.Scale(domain=order, paddingInner=0, paddingOuter=0))


def _lift() -> alt.YOffset:
    return alt.YOffset("lift:Q", scale=alt.Scale(domain=[-1, 1]))


def _value_axis(field: str, title: str, values: Collection[float] = ()) -> alt.X:
    """From the lowest to the highest of all layers; where those values are but one, with room around it."""
    domain = list(_apart(*values, *values)) if len(values) == 1 else alt.Undefined
    scale = alt.Scale(domain=domain, zero=False, nice=True, padding=12)
    return alt.X(f"{field}:Q", title=title, scale=scale, axis=alt.Axis(tickCount=6))


def _apart(low: float, high: float) -> tuple[float, float]:
    """The ends of an axis; ticks beside a single value would not be where they say."""
    if low < high:
        return low, high
    return (0.9 * low, 1.1 * low) if low else (0.0, 1.0)


def _colours(looks: Looks) -> alt.Color:
    used = sorted(set(looks.values()))
    return alt.Color("look:O", legend=None, scale=alt.Scale(domain=used, range=[drawing.colour(look) for look in used]))


def panel(curves: Sequence[Curve], *, label: str, scale: Scale, width: Width = "any", against: str = "epoch") -> Markup:
    """Means as lines and lowest to highest as bands over the epochs; a cross on the axis where a run diverged."""
    rows = [row for curve in curves for row in _points(curve)]
    used = sorted({curve.look for curve in curves})
    colour = _colours({str(look): look for look in used})
    dashes = alt.Scale(domain=used, range=[list(drawing.dash(look)) for look in used])
    x = alt.X(
        "e:Q",
        title=against,
        scale=alt.Scale(nice=False, zero=False),
        axis=alt.Axis(tickCount=6 if width == "any" else 3, tickMinStep=1, grid=False, format="d"),
    )
    y = scale.axis
    base = alt.Chart(drawing.data(rows)).encode(x=x, color=colour)
    zero = alt.Chart(drawing.data([{"m": 0}])).mark_rule(color=QUIET, strokeWidth=1, aria=False).encode(y=y("m"))
    layers = [
        *_healthy(scale),
        *([zero] if scale.zero_line else []),
        base.mark_area(opacity=0.16, aria=False).encode(y=y("l"), y2="h:Q"),
        base.mark_line(strokeWidth=2, aria=False).encode(
            y=y("m"), strokeDash=alt.StrokeDash("look:O", legend=None, scale=dashes)
        ),
        *_single([row for curve in curves if len(curve.points) == 1 for row in _points(curve)], x, y, colour),
        *_crosses([loss for curve in curves for loss in _lost(curve)], x, colour, alt.value(alt.expr("height"))),
    ]
    return drawing.draw(layers, height=250 if width == "any" else 150, label=label, width=width)


def _points(curve: Curve) -> list[Row]:
    return [{"look": curve.look, "e": at.epoch, "m": at.mean, "l": at.low, "h": at.high} for at in curve.points]


def _single(rows: Sequence[Row], x: alt.X, y: Callable[[str], alt.Y], colour: alt.Color) -> list[alt.Chart]:
    """A dot and a bar for an arm of one point, of which there is no line and no band."""
    if not rows:
        return []
    base = alt.Chart(drawing.data(rows)).encode(x=x, color=colour)
    bar, dot = base.mark_rule(strokeWidth=2, opacity=0.4, aria=False), base.mark_circle(size=50, opacity=1, aria=False)
    return [bar.encode(y=y("l"), y2="h:Q"), dot.encode(y=y("m"))]


def _healthy(scale: Scale) -> list[alt.Chart]:
    """A band behind the lines where values need no thought."""
    if scale.healthy is None:
        return []
    low, high = max(scale.low, scale.healthy[0]), min(scale.high, scale.healthy[1])
    band = alt.Chart(drawing.data([{"l": low, "h": high}])).mark_rect(color=drawing.GRID, opacity=0.5, aria=False)
    return [band.encode(y=scale.axis("l"), y2="h:Q")]


def _lost(curve: Curve) -> list[Row]:
    return [
        {"look": curve.look, "e": epoch, "text": f"{curve.label}: a run diverged at epoch {epoch}"}
        for epoch in curve.losses
    ]


def _crosses(rows: Sequence[Row], x: alt.X, colour: Any, y: Any) -> list[alt.Chart]:
    """A cross for every run that diverged."""
    if not rows:
        return []
    marks = alt.Chart(drawing.data(rows)).mark_point(shape="cross", angle=45, size=80, filled=True, opacity=1)
    return [marks.encode(x=x, y=y, color=colour, description="text:N")]


@dataclass(frozen=True)
class Scale:
    """The vertical scale of one or more panels, from the lowest to the highest of their values."""

    low: float
    high: float
    log: bool = False
    zero_line: bool = False
    healthy: tuple[float, float] | None = None

    def axis(self, field: str) -> alt.Y:
        """For that field of the rows."""
        return _log_axis(self.low, self.high, field) if self.log else _linear_axis(self.low, self.high, field)


def scale_of(
    curves: Sequence[Curve], *, log: bool = False, zero_line: bool = False, healthy: tuple[float, float] | None = None
) -> Scale:
    """That fits the bands of all those curves, zero where it is drawn, and enough of the healthy range to be seen."""
    shown = ([0.0] if zero_line else []) + (_seen(*healthy, log=log) if healthy else [])
    lows = [point.low for curve in curves for point in curve.points]
    highs = [point.high for curve in curves for point in curve.points]
    return Scale(*_apart(min(lows + shown), max(highs + shown)), log, zero_line, healthy)


def _seen(low: float, high: float, *, log: bool) -> list[float]:
    """The lower end of a healthy range, or all of it where that begins at zero, which a logarithm does not have."""
    if low:
        return [low, 2 * low]
    return [high / 2 if log else 0.0, high]


def _linear_axis(low: float, high: float, field: str) -> alt.Y:
    scale = alt.Scale(domain=[low, high], zero=False, nice=True)
    return alt.Y(f"{field}:Q", title=None, scale=scale, axis=alt.Axis(tickCount=5))


def _log_axis(low: float, high: float, field: str) -> alt.Y:
    """Logarithmic, with the powers of ten where they are enough, else with round numbers between them, or Vega's."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    decades = math.log10(high / low)
    digits = (1,) if decades > 2.5 else (1, 2, 5) if decades > 1 else (1, 1.5, 2, 3, 5, 7)
    ticks = [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    axis = alt.Axis(values=ticks, format="~g") if len(ticks) > 2 else alt.Axis(tickCount=5, format="~g")
    return alt.Y(f"{field}:Q", title=None, scale=scale, axis=axis)


def can_log(curves: Sequence[Curve]) -> bool:
    """Whether every value has a logarithm."""
    return all(point.low > 0 for curve in curves for point in curve.points)


def rates(arm: Arm, tuning: Tuning, look: int, *, errors: Sequence[float], label: str) -> Markup:
    """Validation error against learning rate: seeds as dots, means as a line, the choice ringed, divergence crossed.

    Args:
        arm: whose tuning it is.
        tuning: of that arm.
        look: number of its colour.
        errors: all validation errors of all arms, so that every arm is drawn on the same scale.
        label: for a screen reader.
    """
    every = [point.learning_rate for point in tuning.grid]
    scale = alt.Scale(type="log", domain=[min(every) / 1.4, max(every) * 1.4], nice=False)
    x = alt.X("r:Q", title="learning rate", scale=scale, axis=alt.Axis(values=every, format="~g", grid=False))
    log = min(errors) > 0
    y = Scale(min(errors) / 1.1, max(errors) * 1.1, log).axis("m")
    colour = alt.value(drawing.colour(look))
    means = [
        {"r": p.learning_rate, "m": mean} for p in tuning.grid if (mean := mean_error(p.validation_errors)) is not None
    ]
    chosen = [row for row in means if row["r"] == tuning.chosen]
    line = alt.Chart(drawing.data(means)).mark_line(strokeWidth=2, aria=False, strokeDash=list(drawing.dash(look)))
    dots = alt.Chart(drawing.data(_tried(arm, tuning))).mark_circle(size=36, opacity=0.55)
    ring = alt.Chart(drawing.data(chosen)).mark_point(size=190, strokeWidth=2, filled=False, opacity=1, aria=False)
    layers = [
        line.encode(x=x, y=y, color=colour),
        dots.encode(x=x, y=y, color=colour, description="text:N"),
        ring.encode(x=x, y=y, color=alt.value(INK)),
        *_crosses(_diverged_rates(tuning), x, colour, alt.value(6)),
    ]
    return drawing.draw(layers, height=220, label=label)


def _tried(arm: Arm, tuning: Tuning) -> list[Row]:
    return [
        {
            "r": point.learning_rate,
            "m": error,
            "text": f"{arm.label}, learning rate {point.learning_rate:g}: {error:.2f}",
        }
        for point in tuning.grid
        for error in point.validation_errors
        if error is not None
    ]


def _diverged_rates(tuning: Tuning) -> list[Row]:
    return [
        {"r": p.learning_rate, "text": f"{p.validation_errors.count(None)} of {len(p.validation_errors)} diverged"}
        for p in tuning.grid
        if None in p.validation_errors
    ]


def mean_error(errors: Sequence[float | None]) -> float | None:
    """Over the runs that ended well; None where none did."""
    known = [error for error in errors if error is not None]
    return sum(known) / len(known) if known else None
