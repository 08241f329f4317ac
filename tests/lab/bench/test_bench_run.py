"""A whole benchmark on the CPU: files, continuation, tables, pictures, the command."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from zeromean.lab.bench import Record, run, settings, summarise
from zeromean.lab.bench import measure as measuring
from zeromean.lab.bench.tables import grids
from zeromean.lab.cli import main

Bench = Callable[..., str]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Runs a tiny benchmark and returns what it printed."""

    def call(*activations: str, fresh: bool = False, **wishes: Any) -> str:
        console = Console(width=180, force_terminal=False, record=True, file=io.StringIO())
        defaults = {"elements": ["4096"], "competitors": ["zeromean", "eager", "textbook"], "rounds": 1}
        chosen = settings(activations or ["elu"], **{**defaults, **wishes, "device": "cpu"})
        run(chosen, tmp_path, fresh=fresh, console=console)
        return console.export_text()

    return call


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_files_say_what_was_measured_and_where(bench: Bench, tmp_path: Path) -> None:
    out = bench("elu", "prelu", passes=["forward", "both"], competitors=["zeromean", "eager", "attorch"])
    assert "without attorch: not installed" in out
    assert "ours against the best other" in out
    machine = json.loads((tmp_path / "machine.json").read_text())
    assert machine["ceilings"]["copy_gigabytes_per_second"] > 0
    assert machine["ceilings"]["product_teraflops"] > 0
    assert set(machine["missing"]) == {"attorch"}
    assert len(lines(tmp_path)) == 3 * 2 * 2
    summary = (tmp_path / "summary.md").read_text()
    assert "| elu | contiguous | forward |" in summary
    assert "attorch: not installed" in summary


def test_what_is_there_is_not_measured_again(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench("elu")
    before = lines(tmp_path)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"activation": "elu", "pa')
    bench("elu", "relu")
    after = lines(tmp_path)
    assert after[: len(before)] == before
    assert [row["activation"] for row in after] == ["elu"] * 3 + ["relu"] * 2
    monkeypatch.setattr(measuring.Bench, "rows", lambda *_: pytest.fail("measured again"))
    bench("elu", "relu")
    assert lines(tmp_path) == after


def test_fresh_measures_again(bench: Bench, tmp_path: Path) -> None:
    bench("elu", "relu")
    bench("elu", fresh=True)
    assert {row["activation"] for row in lines(tmp_path)} == {"elu"}


def test_rows_of_other_conditions_are_not_mixed(bench: Bench, tmp_path: Path) -> None:
    bench("elu")
    before = lines(tmp_path)
    with pytest.raises(ValueError, match="another rounds: choose another --output, or --fresh"):
        bench("relu", rounds=2)
    assert lines(tmp_path) == before


def test_a_damaged_line_is_told(bench: Bench, tmp_path: Path) -> None:
    bench("elu")
    file = tmp_path / "results.jsonl"
    file.write_text("{\n" + file.read_text())
    with pytest.raises(ValueError, match="damaged in line 1: remove that line, or use --fresh"):
        bench("elu")


def test_pictures_are_pictures_and_can_be_drawn_again(bench: Bench, tmp_path: Path) -> None:
    bench("elu", passes=["forward", "backward"])
    drawing, raster = (tmp_path / f"fraction_of_copy-bfloat16-4096.{end}" for end in ("svg", "png"))
    texts = [element.text for element in ElementTree.fromstring(drawing.read_bytes()).iter() if element.text]
    assert {"elu", "eager", "textbook", "forward", "backward"} <= set(texts)
    assert raster.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    summary = (tmp_path / "summary.md").read_bytes()
    drawing.unlink()
    (tmp_path / "summary.md").unlink()
    summarise(Record(tmp_path), Console(file=io.StringIO()))
    assert drawing.exists()
    assert (tmp_path / "summary.md").read_bytes() == summary


def test_tables_show_the_best_the_losses_and_the_failures() -> None:
    place = {"activation": "elu", "pass": "forward", "dtype": "bfloat16", "layout": "contiguous", "elements": 2**28}
    quality = {"saved_bytes_per_element": 2.0, "max_relative_error": 0.004, "max_absolute_error": 0.002}
    rows = [
        place | quality | {"contender": "zeromean", "milliseconds": 2.0, "fraction_of_copy": 0.5},
        place | quality | {"contender": "eager", "milliseconds": 1.0, "fraction_of_copy": 1.0},
        place | dict.fromkeys(quality) | {"contender": "textbook", "milliseconds": None, "error": "out of memory"},
    ]
    speed, saved, _ = grids(rows)
    assert [cell.text for cell in speed.lines[0]] == [
        *("elu", "contiguous", "forward"),
        *("0.500", "1.000", "error", "0.50 x eager"),
    ]
    assert [cell.best for cell in speed.lines[0]] == [False, False, False, False, True, False, False]
    assert [cell.text for cell in saved.lines[0]] == ["elu", "contiguous", "2", "2", "error"]
    assert "2^28 elements" in speed.title


def test_the_command_measures_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("zeromean.lab.cli._console.width", 200)
    words = ["relu", "--elements", "4096", "--contenders", "zeromean", "eager", "--rounds", "1", "--device", "cpu"]
    main(["bench", *words, "--output", "out"])
    assert "ours against the best other" in capsys.readouterr().out
    main(["bench", "--redraw", "--output", "out"])
    assert "written to out" in capsys.readouterr().out
    for wrong, message in ((["relux"], "did you mean 'relu'"), (["--redraw"], "holds no measurements")):
        with pytest.raises(SystemExit):
            main(["bench", *wrong])
        assert message in capsys.readouterr().err


def test_it_runs_with_torch_numpy_and_rich_alone(tmp_path: Path) -> None:
    """A bare GPU machine: no drawing, no typed command line."""
    code = """
import runpy, sys
absent = {"scipy", "sklearn", "safetensors", "tyro", "jinja2", "pooch", "PIL", "altair", "vl_convert"}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
runpy.run_module("zeromean.lab.bench", run_name="__main__", alter_sys=True)
"""
    words = ["relu", "--elements", "4096", "--contenders", "eager", "--rounds", "1", "--output", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no picture" in done.stdout
    assert len(lines(tmp_path)) == 1
