"""``zeromean probe`` on a recipe and on a module of the user's own."""

from collections.abc import Callable
from pathlib import Path

import pytest

from zeromean.diagnostics import Report
from zeromean.lab.cli import main

OWN = """
from torch import nn
def build(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
def flat(): return nn.Sequential(nn.Linear(64, 10))
def nothing(): return 3
"""
Zeromean = Callable[..., str]


@pytest.fixture
def zeromean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Zeromean:
    """Runs a command in a folder with a module; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("zeromean.lab.cli._console.width", 200)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_probed_module.py").write_text(OWN)

    def call(*words: str) -> str:
        main(["probe", *words])
        return capsys.readouterr().out

    return call


def test_a_recipe_before_and_while_it_trains(zeromean: Zeromean, tmp_path: Path) -> None:
    out = zeromean("digits-mlp8", "--activation", "relu", "--samples", "100")
    assert "8 x 128 network on the embedded digits, ReLU" in out
    assert "of units are switched off on at least 90 % of this batch" in out
    report = Report.from_json((tmp_path / "runs/probe/report.json").read_text())
    assert (report.preset, len(report.layers)) == ("full", 17)
    zeromean("digits-mlp8", "--preset", "light", "--steps", "4", "--every", "3", "--samples", "50", "--output", "out")
    report = Report.from_json((tmp_path / "out/report.json").read_text())
    assert report.steps == (0, 3, 4)
    assert report["1"].kind == "ELU"
    assert report["0"].series["weight_gradient"][0] != report["0"].series["weight_gradient"][2]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"report.json", "units.svg", "steps_input_shift.svg", "steps_weight_gradient.svg"} <= names
    assert "arrows.svg" not in names


def test_a_model_of_ones_own(zeromean: Zeromean, tmp_path: Path) -> None:
    out = zeromean("my_probed_module:build", "--data", "digits", "--samples", "40")
    assert "1 BatchNorm2d not read (1): neither" in out
    assert (tmp_path / "runs/probe/arrows.svg").exists()
    assert "Linear" in zeromean("my_probed_module:flat", "--flat", "--samples", "40", "--layers", "0")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["digits-mlp"], "is no recipe: did you mean 'digits-mlp8'?"),
        (["no_such_module:build"], "no module 'no_such_module' is found from"),
        (["my_probed_module:biuld"], "has no function 'biuld': did you mean 'build'?"),
        (["my_probed_module:nothing"], "must return a torch.nn.Module, got int"),
        (["my_probed_module:build", "--activation", "elu"], "activation is for recipes"),
        (["digits-mlp8", "--layers", "conv*"], "layers='conv*' matches no module"),
        (["digits-mlp8", "--preset", "heavy"], "preset must be light or full, got 'heavy'"),
        (["digits-mlp8", "--samples", "1"], "samples must be at least 2"),
    ],
)
def test_errors_teach(zeromean: Zeromean, capsys: pytest.CaptureFixture[str], words: list[str], error: str) -> None:
    with pytest.raises(SystemExit) as stop:
        zeromean(*words)
    assert stop.value.code == 2
    assert error in capsys.readouterr().err
