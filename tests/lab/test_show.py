"""What the terminal shows of plans and results."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console, RenderableType
from tests.lab.image_study import CPU, tiny_cifar, write_image_study

from zeromean.lab import show
from zeromean.lab.plan import describe, make
from zeromean.lab.recipes import find, override
from zeromean.lab.store import Study
from zeromean.lab.summary import load

StudyFolder = Callable[..., Study]


def printed(page: RenderableType, width: int = 200) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(page)
    return file.getvalue()


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ("cifar100-elu11", "smallest detectable difference of the test error: 0.5 points"),
        ("mnist-autoencoder", "smallest detectable difference of the test reconstruction error: "),
    ],
)
def test_a_plan_tells_a_difference_in_its_unit(recipe: str, told: str) -> None:
    plan = make(find(recipe), ("elu", "relu"), seeds=8 if "cifar" in recipe else 12)
    facts = describe(plan, tiny_cifar(train=100), CPU, None)
    lines = printed(show.plan(facts, Study(Path("x")))).splitlines()
    (line,) = (line for line in lines if line.startswith("smallest"))
    assert line.startswith(told)
    assert re.search(r": [\d.]+ (points|× 1e-3) \(80 % power", line)


def test_results_say_what_was_trained(tmp_path: Path) -> None:
    study = write_image_study(tmp_path, seeds=1)
    written = study.plan()
    assert written is not None
    title = override(find("cifar100-elu11"), ["length=0.1"]).title
    study.write_plan({**written, "recipe": {**written["recipe"], "title": title}})
    assert printed(show.results(load(study))).startswith("cifar100-elu11: 11-layer network on CIFAR-100 (length=0.1)\n")


def test_a_narrow_terminal_loses_no_letter(study_folder: StudyFolder) -> None:
    summary = load(study_folder(seeds=6, epochs=2))
    shown = printed(show.results(summary), width=44)
    assert "…" not in shown
    assert sum(shown.count(letter) for letter in "0123456789") == sum(
        printed(show.results(summary)).count(letter) for letter in "0123456789"
    )


def test_brackets_in_a_folder_are_no_markup() -> None:
    facts = describe(make(find("cifar100-elu11"), ("elu",), seeds=1), tiny_cifar(train=100), CPU, None)
    shown = " ".join(printed(show.plan(facts, Study(Path("runs/try[/old]")))).split())
    assert "11-layer network on CIFAR-100 -> runs/try[/old] arm" in shown


def test_brackets_in_the_data_folder_are_no_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROMEAN_DATA", str(tmp_path / "a[bold]b"))
    assert "a[bold]b" in printed(show.data_sets(()), width=800)
