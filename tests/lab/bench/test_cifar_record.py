"""The record of studies on CIFAR: every run as a row, every arm beside the paper."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from benchmarks import cifar_record
from tests.lab.image_study import CPU, tiny_cifar

from zeromean.lab.plan import describe, make
from zeromean.lab.recipes import find, override
from zeromean.lab.store import Study


def write(root: Path, recipe: str, *errors: float | None, changes: tuple[str, ...] = ()) -> Path:
    """A study of ELU with a seed for each error; None stands for a run that diverged."""
    chosen = override(find(recipe), changes)
    plan = make(chosen, ("elu",), seeds=len(errors))
    study = Study(root / f"{recipe}{len(changes)}")
    study.write_plan(describe(plan, tiny_cifar(train=600), CPU, None))
    for run, error in zip(plan.runs({}), errors, strict=True):
        study.begin(run)
        study.append_metrics(run, {"epoch": 1})
        outcome = {"status": "diverged" if error is None else "ok", "test_error": error, "epochs": 1}
        study.finish(run, {**outcome, "seconds": 300.0, "images_per_second": 40_000.0}, None)
    return study.path


def record(monkeypatch: pytest.MonkeyPatch, out: Path, *studies: Path) -> tuple[list[list[str]], str]:
    """The rows of the first table, and the picture; empty where there is none."""
    monkeypatch.setattr(sys, "argv", ["cifar_record.py", *map(str, studies), "--out", str(out)])
    cifar_record.main()
    first = (out / "table.md").read_text().partition("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in first[2:]]
    picture = out / "runs.svg"
    return cells, picture.read_text() if picture.exists() else ""


def test_the_18_layer_recipes_stand_beside_the_papers_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("cifar100-elu18", "cifar10-elu18", "cifar100-elu18-fast", "cifar10-elu18-fast")
    errors = ((24.4, 24.5, 24.6), (6.5, 6.6, 6.7), (25.0, None, 25.2), (7.0, 7.1, 7.2))
    studies = [write(tmp_path, name, *own) for name, own in zip(names, errors, strict=True)]
    cells, picture = record(monkeypatch, tmp_path / "record", *studies)
    assert cells == [
        ["18-layer network on CIFAR-100", "ELU", "3", "0", "24.50 ± 0.10", "24.28", "+0.22"],
        ["18-layer network on CIFAR-10", "ELU", "3", "0", "6.60 ± 0.10", "6.55", "+0.05"],
        ["18-layer network on CIFAR-100, fast schedule", "ELU", "2", "1", "25.10 ± 0.14", "24.28", "+0.82"],
        ["18-layer network on CIFAR-10, fast schedule", "ELU", "3", "0", "7.10 ± 0.10", "6.55", "+0.55"],
    ]
    assert picture.count('aria-roledescription="point"') == 11
    assert picture.count('aria-roledescription="tick"') == 4
    assert picture.count(">circles: our runs; line: the paper's error<") == 4
    assert "standard deviation" not in picture  # the paper gives none
    assert "one arm: nothing to compare" in (tmp_path / "record" / "table.md").read_text()


def test_another_training_is_not_drawn_among_the_published_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies = [write(tmp_path, "cifar100-elu11", 29.3, changes=own) for own in ((), ("length=0.5",))]
    cells, picture = record(monkeypatch, tmp_path / "record", *studies)
    titles = ["11-layer network on CIFAR-100", "11-layer network on CIFAR-100 (length=0.5)"]
    assert [row[0] for row in cells] == titles
    assert [row[4:] for row in cells] == [["29.30", "28.75 ± 0.24", "+0.55"]] * 2
    rows = [json.loads(line) for line in (tmp_path / "record" / "results.jsonl").read_text().splitlines()]
    assert [row["title"] for row in rows] == titles
    assert re.findall(r">(11-layer[^<]+)<", picture) == titles
    assert picture.count(">circles: our runs; bars: the paper's mean ± standard deviation<") == 2


def test_without_any_error_there_are_rows_and_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells, picture = record(monkeypatch, tmp_path / "record", write(tmp_path, "cifar10-elu18", None, None))
    assert cells == [["18-layer network on CIFAR-10", "ELU", "0", "2", "", "6.55", ""]]
    assert picture == ""
    assert len((tmp_path / "record" / "results.jsonl").read_text().splitlines()) == 2
