"""A study on images through the command line: trained, stopped, continued, watched, and by two processes."""

from __future__ import annotations

import csv
import io
import math
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab.image_study import CPU, planned, short, tiny_cifar

from zeromean.lab import compare, data
from zeromean.lab.cli import main
from zeromean.lab.recipes.cifar import cifar100_elu11, cifar100_elu18, cifar100_elu18_fast
from zeromean.lab.recipes.imagenet import imagenet_elu15
from zeromean.lab.recipes.images import ImageRecipe
from zeromean.lab.session import Session, _mean, sigterm, train_images, words
from zeromean.lab.sharing import Share
from zeromean.lab.store import Run, Study
from zeromean.lab.train import Stopped

# 8 steps in three epochs of 3, 3 and 2 steps of 4 images.
TINY = ["batch_size=4", "normalization=mean-std", "probe_samples=4", "rate_factor=0.001"]
SMALL = ["cifar100-elu11", "length=0.00005", *TINY]
ARMS = ["--activations", "elu", "--norm", "none,batch", "--seeds", "1", "--device", "cpu"]
CHILD = """
import torch
from zeromean.lab import data
from tests.lab.image_study import tiny_cifar
data.load = lambda name: tiny_cifar(name)
torch.set_num_threads(1)
from zeromean.lab.cli import main
main()
"""
Zeromean = Callable[..., str]


@pytest.fixture
def zeromean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Zeromean]:
    """Runs a command in an empty folder, on tiny images, and returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("zeromean.lab.cli._console.width", 200)
    monkeypatch.setattr(data, "load", tiny_cifar)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def call(*words: str) -> str:
        main(words)
        return capsys.readouterr().out

    yield call
    torch.set_num_threads(threads)


def rows_of(study: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((study / "summary.csv").read_text())))


def spawn(folder: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, **variables}
    command = [sys.executable, "-c", CHILD, *words]
    return subprocess.Popen(
        command, cwd=folder, text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_compare_from_plan_to_report(zeromean: Zeromean, tmp_path: Path) -> None:
    out = zeromean("compare", *SMALL, *ARMS)
    assert "2 runs of 8 steps (3 epochs) each on cpu" in out
    assert "the first epoch tells the time" in out
    assert "images/s, training error" in out
    study = tmp_path / "runs" / "cifar100-elu11"
    assert [(row["arm"], row["norm"], row["status"]) for row in rows_of(study)] == [
        ("elu", "none", "ok"),
        ("elu-batch", "batch", "ok"),
    ]
    assert not list(study.glob("*/*/checkpoint.safetensors"))
    assert "ELU and ELU + BatchNorm in the convolutional network elu11" in (study / "report.html").read_text()
    before = (study / "summary.csv").read_bytes()
    assert "2 of 2 final runs are done already" in zeromean("compare", *SMALL, *ARMS)
    assert (study / "summary.csv").read_bytes() == before


def test_run_trains_one_normalized_network(zeromean: Zeromean, tmp_path: Path) -> None:
    zeromean("run", *SMALL, "--activation", "relu", "--norm", "batch", "--seed", "3", "--device", "cpu")
    assert (tmp_path / "runs/cifar100-elu11-relu-batch-seed3/relu-batch/seed-003/result.json").exists()


def test_a_killed_study_continues_to_the_same_bytes(tmp_path: Path, zeromean: Zeromean) -> None:
    """SIGTERM leaves a checkpoint and says how to go on, SIGKILL does not; neither changes a number."""
    words = ["compare", "cifar100-elu11", "length=0.0001", *TINY, *ARMS]
    study = tmp_path / "runs" / "cifar100-elu11"
    for number, arm, epochs in ((signal.SIGTERM, "elu", 2), (signal.SIGKILL, "elu-batch", 1)):
        process = spawn(tmp_path, *words)
        folder = study / arm / "seed-000"
        metrics = folder / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < epochs:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(number)
        out = process.communicate()[0]
        assert not (study / "summary.csv").exists()
        if number == signal.SIGTERM:
            assert process.returncode == 143
            assert "the same command continues" in out.splitlines()[-1]
            assert "Traceback" not in out
            assert (folder / "checkpoint.safetensors").exists()
    zeromean(*words)
    zeromean(*words, "--runs", "undisturbed")
    undisturbed = tmp_path / "undisturbed" / "cifar100-elu11" / "summary.csv"
    assert (study / "summary.csv").read_bytes() == undisturbed.read_bytes()


def test_two_processes_make_one_study(tmp_path: Path) -> None:
    words = ["run", *SMALL, "--device", "cpu", "--name", "one"]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + os.getpid() % 20_000)}
    processes = [spawn(tmp_path, *words, **shared, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]
    outs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outs
    assert "report" in outs[0]
    assert outs[1].count("\n") == outs[1].count("[Gloo]"), "the second process is quiet"
    study = Study(tmp_path / "runs" / "one")
    assert [row["status"] for row in rows_of(study.path)] == ["ok"]
    assert len(study.metrics(Run("elu", "elu", 1e-5, 0))) == 3
    assert (study.plan() or {})["device"]["processes"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "cifar100-elu11", "batch_sise=4"], "did you mean 'batch_size'"),
        (["compare", "cifar100-elu11", "--norm", "bach"], "did you mean 'batch'"),
        (["compare", "cifar100-elu11", "--baseline", "relu+batch"], "no arm"),
        (["compare", "cifar100-elu11", "--tune"], "--tune is not offered for 'cifar100-elu11'"),
        (["compare", "cifar100-elu11", "--checkpoint-every", "5"], "writes a checkpoint a minute"),
        (["compare", "cifar100-elu11", "--together", "0"], "at least 1"),
        (["compare", "cifar100-elu11"], "batch_size must lie in [1, 12]"),
        (["compare", "digits-mlp8", "--norm", "batch"], "has no normalization layers"),
        (["compare", "digits-mlp8", "--together", "4"], "--together is not for 'digits-mlp8'"),
        (["compare", "digits-mlp8", "--tensorboard"], "--tensorboard is not for 'digits-mlp8'"),
        (["run", "cifar100-elu18", "--norm", "layer"], "unknown normalization 'layer'"),
    ],
)
def test_bad_words_are_refused_with_a_remedy(
    zeromean: Zeromean, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        zeromean(*words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_torchrun_is_refused_for_stacked_networks(
    zeromean: Zeromean, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zeromean.lab.cli.launched", lambda device: nullcontext((Share(0, 2), device)))
    with pytest.raises(SystemExit):
        zeromean("run", "digits-mlp8")
    assert "torchrun cannot speed up 'digits-mlp8'" in capsys.readouterr().err


class Told:
    """Everything that a study told."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, int]] = []
        self.notes: list[str] = []
        self.total = 0

    @property
    def progress(self) -> compare.Progress:
        return compare.Progress(say=lambda line: None, stage=self._stage, note=self.notes.append)

    def _stage(self, stage: str, epochs: int) -> Callable[[float, int], None]:
        self.total = epochs
        return lambda epoch, runs: self.steps.append((epoch, runs))


def test_progress_counts_the_epochs_of_all_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A slow machine would tell of parts of an epoch too.
    monkeypatch.setattr("zeromean.lab.pauses._QUIET_SECONDS", math.inf)
    plan, told, study = planned(short(cifar100_elu11()), seeds=1, norms=["none"]), Told(), Study(tmp_path)
    runs = [*plan.runs({}), *planned(short(cifar100_elu11()), seeds=1, norms=["batch"]).runs({})[:1]]
    session = Session(CPU, together=2)
    train_images(short(cifar100_elu11()), runs, tiny_cifar(), study, session, told.progress)
    assert told.total == 9
    assert told.steps == [(0, 2), (2, 2), (4, 2), (6, 2), (6, 1), (7, 1), (8, 1), (9, 1)]
    assert told.notes[0] == ""
    assert all("images/s, training error" in note for note in told.notes[1:4])


def test_a_stop_in_one_group_ends_the_session_with_a_checkpoint(tmp_path: Path) -> None:
    recipe, study = short(cifar100_elu11()), Study(tmp_path)
    run = planned(recipe, seeds=1).runs({})[0]

    def stage(stage: str, epochs: int) -> Callable[[float, int], None]:
        return lambda epoch, runs: os.kill(os.getpid(), signal.SIGTERM) if epoch == 1 else None

    with pytest.raises(Stopped):
        train_images(recipe, [run], tiny_cifar(), study, Session(CPU), compare.Progress(stage=stage))
    assert len(study.metrics(run)) == 1
    assert (study.read_checkpoint(run) or ({}, {}))[1]["steps"] == 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_sigterm_is_not_caught_but_the_same_one_from_two_sides_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now, sent = [100.0], list[int]()
    monkeypatch.setattr("zeromean.lab.session.time.monotonic", lambda: now[0])
    kill = os.kill
    with sigterm() as asked:
        assert not asked()
        for now[0] in (100.0, 101.0, 104.9):
            kill(os.getpid(), signal.SIGTERM)
            assert asked()
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        monkeypatch.setattr("zeromean.lab.session.os.kill", lambda process, number: sent.append(number))
        now[0] = 105.1
        kill(os.getpid(), signal.SIGTERM)
        assert sent == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_damaged_checkpoint_is_told_and_the_run_begins_anew(tmp_path: Path) -> None:
    plan = planned(short(cifar100_elu11()), seeds=1, norms=["none"])
    study, run, told = Study(tmp_path), plan.runs({})[0], list[str]()
    study.begin(run)
    (tmp_path / run.folder / "checkpoint.safetensors").write_bytes(b"no")
    progress = replace(compare.SILENT, say=told.append)
    compare.run(plan, study, tiny_cifar(), device=CPU, progress=progress)
    assert ["checkpoint.safetensors is damaged" in line for line in told] == [True]
    assert study.pending(plan.runs({})) == []


def test_metrics_that_do_not_carry_the_checkpoint_are_told_and_the_run_begins_anew(tmp_path: Path) -> None:
    plan = planned(short(cifar100_elu11()), seeds=1, norms=["none"])
    study, (run, other), told = Study(tmp_path), plan.runs({}), list[str]()
    assert isinstance(plan.recipe, ImageRecipe)

    def killed(name: str, epochs: int) -> Callable[[float, int], None]:
        def on_epoch(epoch: float, runs: int) -> None:
            if epoch == 2:
                raise InterruptedError

        return on_epoch

    progress = replace(compare.SILENT, say=told.append)
    with pytest.raises(InterruptedError):
        train_images(plan.recipe, [run], tiny_cifar(), study, Session(CPU), replace(progress, stage=killed))
    tensors, state = {"none": torch.zeros(1)}, {"epoch": 2}
    study.write_checkpoint(run, tensors, state)
    metrics = tmp_path / run.folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes().splitlines(keepends=True)[0] + b"\0\0\0\0")
    compare.run(plan, study, tiny_cifar(), device=CPU, progress=progress)
    assert ["does not hold the 2 epochs of the checkpoint" in line for line in told] == [True]
    assert study.pending([run, other]) == []
    assert len(study.metrics(run)) == 3


def test_the_mean_of_a_folder_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = [0.0], list[str]()
    monkeypatch.setattr("zeromean.lab.session.time.monotonic", lambda: now[0])
    tell = _mean(replace(compare.SILENT, say=told.append))
    for now[0], done in ((6.0, 1000), (12.0, 2000), (18.0, 3000), (24.0, 4000)):
        tell(done, 10_000)
    assert told == [
        "mean of the training images: 2,000 of 10,000 read, 48 s left",
        "mean of the training images: 4,000 of 10,000 read, 36 s left",
    ]


def test_a_finished_run_keeps_no_checkpoint(tmp_path: Path) -> None:
    plan = planned(short(cifar100_elu11()), seeds=1, norms=["none"])
    study, run = Study(tmp_path), plan.runs({})[0]
    compare.run(plan, study, tiny_cifar(), device=CPU, progress=compare.SILENT)
    study.write_checkpoint(run, {"w": torch.zeros(1)}, {"epoch": 3})
    compare.run(plan, study, tiny_cifar(), device=CPU, progress=compare.SILENT)
    assert study.read_checkpoint(run) is None
    assert study.pending([run]) == []


def test_another_number_of_threads_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(short(cifar100_elu11()), seeds=1, norms=["none"])
    study, told = Study(tmp_path), list[str]()
    study.write_plan(compare.open_study(plan, study, tiny_cifar(), CPU))
    for threads in (torch.get_num_threads(), 17):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        compare.run(plan, study, tiny_cifar(), device=CPU, progress=replace(compare.SILENT, say=told.append))
    assert ["this session has 17: its numbers are the same up to rounding" in line for line in told] == [True, False]


def test_runs_share_a_gpu_as_the_recipe_says() -> None:
    cuda = Session(torch.device("cuda"))
    recipes = (cifar100_elu11(), cifar100_elu18(), cifar100_elu18_fast(), imagenet_elu15())
    assert [cuda.at_once(recipe) for recipe in recipes] == [4, 3, 1, 1]
    assert Session(torch.device("cuda"), Share(0, 2)).at_once(cifar100_elu11()) == 1
    assert Session(CPU).at_once(cifar100_elu11()) == 1
    assert Session(CPU).at_once(cifar100_elu18()) == 1
    assert Session(CPU, together=2).at_once(cifar100_elu18()) == 2


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ([34.25], "41,200 images/s, training error 34.2 %"),
        ([30.0, 40.0], "41,200 images/s, training error 35 %"),
        ([30.0, None], "41,200 images/s, training error 30 %, 1 diverged"),
        ([None], "41,200 images/s, diverged"),
    ],
)
def test_the_note_of_a_group(errors: list[float | None], said: str) -> None:
    assert words([{"images_per_second": 41_234.5, "train_error": error} for error in errors]) == said
    assert words([]) == ""


def test_the_note_counts_the_steps_that_changed_nothing() -> None:
    rows = [{"images_per_second": 500.0, "train_error": 5.0, "overflows": count} for count in (0, 2, 1)]
    assert words(rows) == "500 images/s, training error 5 %, 3 steps overflowed"


class Writer:
    """Remembers what it was asked to write."""

    made: dict[str, Writer]

    def __init__(self, *, log_dir: str, purge_step: int) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = False
        self.made[Path(log_dir).as_posix()] = self
        assert purge_step == 0

    def add_scalar(self, name: str, value: float, epoch: int) -> None:
        self.scalars.append((name, value, epoch))

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_every_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(Writer, "made", {}, raising=False)
    recipe, study = short(cifar100_elu11()), Study(tmp_path)
    run = planned(recipe, seeds=1).runs({})[0]
    train_images(recipe, [run], tiny_cifar(), study, Session(CPU, tensorboard=True), compare.SILENT)
    (folder, writer), *others = Writer.made.items()
    assert (folder, others) == ((tmp_path / "tensorboard" / run.folder).as_posix(), [])
    assert writer.closed
    told = {(name, epoch): value for name, value, epoch in writer.scalars}
    assert len(told) == len(writer.scalars)
    for row in study.metrics(run):
        assert told["train_loss", row["epoch"]] == row["train_loss"]
        assert told["mean_activation/layer-02", row["epoch"]] == row["mean_activation"][1]
    assert not [name for name, _ in told if name == "validation_error"]


def test_tensorboard_that_is_absent_is_named_with_its_extra(
    zeromean: Zeromean, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit):
        zeromean("compare", *SMALL, *ARMS, "--tensorboard")
    assert "pip install 'zeromean[tensorboard]'" in capsys.readouterr().err


def test_a_second_process_leaves_the_files_of_the_first_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("zeromean.lab.session.train", lambda *words, **options: asked.append(options))
    run, study = Run("elu", "elu", 0.01, 0), Study(tmp_path)
    study.begin(run)
    (tmp_path / run.folder / "metrics.jsonl").write_text('{"half a line')
    session = Session(CPU, Share(1, 1), tensorboard=True)
    train_images(short(cifar100_elu11()), [run], tiny_cifar(), study, session, compare.SILENT)
    asked[0]["on_epoch"](1, 1)
    assert not (tmp_path / "tensorboard").exists()
