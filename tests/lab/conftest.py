"""A synthetic study, written through the store as a real one is, and the small network in the place of elu11."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from zeromean.lab.recipes.mnist import digits_mlp8, mnist_autoencoder
from zeromean.lab.recipes.recipe import Recipe
from zeromean.lab.store import Run, Study

# name -> (label, activation, test error, its standard deviation, decay of the loss, median mean activation)
ARMS: dict[str, tuple[str, str, float, float, float, float]] = {
    "elu": ("ELU", "elu", 2.2, 0.25, 0.16, 0.05),
    "relu": ("ReLU", "relu", 3.4, 0.4, 0.10, 0.45),
    "leaky_relu-0.1": ("LeakyReLU(0.1)", "leaky_relu:0.1", 3.2, 0.4, 0.11, 0.35),
    "shifted_relu": ("ShiftedReLU", "shifted_relu", 2.4, 0.3, 0.15, -0.12),
}
StudyFolder = Callable[..., Study]
Zeromean = Callable[..., str]


@pytest.fixture
def zeromean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Zeromean:
    """Runs a command in an empty folder and returns what it printed."""
    from zeromean.lab.cli import main  # needs more packages than the rest of this folder

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("zeromean.lab.cli._console.width", 200)

    def call(*words: str) -> str:
        main(words)
        return capsys.readouterr().out

    return call


@pytest.fixture
def small_networks() -> Iterator[None]:
    """Within, the small network has elu11's place, and torch one thread."""
    from tests.lab.small_images import small

    with small():
        yield


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """Writes a study into a new folder; see :func:`write_study` for what can be asked of it."""
    return lambda **wishes: write_study(tmp_path_factory.mktemp("runs"), **wishes)


def write_study(
    root: Path,
    *,
    seeds: int = 10,
    epochs: int = 100,
    tune: bool = False,
    task: str = "classification",
    validation: int = 0,
    rates: tuple[float, ...] = (0.01,),
    diverged: tuple[tuple[str, int], ...] = (),
    missing: tuple[tuple[str, int], ...] = (),
    arms: tuple[str, ...] = tuple(ARMS),
    plan_changes: Mapping[str, Any] | None = None,
) -> Study:
    """A study of those arms x learning rates x seeds; runs named in ``diverged`` and ``missing`` are (arm, seed)."""
    recipe = digits_mlp8() if task == "classification" else mnist_autoencoder()
    recipe = replace(recipe, epochs=epochs, learning_rates=rates, validation=validation, expected_sd=0.5)
    several = len(rates) > 1
    planned: list[dict[str, Any]] = []
    for name in arms:
        for rate in rates:
            suffix, note = (f"-lr{rate:g}", f", lr {rate:g}") if several else ("", "")
            label, activation = ARMS[name][0] + note, ARMS[name][1]
            planned.append(
                {
                    "name": name + suffix,
                    "label": label,
                    "activation": activation,
                    "learning_rate": None if tune else rate,
                    "norm": "none",
                }
            )
    study = Study(root / "study")
    plan = _plan(recipe, planned, seeds=seeds, tune=tune)
    study.write_plan({**plan, **(plan_changes or {})})
    chosen = {arm["name"]: 0.03 if tune else arm["learning_rate"] for arm in planned}
    if tune:
        _write_tuning(study, recipe, planned, chosen)
    for index, arm in enumerate(planned):
        for seed in range(seeds):
            if (arm["name"], seed) not in missing:
                run = Run(arm["name"], arm["activation"], chosen[arm["name"]], seed)
                _write_run(study, run, recipe, 100 * index + seed, (arm["name"], seed) in diverged)
    return study


def _plan(recipe: Recipe, arms: list[dict[str, Any]], *, seeds: int, tune: bool) -> dict[str, Any]:
    baselines = [arm for arm in arms if arm["activation"] == "relu"] or arms[:1]
    pairs = [[arm["name"], base["name"]] for base in baselines for arm in arms if _comparable(arm, base)]
    return {
        "study": recipe.name,
        "recipe": {**asdict(recipe), "error_unit": recipe.error_unit},
        "arms": arms,
        "comparisons": pairs,
        "seeds": list(range(seeds)),
        "tune": tune,
        "budget": {
            "epochs": recipe.epochs,
            "runs": len(arms) * seeds,
            "runs_per_arm": seeds,
            "tuning_runs_per_arm": len(recipe.tuning_grid) * recipe.tuning_seeds if tune else 0,
            "seconds_estimate": 80.0,
        },
        "detectable_difference": 0.65 if seeds > 5 else None,
        "command": f"zeromean compare {recipe.name} --seeds {seeds}{' --tune' if tune else ''}",
        "created": "2026-11-22T06:00:00Z",
        "versions": {"zeromean": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "numpy": "2.4.6"},
        "device": {"kind": "cpu", "name": "AMD EPYC", "threads": 2, "platform": "Linux-6.1-x86_64", "processes": 1},
        "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": True},
        "data": {
            "name": recipe.data,
            "checksums": {recipe.data: "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"},
            "train": 1437 - recipe.validation,
            "validation": recipe.validation,
            "test": 360,
            "source": "scikit-learn's embedded digits",
        },
    }


def _comparable(arm: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    return bool(arm["activation"] != base["activation"] and arm["learning_rate"] == base["learning_rate"])


def _write_tuning(study: Study, recipe: Recipe, arms: list[dict[str, Any]], chosen: Mapping[str, float]) -> None:
    tuned = {}
    for index, arm in enumerate(arms):
        grid: list[dict[str, Any]] = []
        for place, rate in enumerate(recipe.tuning_grid):
            mean = 2.5 + 4 * abs(math.log10(rate / 0.03)) ** 1.5
            noise = [0.15 * _normal(index, place, seed) for seed in range(recipe.tuning_seeds)]
            errors: list[float | None] = [_rounded(mean + value) for value in noise]
            if rate == max(recipe.tuning_grid) and arm["activation"] == "relu":
                errors[1] = None
            grid.append({"learning_rate": rate, "validation_errors": errors})
        tuned[arm["name"]] = {"chosen": chosen[arm["name"]], "at_edge": index == 2, "grid": grid}
    content = {"arms": tuned, "seeds": list(range(recipe.tuning_seeds)), "validation": recipe.tuning_validation}
    study.write_text("tuning.json", json.dumps(content))


def _write_run(study: Study, run: Run, recipe: Recipe, stream: int, diverged: bool) -> None:
    _, _, error, sd, decay, shift = next(arm for arm in ARMS.values() if arm[1] == run.activation)
    last = recipe.epochs // 4 if diverged else recipe.epochs
    layers = len(recipe.hidden)
    pace = decay * (1 + 0.1 * _normal(stream, 1))
    study.begin(run)
    row: dict[str, Any] = {}
    for epoch in range(1, recipe.epochs + 1):
        alive = epoch < last or not diverged
        loss = 2.2 * math.exp(-pace * epoch) + 4e-4 * (1 + 0.1 * _normal(stream, 2, epoch))
        settled = 1 - math.exp(-epoch / 6)
        median = [
            _rounded(
                shift * settled * (1 + 0.12 * layer)
                + 0.02 * _normal(stream, 3, layer)
                + 0.004 * _normal(stream, 4, layer, epoch)
            )
            for layer in range(layers)
        ]
        row = {
            "epoch": epoch,
            "train_loss": _rounded(loss) if alive else None,
            "train_error": _rounded(max(0.0, 30 * loss - 0.5)) if alive else None,
            "validation_error": _rounded(error + 60 * math.exp(-pace * epoch)) if alive and recipe.validation else None,
            "mean_activation": median if alive else [None] * layers,
            "mean_activation_spread": [_rounded((0.1 + abs(shift)) * settled + 0.02 * layer) for layer in range(layers)]
            if alive
            else [None] * layers,
            "seconds": round(0.02 * epoch, 3),
        }
        study.append_metrics(run, row)
    study.finish(run, _result(run, recipe, row, error + sd * _normal(stream, 5), last if diverged else None), None)


def _result(run: Run, recipe: Recipe, row: Mapping[str, Any], error: float, diverged_at: int | None) -> dict[str, Any]:
    ok = diverged_at is None
    test_error = round(error * 3.6) / 3.6 if recipe.task == "classification" else error
    return {
        "arm": run.arm,
        "activation": run.activation,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "stage": run.stage,
        "status": "ok" if ok else "diverged",
        "diverged_at": diverged_at,
        "epochs": recipe.epochs,
        "train_loss": row["train_loss"] if ok else None,
        "train_error": row["train_error"] if ok else None,
        "validation_error": row["validation_error"] if ok else None,
        "test_error": _rounded(test_error) if ok else None,
        "test_loss": _rounded(error / 20) if ok else None,
        "median_mean_activation": _rounded(sum(map(abs, row["mean_activation"])) / len(recipe.hidden)) if ok else None,
        "seconds": 2.0,
        "together": 40,
    }


def _normal(*stream: int) -> float:
    """About standard normal, the same everywhere: numpy promises no stream across its versions."""
    return 2 * sum(_uniform(*stream, part) for part in range(3)) - 3


def _uniform(*stream: int) -> float:
    phase = sum(
        number * weight for number, weight in zip(stream, (12.9898, 78.233, 37.719, 4.581, 9.151), strict=False)
    )
    return math.sin(phase + 1) * 43758.5453 % 1


def _rounded(value: float) -> float:
    return float(f"{value:.7g}")
