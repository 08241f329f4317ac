"""The benchmark of what normalization layers cost: a small network on a CPU, and the rows that it leaves."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks import norm_cost
from benchmarks.norm_cost import CONTENDERS, REFERENCE, Contender, Setting, Steps, endless, random_images
from tests.lab.small_images import CPU, DROPOUT, recipe

from zeromean.lab.recipes.cifar import cifar100_elu18
from zeromean.lab.recipes.images import ImageRecipe, Phase

ROUNDS, STEPS, BATCH = 3, 2, 8


pytestmark = pytest.mark.usefixtures("small_networks")


def dropping() -> ImageRecipe:
    return recipe(phases=(Phase(12, DROPOUT),))


def test_all_contenders_are_measured_beside_relu_with_batch_normalization(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(norm_cost, "SETTINGS", {"elu11": (Setting(dropping, BATCH, STEPS),)})
    norm_cost.main(["--rounds", str(ROUNDS), "--images", "24", "--out", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["activation"], row["norm"]) for row in rows] == [
        ("elu", "none"),
        ("relu", "batch"),
        ("relu", "none"),
        ("elu", "batch"),
    ]
    printed = capsys.readouterr().out
    for row in rows:
        assert (row["network"], row["batch"], row["steps"], len(row["rounds"])) == ("elu11", BATCH, STEPS, ROUNDS)
        assert row["lowest"] == min(row["rounds"]) <= row["milliseconds_per_step"] <= row["highest"]
        assert row["images_per_second"] == pytest.approx(1000 * BATCH / row["milliseconds_per_step"], abs=1)
        assert row["peak_mib"] is row["peak_ratio"] is None
        assert row["device"]["kind"] == "cpu"
        assert f"{row['activation']}, {row['norm']}" in printed
    assert [row["times_relu_batch"] for row in rows].count(1.0) >= 1
    assert rows[1]["lowest_ratio"] == rows[1]["highest_ratio"] == 1.0


def test_ratios_are_taken_within_a_round_and_of_memory_to_the_same_contender() -> None:
    taken = {contender: [2.0, 4.0, 8.0] for contender in CONTENDERS} | {Contender("elu", "none"): [1.0, 3.0, 4.8]}
    peak: dict[Contender, float | None] = dict.fromkeys(CONTENDERS, 200.0)
    peak[Contender("elu", "none")] = 130.0
    first, reference, *_ = norm_cost.rows(recipe(), taken, peak)
    told = [first[key] for key in ("times_relu_batch", "lowest_ratio", "highest_ratio", "peak_mib", "peak_ratio")]
    assert told == [0.6, 0.5, 0.75, 130.0, 0.65]
    assert (first["milliseconds_per_step"], first["lowest"], first["highest"]) == (3.0, 1.0, 4.8)
    assert (reference["times_relu_batch"], reference["peak_ratio"]) == (1.0, 1.0)


def test_the_recipe_keeps_what_a_step_costs() -> None:
    published = cifar100_elu18()
    found = endless(published, 512, 7)
    assert (found.batch_size, found.steps, found.rate(6)) == (512, 7, norm_cost.RATE)
    assert found.phases[0].dropout == published.phases[0].dropout
    assert (found.precision, found.padding, found.weight_decay) == (
        published.precision,
        published.padding,
        published.weight_decay,
    )


def test_a_training_goes_on_behind_the_end_of_an_epoch() -> None:
    steps = Steps(endless(dropping(), BATCH, 9), REFERENCE.run, random_images(24, CPU), CPU)
    for _ in range(8):
        steps.take()
    assert (steps.training.steps_done, steps.training.steps_left) == (8, 1)
    steps.check()


def test_times_of_nan_are_refused() -> None:
    images = random_images(24, CPU)
    images.train.fill_(torch.inf)
    steps = Steps(endless(dropping(), BATCH, 9), REFERENCE.run, images, CPU)
    steps.take()
    with pytest.raises(ValueError, match="all steps must be finite"):
        steps.check()
