"""The benchmark of several processes on one training; as a script, one of its processes with a small network."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from benchmarks import scaling
from tests.lab.processes import two_processes
from tests.lab.small_images import CPU, DROPOUT, recipe, small

from zeromean.lab.recipes.images import Phase
from zeromean.lab.store import Run
from zeromean.lab.train import Training

STEPS = 9
SMALL = recipe(phases=(Phase(12, DROPOUT),), rates=((0, 0.01),))
WORDS = ("--batch", "8", "--steps", "2", "--rounds", "3", "--images", "40")
CURVES = ("--curve-steps", str(STEPS), "--curve-images", "64")
Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with small():
        yield


def measured(folder: Path, kind: str) -> Rows:
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [row for row in rows if row["measurement"] == kind]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder that two processes wrote to, and what each of them printed."""
    folder = tmp_path_factory.mktemp("two")
    return folder, two_processes("tests.lab.bench.test_scaling", *WORDS, *CURVES, "--out", str(folder))


def test_two_processes_have_the_losses_of_one(two: tuple[Path, list[str]]) -> None:
    rows = measured(two[0], "curves")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert (row["processes"], row["precision"], row["batch"]) == (2, "float32", SMALL.batch_size)
        assert row["all"] == pytest.approx(row["one"], rel=1e-4)
        assert row["parts"] == pytest.approx(row["one"], rel=1e-4)
        assert row["all_from_one"] == pytest.approx(abs(row["all"] - row["one"]) / row["one"])
        assert max(row[name] for name in scaling.DISTANCES) < 1e-4
        assert row["all_from_parts"] < 1e-6
    assert len({row["one"] for row in rows}) == STEPS


def test_the_losses_are_those_of_each_step_and_fall() -> None:
    chosen, images = recipe(phases=(Phase(40, (0.0,) * 3),)), scaling.learnable_images(64, CPU)
    found = scaling.losses(chosen, images, CPU)
    assert len(found) == 40
    training = Training(chosen, Run("elu", "elu", 0.05, 0), images, CPU)
    training.begin_epoch()
    while training.steps_left:
        training.advance()
    training.finish_epoch()
    assert training.watch()["train_loss"] == pytest.approx(sum(found[:4]) / 4)
    assert sum(found[-4:]) < 0.8 * sum(found[:4])


def test_two_processes_and_one_take_turns(two: tuple[Path, list[str]]) -> None:
    (row,) = measured(two[0], "throughput")
    assert (row["processes"], row["images_a_process"], row["steps"], len(row["rounds"])) == (2, 8, 2, 3)
    assert min(time for pair in row["rounds"] for time in pair) > 0
    assert row["lowest_efficiency"] <= row["efficiency"] <= row["highest_efficiency"]


def test_the_first_process_alone_tells_and_writes(two: tuple[Path, list[str]]) -> None:
    first, second = two[1]
    assert "efficiency" in first
    assert "all_from_one" in first
    assert second == ""


def test_rates_and_efficiency_of_a_round() -> None:
    row = scaling.rates("elu18", 512, [(10.0, 10.0, 10.0), (10.0, 10.0, 12.5), (10.24, 10.24, 12.8)])
    assert (row["images_per_second_alone"], row["images_per_second"]) == ([51200, 51200], 81920)
    assert (row["efficiency"], row["lowest_efficiency"], row["highest_efficiency"]) == (0.8, 0.8, 1.0)
    # 100 and 50 images a second make 150; the slower one holds both up.
    assert scaling.rates("elu18", 1, [(10.0, 20.0, 20.0)])["efficiency"] == pytest.approx(2 / 3, abs=1e-4)


def test_a_process_alone_compares_with_itself_and_is_drawn(tmp_path: Path) -> None:
    scaling.run(SMALL, SMALL, scaling.arguments([*WORDS, *CURVES, "--out", str(tmp_path)]))
    (row,) = measured(tmp_path, "throughput")
    rows = measured(tmp_path, "curves")
    assert (row["processes"], row["images_a_process"], len(rows)) == (1, 8, STEPS)
    assert max(row["all_from_one"] for row in rows) == 0
    assert 0 < max(row["parts_from_one"] for row in rows) < 1e-4
    scaling.draw(tmp_path)
    assert ElementTree.parse(tmp_path / "losses.svg").getroot().tag.endswith("svg")


def test_steps_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="all losses must be finite"):
        scaling.losses(recipe(rates=((0, 1e30),)), scaling.learnable_images(64, CPU), CPU)


if __name__ == "__main__":
    with small():
        scaling.run(SMALL, SMALL, scaling.arguments(sys.argv[1:]))
