"""From a Vega-Lite chart to an SVG that takes its colours from the page.

The SVG is drawn here, once, by Vega inside vl-convert. Its colours are CSS variables (``var(--arm-0)``), which the
page defines for light, dark and print; so the page carries no chart runtime and shows its charts without a script.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import altair as alt
import vl_convert
from markupsafe import Markup, escape

from zeromean.lab.summary import Arm

Width = Literal["wide", "narrow", "any", "small"]
WIDTHS: Mapping[Width, int] = {"wide": 820, "narrow": 350, "any": 400, "small": 200}
COLOURS = 8
DASHES: Sequence[Sequence[int]] = ([1, 0], [7, 3], [2, 2], [9, 3, 2, 3], [5, 2], [1, 3], [12, 3], [4, 4])
INK, QUIET, GRID, PAPER = "var(--ink)", "var(--quiet)", "var(--grid)", "var(--paper)"


def colour(index: int) -> str:
    """Of the arm with that activation, all over the page; its name is the arm's alone, see :func:`repeated`."""
    return f"var(--arm-{index})"


def repeated(count: int) -> str:
    """Style that gives arms beyond the page's colours those colours again; empty where they are enough."""
    names = " ".join(f"--arm-{index}: var(--arm-{index % COLOURS});" for index in range(COLOURS, count))
    return f":root {{ {names} }}\n" if names else ""


def dash(index: int) -> Sequence[int]:
    """Of its lines, so that colour is not the only difference; a colour that comes round has another dash."""
    return DASHES[(index + index // COLOURS) % len(DASHES)]


def data(rows: Sequence[Mapping[str, Any]]) -> alt.InlineData:
    """Rows for a chart."""
    return alt.InlineData(values=list(rows))


def draw(layers: Sequence[alt.Chart], *, height: int, label: str, width: Width = "any") -> Markup:
    """The layers as inline SVG of a natural width that the page may shrink or stretch a little.

    Args:
        layers: bottom first; their colours are CSS variables; their texts may hold anything, they are escaped.
        height: of everything, in pixels.
        label: what a screen reader says in its place.
        width: ``wide`` or ``narrow`` for a chart drawn in both, ``any`` or ``small`` for a panel.
    """
    chart = alt.LayerChart(layer=list(layers), width=WIDTHS[width], height=height, background="transparent")
    chart = chart.properties(autosize=alt.AutoSizeParams(type="fit", contains="padding"))
    svg = vl_convert.vegalite_to_svg(_styled(chart).to_dict(), vl_version=".".join(alt.SCHEMA_VERSION.split(".")[:2]))
    return _inline(svg, width, label)


def _styled(chart: alt.LayerChart) -> alt.LayerChart:
    styled: alt.LayerChart = (
        chart.configure_axis(
            aria=False,
            labelColor=QUIET,
            titleColor=QUIET,
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
            titlePadding=8,
            gridColor=GRID,
            domainColor=GRID,
            tickColor=GRID,
        )
        .configure_axisX(tickSize=4, labelPadding=4, labelFlush=False, labelOverlap=True)
        .configure_axisY(domain=False, ticks=False, labelPadding=8)
        .configure_view(stroke=None)
    )
    return styled


def _inline(svg: str, width: Width, label: str) -> Markup:
    """Swap the opening tag for the page's, drop what only Vega's own page needs, and shorten coordinates."""
    opening, body = svg.split(">", 1)
    box = re.search(r'viewBox="[\d. ]+"', opening)
    assert box is not None, opening
    body = re.sub(r' (?:role|aria-roledescription|pointer-events|font-family|class)="[^"]*"', "", body)
    body = re.sub(r' aria-hidden="true"| opacity="1"| stroke-width="0"', "", body)
    body = re.sub(r'<path(?: transform="[^"]*")? d=""[^>]*/>', "", body)
    body = re.sub(r' (?:d|transform|[xy][12]?)="[^"]*"', lambda found: _short(found[0]), body)
    head = f'<svg class="{width}" {box[0]} width="{WIDTHS[width]}" role="img" aria-label="{escape(label)}">'
    return Markup(head + body)


def _short(attribute: str) -> str:
    return re.sub(r"(\.\d)\d+", r"\1", attribute)


def looks(arms: Sequence[Arm]) -> dict[str, int]:
    """Arm name to the number of its colour: one an activation and its normalization, in the order of the plan."""
    kinds = list(dict.fromkeys((arm.activation, arm.norm) for arm in arms))
    return {arm.name: kinds.index((arm.activation, arm.norm)) for arm in arms}
