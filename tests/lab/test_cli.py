"""The command line, end to end on the embedded digits, killed and continued."""

import contextlib
import csv
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from zeromean.lab.progress import Bar

SMALL = ["digits-mlp8", "hidden=16,16", "probe_samples=50"]
ARMS = ["--activations", "elu", "relu", "eelu"]
Zeromean = Callable[..., str]


def refusal(zeromean: Zeromean, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        zeromean(*words)
    assert stop.value.code not in (0, None)
    return capsys.readouterr().err


def test_compare_ends_with_a_verdict_and_the_reports_path(zeromean: Zeromean, tmp_path: Path) -> None:
    out = zeromean("compare", *SMALL, "epochs=2", *ARMS, "--seeds", "3")
    assert "smallest possible p-value" in " ".join(out.split())
    assert "report.html" in out
    study = tmp_path / "runs" / "digits-mlp8"
    rows = rows_of(study)
    assert len(rows) == 9
    assert {row["status"] for row in rows} == {"ok"}
    assert (study / "elu" / "seed-002" / "model.safetensors").exists()
    assert (study / "report.html").stat().st_size < 2_000_000
    again = zeromean("compare", *SMALL, "epochs=2", *ARMS, "--seeds", "3")
    assert "9 of 9 final runs are done already" in again


def test_tuned_compare_trains_each_arm_at_its_own_rate(zeromean: Zeromean, tmp_path: Path) -> None:
    words = ["compare", *SMALL, "epochs=1", "tuning_grid=0.01,0.1", "tuning_seeds=1", *ARMS, "--seeds", "1", "--tune"]
    zeromean(*words)
    study = tmp_path / "runs" / "digits-mlp8"
    assert (study / "tuning.json").exists()
    assert len(list(study.glob("tuning/*/lr-*/seed-*/result.json"))) == 6


def test_dry_run_plans_and_writes_nothing(zeromean: Zeromean, tmp_path: Path) -> None:
    out = zeromean("compare", *SMALL, "epochs=2", "--seeds", "10", "--dry-run")
    assert "40 runs of 2 epochs each" in out
    assert "smallest detectable difference" in out
    assert "training takes about" in out
    assert not (tmp_path / "runs").exists()


def test_run_show_report(zeromean: Zeromean, tmp_path: Path) -> None:
    out = zeromean("run", *SMALL, "epochs=1", "--activation", "pelu", "--seed", "4")
    assert "report.html" in out
    study = tmp_path / "runs" / "digits-mlp8-pelu-seed4"
    assert (study / "pelu" / "seed-004" / "result.json").exists()
    before = (study / "summary.csv").read_bytes()
    (study / "summary.csv").unlink()
    zeromean("report", str(study))
    assert (study / "summary.csv").read_bytes() == before
    assert "PELU" in zeromean("show", str(study))


def test_lists_and_pages(zeromean: Zeromean) -> None:
    listing = zeromean("ls")
    assert "mnist-autoencoder" in listing
    assert "eelu" in listing
    assert "165,000 steps" in listing
    assert "learning_rates" in zeromean("show", "mnist-mlp8")
    convolutional = " ".join(zeromean("show", "cifar10-elu18").split())
    assert "50,000 steps with dropout 0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0 behind every layer" in convolutional
    assert "0.001 at step 85,000, 0.0001 at step 120,000" in convolutional
    assert "125,000 in all" in convolutional
    assert "+0.1605" in zeromean("show", "elu")
    assert "alpha (e^(beta x) - 1)" in zeromean("show", "mpelu:alpha=1")
    assert "digits" in zeromean("data", "digits")
    assert "torch" in zeromean("doctor")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "digits-mpl8"], "did you mean 'digits-mlp8'"),
        (["compare", "digits-mlp8", "epoch=2"], "did you mean 'epochs'"),
        (["compare", "digits-mlp8", "--activations", "rleu"], "did you mean 'relu'"),
        (["compare", "digits-mlp8", "--seeds", "-1"], "between 0 and 65535"),
        (["compare", "digits-mlp8", "--seeds", "0"], "between 0 and 65535"),
        (["compare", "digits-mlp8", "--device", "tpu"], "auto, cpu or cuda"),
        (["compare", "digits-mlp8", "--name", "../x"], "plain folder name"),
        (["compare", "digits-mlp8", "--checkpoint-every", "0"], "at least 1"),
        (["compare", "digits-mlp8", "batch_size=5000"], "batch_size 5000 exceeds"),
        (["compare", "digits-mlp8", "validation=1437"], "validation"),
        (["show", "elux"], "did you mean 'elu'"),
        (["report", "nowhere"], "holds no study"),
        (["compare", "digits-mlp8", "baseline=gelu"], "no arm"),
        (["compare", "digits-mlp8", "activations="], "at least one"),
        (["run", "digits-mlp8", "learning_rates=0.1,0.2"], "trains one network"),
        (["data", "minst"], "mnist"),
    ],
)
def test_bad_words_are_refused_with_a_remedy(
    zeromean: Zeromean, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], message: str
) -> None:
    assert message in refusal(zeromean, capsys, *words)
    assert not (tmp_path / "runs").exists()


def rows_of(study: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((study / "summary.csv").read_text())))


def spawn(folder: Path, *words: str) -> "subprocess.Popen[str]":
    code = "from zeromean.lab.cli import main; main()"
    command = [sys.executable, "-W", "error", "-c", code, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for_epoch(study: Path, epoch: int) -> None:
    metrics = study / "elu" / "seed-000" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < epoch:
        time.sleep(0.005)


STUDY = ["compare", *SMALL, "epochs=60", *ARMS, "--seeds", "4", "--name", "study"]


def test_killed_at_three_random_moments_the_summary_is_the_same_to_the_byte(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for folder in (undisturbed, killed):
        folder.mkdir()
    whole = spawn(undisturbed, *STUDY)
    assert "report" in whole.communicate()[0]
    moments = sorted(random.Random(0).sample(range(1, 55), 3))
    for epoch in moments:
        process = spawn(killed, *STUDY)
        wait_for_epoch(killed / "runs" / "study", epoch)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (killed / "runs" / "study" / "summary.csv").exists()
    last = spawn(killed, *STUDY)
    assert "report" in last.communicate()[0]
    first, second = (folder / "runs" / "study" / "summary.csv" for folder in (undisturbed, killed))
    assert first.read_bytes() == second.read_bytes()
    assert len(first.read_text().splitlines()) == 13


def test_a_damaged_result_is_told_and_repeated(tmp_path: Path, zeromean: Zeromean) -> None:
    words = ["compare", *SMALL, "epochs=2", *ARMS, "--seeds", "2", "--name", "study"]
    zeromean(*words)
    study = tmp_path / "runs" / "study"
    before = rows_of(study)
    result = study / "relu" / "seed-001" / "result.json"
    result.write_text(result.read_text()[:100])
    out = zeromean(*words)
    assert "damaged" in out
    assert "the run repeated" in out
    repeated = rows_of(study)
    assert [row for row in repeated if row["arm"] != "relu"] == [row for row in before if row["arm"] != "relu"]
    assert float(repeated[3]["train_loss"]) == pytest.approx(float(before[3]["train_loss"]), rel=1e-5)


def test_ctrl_c_ends_cleanly_and_says_how_to_continue(tmp_path: Path) -> None:
    process = spawn(tmp_path, *STUDY)
    wait_for_epoch(tmp_path / "runs" / "study", 2)
    process.send_signal(signal.SIGINT)
    out = process.communicate()[0]
    assert process.returncode == 130
    assert "same command continues" in out
    assert "Traceback" not in out


def test_ctrl_c_counts_even_where_a_destructor_swallows_it() -> None:
    class Swallows:
        def __del__(self) -> None:
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with Bar(Console(file=io.StringIO())) as bar:
        on_epoch = bar.progress.stage("final", 3)
        on_epoch(0, 1)
        swallows = Swallows()
        del swallows
        with pytest.raises(KeyboardInterrupt):
            on_epoch(1, 1)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), ["use fewer --workers", "continues"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ["name fewer seeds or arms"]),
    ],
)
def test_what_a_machine_is_short_of_is_no_traceback(
    error: Exception, told: list[str], zeromean: Zeromean, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def failing(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("zeromean.lab.cli.find", failing)
    message = refusal(zeromean, capsys, "compare", *SMALL, *ARMS)
    assert all(words in message for words in (str(error), *told))


def test_a_full_disk_ends_cleanly_and_says_how_to_continue(
    zeromean: Zeromean, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["compare", *SMALL, "epochs=2", *ARMS, "--seeds", "2", "--name", "study"]
    sync = os.fsync
    calls: list[int] = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 9:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    message = refusal(zeromean, capsys, *words)
    assert "disk is full" in message
    assert "continues the study" in message
    monkeypatch.setattr(os, "fsync", sync)
    zeromean(*words)
    assert len((tmp_path / "runs" / "study" / "summary.csv").read_text().splitlines()) == 7
