"""A benchmark from the first measurement to the summary: ceilings, cases, tables, picture."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from zeromean.lab.bench import ceilings, contenders, tables
from zeromean.lab.bench.clock import Pass
from zeromean.lab.bench.measure import Bench, candidates
from zeromean.lab.bench.record import Record, conditions, facts, identity
from zeromean.lab.bench.settings import DTYPES, ELEMENTS, Case, Settings
from zeromean.lab.store import write_whole

Todo = dict[Case, dict[Pass, list[str]]]


def run(settings: Settings, folder: Path, *, fresh: bool = False, console: Console | None = None) -> Record:
    """Measure what is not in the folder yet, then write and print the summary.

    Args:
        settings: What to measure.
        folder: Where the results lie.
        fresh: Whether to throw away what lies there.
        console: Where to print.

    Raises:
        ValueError: If the folder holds measurements made under other conditions.
    """
    console = console or Console(highlight=False)
    record = Record(folder)
    if fresh:
        record.clear()
    record.check(conditions(settings))
    absent = contenders.missing(settings.contenders)
    for name, reason in absent.items():
        console.print(f"without {name}: {reason}", soft_wrap=True, markup=False)
    todo = _todo(settings, record, [name for name in settings.contenders if name not in absent])
    if todo:
        # A copy that fits into a cache would be no ceiling.
        elements = max(ELEMENTS[settings.device.type], *(case.elements for case in settings.cases))
        limits = ceilings.measure(elements, DTYPES[settings.cases[0].dtype], settings.device)
        machine = facts(settings, limits, absent)
        record.begin(machine)
        console.print(tables.headline(machine), soft_wrap=True)
        _measure(todo, settings, record, console)
    summarise(record, console)
    return record


def summarise(record: Record, console: Console) -> None:
    """Write summary.md and the pictures of a folder from its rows, and print the tables.

    Raises:
        ValueError: If the folder holds no benchmark.
    """
    machine, rows = record.machine(), record.rows()
    if machine is None or not rows:
        raise ValueError(f"{record.path} holds no measurements: name the folder given to zeromean bench --output")
    drawn = _draw(record, console)
    write_whole(record.path / "summary.md", tables.to_markdown(rows, machine, drawn).encode())
    console.print(tables.to_terminal(rows, machine))
    console.print(f"written to {record.path}", soft_wrap=True, markup=False)


def _draw(record: Record, console: Console) -> list[str]:
    try:
        from zeromean.lab.bench.picture import pictures
    except ModuleNotFoundError as error:
        console.print(f"no picture ({error}): zeromean bench --redraw draws it where that is installed")
        return []
    drawn = pictures(record.rows())
    for name, content in drawn.items():
        write_whole(record.path / name, content)
    return list(drawn)


def _measure(todo: Todo, settings: Settings, record: Record, console: Console) -> None:
    total = sum(map(len, todo.values()))
    with _bar(console) as bar:
        task = bar.add_task("measuring", total=total)
        started = time.monotonic()
        for number, (case, passes) in enumerate(todo.items(), 1):
            bar.update(task, description=_describe(case))
            bench = Bench(case, list(dict.fromkeys(itertools.chain(*passes.values()))), settings.device)
            for which, left in passes.items():
                record.append(bench.rows(which, settings.rounds, left))
                bar.advance(task)
            if not console.is_terminal:
                left_seconds = (time.monotonic() - started) / number * (len(todo) - number)
                console.print(f"{number} of {len(todo)}: {_describe(case)}; {left_seconds:.0f} s left", soft_wrap=True)
            del bench
            if settings.device.type == "cuda":
                torch.cuda.empty_cache()


def _todo(settings: Settings, record: Record, names: Sequence[str]) -> Todo:
    """The contenders whose rows are not there yet; one that erred is tried again."""
    done = {identity(row) for row in record.rows() if "error" not in row}
    todo: Todo = {}
    for case, which in settings.units():
        place = (case.activation, which, case.dtype, case.layout, case.elements)
        left = [name for name in candidates(case, which, names, settings.device) if (*place, name) not in done]
        if left:
            todo.setdefault(case, {})[which] = left
    return todo


def _describe(case: Case) -> str:
    return f"{case.activation}, {case.layout}, {case.dtype}, {tables.size(case.elements)}"


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("passes"))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(compact=True))
    return Progress(*columns, *times, console=console, disable=not console.is_terminal)
