"""Trainings on images that are killed or asked to stop, and continue."""

import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.lab.small_images import (
    CPU,
    DROPOUT,
    ENDANGERED_RUNS,
    MUON,
    NO_DROPOUT,
    Epochs,
    KilledError,
    contents,
    endangered,
    halved,
    material,
    recipe,
    run,
)

from zeromean.lab.recipes.images import Phase
from zeromean.lab.store import DamagedFileError, Run, Study
from zeromean.lab.train import Stopped, Training, train

pytestmark = pytest.mark.usefixtures("small_networks")


ROOT = Path(__file__).parents[2]


ARMS = [
    (run("elu"), {}),
    (run("eelu"), {}),
    (run("rrelu"), {"accumulate": 2}),
    (run("elu", norm="batch"), {"clip": 0.5}),
    (run("relu", norm="batch"), {"ema": 0.8, "nesterov": True}),
    (run("prelu"), MUON),
    (run("elu"), {"dropout_curve": "linear"}),
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


def test_sigterm_ends_the_training_with_a_checkpoint(tmp_path: Path) -> None:
    asked: list[int] = []

    def terminate(epoch: float, runs: int) -> None:
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
    assert (checkpoint[1]["epoch"], checkpoint[1]["steps"]) == (1, 5)
    assert not (cut.path / runs[1].folder).exists()
    train(recipe(), runs, material(), cut, device=CPU)
    assert [contents(cut, one) for one in runs] == [contents(whole, one) for one in runs]


# Epochs of five steps; a phase begins within the second.
WITHIN = {"phases": (Phase(7, DROPOUT), Phase(5, DROPOUT, everywhere=True)), "ema": 0.9}


@pytest.mark.parametrize("together", [1, 2])
def test_a_training_stopped_before_any_step_continues_with_the_same_bits(tmp_path: Path, together: int) -> None:
    chosen, runs, whole = recipe(**WITHIN), [run("eelu"), run("rrelu", norm="batch")], Study(tmp_path / "whole")
    train(chosen, runs, material(), whole, device=CPU, together=together)
    for stopped in range(1, 13):
        cut, asked = Study(tmp_path / f"cut-{stopped}"), list[int]()

        def stop(asked: list[int] = asked, stopped: int = stopped) -> bool:
            asked.append(1)
            return len(asked) == 2 + stopped

        with pytest.raises(Stopped):
            train(chosen, runs, material(), cut, device=CPU, together=together, stop=stop)
        _, state = cut.read_checkpoint(runs[0]) or ({}, {})
        assert state["epoch"] == len(cut.metrics(runs[0])) == state["steps"] // 5
        train(chosen, runs, material(), cut, device=CPU, together=together)
        assert [contents(cut, one) for one in runs] == [contents(whole, one) for one in runs], stopped


def test_a_long_epoch_has_checkpoints_and_tells_of_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, one = recipe(**WITHIN), run("eelu")
    whole, cut, told = Study(tmp_path / "whole"), Study(tmp_path / "cut"), list[float]()
    train(chosen, [one], material(), whole, device=CPU)
    clock = iter(range(10**6))
    monkeypatch.setattr("zeromean.lab.pauses.time", SimpleNamespace(monotonic=lambda: 3.0 * next(clock)))

    def killed() -> bool:
        if len(told) > 3:
            raise KilledError
        return False

    def tell(epoch: float, runs: int) -> None:
        told.append(epoch)

    with pytest.raises(KilledError):
        train(chosen, [one], material(), cut, device=CPU, checkpoint_seconds=5, on_epoch=tell, stop=killed)
    assert told == sorted(told)
    assert 0.2 <= told[1] < 1, "within the first epoch"
    _, state = cut.read_checkpoint(one) or ({}, {})
    assert state["steps"] % 5
    monkeypatch.undo()
    epochs = Epochs()
    train(chosen, [one], material(), cut, device=CPU, on_epoch=epochs)
    assert epochs.seen[0] == (state["steps"] / 5, 1)
    assert contents(cut, one) == contents(whole, one)


def test_a_training_killed_while_it_is_judged_is_judged_again_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut, epochs = Study(tmp_path / "whole"), Study(tmp_path / "cut"), Epochs()
    train(recipe(), [run()], material(), whole, device=CPU)

    def broken(training: Training) -> None:
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(Training, "_test", broken)
        with pytest.raises(KilledError):
            train(recipe(), [run()], material(), cut, device=CPU)
    assert cut.result(run()) is None
    train(recipe(), [run()], material(), cut, device=CPU, on_epoch=epochs)
    assert epochs.seen == [(3, 1)]
    assert contents(cut, run()) == contents(whole, run())
    assert cut.read_checkpoint(run()) is None


def test_no_run_begins_once_the_training_was_asked_to_stop(tmp_path: Path) -> None:
    study, epochs, runs = Study(tmp_path), Epochs(), [run(), run("relu")]

    def stop() -> bool:
        return len(epochs.seen) >= 4

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


@pytest.mark.parametrize(("cost", "written"), [(0.0, list(range(2, 25, 2))), (0.25, [2, 15, 24])])
def test_checkpoints_take_a_fiftieth_of_the_time_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cost: float, written: list[int]
) -> None:
    clock, epochs, told = [0.0], list[int](), [0.0]
    write = Study.write_checkpoint

    def slow_write(study: Study, owner: Any, tensors: Any, facts: Any) -> None:
        clock[0] += cost
        epochs.append(facts["epoch"])
        write(study, owner, tensors, facts)

    def tick(epoch: float, runs: int) -> None:
        clock[0] += epoch > told[-1]  # an epoch a second
        told.append(epoch)

    monkeypatch.setattr("zeromean.lab.pauses.time", SimpleNamespace(monotonic=lambda: clock[0]))
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
