"""The benchmarks that search on held-out images: what they train, what they keep, and how they judge."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import open_points, trials, tune_fast
from benchmarks.trials import Trial
from numpy.typing import NDArray
from tests.lab.held_out import DATA, FOREVER, options, small_and_held_out
from tests.lab.image_study import short, tiny_cifar
from tests.lab.small_images import DROPOUT, recipe

from zeromean.lab.recipes import find
from zeromean.lab.recipes.cifar import cifar100_elu11
from zeromean.lab.recipes.images import ImageRecipe, Phase, override
from zeromean.lab.train import Training

SMALL = recipe(normalization="mean-std", validation=30, phases=(Phase(12, DROPOUT),), rates=((0, 0.01),))
Errors = list[float | None]
GAPS: dict[tuple[str, str], Errors] = {
    (open_points.BASE, "elu"): [30.0, 31.0, 32.0],
    ("a", "elu"): [29.0, 30.5, None],
    ("b", "elu"): [30.0, None, 32.5],
    ("c", "elu"): [None, None, None],
}


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with small_and_held_out():
        yield


def two(chosen: ImageRecipe = SMALL) -> list[Trial]:
    return [Trial("first", chosen, "elu", 0), Trial("second", override(chosen, ["rate_factor=2"]), "relu", 1)]


def test_every_variant_of_the_open_points_trains(tmp_path: Path) -> None:
    planned = open_points.trials(SMALL, 1)
    rows = trials.run(planned, DATA, options(tmp_path), FOREVER)
    assert [row and row["status"] for row in rows] == ["ok"] * len(planned)
    losses = {trial.variant: row["train_loss"] for trial, row in zip(planned, rows, strict=True) if row}
    same = {variant for variant, loss in losses.items() if loss == losses[open_points.BASE]}
    # What this small recipe has anyway, and what a CPU ignores.
    assert same == {open_points.BASE, "normalization=mean-std", "padding=one", "precision=tf32"}
    found = open_points.table(planned, rows)
    assert found.count("\n") == 2 + len(open_points.VARIANTS)
    assert "| initialization=he drop_before_pooling=true padding=one_ceil |" in found
    assert open_points.effects(planned, rows).count("(n = 4)") == 2 * len(open_points.CROSSED)


def test_a_trial_with_a_row_is_not_repeated(tmp_path: Path) -> None:
    first = trials.run(two(), DATA, options(tmp_path), FOREVER)
    lines = (tmp_path / "results.jsonl").read_text()
    assert trials.run(two(), DATA, options(tmp_path), FOREVER) == first
    assert (tmp_path / "results.jsonl").read_text() == lines
    again = [Trial("first", replace(SMALL, weight_decay=0.1), "elu", 0)]
    assert trials.run(again, DATA, options(tmp_path), FOREVER)[0] not in first


def test_a_row_from_before_a_recipe_had_a_field_is_that_of_the_field_unset(tmp_path: Path) -> None:
    results = trials.Results(tmp_path)
    row: dict[str, Any] = {"settings": two()[0].settings(), "validation_error": 1.0}
    del row["settings"]["recipe"]["mixup"]
    results.add(row)
    chosen = replace(SMALL, mixup=0.2)
    assert results.of([*two(), Trial("mixed", chosen, "elu", 0)]) == [row, None, None]


def test_a_row_says_all_and_nothing_of_the_test_set(tmp_path: Path) -> None:
    first, second = trials.run(two(), DATA, options(tmp_path), FOREVER)
    assert first is not None
    assert second is not None
    assert (second["variant"], second["activation"], second["seed"], second["steps"]) == ("second", "relu", 1, 12)
    assert second["settings"]["recipe"]["rates"] == [[0, 0.02]]
    assert second["settings"]["recipe"]["validation"] == 30
    assert 0 <= second["validation_error"] <= 100
    assert not [key for key in second if "test" in key]


def test_what_the_time_cuts_off_continues_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = trials.run(two(), DATA, options(tmp_path / "whole"), FOREVER)
    monkeypatch.setattr(trials, "_BEGINNING", 2.0)  # so that trials begin, and end after an epoch
    assert trials.run(two(), DATA, options(tmp_path / "cut"), time.time()) == [None, None]
    assert len(list((tmp_path / "cut" / "unfinished").rglob("*.safetensors"))) == 2
    begun: list[int] = []
    begin = Training.begin_epoch

    def counted(training: Training) -> None:
        begun.append(training.epoch)
        begin(training)

    monkeypatch.setattr(Training, "begin_epoch", counted)
    resumed = trials.run(two(), DATA, options(tmp_path / "cut"), FOREVER)
    assert begun == [1, 1]
    assert list(map(_untimed, resumed)) == list(map(_untimed, undisturbed))
    assert not list((tmp_path / "cut" / "unfinished").rglob("*.safetensors"))


def _untimed(row: dict[str, Any] | None) -> dict[str, Any]:
    assert row is not None
    return {key: value for key, value in row.items() if "second" not in key}


def test_nothing_begins_when_the_time_is_over(tmp_path: Path) -> None:
    assert trials.run(two(), DATA, options(tmp_path), time.time()) == [None, None]
    assert not (tmp_path / "unfinished").exists()


def test_a_trial_that_diverges_has_a_row_and_ends_nothing(tmp_path: Path) -> None:
    wild = [Trial("wild", override(SMALL, ["rate_factor=1e30"]), "elu", 0), *two()]
    rows = trials.run(wild, DATA, options(tmp_path), FOREVER)
    assert [row and row["status"] for row in rows] == ["diverged", "ok", "ok"]
    assert tune_fast.error(rows[:1]) == math.inf
    assert tune_fast.error([rows[1], None]) is None


def test_changes_that_are_better_alone_are_trained_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    known = {
        "as it is": 30.0,
        "cutout=8": 29.0,
        "rate_factor=2": 28.0,
        "rate_factor=0.5": 29.5,
        "dropout_factor=0.5": 28.5,
    }

    def judged(planned: list[Trial], *_: Any) -> list[dict[str, Any]]:
        asked.extend((trial.variant, trial.recipe.steps) for trial in planned)
        rows = [
            {"status": "ok", "validation_error": known.get(one.variant, 31.0), "train_error": 1.0} for one in planned
        ]
        return [{**row, "seconds": 2.0} for row in rows]

    monkeypatch.setattr(tune_fast, "run", judged)
    chosen = find("cifar100-elu11-fast")
    assert isinstance(chosen, ImageRecipe)
    found, taken = tune_fast.search(chosen, DATA, options(tmp_path), FOREVER)
    assert sum(steps == 9750 for _, steps in asked) == 14
    assert [name for name, steps in asked if steps == 19500] == [
        "as it is",
        "rate_factor=2",
        "rate_factor=2 dropout_factor=0.5",
        "rate_factor=2 dropout_factor=0.5 cutout=8",
    ]
    assert found.splitlines()[2].startswith("| 1 | 28.00 | 1.0 | 2 | rate_factor=2 |")
    assert taken == ("rate_factor=2",)


def test_nothing_is_combined_where_the_recipe_is_best() -> None:
    assert tune_fast.finalists({(): 1.0, ("cutout=8",): 1.0, ("rate_factor=2",): 2.0}) == [()]


def test_a_recipe_changes_only_for_a_finalist_that_is_clearly_better() -> None:
    assert tune_fast.choice({(): 30.0, ("cutout=8",): 29.7, ("cutout=8", "rate_factor=2"): 29.8}) == ("cutout=8",)
    assert tune_fast.choice({(): 30.0, ("cutout=8",): 29.75, ("cutout=8", "rate_factor=2"): 29.8}) == ()


def test_a_search_waits_for_trials_that_the_time_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: dict[str, Any] = {"status": "ok", "validation_error": 1.0, "train_error": None, "seconds": 2.0}
    calls: list[int] = []

    def judged(planned: list[Trial], *_: Any) -> list[dict[str, Any] | None]:
        calls.append(len(planned))
        return [done if number else None for number in range(len(planned))]

    monkeypatch.setattr(tune_fast, "run", judged)
    found, taken = tune_fast.search(SMALL, DATA, options(tmp_path), FOREVER)
    assert taken is None
    assert calls == [len(tune_fast.candidates(SMALL))]
    assert found.count("| 0.5 |") == calls[0] - 1


def test_candidates_are_the_recipe_and_single_changes() -> None:
    # The 18-layer recipes have cutout=8, mixup=0.2 and momentum=0.9 already.
    for name, count in (("cifar100-elu11-fast", 14), ("cifar100-elu18-fast", 11), ("cifar10-elu18-fast", 11)):
        chosen = find(name)
        assert isinstance(chosen, ImageRecipe)
        points = tune_fast.candidates(chosen)
        made = {json.dumps(Trial("", override(chosen, point), "elu", 0).settings()) for point in points}
        assert points[0] == ()
        assert len(made) == len(points) == count


def test_differences_are_of_the_seeds_that_have_both() -> None:
    assert open_points.differences(GAPS, "a", "elu") == [-1.0, -0.5]
    assert open_points.differences(GAPS, "b", "elu") == [0.0, 0.5]
    assert open_points.differences(GAPS, "b", "elu", "a") == [1.0]
    assert open_points.differences(GAPS, "a", "relu") == []


def test_variants_and_seeds_are_fitted_to_the_runs_there_are() -> None:
    # By hand: with the variants' shares a = -1 - u and b = -v, the least of
    # ((u + 1/2)^2 + (v + 1/2)^2) / 2 + (u^2 + v^2 - u v) 2 / 3 is at u = v = -3 / 10.
    squares, freedom = open_points.residual_squares(GAPS)
    assert squares == pytest.approx(0.1)
    assert freedom == 2
    assert open_points.half_width(GAPS, 2) == pytest.approx(4.302653 * math.sqrt(2 * 0.05 / 2))


def test_activations_share_their_variance_and_a_single_run_adds_nothing() -> None:
    relu: dict[tuple[str, str], Errors] = {
        (open_points.BASE, "relu"): [50.0, 50.0],
        ("a", "relu"): [51.0, 49.0],
        ("single", "relu"): [99.0, None],
    }
    assert open_points.half_width(relu, 2) == pytest.approx(12.706205 * math.sqrt(2 * 1.0 / 2))
    assert open_points.half_width({**GAPS, **relu}, 2) == pytest.approx(3.182446 * math.sqrt(2 * (1.1 / 3) / 2))


def test_nothing_is_told_without_a_second_run() -> None:
    assert math.isnan(open_points.half_width(GAPS, 0))
    assert math.isnan(open_points.half_width({(open_points.BASE, "elu"): [1.0], ("a", "elu"): [2.0]}, 1))


@pytest.mark.parametrize(("lost", "widest"), [((), 0.962), ((1, 5, 12), 0.98)])
def test_intervals_hold_the_truth_as_often_as_told(lost: tuple[int, ...], widest: float) -> None:
    """The variants share the recipe's runs, an effect is a mean over unlike combinations, and seeds differ."""
    random = np.random.default_rng(0)
    names = [open_points.name_of(variant) for variant in open_points.variants(alone=())]
    truth = 30 + 3 * random.normal(size=len(names))
    tables = truth[:, None] + random.normal(size=(4000, 1, 2)) + 0.5 * random.normal(size=(4000, len(names), 2))
    true = _groups(names, np.repeat(truth, 2), lost)
    held = np.mean([_held(_groups(names, table.ravel(), lost), true) for table in tables], axis=0)
    assert 0.938 < held.min() <= held.max() < widest


def _groups(names: list[str], errors: NDArray[np.float64], lost: tuple[int, ...]) -> dict[tuple[str, str], Errors]:
    """Of two seeds a variant."""
    known = [None if place in lost else float(error) for place, error in enumerate(errors)]
    return {(name, "elu"): known[2 * place : 2 * place + 2] for place, name in enumerate(names)}


def _held(found: dict[tuple[str, str], Errors], true: dict[tuple[str, str], Errors]) -> list[bool]:
    """Whether the interval of a variant's difference and that of an effect reach the truth."""
    pairs = [
        [open_points.differences(errors, open_points.CROSSED[0], "elu") for errors in (found, true)],
        [open_points.effect(errors, open_points.CROSSED[0], "elu") for errors in (found, true)],
    ]
    return [abs(fmean(own) - fmean(right)) < open_points.half_width(found, len(own)) for own, right in pairs]


def test_an_effect_is_taken_over_all_combinations_of_the_others() -> None:
    weights = dict(zip(open_points.CROSSED, (1.0, 2.0, 4.0), strict=True))
    errors: dict[tuple[str, str], list[float | None]] = {
        (open_points.name_of(variant), "elu"): [30 + sum(weights[text] for text in variant) + seed for seed in (0, 5)]
        for variant in open_points.variants(alone=())
    }
    assert len(errors) == 8
    for text, weight in weights.items():
        assert open_points.effect(errors, text, "elu") == [weight] * 8
    errors[open_points.BASE, "elu"] = [None, 35.0]
    assert open_points.effect(errors, open_points.CROSSED[0], "elu") == [1.0] * 7
    assert open_points.effect(errors, open_points.CROSSED[0], "relu") == []


def test_the_command_writes_rows_and_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (open_points, tune_fast):
        monkeypatch.setattr(module, "find", lambda name: replace(SMALL, validation=0))
        monkeypatch.setattr(module.data, "load", lambda name: DATA)
    monkeypatch.setattr(open_points, "CROSSED", open_points.CROSSED[:1])
    monkeypatch.setattr(open_points, "VARIANTS", open_points.variants(open_points.CROSSED, open_points.ALONE[:1]))
    words = ["cifar100-elu11", "length=0.5", "--validation", "30", "--out"]
    open_points.main([*words, str(tmp_path / "points"), "--seeds", "2"])
    rows = [json.loads(line) for line in (tmp_path / "points" / "results.jsonl").read_text().splitlines()]
    assert [row["steps"] for row in rows] == [6] * 12
    assert (tmp_path / "points" / "table.md").read_text().count("±") == 4 + 2
    open_points.main(
        [*words, str(tmp_path / "some"), "--variants", "", "batch_size=4 flip=false", "--activations", "elu"]
    )
    some = [json.loads(line) for line in (tmp_path / "some" / "results.jsonl").read_text().splitlines()]
    assert {row["variant"] for row in some} == {open_points.BASE, "batch_size=4 flip=false"}
    assert {row["activation"] for row in some} == {"elu"}
    assert (tmp_path / "some" / "table.md").read_text().count("±") == 1
    monkeypatch.setattr(tune_fast, "CHANGES", {"cutout": ("2",)})
    tune_fast.main([*words, str(tmp_path / "fast")])
    lines = (tmp_path / "fast" / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[-2:]] == ["| 0.5"] * 2
    assert lines[2].startswith("| 1 |")
    assert (tmp_path / "fast" / "choice.txt").read_text() in ("\n", "cutout=2\n")


def test_two_processes_share_the_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "first_gpus", lambda count: (torch.device("cpu"),) * count)
    chosen = short(cifar100_elu11(), validation=6)
    planned = [
        *(Trial(f"seed {seed}", chosen, "elu", seed) for seed in range(3)),
        Trial("slowed", replace(chosen, rates=((0, 1e-5), (4, 1e-6))), "elu", 0),
    ]
    rows = trials.run(planned, tiny_cifar(train=18), options(tmp_path, gpus=2, together=1, share=[3]), FOREVER)
    assert [row and row["variant"] for row in rows] == ["seed 0", "seed 1", "seed 2", "slowed"]
    assert len(list((tmp_path / "stems").rglob("*.safetensors"))) == 3
