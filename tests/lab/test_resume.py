"""Trainings on images that are killed or asked to stop, and continue."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.lab.small_images import (
    CPU,
    DROPOUT,
    ENDANGERED_RUNS,
    NO_DROPOUT,
    Epochs,
    KilledError,
    contents,
    endangered,
    halved,
    material,
    recipe,
    run,
    small,
)

from zeromean.lab.recipes.images import Phase
from zeromean.lab.store import DamagedFileError, Run, Study
from zeromean.lab.train import Stopped, Training, train


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with small():
        yield


ROOT = Path(__file__).parents[2]


ARMS = [
    (run("elu"), {}),
    (run("eelu"), {}),
    (run("rrelu"), {"accumulate": 2}),
    (run("elu", norm="batch"), {"clip": 0.5}),
    (run("relu", norm="batch"), {"ema": 0.8, "nesterov": True}),
]


@pytest.mark.parametrize(("one", "changes"), ARMS, ids=lambda value: value.arm if isinstance(value, Run) else "")
def test_a_killed_training_continues_to_the_same_bits(tmp_path: Path, one: Run, changes: dict[str, Any]) -> None:
    chosen = recipe(phases=(Phase(4, NO_DROPOUT), Phase(8, DROPOUT)), **changes)
    whole = Study(tmp_path / "whole")
    train(chosen, [one], material(), whole, device=CPU)
    for killed_after in (0, 1, 2):
        cut, epochs = Study(tmp_path / f"cut-{killed_after}"), Epochs()
        with pytest.raises(KilledError):
            train(chosen, [one], material(), cut, device=CPU, checkpoint_seconds=0, on_epoch=Epochs(killed_after))
        torch.manual_seed(killed_after)
        train(chosen, [one], material(), cut, device=CPU, on_epoch=epochs)
        assert epochs.seen[0] == (killed_after, 1)
        assert contents(cut, one) == contents(whole, one)
        assert cut.read_checkpoint(one) is None


def test_a_training_killed_without_a_checkpoint_starts_again(tmp_path: Path) -> None:
    whole, cut = Study(tmp_path / "whole"), Study(tmp_path / "cut")
    train(recipe(), [run()], material(), whole, device=CPU)
    with pytest.raises(KilledError):
        train(recipe(), [run()], material(), cut, device=CPU, checkpoint_seconds=math.inf, on_epoch=Epochs(2))
    assert len(cut.metrics(run())) == 2
    train(recipe(), [run()], material(), cut, device=CPU)
    assert contents(cut, run()) == contents(whole, run())


def test_what_a_kill_leaves_half_done_is_cleared_away(tmp_path: Path) -> None:
    whole, cut = Study(tmp_path / "whole"), Study(tmp_path / "cut")
    train(recipe(), [run()], material(), whole, device=CPU)
    with pytest.raises(KilledError):
        train(recipe(), [run()], material(), cut, device=CPU, checkpoint_seconds=0, on_epoch=Epochs(1))
    folder = cut.path / run().folder
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2}\n{"epoch": 3, "tra')
    (folder / ".checkpoint.safetensors.17.part").write_bytes(b"half")
    train(recipe(), [run()], material(), cut, device=CPU)
    assert contents(cut, run()) == contents(whole, run())
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["config.json", "metrics.jsonl", "model.safetensors", "result.json"]


def test_ten_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    whole, cut = Study(tmp_path / "whole"), Study(tmp_path / "cut")
    train(endangered(), ENDANGERED_RUNS, material(), whole, device=CPU)
    moments = [f"{random.uniform(0.005, 0.08):.4f}" for _ in range(10)]
    script = [sys.executable, "-m", "tests.lab.small_images", "killed", str(cut.path), *moments]
    ended = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.stdout == f"{[int(signal.SIGKILL)] * 10}\n", f"{moments}: {ended.stderr}"
    train(endangered(), ENDANGERED_RUNS, material(), cut, device=CPU)
    for one in ENDANGERED_RUNS:
        assert contents(cut, one) == contents(whole, one), moments
        files = sorted(path.name for path in (cut.path / one.folder).iterdir())
        assert files == ["config.json", "metrics.jsonl", "model.safetensors", "result.json"], moments


def test_sigterm_ends_the_epoch_with_a_checkpoint(tmp_path: Path) -> None:
    asked: list[int] = []

    def terminate(epoch: int, runs: int) -> None:
        if epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    whole, cut = Study(tmp_path / "whole"), Study(tmp_path / "cut")
    runs = [run(), run("relu")]
    train(recipe(), runs, material(), whole, device=CPU)
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    try:
        with pytest.raises(Stopped):
            train(recipe(), runs, material(), cut, device=CPU, on_epoch=terminate, stop=lambda: bool(asked))
    finally:
        signal.signal(signal.SIGTERM, before)
    checkpoint = cut.read_checkpoint(runs[0])
    assert checkpoint is not None
    assert (checkpoint[1]["epoch"], checkpoint[1]["steps"]) == (2, 10)
    assert not (cut.path / runs[1].folder).exists()
    train(recipe(), runs, material(), cut, device=CPU)
    assert [contents(cut, one) for one in runs] == [contents(whole, one) for one in runs]


def test_no_run_begins_once_the_training_was_asked_to_stop(tmp_path: Path) -> None:
    study, epochs, runs = Study(tmp_path), Epochs(), [run(), run("relu")]

    def stop() -> bool:
        return len(epochs.seen) >= 3

    with pytest.raises(Stopped):
        train(recipe(), runs, material(), study, device=CPU, on_epoch=epochs, stop=stop)
    assert epochs.seen == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert (study.result(runs[0]) or {})["status"] == "ok"
    assert not (study.path / runs[1].folder).exists()


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    study = Study(tmp_path)
    with pytest.raises(KilledError):
        train(recipe(), [run()], material(), study, device=CPU, checkpoint_seconds=0, on_epoch=Epochs(1))
    with pytest.raises(DamagedFileError, match=r"checkpoint.safetensors does not fit .*average.0.*: delete it"):
        train(recipe(ema=0.5), [run()], material(), study, device=CPU)


def test_a_run_that_is_behind_catches_up(tmp_path: Path) -> None:
    study, whole = Study(tmp_path / "cut"), Study(tmp_path / "whole")
    runs = [run("elu"), run("relu")]
    train(recipe(), runs, material(), whole, device=CPU)
    with pytest.raises(KilledError):
        train(recipe(), runs[1:], material(), study, device=CPU, checkpoint_seconds=0, on_epoch=Epochs(2))
    epochs = Epochs()
    train(recipe(), runs, material(), study, device=CPU, together=2, on_epoch=epochs)
    assert epochs.seen == [(0, 2), (1, 1), (2, 1), (3, 2)]
    assert [contents(study, one) for one in runs] == [contents(whole, one) for one in runs]


@pytest.mark.parametrize(("cost", "written"), [(0.0, list(range(3, 24, 2))), (0.25, [3, 16])])
def test_checkpoints_take_a_fiftieth_of_the_time_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cost: float, written: list[int]
) -> None:
    clock, epochs = [0.0], list[int]()
    write = Study.write_checkpoint

    def slow_write(study: Study, owner: Any, tensors: Any, facts: Any) -> None:
        clock[0] += cost
        epochs.append(facts["epoch"])
        write(study, owner, tensors, facts)

    def tick(epoch: int, runs: int) -> None:
        clock[0] += epoch > 0  # an epoch a second

    fake = SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter)
    monkeypatch.setattr("zeromean.lab.train.time", fake)
    monkeypatch.setattr(Study, "write_checkpoint", slow_write)
    long = recipe(phases=(Phase(120, NO_DROPOUT),))
    train(long, [run()], material(), Study(tmp_path), device=CPU, checkpoint_seconds=1.5, on_epoch=tick)
    assert epochs == written


@pytest.mark.parametrize("here", [torch.float32, torch.float16], ids=str)
def test_a_training_in_float16_is_told_from_one_that_is_not(here: torch.dtype) -> None:
    there = torch.float32 if here == torch.float16 else torch.float16
    own, other = (halved(Training(recipe(), run(), material(), CPU), dtype) for dtype in (here, there))
    where = "not in float16, as on a CPU" if here == torch.float16 else "on a GPU, in float16"
    with pytest.raises(ValueError, match=f"it was begun {where}: continue it there, or start the run again"):
        own.load(*other.state())


def test_a_checkpoint_that_fits_in_name_alone_is_told(tmp_path: Path) -> None:
    study = Study(tmp_path)
    training = Training(recipe(), run(), material(), CPU)
    study.begin(run())
    tensors, state = training.state()
    study.write_checkpoint(run(), tensors, {**state, "spent": {"hours": 1}})
    with pytest.raises(DamagedFileError, match=r"checkpoint\.safetensors does not fit .*hours.*: delete it"):
        train(recipe(), [run()], material(), study, device=CPU)
