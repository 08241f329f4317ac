"""Bands over all seeds, thinned only along the epochs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from zeromean.lab.report import charts
from zeromean.lab.report.curves import band, layers, losses, of_layer, over_layers, profile, scalar, thinned
from zeromean.lab.store import Study
from zeromean.lab.summary import Arm, load

StudyFolder = Callable[..., Study]


@pytest.fixture(scope="module")
def arm(study_folder: StudyFolder) -> Arm:
    """Six runs of 50 epochs; the one of seed 2 diverged at epoch 12."""
    return load(study_folder(arms=("elu",), seeds=6, epochs=50, diverged=(("elu", 2),))).arms[0]


def test_band_is_over_every_run_that_ended_well(arm: Arm) -> None:
    points = band(arm, scalar("train_loss"), most=1000)
    assert [point.epoch for point in points] == list(range(1, 51))
    for point in points:
        values = [run.metrics[point.epoch - 1]["train_loss"] for run in arm.runs if run.seed != 2]
        assert point.mean == pytest.approx(sum(values) / 5)
        assert (point.low, point.high) == (min(values), max(values))


def test_one_extreme_run_reaches_the_band(arm: Arm) -> None:
    wild = replace(arm.runs[0], metrics=tuple({**row, "train_loss": 99.0} for row in arm.runs[0].metrics))
    points = band(replace(arm, runs=(wild, *arm.runs[1:])), scalar("train_loss"), most=10)
    assert {point.high for point in points} == {99.0}


def test_epochs_are_thinned_and_runs_are_not(arm: Arm) -> None:
    full, thin = band(arm, scalar("train_loss"), most=50), band(arm, scalar("train_loss"), most=7)
    assert len(thin) == 7
    assert (thin[0], thin[-1]) == (full[0], full[-1])
    assert set(thin) <= set(full)


@pytest.mark.parametrize(("count", "most"), [(1, 5), (5, 5), (6, 5), (500, 150), (151, 150), (2, 2)])
def test_thinned_keeps_both_ends_and_its_word(count: int, most: int) -> None:
    kept = thinned(count, most)
    assert len(kept) == min(count, most)
    assert (kept[0], kept[-1]) == (0, count - 1)
    assert all(after - before <= -(-count // most) for before, after in pairwise(kept))


def test_layers(arm: Arm) -> None:
    row = {"mean_activation": [0.5, -1.0, 0.1]}
    assert of_layer("mean_activation", 1)(row) == -1.0
    assert over_layers("mean_activation")(row) == 0.1
    assert over_layers("mean_activation")({"mean_activation": [0.5, None, 0.1]}) is None


def test_an_epoch_without_a_number_is_left_out(arm: Arm) -> None:
    gap = [{**row, "train_loss": None} if row["epoch"] == 20 else row for row in arm.runs[1].metrics]
    points = band(replace(arm, runs=(replace(arm.runs[1], metrics=tuple(gap)),)), scalar("train_loss"), most=1000)
    assert [point.epoch for point in points] == [*range(1, 20), *range(21, 51)]


def test_an_arm_that_always_diverged_has_no_curve(arm: Arm) -> None:
    lost = replace(arm, runs=(arm.runs[2],))
    assert band(lost, scalar("train_loss"), most=10) == []
    assert list(losses(lost)) == [12]


@pytest.mark.parametrize("errors", [[], [1.0], [2.0] * 10, [1.0, 2.0, 2.0, 2.001, 3.0]])
def test_no_dot_hides_another(errors: list[float]) -> None:
    places = list(zip(errors, charts._stacked(errors), strict=True))
    assert len(set(places)) == len(errors)
    assert all(-0.5 < lift <= 0.26 for _, lift in places)
    near = [lift for error, lift in places if abs(error - 2.0) < 0.01]
    assert len(set(near)) == len(near)


def test_a_profile_is_the_last_epoch_of_every_layer(arm: Arm) -> None:
    points = profile(arm, "mean_activation")
    assert [point.epoch for point in points] == list(range(1, layers(arm) + 1)) == list(range(1, 9))
    for place, point in enumerate(points):
        values = [run.metrics[-1]["mean_activation"][place] for run in arm.runs if run.seed != 2]
        assert point.mean == pytest.approx(sum(values) / 5)
        assert (point.low, point.high) == (min(values), max(values))
    assert profile(replace(arm, runs=()), "mean_activation") == []
