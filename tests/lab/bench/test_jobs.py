"""Jobs over several GPUs: which begins when, what it is told, and what is left out."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks.jobs import Job, Runner, main, processors, read

FOREVER = float("inf")


def rows(jobs: list[Job], out: Path, *, gpus: int = 2, ends: float = FOREVER) -> dict[str, dict[str, Any]]:
    out.mkdir(exist_ok=True)
    return {row["name"]: row for row in Runner(jobs, gpus, out, ends).run()}


def test_a_job_waits_for_all_of_its_gpus_and_lets_no_later_one_pass(tmp_path: Path) -> None:
    wait = f"until [ -e {tmp_path}/go ]; do sleep 0.05; done"
    jobs = [
        Job("first", wait, (0,)),
        Job("beside", f"touch {tmp_path}/go", (1,)),
        Job("both", "true", (0, 1)),
        Job("last", "true", (1,)),
    ]
    found = rows(jobs, tmp_path / "out")
    assert len(found) == 4
    assert all(row["exit"] == 0 for row in found.values())
    assert found["both"]["began"] >= found["first"]["ended"]
    assert found["last"]["began"] >= found["both"]["ended"]


def test_a_job_sees_its_gpus_its_processors_and_its_folder(tmp_path: Path) -> None:
    told = (
        """python3 -c 'import os; print(os.environ["CUDA_VISIBLE_DEVICES"], len(os.sched_getaffinity(0)))' > $OUT/t"""
    )
    rows([Job("one", told, (1,)), Job("all", told, (0, 1))], tmp_path)
    mine = len(os.sched_getaffinity(0))
    assert (tmp_path / "one" / "t").read_text().split() == ["1", str(max(1, mine // 2) if mine > 1 else 1)]
    assert (tmp_path / "all" / "t").read_text().split() == ["0,1", str(mine // 2 * 2 or 1)]


def test_processors_are_dealt_out_without_overlap() -> None:
    parts = [processors([gpu], 2) for gpu in (0, 1)]
    own = os.sched_getaffinity(0)
    assert all(part and part <= own for part in parts)
    assert len(own) < 2 or not set.intersection(*(part or set() for part in parts))
    assert processors([0], len(own) + 1) == own


def test_a_job_waits_for_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_TEST", str(tmp_path))
    jobs = [Job("reads", "cat $OF_THE_TEST/data", (0,), needs=("$OF_THE_TEST/data",))]
    jobs.append(Job("writes", f"echo 7 > {tmp_path}/data", (1,)))
    found = rows(jobs, tmp_path / "out")
    assert found["reads"]["exit"] == 0
    assert (tmp_path / "out" / "reads" / "log").read_text() == "7\n"


def test_what_would_not_end_in_time_is_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [Job("long", "true", seconds=1000.0), Job("short", "true", seconds=1.0)]
    found = rows(jobs, tmp_path, ends=time.monotonic() + 100)
    assert (found["long"]["began"], found["long"]["exit"]) == (None, None)
    assert found["short"]["exit"] == 0
    assert "long: left out: no time" in capsys.readouterr().out
    assert [json.loads(line)["name"] for line in (tmp_path / "jobs.jsonl").read_text().splitlines()] == list(found)


def test_what_still_runs_when_the_time_is_over_is_ended(tmp_path: Path) -> None:
    command = "trap 'echo asked; exit 3' TERM; sleep 1000 & wait"
    found = rows([Job("endless", command)], tmp_path, ends=time.monotonic() + 2)
    assert found["endless"]["exit"] == 3
    assert "asked" in (tmp_path / "endless" / "log").read_text()


def test_a_list_with_one_name_twice_or_an_unknown_gpu_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "list.json"
    file.write_text(json.dumps([{"name": "a", "command": "true"}] * 2))
    with pytest.raises(ValueError, match="must differ, got 'a' twice"):
        read(file, 1)
    file.write_text(json.dumps([{"name": "a", "command": "true", "gpus": [2]}]))
    with pytest.raises(ValueError, match=r"gpus of 'a' must be some of 0 to 1, got \(2,\)"):
        read(file, 2)


def test_a_job_that_fails_is_named_and_ends_no_other(tmp_path: Path) -> None:
    file = tmp_path / "list.json"
    file.write_text(json.dumps([{"name": "bad", "command": "exit 4"}, {"name": "good", "command": "echo ok"}]))
    with pytest.raises(SystemExit, match="not all ended well: bad"):
        main([str(file), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "good" / "log").read_text() == "ok\n"
