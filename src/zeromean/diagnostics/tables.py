"""A report for the terminal: findings first, then a row a layer, then what was not read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from zeromean.diagnostics.meaning import MEANINGS
from zeromean.diagnostics.report import NOTHING, LayerReport, Report

MOST_FINDINGS = 12
_ACTIVATIONS = ("mean", "shift", "spread", "saturated", "dead", "never_off")
_WEIGHTS = ("input_mean", "input_shift", "spread", "weight_gradient", "output_gradient")
_NATURAL = ("k", "bias_ratio", "shift_ratio", "cosine", "norm_ratio", "residual")


def page(report: Report) -> RenderableType:
    """Findings, tables of the layers at the last measured step, and what was not read."""
    units = [layer for layer in report.layers if layer.role == "unit"]
    groups = (
        ("Activations", [layer for layer in report.layers if layer.role != "unit"], _ACTIVATIONS),
        ("Weights", units, _WEIGHTS),
        ("Against the unit natural gradient", [layer for layer in units if "residual" in layer.series], _NATURAL),
    )
    step = f", step {report.steps[-1]}" if len(report.steps) > 1 else ""
    tables = [layers(f"{title}{step}", shown, columns) for title, shown, columns in groups if shown]
    return Group(findings(report), *tables, not_read(report))


def findings(report: Report) -> Text:
    """The gravest findings, each remedy told once."""
    found = report.findings
    if not found:
        return Text(f"{NOTHING}\n")
    lines, told = Text("Findings\n", style="bold"), set[str]()
    for place, one in enumerate(found[:MOST_FINDINGS], 1):
        lines.append(f"{place:>3}. {one.layer}: {one.text}\n", style="not bold")
        if one.remedy not in told:
            lines.append(f"     -> {one.remedy}\n", style="not bold dim")
        told.add(one.remedy)
    if len(found) > MOST_FINDINGS:
        lines.append(f"     and {len(found) - MOST_FINDINGS} more of less gravity\n", style="not bold")
    return lines


def layers(title: str, shown: Sequence[LayerReport], columns: Sequence[str]) -> Table:
    """A row a layer; what lies outside of its healthy range is marked with an exclamation mark."""
    title += " (! outside of the healthy range)"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    known = [name for name in columns if any(layer.value(name) is not None for layer in shown)]
    for head in ("layer", "kind"):
        table.add_column(head, overflow="fold")
    for head in ("units", *(MEANINGS[name].title for name in known)):
        table.add_column(head, justify="right")
    for layer in shown:
        table.add_row(layer.name, layer.kind, str(layer.units), *(_cell(layer, name) for name in known))
    return table


def _cell(layer: LayerReport, quantity: str) -> Text:
    value, meaning = layer.value(quantity), MEANINGS[quantity]
    if meaning.is_healthy(value):
        return Text(meaning.print(value))
    return Text(f"!{meaning.print(value)}", style="bold red")


def not_read(report: Report) -> Text:
    """Notes of layers, modules that were skipped by kind and reason, and functions that no hook sees."""
    notes = [f"{layer.name}: {', '.join(layer.notes)}" for layer in report.layers if layer.notes]
    reasons = Counter((one.kind, one.reason) for one in report.skipped)
    names = {key: [one.name for one in report.skipped if (one.kind, one.reason) == key] for key in reasons}
    skipped = [f"{count} {kind} not read ({_few(names[kind, why])}): {why}" for (kind, why), count in reasons.items()]
    unseen = [f"unseen: {one}; write it as a module to have it measured" for one in report.unseen]
    return Text("\n".join(["", *report.notes, *_few_lines(notes), *skipped, *unseen]))


def _few(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _few_lines(lines: list[str], most: int = 8) -> list[str]:
    return lines[:most] + ([f"... and {len(lines) - most} more layers with notes"] if len(lines) > most else [])
