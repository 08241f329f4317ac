"""What the page shows, section by section: figures with their numbers, tables and facts, ready for the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from zeromean.lab.report import charts, curves, drawing
from zeromean.lab.report.charts import Curve
from zeromean.lab.report.curves import Point, Quantity
from zeromean.lab.schedule import setting
from zeromean.lab.summary import Arm, FinalRun, Summary, arm_table, comparison_table, number

FULL, SMALL = 150, 60
"""Epochs drawn in a panel, and in one of the many small ones."""
WATCHED = {"Mean activation": "mean_activation", "Spread over the units": "mean_activation_spread"}
PANELS = 8
"""Layers that get a small panel of their own; of more, these many are chosen, and all are drawn in a profile."""


@dataclass(frozen=True)
class Table:
    """Head and rows of text; columns from ``left`` on hold numbers."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


@dataclass(frozen=True)
class Figure:
    """A chart in one or more drawings, with its numbers.

    Attributes:
        title: above the chart.
        drawings: name of the scale to its SVGs; the reader switches between several scales, the first is shown.
        numbers: the same as a table; None where another table of the section has them.
        note: a warning below the chart; may be empty.
        reading: how to read it, below the chart; may be empty.
    """

    title: str
    drawings: Mapping[str, Sequence[Markup]]
    numbers: Table | None = None
    note: str = ""
    reading: str = ""


@dataclass(frozen=True)
class Group:
    """Arms that are drawn together: those of one learning rate, or all."""

    title: str
    arms: Sequence[Arm]


def groups(summary: Summary) -> list[Group]:
    """One group, or one a learning rate where the recipe fixes several; their labels then need not name it."""
    rates = list(dict.fromkeys(arm.learning_rate for arm in summary.arms))
    if summary.plan["tune"] or len(rates) == 1:
        return [Group("", summary.arms)]
    return [
        Group(f"learning rate {rate:g}", [short(arm) for arm in summary.arms if arm.learning_rate == rate])
        for rate in rates
    ]


def short(arm: Arm) -> Arm:
    """The arm without the learning rate in its label."""
    return replace(arm, label=arm.label.removesuffix(f", lr {arm.learning_rate or 0:g}"))


def seeds(summary: Summary, group: Group) -> Figure:
    """Every seed's test error."""
    looks, title = drawing.looks(summary.arms), f"{summary.metric} ({summary.unit})"
    drawn = [charts.seeds(group.arms, looks, title, summary.decimals, width) for width in ("wide", "narrow")]
    return Figure(group.title, {"linear": drawn})


def differences(summary: Summary, group: Group) -> Figure | None:
    """The comparisons among the group's arms; None where there are none."""
    full = {
        arm.label: short(arm).label if group.title else arm.label
        for arm in summary.arms
        if arm.name in {a.name for a in group.arms}
    }
    found = [
        replace(one, arm=full[one.arm], baseline=full[one.baseline]) for one in summary.comparisons if one.arm in full
    ]
    if not found:
        return None
    looks = {arm.label: drawing.looks(summary.arms)[arm.name] for arm in group.arms}
    title = f"difference in {summary.metric} ({summary.difference_unit})"
    drawn = [charts.differences(found, looks, title, summary.decimals, width) for width in ("wide", "narrow")]
    return Figure(group.title, {"linear": drawn})


def learning(summary: Summary, group: Group) -> list[Figure]:
    """Training loss, training error and, where a validation set was held out, validation error."""
    wanted = {
        "Training loss": "train_loss",
        f"Training error ({summary.unit})": "train_error",
        f"Validation error ({summary.unit})": "validation_error",
    }
    found = [
        (_titled(title, group), _curves(summary, group, curves.scalar(name), FULL)) for title, name in wanted.items()
    ]
    return [_panel(title, drawn) for title, drawn in found if _any(drawn)]


def activations(summary: Summary, group: Group) -> list[Figure]:
    """Mean activation and its spread over the units, each the median over the layers."""
    found = [
        (_titled(title, group), _curves(summary, group, curves.over_layers(name), FULL))
        for title, name in WATCHED.items()
    ]
    return [_panel(title, drawn, zero_line=True) for title, drawn in found if _any(drawn)]


@dataclass(frozen=True)
class Layers:
    """Mean activation layer by layer: small panels on one scale, and the last epoch as a table.

    Attributes:
        title: of the group; may be empty.
        profiles: of a network with many layers, the last epoch against the layer.
        panels: a layer each, over the epochs.
        numbers: every layer's.
        left_out: how many layers have no panel.
    """

    title: str
    profiles: Sequence[Figure]
    panels: Sequence[Figure]
    numbers: Table
    left_out: int


def layers(summary: Summary, group: Group) -> Layers | None:
    """Mean activation layer by layer; None where there is but one layer or no curve."""
    count = max(curves.layers(arm) for arm in group.arms)
    shown = curves.thinned(count, PANELS)
    drawn = {place: _curves(summary, group, curves.of_layer("mean_activation", place), SMALL) for place in shown}
    if count < 2 or not all(map(_any, drawn.values())):
        return None
    scale = charts.scale_of([curve for layer in drawn.values() for curve in layer], zero_line=True)
    titles = {place: f"Layer {place + 1}{_units(summary, place)}" for place in shown}
    panels = [
        Figure(
            titles[place],
            {"linear": [charts.panel(layer, label=_panel_label(titles[place], layer), scale=scale, width="small")]},
        )
        for place, layer in drawn.items()
    ]
    profiles = [_profile(summary, group, title, name) for title, name in WATCHED.items() if count > PANELS]
    return Layers(group.title, profiles, panels, _layer_table(group, count), count - len(shown))


def _units(summary: Summary, layer: int) -> str:
    hidden = summary.plan["recipe"].get("hidden")
    return f" ({hidden[layer]} units)" if hidden else ""


def _profile(summary: Summary, group: Group, title: str, name: str) -> Figure:
    looks = drawing.looks(summary.arms)
    drawn = [Curve(arm.label, looks[arm.name], curves.profile(arm, name), []) for arm in group.arms]
    scale = charts.scale_of(drawn, zero_line=True)
    ends = "; ".join(
        f"{curve.label} {curve.points[0].mean:.3g} to {curve.points[-1].mean:.3g}" for curve in drawn if curve.points
    )
    label = f"{title} of every layer at the last epoch, mean and range over seeds. First to last layer: {ends}."
    return Figure(
        f"{title} at the last epoch", {"linear": [charts.panel(drawn, label=label, scale=scale, against="layer")]}
    )


def _layer_table(group: Group, count: int) -> Table:
    profiles = {arm.label: curves.profile(arm, "mean_activation") for arm in group.arms}
    rows = [(label, *map(_point_text, points)) for label, points in profiles.items() if len(points) == count]
    head = ("arm", *(f"layer {place}" for place in range(1, count + 1)))
    return Table("Mean activation at the last epoch: mean (lowest to highest over seeds)", head, rows)


def _any(drawn: Sequence[Curve]) -> bool:
    return any(curve.points for curve in drawn)


def _titled(title: str, group: Group) -> str:
    return f"{title}, {group.title}" if group.title else title


def _curves(summary: Summary, group: Group, quantity: Quantity, most: int) -> list[Curve]:
    looks = drawing.looks(summary.arms)
    return [
        Curve(arm.label, looks[arm.name], curves.band(arm, quantity, most=most), curves.losses(arm))
        for arm in group.arms
    ]


def _panel(title: str, drawn: Sequence[Curve], *, zero_line: bool = False) -> Figure:
    logs = (True, False) if not zero_line and charts.can_log(drawn) else (False,)
    drawings = {}
    for log in logs:
        scale = charts.scale_of(drawn, log=log, zero_line=zero_line)
        drawings["log" if log else "linear"] = [charts.panel(drawn, label=_panel_label(title, drawn), scale=scale)]
    return Figure(title, drawings, _curve_table(title, drawn))


def _panel_label(title: str, drawn: Sequence[Curve]) -> str:
    ends = "; ".join(f"{curve.label} {curve.points[-1].mean:.3g}" for curve in drawn if curve.points)
    return f"{title} against the epoch, mean and range over seeds. At the last epoch: {ends}."


def _curve_table(title: str, drawn: Sequence[Curve]) -> Table:
    longest = max((curve.points for curve in drawn), key=len)
    kept = curves.thinned(len(longest), 6)
    rows = [
        (curve.label, *(_point_text(curve.points[place]) for place in kept))
        for curve in drawn
        if len(curve.points) == len(longest)
    ]
    head = ("arm", *(f"epoch {longest[place].epoch}" for place in kept))
    return Table(f"{title}: mean (lowest to highest over seeds)", head, rows)


def _point_text(point: Point) -> str:
    return f"{point.mean:.3g} ({point.low:.3g} to {point.high:.3g})"


def tuning(summary: Summary) -> list[Figure]:
    """Validation error against learning rate, a panel an arm, all on one scale."""
    looks = drawing.looks(summary.arms)
    tuned = [(arm, arm.tuning) for arm in summary.arms if arm.tuning]
    errors = [e for _, found in tuned for point in found.grid for e in point.validation_errors if e is not None]
    figures = []
    for arm, found in tuned:
        label = f"{arm.label}: validation error against learning rate; {found.chosen:g} was chosen."
        drawn = charts.rates(arm, found, looks[arm.name], errors=errors, label=label)
        rows = [
            (
                f"{point.learning_rate:g}",
                _mean_text(point.validation_errors),
                *(_error_text(e) for e in point.validation_errors),
            )
            for point in found.grid
        ]
        head = ("learning rate", "mean", *(f"run {place + 1}" for place in range(len(found.grid[0].validation_errors))))
        table = Table(f"{arm.label}: validation error ({summary.unit})", head, rows)
        note = (
            f"The chosen rate {found.chosen:g} is at the edge of the grid: a better one may lie outside of it."
            if found.at_edge
            else ""
        )
        figures.append(Figure(arm.label, {"linear": [drawn]}, table, note))
    return figures


def _mean_text(errors: Sequence[float | None]) -> str:
    mean = charts.mean_error(errors)
    return "" if mean is None else f"{mean:.2f}"


def _error_text(error: float | None) -> str:
    return "diverged" if error is None else f"{error:.2f}"


def results(summary: Summary) -> list[Table]:
    """The tables of arms and of comparisons."""
    tables = [Table("Arms", *arm_table(summary), left=1)]
    if summary.comparisons:
        tables.append(Table("Comparisons", *comparison_table(summary), left=1))
    return tables


def runs(summary: Summary) -> Table:
    """Every run; those in the plan that are not done too."""
    head = (
        "arm",
        "seed",
        "status",
        f"{summary.metric} ({summary.unit})",
        f"training error ({summary.unit})",
        "training loss",
        "|mean activation|",
        *(("training time", "images/s") if summary.speed else ()),
    )
    rows = [
        (
            arm.label,
            str(run.seed),
            "not done" if run.status == "missing" else run.status,
            number(_known(run.test_error), summary.decimals),
            number(_known(run.result.get("train_error")), summary.decimals),
            _significant(run.result.get("train_loss")),
            _significant(run.result.get("median_mean_activation")),
            *(_pace(run) if summary.speed else ()),
        )
        for arm in summary.arms
        for run in arm.runs
    ]
    return Table("Every run", head, rows)


def _pace(run: FinalRun) -> tuple[str, str]:
    if "images_per_second" not in run.result:
        return "", ""
    return f"{run.result['seconds']:,.0f} s", f"{run.result['images_per_second']:,.0f}"


def _known(value: float | None) -> float:
    return float("nan") if value is None else value


def _significant(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def lost(summary: Summary) -> Table | None:
    """Runs that diverged or failed; None where all ended well."""
    rows = [
        (arm.label, str(run.seed), run.status, str(run.result.get("diverged_at") or ""), run.where)
        for arm in summary.arms
        for run in arm.runs
        if run.status in ("diverged", "failed")
    ]
    wide = any(row[-1] for row in rows)
    head = ("arm", "seed", "status", "epoch", *(("where",) if wide else ()))
    return Table("Runs that diverged or failed", head, [row[: len(head)] for row in rows]) if rows else None


def settings(summary: Summary) -> Table:
    """Every field of the recipe."""
    rows = [(name, setting(name, value)) for name, value in summary.plan["recipe"].items()]
    return Table("Every setting of the recipe", ("setting", "value"), rows, left=2)
