"""The picture of a benchmark: every activation's fraction of the copy, ours as a bar, each other as a mark.

One picture for every dtype and size, with a panel a pass. It is drawn for paper: dark on white, shapes beside colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import vl_convert

from zeromean.lab.bench.measure import Row
from zeromean.lab.bench.tables import OURS, contenders_of, groups, size

_INK, _QUIET, _GRID = "#1d1f23", "#5d626b", "#e2e2dc"
_BAR = "#9cc7e6"
_COLOURS = ("#c9500a", "#00805c", "#a4478f", "#1d1f23", "#8a6a00", "#6b6f76", "#7a3b12", "#2b8fb8")
_SHAPES = ("circle", "square", "triangle-up", "cross", "diamond", "triangle-down", "triangle-right", "triangle-left")
_STEP, _WIDTH = 22, 330
_TITLES = {"forward": "forward", "backward": "backward", "both": "forward + backward, with the host's share"}


def pictures(rows: Sequence[Row]) -> dict[str, bytes]:
    """SVG and PNG by file name."""
    drawn: dict[str, bytes] = {}
    timed = [row for row in rows if row["fraction_of_copy"] is not None]
    for dtype, elements in dict.fromkeys((row["dtype"], row["elements"]) for row in timed):
        part = [row for row in timed if (row["dtype"], row["elements"]) == (dtype, elements)]
        name = f"fraction_of_copy-{dtype}-{elements}"
        chart = _chart(part, f"Speed as a fraction of a copy: {dtype}, {size(elements)} elements").to_dict()
        version = ".".join(alt.SCHEMA_VERSION.split(".")[:2])
        drawn[f"{name}.svg"] = vl_convert.vegalite_to_svg(chart, vl_version=version).encode()
        drawn[f"{name}.png"] = vl_convert.vegalite_to_png(chart, vl_version=version, scale=2)
    return drawn


def _chart(rows: Sequence[Row], title: str) -> alt.HConcatChart:
    labels = [_label(activation, layout) for activation, layout in groups(rows, ("activation", "layout"))]
    passes = [which for which in _TITLES if any(row["pass"] == which for row in rows)]
    highest = max(1.1, *(row["fraction_of_copy"] for row in rows))
    others = [name for name in contenders_of(rows) if name != OURS]
    panels = [
        _panel([row for row in rows if row["pass"] == which], _TITLES[which], labels, highest, others, number == 0)
        for number, which in enumerate(passes)
    ]
    chart: alt.HConcatChart = alt.HConcatChart(hconcat=panels, spacing=18, background="white")
    text = alt.TitleParams(
        title, anchor="start", fontSize=15, color=_INK, subtitle=_legend(), subtitleColor=_QUIET, subtitleFontSize=12
    )
    return _styled(chart.properties(title=text))


def _legend() -> str:
    return (
        f"bar: {OURS}; marks: the others; line: the copy, the limit of any kernel that reads and writes each byte once"
    )


def _label(activation: str, layout: str) -> str:
    return activation if layout == "contiguous" else f"{activation}, {layout}"


def _panel(
    rows: Sequence[Row], title: str, labels: Sequence[str], highest: float, others: Sequence[str], first: bool
) -> alt.LayerChart:
    values = [
        {"row": _label(row["activation"], row["layout"]), "x": row["fraction_of_copy"], "contender": row["contender"]}
        for row in rows
    ]
    y = alt.Y(
        "row:N", sort=list(labels), title=None, scale=alt.Scale(domain=list(labels)), axis=alt.Axis() if first else None
    )
    axis = alt.Axis(tickCount=5, format="~g")
    x = alt.X("x:Q", title="fraction of copy", scale=alt.Scale(domain=[0, highest], nice=False), axis=axis)
    shapes = alt.Scale(domain=list(others), range=list(_SHAPES[: len(others)]))
    colours = alt.Scale(domain=list(others), range=list(_COLOURS[: len(others)]))
    legend = alt.Legend(title=None, orient="bottom", columns=5)
    ours = [value for value in values if value["contender"] == OURS]
    bars = alt.Chart(_data(ours)).mark_bar(color=_BAR, height=13).encode(x=x, y=y)
    line = alt.Chart(_data([{"x": 1.0}])).mark_rule(color=_INK, strokeWidth=1.2).encode(x=x)
    marks = alt.Chart(_data([value for value in values if value["contender"] != OURS]))
    points = marks.mark_point(size=62, filled=True, opacity=1, stroke="white", strokeWidth=0.6).encode(
        x=x,
        y=y,
        shape=alt.Shape("contender:N", scale=shapes, legend=legend),
        color=alt.Color("contender:N", scale=colours, legend=legend),
    )
    layers = [bars, line, points] if others else [bars, line]
    return alt.LayerChart(layer=layers, title=title, width=_WIDTH, height=_STEP * len(labels))


def _data(rows: Sequence[dict[str, Any]]) -> alt.InlineData:
    return alt.InlineData(values=list(rows))


def _styled(chart: alt.HConcatChart) -> alt.HConcatChart:
    styled: alt.HConcatChart = (
        chart.configure_axis(
            labelColor=_INK,
            titleColor=_QUIET,
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
            gridColor=_GRID,
            domainColor=_GRID,
            tickColor=_GRID,
            labelLimit=220,
        )
        .configure_axisY(domain=False, ticks=False, grid=False)
        .configure_view(stroke=None)
        .configure_legend(labelFontSize=12, labelColor=_INK, symbolSize=80)
        .configure_title(fontSize=13, color=_INK, fontWeight="normal")
    )
    return styled
