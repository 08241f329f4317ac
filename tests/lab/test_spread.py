"""The runs of a study over several devices, here processes on the CPU."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab.image_study import CPU, tiny_cifar

from zeromean.lab.cli import main
from zeromean.lab.compare import Progress
from zeromean.lab.compare import run as run_study
from zeromean.lab.plan import Plan, make
from zeromean.lab.recipes.cifar import cifar100_elu11
from zeromean.lab.session import Session
from zeromean.lab.spread import _parts, first_gpus
from zeromean.lab.store import Run, Study
from zeromean.lab.train import Stopped


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plan(length: float = 3e-5) -> Plan:
    recipe = replace(
        cifar100_elu11(), batch_size=4, normalization="mean-std", probe_samples=4, rates=((0, 1e-5),)
    ).shortened(length)
    return make(recipe, ("elu", "relu"), norms=("none",), seeds=2)


def train(planned: Plan, folder: Path, devices: tuple[torch.device, ...], **progress: Any) -> Study:
    study = Study(folder)
    folder.mkdir(exist_ok=True)
    session = Session(CPU, devices=devices)
    run_study(planned, study, tiny_cifar(), device=CPU, progress=Progress(**progress), session=session)
    return study


def test_runs_are_dealt_in_stretches_of_neighbours() -> None:
    runs = [Run("elu", "elu", 0.1, seed) for seed in range(7)]
    assert [len(part) for part in _parts(runs, 3)] == [3, 2, 2]
    assert [run for part in _parts(runs, 3) for run in part] == runs
    assert [len(part) for part in _parts(runs[:2], 4)] == [1, 1, 0, 0]


def test_two_processes_leave_what_one_does_and_tell_of_all_runs(tmp_path: Path) -> None:
    totals: list[int] = []
    told: list[int] = []
    notes: list[str] = []

    def stage(name: str, epochs: int) -> Any:
        totals.append(epochs)
        return lambda epoch, runs: told.append(epoch)

    spread = train(plan(), tmp_path / "two", (CPU, CPU), stage=stage, note=notes.append, say=lambda line: None)
    alone = train(plan(), tmp_path / "one", (), say=lambda line: None)
    for run in plan().runs({}):
        first, second = (study.path / run.folder / "model.safetensors" for study in (spread, alone))
        assert first.read_bytes() == second.read_bytes()
    assert totals == [8]  # four runs of two epochs
    assert told == sorted(told)
    assert told[-1] == 8
    assert "0: " in notes[-1]
    assert "1: " in notes[-1]


def test_sigterm_reaches_every_process_and_the_study_continues(tmp_path: Path) -> None:
    long = plan(length=2e-3)  # 330 steps, 110 epochs

    def ask(folder: Path) -> None:
        while len(list(folder.rglob("metrics.jsonl"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=ask, args=(tmp_path / "study",), daemon=True)
    watcher.start()
    with pytest.raises(Stopped):
        train(long, tmp_path / "study", (CPU, CPU), say=lambda line: None)
    assert len(list((tmp_path / "study").rglob("checkpoint.safetensors"))) == 2
    assert not list((tmp_path / "study").rglob("result.json"))


@pytest.mark.parametrize("early", [False, True])
def test_sigterm_to_every_process_at_once_is_one_request(tmp_path: Path, early: bool) -> None:
    def ask(folder: Path) -> None:
        while len(workers := multiprocessing.active_children()) < 2:
            time.sleep(0.01)
        while not early and len(list(folder.rglob("metrics.jsonl"))) < 2:
            time.sleep(0.05)
        for process in (*(worker.pid or 0 for worker in workers), os.getpid()):
            os.kill(process, signal.SIGTERM)

    watcher = threading.Thread(target=ask, args=(tmp_path / "study",), daemon=True)
    watcher.start()
    with pytest.raises(Stopped):
        train(plan(length=2e-3), tmp_path / "study", (CPU, CPU), say=lambda line: None)
    assert len(list((tmp_path / "study").rglob("checkpoint.safetensors"))) == (0 if early else 2)


ORPHAN = """
import multiprocessing, sys, threading, time
from zeromean.lab.spread import _end_with_parent

def work():
    threading.Thread(target=_end_with_parent, daemon=True).start()
    print("begun", flush=True)
    time.sleep(60)
    print("outlived its parent", flush=True)

if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=work, daemon=True)
    worker.start()
    worker.join()
"""


def test_a_process_ends_when_the_one_that_started_it_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "begun\n"
        parent.kill()
        assert parent.stdout.read() == "", "the pipe ends with the last process that holds it"


def test_a_process_that_fails_is_not_silent(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    blocked = plan().runs({})[3]
    (folder / blocked.arm).mkdir(parents=True)
    (folder / blocked.folder).write_text("in the way")
    with pytest.raises(RuntimeError, match="ended with the codes"):
        train(plan(), folder, (CPU, CPU), say=lambda line: None)


def test_gpus_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert first_gpus(2) == (torch.device("cuda", 0), torch.device("cuda", 1))
    with pytest.raises(ValueError, match=r"gpus must lie between 1 and 2, .* got 3"):
        first_gpus(3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="GPUs that this process sees, which are none, got 2: leave --gpus out"):
        first_gpus(2)
    for words in (
        ["digits-mlp8", "--gpus", "2"],
        ["cifar100-elu11", "--gpus", "2", "--device", "cpu"],
        ["cifar100-elu11", "--gpus", "0"],
    ):
        with pytest.raises(SystemExit):
            main(["compare", *words, "--runs", str(tmp_path)])
        assert "gpus" in capsys.readouterr().err
