"""What the terminal shows: tables of recipes, activations, data sets, plans and results."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import zeromean
import zeromean.nn as zmnn
from zeromean.lab.activation import parse
from zeromean.lab.data import describe, load
from zeromean.lab.recipes import RECIPES, find
from zeromean.lab.store import Study
from zeromean.lab.summary import Summary, to_tables
from zeromean.lab.summary import load as load_summary
from zeromean.spelling import nearest


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def recipes() -> Table:
    """Every recipe with its data and default arms."""
    table = _table("Recipes", "name", "what", "data", "epochs", "arms")
    for name in RECIPES:
        recipe = find(name)
        table.add_row(name, recipe.title, recipe.data, str(recipe.epochs), " ".join(recipe.activations))
    return table


def activations() -> Table:
    """Every activation with the mean of its output and its gain for unit Gaussian inputs."""
    table = _table("Activations (mean output and gain for a unit Gaussian input)", "name", "module", "mean", "gain")
    for name, module in zmnn.ACTIVATIONS.items():
        found = zmnn.moments(module())
        table.add_row(name, module.__name__, f"{found.mean:+.4f}", f"{found.second**-0.5:.4f}")
    return table


def page(target: str) -> RenderableType:
    """A recipe, an activation or a study, whichever the name means."""
    if (Path(target) / "plan.json").exists():
        return results(load_summary(Study(Path(target))))
    if target in RECIPES:
        return _recipe(target)
    name = target.partition(":")[0].partition("(")[0]
    if name in zmnn.ACTIVATIONS:
        return _activation(target)
    raise ValueError(
        f"{target!r} is no recipe, activation or study folder: {nearest(target, [*RECIPES, *zmnn.ACTIVATIONS])}"
    )


def _recipe(name: str) -> Table:
    recipe = find(name)
    table = _table(recipe.title, "field", "value")
    for field in recipe.__dataclass_fields__:
        value = getattr(recipe, field)
        table.add_row(field, ",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return table


def _activation(text: str) -> RenderableType:
    activation = parse(text)
    found = zmnn.moments(activation.build())
    facts = (
        f"unit Gaussian input: mean {found.mean:+.4f}, variance {found.variance:.4f}, second moment {found.second:.4f}"
    )
    family = inspect.getmodule(getattr(zeromean.functional, activation.name))
    formula = (inspect.getdoc(family) or "") if family and family.__name__.startswith("zeromean.") else ""
    usage = inspect.getdoc(zmnn.ACTIVATIONS[activation.name]) or ""
    return Group(Text(activation.label, style="bold"), Text(f"{formula}\n\n{usage}\n\n{facts}"))


def data_sets(names: Sequence[str]) -> Table:
    """Every data set and its state, after loading the named ones."""
    for name in names:
        load(name)
    table = _table("Data sets", "name", "training", "test", "pixels", "state", "where", "note")
    for row in describe():
        pixels = "x".join(map(str, row.image_shape[1:]))
        table.add_row(row.name, str(row.train_count), str(row.test_count), pixels, row.state, row.where, row.detail)
    return table


def plan(facts: dict[str, Any], study: Study) -> RenderableType:
    """The plan as it is announced before anything runs."""
    recipe, budget = facts["recipe"], facts["budget"]
    table = _table(f"{recipe['title']} -> {study.path}", "arm", "activation", "learning rate", "seeds")
    for arm in facts["arms"]:
        rate = "tuned" if arm["learning_rate"] is None else f"{arm['learning_rate']:g}"
        table.add_row(arm["label"], arm["activation"], rate, str(len(facts["seeds"])))
    lines = [
        f"{budget['runs']} runs of {recipe['epochs']} epochs each on {facts['device']['kind']} "
        f"({facts['device']['name']}); "
        f"training takes about {_duration(budget['seconds_estimate'])}"
    ]
    if facts["tune"]:
        lines.append(
            f"tuning: {budget['tuning_runs_per_arm']} runs per arm over {recipe['tuning_grid']}, the same for every arm"
        )
    lines.append(_detectable(facts))
    return Group(table, Text("\n".join(lines)))


def _detectable(facts: dict[str, Any]) -> str:
    if not facts["comparisons"]:
        return "one arm: nothing to compare"
    difference, recipe = facts["detectable_difference"], facts["recipe"]
    pairs = _count(facts["comparisons"], "comparison")
    if difference is None:
        return f"{_count(facts['seeds'], 'seed')} cannot support a verdict on {pairs}: use more seeds"
    return (
        f"smallest detectable difference of the test error: {difference:.2g} {recipe['error_unit']} "
        f"(80 % power, 5 % level, {pairs}, sd {recipe['expected_sd']:g} assumed from our records)"
    )


def _count(things: Sequence[Any], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def results(summary: Summary) -> RenderableType:
    """Verdicts and the table of arms."""
    words = "\n".join(
        word for word in (*summary.sentences, summary.progress, summary.exclusions, summary.edges) if word
    )
    return Group(Text(words), *to_tables(summary))
