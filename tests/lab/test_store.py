"""The run directory: whole files, damage found, nothing half-used."""

import errno
import gc
import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from zeromean.lab.store import DamagedFileError, Run, Study, write_whole

RUN = Run("elu", "elu", 0.01, 3)
TUNING = Run("elu", "elu", 0.001, 3, "tuning")
OUTCOME = {"status": "ok", "test_error": 1.5, "epochs": 1}
PLAN = dict.fromkeys(("recipe", "arms", "comparisons", "seeds", "tune", "data", "budget", "device", "versions"), 0)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path / "study")


def test_folders(study: Study) -> None:
    assert RUN.folder == "elu/seed-003"
    assert TUNING.folder == "tuning/elu/lr-0.001/seed-003"


def test_a_finished_run_reads_back(study: Study) -> None:
    study.begin(RUN)
    study.append_metrics(RUN, {"epoch": 1, "train_loss": 2.0})
    study.finish(RUN, OUTCOME, {"0.weight": torch.eye(2)})
    assert study.result(RUN) == {**asdict(RUN), **OUTCOME}
    assert study.finished(RUN) == (study.result(RUN), study.metrics(RUN))
    assert study.finished(TUNING) is None
    assert study.metrics(RUN) == [{"epoch": 1, "train_loss": 2.0}]
    assert study.pending([RUN, TUNING]) == [TUNING]
    assert json.loads((study.path / RUN.folder / "config.json").read_text())["learning_rate"] == 0.01


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("1.5", "1.4"),
        lambda text: "",
        lambda text: "[1]",
        lambda text: text.replace('"checksum"', '"check"'),
    ],
)
def test_a_damaged_result_is_found_and_set_aside(study: Study, damage: "type[str]") -> None:
    study.finish(RUN, OUTCOME, None)
    file = study.path / RUN.folder / "result.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(DamagedFileError, match=r"result\.json is damaged"):
        study.result(RUN)
    assert study.set_aside(RUN).name == "result.json.damaged"
    assert study.result(RUN) is None


def test_a_checkpoint_reads_back_and_damage_is_found(study: Study) -> None:
    assert study.read_checkpoint("final") is None
    study.write_checkpoint("final", {"w": torch.arange(3.0)}, {"epoch": 7})
    tensors, state = study.read_checkpoint("final") or ({}, {})
    assert state == {"epoch": 7}
    assert torch.equal(tensors["w"], torch.arange(3.0))
    file = study.path / "checkpoint-final.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(DamagedFileError, match="checkpoint"):
        study.read_checkpoint("final")
    save_file({"w": torch.eye(2)}, file)
    with pytest.raises(DamagedFileError, match="is damaged"):
        study.read_checkpoint("final")


def test_metrics_are_trimmed_to_the_checkpoint(study: Study) -> None:
    study.begin(RUN)
    for epoch in (1, 2, 3):
        study.append_metrics(RUN, {"epoch": epoch})
    file = study.path / RUN.folder / "metrics.jsonl"
    file.write_text(file.read_text() + '{"epoch": 4, "tra')
    study.trim_metrics(RUN, 2)
    assert [row["epoch"] for row in study.metrics(RUN)] == [1, 2]
    with pytest.raises(DamagedFileError, match="does not hold the 3 epochs of the checkpoint: delete the checkpoint"):
        study.trim_metrics(RUN, 3)


FIRST = b'{"epoch": 1}\n'


@pytest.mark.parametrize("left", [b"", FIRST, FIRST + b"\0\0\n", FIRST + FIRST, FIRST + b"\xff\n", FIRST + b"{}\n"])
def test_metrics_that_a_loss_of_power_cut_off_are_found(study: Study, left: bytes) -> None:
    study.begin(RUN)
    (study.path / RUN.folder / "metrics.jsonl").write_bytes(left)
    with pytest.raises(DamagedFileError, match="does not hold the 2 epochs"):
        study.check_metrics(RUN, 2)


def test_metrics_reach_the_disk_before_the_checkpoint_of_their_run(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    study.begin(RUN)
    study.append_metrics(RUN, {"epoch": 1})
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    study.write_checkpoint(RUN, {}, {"epoch": 1})
    folder = study.path / RUN.folder
    assert flushed == [(folder / name).stat().st_ino for name in ("metrics.jsonl", "checkpoint.safetensors")]


def test_a_damaged_or_foreign_plan_is_refused(study: Study) -> None:
    assert study.plan() is None
    study.write_plan(PLAN)
    assert study.plan() == {"format": 1, **PLAN}
    file = study.path / "plan.json"
    file.write_text('{"format": 9}')
    with pytest.raises(DamagedFileError, match="format 9"):
        study.plan()
    for text, message in (("{", "damaged"), ("[]", "damaged"), ('{"format": 1}', "lacks arms, budget")):
        file.write_text(text)
        with pytest.raises(DamagedFileError, match=message):
            study.plan()


def test_a_result_of_another_run_is_not_taken(study: Study) -> None:
    study.finish(RUN, OUTCOME, None)
    other = replace(RUN, learning_rate=0.02)
    with pytest.raises(DamagedFileError, match=r"of another run \(learning_rate 0\.01, not 0\.02\)"):
        study.result(other)
    assert study.result(replace(RUN, learning_rate=math.nan)), "an unknown learning rate fits any"


@pytest.mark.parametrize("text", ["", "5\n", "{}\n", '{"epoch": 2}\n', '{"epoch": 1}\n{"epoch": 1}\n', "{"])
def test_metrics_that_do_not_fit_their_result_are_found(study: Study, text: str) -> None:
    study.begin(RUN)
    study.finish(RUN, OUTCOME, None)
    (study.path / RUN.folder / "metrics.jsonl").write_text(text)
    with pytest.raises(DamagedFileError, match="repeat the run"):
        study.finished(RUN)


def test_an_interrupt_right_behind_the_opening_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, opened, openings = tmp_path / "result.json", os.open, list[int]()
    write_whole(file, b"old")

    def interrupted(*words: Any) -> int:
        openings.append(opened(*words))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_whole(file, b"new")
    os.close(openings[0])
    gc.collect()  # a file object would warn here
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_full_disk_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "result.json"
    write_whole(file, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(file, b"new")
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
