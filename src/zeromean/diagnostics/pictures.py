"""A report's pictures, as SVG : layers over steps, units of a layer, gradient against unit natural gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from zeromean.diagnostics.meaning import MEANINGS
from zeromean.spelling import nearest

if TYPE_CHECKING:
    import altair as alt

    from zeromean.diagnostics.report import LayerReport, Report

INK, QUIET, GRID = "#1a1a1a", "#666666", "#dddddd"
PLAIN, NATURAL = "#d55e00", "#0072b2"
_BINS = 30
_MOST_ARROWS = 200


def heat_map(report: Report, quantity: str = "shift") -> str:
    """A quantity over layers (input at the top) and measured steps.

    Args:
        report: of a probe.
        quantity: a key of `zeromean.diagnostics.MEANINGS`.

    Raises:
        ValueError: If no layer has that quantity, or altair is not installed.
    """
    alt = _altair()
    layers = [layer for layer in report.layers if any(value is not None for value in layer.series.get(quantity, ()))]
    _check(quantity, layers, {name for layer in report.layers for name in layer.series})
    rows = [
        {"layer": layer.name, "step": str(step), "value": value}
        for layer in layers
        for step, value in zip(report.steps, layer.series[quantity], strict=True)
        if value is not None
    ]
    colour = alt.Color("value:Q", title=MEANINGS[quantity].title, scale=_scale(quantity, rows))
    chart = alt.Chart(alt.InlineData(values=rows)).mark_rect()
    chart = chart.encode(
        x=alt.X("step:O", title="step", sort=None, axis=alt.Axis(labelOverlap=True, labelAngle=0)),
        y=alt.Y("layer:O", title=None, sort=None),
        color=colour,
    )
    return _svg(chart.properties(width=480, height=max(60, 18 * len(layers))))


def _scale(quantity: str, rows: Sequence[dict[str, Any]]) -> Any:
    """Shares from 0 to 1; what may be negative around 0; gradients, which span decades, on a logarithmic scale."""
    import altair as alt

    values = [row["value"] for row in rows]
    if MEANINGS[quantity].form == "share":
        return alt.Scale(domain=[0, 1], scheme="viridis")
    if min(values) < 0:
        largest = max(map(abs, values))
        return alt.Scale(domain=[-largest, largest], scheme="blueorange")
    decades = min(values) > 0 and max(values) / min(values) > 100
    return alt.Scale(type="log" if decades else "linear", scheme="viridis")


def histograms(report: Report, quantity: str = "mean") -> str:
    """How a quantity spreads over the units of each layer, at the last measured step.

    Args:
        report: of a probe.
        quantity: a key of `LayerReport.of_units`.

    Raises:
        ValueError: If no layer has that quantity, or altair is not installed.
    """
    alt = _altair()
    layers = [layer for layer in report.layers if quantity in layer.of_units]
    _check(quantity, layers, {name for layer in report.layers for name in layer.of_units})
    rows = [row for layer in layers for row in _bins(layer, quantity)]
    bars = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_bar(color=NATURAL)
        .encode(
            x=alt.X("from:Q", title=quantity.replace("_", " "), bin="binned", axis=alt.Axis(tickCount=4, format="~g")),
            x2="to:Q",
            y=alt.Y("units:Q", title=None, axis=alt.Axis(tickCount=3)),
        )
    )
    panels = bars.properties(width=180, height=70).facet(facet=alt.Facet("layer:N", title=None, sort=None), columns=3)
    return _svg(panels.resolve_scale(x="independent", y="independent"))


def _bins(layer: LayerReport, quantity: str) -> list[dict[str, Any]]:
    values = [value for value in layer.of_units[quantity] if value is not None]
    if not values:
        return []
    low, high = min(values), max(values)
    width = (high - low) / _BINS or max(abs(low), 1.0) / _BINS
    counts = [0] * _BINS
    for value in values:
        counts[min(_BINS - 1, int((value - low) / width))] += 1
    return [
        {"layer": layer.name, "from": low + place * width, "to": low + (place + 1) * width, "units": count}
        for place, count in enumerate(counts)
    ]


def arrows(report: Report) -> str:
    """Each unit's natural gradient against its gradient, which points to the right with length 1.

    The angle is that between the two, with weights and bias; the length that of the natural gradient against the
    gradient, over the median of the layer's units, cut off at 3. Of a layer with more units, about 200 are drawn.

    Args:
        report: of a probe with the preset ``full`` and targets.

    Raises:
        ValueError: If no layer was measured so, or altair is not installed.
    """
    alt = _altair()
    layers = [layer for layer in report.layers if {"cosine", "norm_ratio"} <= layer.of_units.keys()]
    _check("cosine", layers, {name for layer in report.layers for name in layer.of_units})
    rows = [row for layer in layers for row in _arrows(layer)]
    lines = (
        alt.Chart()
        .mark_line(strokeWidth=1)
        .encode(
            x=alt.X("x:Q", title=None, axis=None, scale=alt.Scale(domain=[0, 3])),
            y=alt.Y("y:Q", title=None, axis=None, scale=alt.Scale(domain=[0, 3])),
            detail="unit:N",
            color=alt.Color(
                "kind:N", title=None, sort=None, scale=alt.Scale(domain=list(_KINDS), range=[NATURAL, PLAIN])
            ),
            opacity=alt.Opacity("opacity:Q", scale=None, legend=None),
            strokeWidth=alt.StrokeWidth("width:Q", scale=None, legend=None),
        )
    )
    heads = (
        alt.Chart()
        .mark_point(shape="triangle-right", filled=True, size=40, color=PLAIN, opacity=1)
        .encode(x="x:Q", y="y:Q")
        .transform_filter("datum.head")
    )
    both = alt.layer(lines, heads, data=alt.InlineData(values=rows)).properties(width=150, height=150)
    return _svg(both.facet(facet=alt.Facet("layer:N", title=None, sort=None), columns=3))


_KINDS = ("unit natural gradient", "gradient")


def _arrows(layer: LayerReport) -> list[dict[str, Any]]:
    pairs = [
        (cosine, ratio)
        for cosine, ratio in zip(layer.of_units["cosine"], layer.of_units["norm_ratio"], strict=True)
        if cosine is not None and ratio is not None
    ]
    middle = sorted(ratio for _, ratio in pairs)[len(pairs) // 2] if pairs else 1.0
    rows = _line(layer.name, "gradient", _KINDS[1], 1.0, 0.0, width=2.5)
    for place, (cosine, ratio) in enumerate(pairs[:: 1 + len(pairs) // _MOST_ARROWS]):
        angle, length = math.acos(max(-1.0, min(1.0, cosine))), min(3.0, ratio / (middle or 1.0))
        rows += _line(layer.name, str(place), _KINDS[0], length * math.cos(angle), length * math.sin(angle), width=0.8)
    return rows


def _line(layer: str, unit: str, kind: str, x: float, y: float, *, width: float) -> list[dict[str, Any]]:
    row = {"layer": layer, "unit": unit, "kind": kind, "width": width, "opacity": min(1.0, width / 2)}
    return [row | {"x": 0.0, "y": 0.0, "head": False}, row | {"x": x, "y": y, "head": kind == _KINDS[1]}]


def _check(quantity: str, layers: Sequence[LayerReport], known: set[str]) -> None:
    if not layers:
        raise ValueError(f"no layer has {quantity!r}: {nearest(quantity, sorted(known))}")


def _altair() -> Any:
    try:
        import altair
        import vl_convert  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError("pictures need altair and vl-convert-python: pip install 'zeromean[lab]'") from error
    return altair


def _svg(chart: alt.TopLevelMixin) -> str:
    import altair as alt
    import vl_convert

    styled = chart.configure_axis(
        labelColor=QUIET, titleColor=QUIET, gridColor=GRID, domainColor=GRID, tickColor=GRID, titleFontWeight="normal"
    )
    styled = styled.configure_view(stroke=None).configure_legend(labelColor=INK, titleColor=QUIET)
    styled = styled.configure_header(labelColor=INK, labelFontSize=11)
    version = ".".join(alt.SCHEMA_VERSION.split(".")[:2])
    svg: str = vl_convert.vegalite_to_svg({**styled.to_dict(), "background": "white"}, vl_version=version)
    return svg
