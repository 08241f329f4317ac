"""What the terminal shows: tables of recipes, activations, data sets, plans and results."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import zeromean
import zeromean.nn as zmnn
from zeromean.lab.activation import parse
from zeromean.lab.data import FolderDataset, describe, describe_folders, load_any
from zeromean.lab.data.folder import expanded
from zeromean.lab.recipes import RECIPES, ImageRecipe, find
from zeromean.lab.schedule import duration, length, setting
from zeromean.lab.store import Study
from zeromean.lab.summary import Summary, difference_unit_of, metric_of, to_tables
from zeromean.lab.summary import load as load_summary
from zeromean.spelling import nearest


def _table(title: str, *columns: str) -> Table:
    """A table whose first column, a name to be typed, is not broken."""
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=place == 0)
    return table


def recipes() -> Table:
    """Every recipe with its data and default arms."""
    table = _table("Recipes", "name", "what", "data", "training", "arms")
    for name in RECIPES:
        recipe = find(name)
        long = f"{recipe.steps:,} steps" if isinstance(recipe, ImageRecipe) else f"{recipe.epochs:,} epochs"
        table.add_row(name, recipe.title, recipe.data, long, " ".join(recipe.activations))
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
    for field, value in asdict(recipe).items():
        table.add_row(field, setting(field, value))
    if isinstance(recipe, ImageRecipe):
        table.add_row("steps", f"{recipe.steps:,} in all; length=0.1 takes a tenth of each phase")
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
    """Every data set and its state, after loading the named ones; those named by a path come last.

    Raises:
        ValueError: a name is unknown, or a named data set cannot be had or is not as it must be.
    """
    named = [load_any(name) for name in names]
    table = _table("Data sets", "name", "training", "test", "pixels", "state", "where", "note")
    for row in (*describe(), *describe_folders()):
        counts, pixels = (str(row.train_count), str(row.test_count)), "x".join(map(str, row.image_shape[1:]))
        table.add_row(row.name, *counts, pixels, row.state, Text(row.where), Text(row.detail))
    for dataset in named:
        if isinstance(dataset, FolderDataset) and "/" in dataset.name:
            table.add_row(*_folder(dataset))
    return table


def _folder(dataset: FolderDataset) -> list[str | Text]:
    counts = [str(len(labels)) for labels in (dataset.train_labels, dataset.test_labels)]
    where = Text(str(expanded(dataset.name).resolve()))
    note = f"{_classes(dataset.classes)}, listed; contents are not checked"
    return [Text(dataset.name), *counts, "any", "present", where, note]


def _classes(names: Sequence[str]) -> str:
    return f"{len(names):,} class{'' if len(names) == 1 else 'es'}"


def plan(facts: dict[str, Any], study: Study) -> RenderableType:
    """The plan as it is announced before anything runs."""
    recipe, budget = facts["recipe"], facts["budget"]
    table = _table(f"{recipe['title']} -> {study.path}", "arm", "activation", "learning rate", "seeds")
    for arm in facts["arms"]:
        rate = "tuned" if arm["learning_rate"] is None else f"{arm['learning_rate']:g}"
        table.add_row(arm["label"], arm["activation"], rate, str(len(facts["seeds"])))
    lines = [
        f"{_number(budget['runs'], 'run')} of {length(recipe, budget['epochs'])} each on {facts['device']['kind']} "
        f"({facts['device']['name']}); {_time(budget['seconds_estimate'])}"
    ]
    if "phases" in recipe:
        lines.append(_images(facts["data"]))
    if facts["tune"]:
        lines.append(
            f"tuning: {budget['tuning_runs_per_arm']} runs per arm over {recipe['tuning_grid']}, the same for every arm"
        )
    lines.append(_detectable(facts))
    return Group(table, Text("\n".join(lines)))


def _images(held: dict[str, Any]) -> str:
    counts = {"training": held["train"], "validation": held["validation"], "test": held["test"]}
    told = ", ".join(f"{count:,} {part}" for part, count in counts.items() if count)
    return f"{held['name']}: {told} images, {_classes(held['classes'])}"


def _detectable(facts: dict[str, Any]) -> str:
    if not facts["comparisons"]:
        return "one arm: nothing to compare"
    difference, recipe = facts["detectable_difference"], facts["recipe"]
    pairs = _number(len(facts["comparisons"]), "comparison")
    if difference is None:
        return f"{_number(len(facts['seeds']), 'seed')} cannot support a verdict on {pairs}: use more seeds"
    return (
        f"smallest detectable difference of the {metric_of(facts)}: {difference:.2g} {difference_unit_of(facts)} "
        f"(80 % power, 5 % level, {pairs}, sd {recipe['expected_sd']:g} assumed from our records)"
    )


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _time(seconds: float | None) -> str:
    return "the first epoch tells the time" if seconds is None else f"training takes about {duration(seconds)}"


def results(summary: Summary) -> RenderableType:
    """What was trained, verdicts, and the tables of arms and comparisons."""
    title = Text(f"{summary.plan['study']}: {summary.plan['recipe']['title']}", style="bold")
    words = "\n".join(
        word for word in (*summary.sentences, summary.progress, summary.exclusions, summary.edges) if word
    )
    return Group(title, Text(words), *to_tables(summary))
