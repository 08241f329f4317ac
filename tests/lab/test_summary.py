"""What a study's folder says: counts, verdicts, and the two text files made from them."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.lab.image_study import write_image_study

from zeromean.lab.store import DamagedFileError, Run, Study
from zeromean.lab.summary import CSV_COLUMNS, Summary, arm_table, load, to_csv, to_markdown, to_tables

StudyFolder = Callable[..., Study]

GOLDEN_CSV = """\
arm,activation,learning_rate,seed,status,epochs,train_loss,train_error,validation_error,test_error,median_mean_activation,norm
elu,elu,0.01,0,ok,3,1.295474,38.36423,,2.5,0.03742605,none
elu,elu,0.01,1,diverged,3,,,,,,none
relu,relu,0.01,0,ok,3,1.66082,49.3246,,3.055556,0.2500859,none
relu,relu,0.01,1,ok,3,1.537145,45.61435,,3.611111,0.2520101,none
"""

GOLDEN_MARKDOWN = """\
# digits-mlp8: 8 x 128 network on the embedded digits

- ELU: lower test error than ReLU by 0.83 points (95 % interval 0.42 to 1.39, adjusted p = 0.016, 7 seeds).

14 of 14 runs done: 14 ok.

| arm  | learning rate |   n | mean test error (%) |   sd | 95 % interval | diverged | failed |
|------|---------------|----:|--------------------:|-----:|--------------:|---------:|-------:|
| ELU  | 0.01          |   7 |                2.26 | 0.30 |  1.94 to 2.50 |        0 |      0 |
| ReLU | 0.01          |   7 |                3.10 | 0.37 |  2.78 to 3.47 |        0 |      0 |

| comparison | pairs | difference (points) |  95 % interval |     p | adjusted p | P(better) | verdict |
|------------|------:|--------------------:|---------------:|------:|-----------:|----------:|--------:|
| ELU - ReLU |     7 |               -0.83 | -1.39 to -0.42 | 0.016 |      0.016 |      0.96 |  better |

Differences are arm minus baseline over runs that share a seed: negative favours the arm. The interval inverts the \
sign-flip test that gives p (below 6 pairs it is Student's t) and is not adjusted; adjusted p-values are Holm's over \
all comparisons.

- Command: `zeromean compare digits-mlp8 --seeds 7`
- Made 2026-11-22T06:00:00Z with zeromean 0.1.0, python 3.11.2, torch 2.13.0, numpy 2.4.6, on AMD EPYC (cpu), \
commit 0123456789abcdef0123456789abcdef01234567 with uncommitted changes
- Data: digits, 1437 train, 0 validation, 360 test samples
- Design: with 7 seeds per arm a difference of 0.65 points is found with 80 % power, if the standard deviation \
between seeds is 0.5
"""


def test_csv_text(study_folder: StudyFolder) -> None:
    study = study_folder(arms=("elu", "relu"), seeds=2, epochs=3, diverged=(("elu", 1),))
    assert to_csv(load(study)) == GOLDEN_CSV


def test_csv_holds_nothing_that_a_repetition_changes(study_folder: StudyFolder) -> None:
    first = study_folder(seeds=2, epochs=2)
    second = study_folder(
        seeds=2, epochs=2, plan_changes={"created": "2030-01-01T00:00:00Z", "device": {"name": "other"}}
    )
    run = Run("elu", "elu", 0.01, 0)
    result = second.result(run)
    assert result is not None
    second.finish(run, {**result, "seconds": 99.0, "together": 1}, None)
    assert to_csv(load(first)) == to_csv(load(second))


def test_markdown_text(study_folder: StudyFolder) -> None:
    assert to_markdown(load(study_folder(arms=("elu", "relu"), seeds=7, epochs=3))) == GOLDEN_MARKDOWN


def test_diverged_runs_are_counted_and_named(study_folder: StudyFolder) -> None:
    summary = load(study_folder(epochs=4, diverged=(("elu", 0), ("elu", 4), ("relu", 4))))
    assert [arm.count("diverged") for arm in summary.arms] == [2, 1, 0, 0]
    assert summary.progress == "40 of 40 runs done: 37 ok, 3 diverged."
    assert summary.exclusions == "Left out of means and comparisons: ELU (2 diverged); ReLU (1 diverged)."
    assert summary.arms[0].test_error.n == 8
    assert summary.comparisons[0].n_pairs == 8
    assert "among runs that did not diverge" in summary.sentences[0]
    rows = list(csv.DictReader(io.StringIO(to_csv(summary))))
    assert len(rows) == 40
    assert [row["seed"] for row in rows if row["status"] == "diverged"] == ["0", "4", "4"]


def test_a_failed_run_needs_no_numbers(study_folder: StudyFolder) -> None:
    study = study_folder(arms=("elu", "relu"), seeds=2, epochs=2, missing=(("elu", 1),))
    study.finish(Run("elu", "elu", 0.01, 1), {"arm": "elu", "seed": 1, "status": "failed"}, None)
    summary = load(study)
    assert summary.exclusions == "Left out of means and comparisons: ELU (1 failed)."
    assert "elu,elu,0.01,1,failed,,,,,,,none" in to_csv(summary)


def test_no_verdict_before_all_runs_are_done(study_folder: StudyFolder) -> None:
    summary = load(study_folder(epochs=2, missing=(("shifted_relu", 7), ("relu", 2))))
    assert summary.comparisons == ()
    assert summary.sentences == ("No verdict yet: 2 of 40 runs are not done.",)
    assert summary.progress == "38 of 40 runs done: 38 ok."
    assert [arm.test_error.n for arm in summary.arms] == [10, 9, 10, 9]
    assert "relu,relu,0.01,2,missing,,,,,,,none" in to_csv(summary)
    assert "comparison" not in to_markdown(summary)


def test_three_seeds_get_no_verdict(study_folder: StudyFolder) -> None:
    summary = load(study_folder(seeds=3, epochs=2))
    assert {one.verdict for one in summary.comparisons} == {"cannot support"}
    text = to_markdown(summary)
    assert "3 seeds cannot support a verdict on ELU against ReLU" in text
    assert "3 seeds per arm cannot reach significance" in text


def test_one_arm_is_no_comparison(study_folder: StudyFolder) -> None:
    summary = load(study_folder(arms=("elu",), seeds=1, epochs=2))
    assert summary.sentences == ("Nothing to compare: the study has one arm.",)
    assert arm_table(summary)[1] == [("ELU", "0.01", "1", "2.50", "", "too few runs", "0", "0")]


def test_every_learning_rate_has_its_baseline_and_all_share_one_adjustment(study_folder: StudyFolder) -> None:
    study = study_folder(task="reconstruction", rates=(0.01, 0.001), seeds=8, epochs=2, arms=("elu", "relu"))
    summary = load(study)
    found = [(one.arm, one.baseline) for one in summary.comparisons]
    assert found == [("ELU, lr 0.01", "ReLU, lr 0.01"), ("ELU, lr 0.001", "ReLU, lr 0.001")]
    assert [one.p_value for one in summary.comparisons] == [2 / 2**8] * 2
    assert [one.p_adjusted for one in summary.comparisons] == [2 * 2 / 2**8] * 2


def test_reconstruction_names_its_error_and_unit(study_folder: StudyFolder) -> None:
    text = to_markdown(load(study_folder(task="reconstruction", seeds=8, epochs=2, arms=("elu", "relu"))))
    assert "| mean test reconstruction error (1e-3) |" in text
    assert "ELU: lower test reconstruction error than ReLU by 0.88 × 1e-3 (" in text
    assert "points" not in text


def test_tuning_gives_the_learning_rate(study_folder: StudyFolder) -> None:
    summary = load(study_folder(tune=True, seeds=2, epochs=2))
    assert [arm.learning_rate for arm in summary.arms] == [0.03] * 4
    tunings = [arm.tuning for arm in summary.arms if arm.tuning]
    assert [tuning.at_edge for tuning in tunings] == [False, False, True, False]
    assert (
        summary.edges == "Learning rate at the edge of the tuning grid, so perhaps not the best: LeakyReLU(0.1) (0.03)."
    )
    assert summary.edges in to_markdown(summary)
    assert [tuning.grid[-1].validation_errors.count(None) for tuning in tunings] == [0, 1, 0, 0]


def test_before_tuning_no_learning_rate_is_claimed(study_folder: StudyFolder) -> None:
    missing = tuple((arm, seed) for arm in ("elu", "relu") for seed in range(2))
    study = study_folder(tune=True, seeds=2, epochs=2, arms=("elu", "relu"), missing=missing)
    (study.path / "tuning.json").unlink()
    summary = load(study)
    assert arm_table(summary)[1][0][:3] == ("ELU", "not chosen yet", "0")
    assert "elu,elu,,0,missing,,,,,,,none" in to_csv(summary)


def test_labels_that_repeat_get_their_settings(study_folder: StudyFolder) -> None:
    study = study_folder(arms=("elu", "relu"), seeds=2, epochs=2)
    plan = study.plan()
    assert plan is not None
    study.write_plan({**plan, "arms": [{**arm, "label": "Same"} for arm in plan["arms"]]})
    assert [arm.label for arm in load(study).arms] == ["Same [elu]", "Same [relu]"]


@pytest.mark.parametrize(("factor", "decimals"), [(1.0, 2), (0.1, 3), (1e-6, 4), (100.0, 2)])
def test_decimals_follow_the_spread(study_folder: StudyFolder, factor: float, decimals: int) -> None:
    summary = load(study_folder(arms=("elu", "relu"), seeds=3, epochs=2))
    arms = [replace(arm, test_error=replace(arm.test_error, sd=0.23 * factor)) for arm in summary.arms]
    assert replace(summary, arms=tuple(arms)).decimals == decimals


def test_user_text_cannot_break_a_table(study_folder: StudyFolder) -> None:
    study = study_folder(arms=("elu", "relu"), seeds=2, epochs=2, plan_changes={"study": "a|b\n\n# c <img>"})
    assert to_markdown(load(study)).startswith("# a\\|b # c &lt;img>: 8 x 128")


def test_terminal_tables_hold_the_same_cells(study_folder: StudyFolder) -> None:
    from rich.console import Console

    summary = load(study_folder(arms=("elu", "relu"), seeds=7, epochs=2))
    console = Console(width=200, file=io.StringIO(), force_terminal=False)
    for table in to_tables(summary):
        console.print(table)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for row in [*arm_table(summary)[1], ("ELU - ReLU", "-1.39 to -0.42", "better")]:
        assert all(cell in shown for cell in row)


def test_a_damaged_result_is_not_summarised(study_folder: StudyFolder) -> None:
    study = study_folder(arms=("elu",), seeds=1, epochs=2)
    file = study.path / "elu/seed-000/result.json"
    file.write_text(file.read_text().replace('"status": "ok"', '"status": "no"'))
    with pytest.raises(DamagedFileError, match="checksum"):
        load(study)


def test_a_damaged_tuning_file_is_named(study_folder: StudyFolder) -> None:
    study = study_folder(tune=True, arms=("elu",), seeds=1, epochs=2)
    (study.path / "tuning.json").write_text('{"arms": {"elu": {"chosen": 0.1}}}')
    with pytest.raises(DamagedFileError, match=r"tuning\.json is damaged"):
        load(study)


def test_a_folder_without_a_study(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no study: name a folder with a plan\.json"):
        load(Study(tmp_path))


def test_columns_hold_no_time_and_no_machine() -> None:
    assert not {"seconds", "together", "device", "created"} & set(CSV_COLUMNS)


def test_summary_needs_no_chart_library() -> None:
    code = "import sys, zeromean.lab.summary; print('altair' in sys.modules or 'zeromean.lab.report' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_summary_is_frozen(study_folder: StudyFolder) -> None:
    summary: Summary = load(study_folder(arms=("elu",), seeds=1, epochs=2))
    with pytest.raises(AttributeError):
        summary.arms = ()  # type: ignore[misc]


def test_an_image_study_is_summarised_from_its_folder(tmp_path: Path) -> None:
    summary = load(write_image_study(tmp_path, seeds=8, diverged=3))
    assert [(arm.label, arm.norm) for arm in summary.arms] == [
        ("ELU", "none"),
        ("ReLU", "none"),
        ("ELU + BatchNorm", "batch"),
        ("ReLU + BatchNorm", "batch"),
    ]
    assert summary.exclusions == (
        "Left out of means and comparisons: ReLU (1 diverged). "
        "Diverged: ReLU seed 3: step 7, output of stacks.2.convolution."
    )
    assert [(one.arm, one.baseline, one.n_pairs) for one in summary.comparisons] == [
        ("ELU", "ReLU", 7),
        ("ELU + BatchNorm", "ReLU", 7),
        ("ReLU + BatchNorm", "ReLU", 7),
    ]
    rows = list(csv.DictReader(io.StringIO(to_csv(summary))))
    assert [row["norm"] for row in rows] == ["none"] * 16 + ["batch"] * 16
    assert summary.speed == "18 s a run, 40,000 images/s on average"
    text = to_markdown(summary)
    assert "- Speed: 18 s a run, 40,000 images/s on average" in text
    assert "- ELU + BatchNorm: lower test error than ReLU by" in text
    assert "images/s" not in to_csv(summary)


def test_a_run_takes_the_time_of_those_that_ended_well(tmp_path: Path) -> None:
    study = write_image_study(tmp_path, seeds=1, diverged=0)
    summary = load(study)
    assert sorted(run.result["seconds"] for arm in summary.arms for run in arm.runs) == [4.5, 18.0, 18.0, 18.0]
    assert summary.speed == "18 s a run, 40,000 images/s on average"


def test_records_hold_every_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import cifar_record

    study = write_image_study(tmp_path, seeds=2, diverged=1)
    monkeypatch.setattr(sys, "argv", ["cifar_record.py", str(study.path), "--out", str(tmp_path / "record")])
    cifar_record.main()
    rows = [json.loads(line) for line in (tmp_path / "record" / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    wanted = ("recipe", "activation", "norm", "seed", "status", "seconds", "images_per_second")
    assert [rows[0][key] for key in wanted] == ["cifar100-elu11", "elu", "none", 0, "ok", 18.0, 40_000.0]
    assert rows[0]["test_error"] == pytest.approx(28.0, abs=0.5)
    (lost,) = [row for row in rows if row["status"] == "diverged"]
    assert (lost["activation"], lost["norm"], lost["seed"], lost["test_error"]) == ("relu", "none", 1, None)
    assert lost["diverged"]["step"] == 7
    assert (tmp_path / "record" / "table.md").read_text().endswith("\n\n" + to_markdown(load(study)))
    drawn = (tmp_path / "record" / "runs.svg").read_text()
    assert drawn.count('aria-roledescription="point"') == 7  # the diverged one has no error
    assert drawn.count('aria-roledescription="tick"') == 2  # ELU's and ReLU's, as published
