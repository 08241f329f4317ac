"""A study on a bare machine that has so much time: which of its runs end, and which continue later."""

import tarfile
import time
from pathlib import Path

import pytest
import torch
from benchmarks import study as command
from benchmarks.study import Lines, in_time
from tests.lab import image_folders
from tests.lab.image_study import tiny_cifar
from tests.lab.small_images import DROPOUT, recipe, small

from zeromean.lab.plan import Arm, Plan
from zeromean.lab.recipes.images import Phase
from zeromean.lab.store import Study

CPU = torch.device("cpu")
DATA = tiny_cifar(train=200)
RECIPE = recipe(normalization="mean-std", phases=(Phase(360, DROPOUT),), rates=((0, 0.01),))
PLAN = Plan("study", RECIPE, (Arm("elu", "ELU", "elu", 0.01),), (), (0, 1, 2), tune=False)


def test_runs_that_would_not_end_in_time_stop_and_continue_later(tmp_path: Path) -> None:
    with small():
        undisturbed, cut = Study(tmp_path / "whole"), Study(tmp_path / "cut")
        in_time(PLAN, RECIPE, undisturbed, DATA, CPU, Lines())
        in_time(PLAN, RECIPE, cut, DATA, CPU, Lines(time.monotonic()))
        runs = PLAN.runs({})
        assert [run.seed for run in cut.pending(runs)] == [1, 2]
        assert all(cut.read_checkpoint(run) is not None for run in runs[1:])
        in_time(PLAN, RECIPE, cut, DATA, CPU, Lines())
    for run in runs:
        first, second = undisturbed.result(run), cut.result(run)
        assert first is not None
        assert second is not None
        assert first["test_error"] == second["test_error"]
        assert first["train_loss"] == second["train_loss"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_folder_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = image_folders.write_folder(tmp_path / "photos")
    fields = [f"data={photos}", f"resize={image_folders.SIDE}", f"crop={image_folders.CROP}", "length=0.0004"]
    folders = ["--out", str(tmp_path), "--runs", str(tmp_path / "runs")]
    words = ["imagenet-elu15-fast", *fields, "batch_size=4", "probe_samples=4", *folders]
    monkeypatch.setattr("sys.argv", ["study.py", *words])
    with image_folders.small():
        command.main()
    with tarfile.open(tmp_path / "imagenet-elu15-fast.tar.gz") as archive:
        arms = [name.split("/")[1] for name in archive.getnames() if name.endswith("result.json")]
    assert arms == ["elu", "relu"]
