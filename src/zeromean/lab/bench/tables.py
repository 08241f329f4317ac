"""The tables of a benchmark, on the terminal and in ``summary.md``: the same cells, the best in bold, losses shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from zeromean.lab.bench.clock import Pass
from zeromean.lab.bench.contenders import CONTENDERS
from zeromean.lab.bench.inputs import Layout
from zeromean.lab.bench.measure import Row
from zeromean.lab.bench.subjects import SUBJECTS

OURS = "zeromean"
_SAVED = "saved_bytes_per_element"
_LABELS = ("activation", "layout", "pass")
_ORDER = {"activation": [*SUBJECTS], "layout": [*get_args(Layout)], "pass": [*get_args(Pass)]}
_READING = (
    "Fraction of copy: (ideal bytes / time) / (copied bytes / time of a device copy in the same round), where ideal is "
    "2 tensors forward and 3 backward. Both passes together are in microseconds a call, the host's share included. "
    "Ours against the best other: how many times faster, below 1 slower. Errors are against float64, relative ones "
    "where the true value exceeds 0.001. A dash: the contender has no such function or pass."
)


@dataclass(frozen=True)
class Cell:
    """A text, and whether it is the best of its row."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Grid:
    """A table before it is drawn."""

    title: str
    header: tuple[str, ...]
    labels: int
    lines: tuple[tuple[Cell, ...], ...]


def grids(rows: Sequence[Row]) -> list[Grid]:
    """Speed, saved bytes and accuracy for every dtype and size in the rows."""
    found = []
    for dtype, elements in dict.fromkeys((row["dtype"], row["elements"]) for row in rows):
        part = [row for row in rows if (row["dtype"], row["elements"]) == (dtype, elements)]
        what = f"{dtype}, {size(elements)} elements"
        found += [
            _grid(f"Fraction of copy: {what}", part, _LABELS, _speed, best="milliseconds", versus=True),
            _grid(f"Bytes kept for the backward pass, an element: {what}", part, _LABELS[:2], _saved, best=_SAVED),
            _grid(f"Largest relative (absolute) error: {what}", part, _LABELS, _error),
        ]
    return found


def size(elements: int) -> str:
    """``2^28`` for a power of two, else the number."""
    power = elements.bit_length() - 1
    return f"2^{power}" if elements == 2**power and elements >= 1024 else str(elements)


def contenders_of(rows: Sequence[Row]) -> list[str]:
    """Those in the rows, in the order of `CONTENDERS`."""
    present = {row["contender"] for row in rows}
    return [name for name in CONTENDERS if name in present]


def groups(rows: Sequence[Row], labels: Sequence[str] = _LABELS) -> dict[tuple[str, ...], dict[str, Row]]:
    """Rows by activation, layout and pass, in reading order; then by contender.

    Args:
        rows: Of one dtype and size.
        labels: The keys to group by; of several rows of a contender in a group the first counts.
    """
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: [_ORDER[label].index(row[label]) for label in _LABELS]):
        found.setdefault(tuple(row[label] for label in labels), {}).setdefault(row["contender"], row)
    return found


def _grid(
    title: str,
    rows: Sequence[Row],
    labels: Sequence[str],
    text: Callable[[Row], str],
    *,
    best: str | None = None,
    versus: bool = False,
) -> Grid:
    names = contenders_of(rows)
    lines = []
    for place, group in groups(rows, labels).items():
        winners = _smallest(group, best) if best else set()
        cells = [Cell(text(group[name]), name in winners) if name in group else Cell("-") for name in names]
        lines.append((*map(Cell, place), *cells, *([Cell(_against(group))] if versus else [])))
    header = (*labels, *names, *(["ours against the best other"] if versus else []))
    return Grid(title, header, len(labels), tuple(lines))


def _speed(row: Row) -> str:
    if row["milliseconds"] is None:
        return "error"
    return f"{1000 * row['milliseconds']:.1f} us" if row["pass"] == "both" else f"{row['fraction_of_copy']:.3f}"


def _saved(row: Row) -> str:
    return "error" if row[_SAVED] is None else f"{row[_SAVED]:.3g}"


def _error(row: Row) -> str:
    if row["milliseconds"] is None:
        return "error"
    relative, absolute = row["max_relative_error"], row["max_absolute_error"]
    return "NaN" if relative is None else f"{relative:.2g} ({absolute:.2g})"


def _smallest(group: Mapping[str, Row], key: str) -> set[str]:
    known = {name: row[key] for name, row in group.items() if row[key] is not None}
    return {name for name, value in known.items() if value == min(known.values())}


def _against(group: Mapping[str, Row]) -> str:
    others = {name: row for name, row in group.items() if not name.startswith(OURS) and row["milliseconds"]}
    if OURS not in group or not group[OURS]["milliseconds"] or not others:
        return "-"
    rival = min(others, key=lambda name: others[name]["milliseconds"])
    return f"{others[rival]['milliseconds'] / group[OURS]['milliseconds']:.2f} x {rival}"


def notes(rows: Sequence[Row], machine: Mapping[str, Any]) -> list[str]:
    """What the tables cannot say: who is missing, who erred and how."""
    lines = [f"{name}: {reason}" for name, reason in machine["missing"].items()]
    for row in rows:
        what = row.get("error") or row.get("remark")
        if what:
            place = " ".join(str(row[key]) for key in ("activation", "pass", "dtype", "layout"))
            lines.append(f"{row['contender']}, {place}, {size(row['elements'])} elements: {what}")
    return lines


def headline(machine: Mapping[str, Any]) -> str:
    """The machine and its ceilings in a sentence."""
    device, found = machine["conditions"]["device"], machine["ceilings"]
    return (
        f"{device['name']}, torch {machine['conditions']['versions']['torch']}: copy "
        f"{found['copy_gigabytes_per_second']:.0f} GB/s ({size(found['copy_elements'])} {found['copy_dtype']}), "
        f"bfloat16 product {found['product_teraflops']:.3g} TFLOP/s ({found['product_size']}^3)"
    )


def to_terminal(rows: Sequence[Row], machine: Mapping[str, Any]) -> RenderableType:
    """All tables for a console."""
    return Group(Text(headline(machine)), *map(_drawn, grids(rows)), Text("\n".join((*notes(rows, machine), _READING))))


def _drawn(grid: Grid) -> Table:
    table = Table(title=grid.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for number, column in enumerate(grid.header):
        table.add_column(column, justify="left" if number < grid.labels else "right", overflow="fold")
    for line in grid.lines:
        table.add_row(*(Text(cell.text, style="bold green" if cell.best else "") for cell in line))
    return table


def to_markdown(rows: Sequence[Row], machine: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The content of ``summary.md``."""
    parts = ["# Activations against the copy", headline(machine), f"`{machine['command']}`, {machine['date']}"]
    parts += [f"![fraction of copy]({name})" for name in pictures if name.endswith(".svg")]
    for grid in grids(rows):
        rule = " | ".join("---" if number < grid.labels else "---:" for number in range(len(grid.header)))
        lines = [" | ".join(f"**{c.text}**" if c.best else c.text for c in line) for line in grid.lines]
        parts += [f"## {grid.title}", "\n".join(f"| {line} |" for line in (" | ".join(grid.header), rule, *lines))]
    told = notes(rows, machine)
    if told:
        parts += ["## Missing or failed", "\n".join(f"- {line}" for line in told)]
    return "\n\n".join([*parts, _READING]) + "\n"
