"""What a study leaves of its trained networks' insides: measured once, repaired, and nothing else changed."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.lab.image_study import CPU, planned, short, tiny_cifar

from zeromean.diagnostics import Report, probe
from zeromean.lab import inside
from zeromean.lab.activation import parse
from zeromean.lab.compare import SILENT, run
from zeromean.lab.data import as_vectors, load
from zeromean.lab.data.imagenet import FolderDataset
from zeromean.lab.nets import mlp
from zeromean.lab.plan import describe
from zeromean.lab.recipes.cifar import cifar100_elu11
from zeromean.lab.schedule import Teller
from zeromean.lab.store import Study
from zeromean.lab.summary import load as load_summary

Zeromean = Callable[..., str]
WORDS = ["compare", "digits-mlp8", "hidden=16,12", "probe_samples=50", "epochs=2", "--activations", "elu", "relu"]
WORDS += ["--seeds", "2", "--name", "study", "--device", "cpu"]


def probes(root: Path) -> dict[str, bytes]:
    return {file.parent.parent.name: file.read_bytes() for file in root.glob("runs/study/*/seed-*/probe.json")}


def others(root: Path) -> dict[str, bytes]:
    """Every file that must not depend on the probes, without those that hold times."""
    timed = ("probe.json", "report.html", "metrics.jsonl", "result.json", "plan.json", ".lock", "summary.md")
    files = [file for file in (root / "runs/study").rglob("*") if file.is_file() and file.name not in timed]
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


def test_a_network_an_arm_is_measured_once(zeromean: Zeromean, tmp_path: Path) -> None:
    assert "looked inside 2 trained networks" in zeromean(*WORDS)
    written = probes(tmp_path)
    assert sorted(written) == ["elu", "relu"]
    assert not list(tmp_path.glob("runs/study/*/seed-001/probe.json"))
    page = (tmp_path / "runs/study/report.html").read_text()
    assert "looked inside" not in zeromean(*WORDS)
    assert probes(tmp_path) == written
    assert (tmp_path / "runs/study/report.html").read_text() == page


def test_the_numbers_are_those_of_the_trained_network(zeromean: Zeromean, tmp_path: Path) -> None:
    zeromean(*WORDS)
    folder = tmp_path / "runs/study/relu/seed-000"
    found = Report.from_json((folder / "probe.json").read_text())
    network = mlp((64, 16, 12, 10), parse("relu"), seed=5)
    network.load_state_dict(load_file(folder / "model.safetensors"))
    digits = load("digits")
    drawn = torch.randperm(1437, generator=torch.Generator().manual_seed(0))[:500]
    expected = probe.measure(network.eval(), as_vectors(digits)[0][drawn], digits.train_labels[drawn])
    assert found.preset == "full"
    assert [layer.series for layer in found.layers] == [layer.series for layer in expected.layers]
    assert found.findings == expected.findings
    assert {name for layer in found.layers for name in layer.of_units} == {"mean"}


def test_the_study_is_the_same_without(zeromean: Zeromean, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeromean(*WORDS)
    looked = others(tmp_path)
    (tmp_path / "runs/study").rename(tmp_path / "runs/looked")
    monkeypatch.setattr(inside, "look", lambda *arguments: None)
    zeromean(*WORDS)
    assert not probes(tmp_path)
    assert others(tmp_path) == looked
    assert len(looked) == 4 + 4 + 1
    assert "Inside the networks" not in (tmp_path / "runs/study/report.html").read_text()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def altered(file: Path) -> None:
    file.write_text(file.read_text().replace('"units": 16', '"units": 17'))


def foreign(file: Path) -> None:
    file.write_bytes((file.parents[2] / "elu/seed-000/probe.json").read_bytes())


def from_the_future(file: Path) -> None:
    study = Study(file.parents[2])
    one = inside.examined(load_summary(study).arms[1])
    assert one is not None
    content = study.probe(one) or {}
    study.write_probe(one, {name: value for name, value in content.items() if name != "checksum"} | {"format": 99})


@pytest.mark.parametrize("damage", [cut, altered, foreign, from_the_future])
def test_a_damaged_or_foreign_file_is_made_anew(
    zeromean: Zeromean, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    zeromean(*WORDS)
    written = probes(tmp_path)
    damage(tmp_path / "runs/study/relu/seed-000/probe.json")
    with pytest.raises(SystemExit):
        zeromean("report", "runs/study")
    assert "run the study again" in capsys.readouterr().err
    out = zeromean(*WORDS)
    assert "measured anew" in out
    assert "looked inside 1 trained network:" in out
    assert probes(tmp_path) == written


def test_what_cannot_be_measured_is_said_and_costs_nothing_else(zeromean: Zeromean, tmp_path: Path) -> None:
    zeromean(*WORDS)
    for file in tmp_path.glob("runs/study/*/seed-000/probe.json"):
        file.unlink()
    cut(tmp_path / "runs/study/elu/seed-000/model.safetensors")
    out = zeromean(*WORDS)
    assert "the network of elu/seed-000 cannot be looked into" in out
    assert "looked inside 1 trained network:" in out
    assert sorted(probes(tmp_path)) == ["relu"]
    page = (tmp_path / "runs/study/report.html").read_text()
    assert "Its network was not measured." in page


def test_a_damaged_file_of_a_damaged_network_does_not_keep_the_report_back(zeromean: Zeromean, tmp_path: Path) -> None:
    zeromean(*WORDS)
    study = tmp_path / "runs/study"
    folder = study / "relu/seed-000"
    cut(folder / "probe.json")
    cut(folder / "model.safetensors")
    damaged = (folder / "probe.json").read_bytes()
    for name in ("summary.csv", "report.html"):
        (study / name).unlink()
    out = zeromean(*WORDS)
    assert "it is set aside as probe.json.damaged and measured anew" in out
    assert "the network of relu/seed-000 cannot be looked into, and the report leaves it out" in out
    assert (folder / "probe.json.damaged").read_bytes() == damaged
    assert (study / "summary.csv").exists()
    assert "Its network was not measured." in (study / "report.html").read_text()
    assert "set aside" not in zeromean(*WORDS)
    assert "report.html" in zeromean("report", "runs/study")


def test_the_first_seed_that_ended_well_stands_for_its_arm(study_folder: Callable[..., Study]) -> None:
    lost = (("elu", 0), ("elu", 1), *(("relu", seed) for seed in range(3)))
    summary = load_summary(study_folder(arms=("elu", "relu"), seeds=3, epochs=4, diverged=lost))
    one = inside.examined(summary.arms[0])
    assert one is not None
    assert one.seed == 2
    assert inside.examined(summary.arms[1]) is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Four arms on images, two of them normalized, trained for 8 steps."""
    plan, study = planned(short(cifar100_elu11()), seeds=1), Study(tmp_path_factory.mktemp("images") / "study")
    study.write_plan(describe(plan, tiny_cifar(), CPU, None))
    run(plan, study, tiny_cifar(), device=CPU, progress=SILENT)
    return study


def test_a_short_study_on_images_is_measured_lightly(trained: Study) -> None:
    lines: list[str] = []
    inside.look(planned(short(cifar100_elu11()), seeds=1), trained, tiny_cifar(), CPU, lines.append)
    found = inside.load(trained, load_summary(trained))
    assert list(found) == ["elu", "relu", "elu-batch", "relu-batch"]
    assert lines[-1].startswith("looked inside 4 trained networks: ")
    report = found["relu-batch"].report
    assert report.preset == "light"
    assert found["relu-batch"].samples == 12
    assert sum(layer.role == "unit" for layer in report.layers) == 11
    assert all("in evaluation mode" in layer.notes for layer in report.layers)


def test_it_is_told_how_long_the_measuring_will_take(trained: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in trained.path.glob("*/*/probe.json"):
        file.unlink()
    monkeypatch.setattr(inside, "_QUIET_SECONDS", 0)
    lines: list[str] = []
    inside.look(planned(short(cifar100_elu11()), seeds=1), trained, tiny_cifar(), CPU, lines.append)
    told = [re.fullmatch(r"looking inside the trained networks: (\d+)% done, \d+ s left", line) for line in lines[:-1]]
    assert [one and one[1] for one in told] == ["25", "50", "75"]


def test_natural_gradients_count_as_a_part_of_their_network() -> None:
    lines: list[str] = []
    teller = Teller(lines.append, 0)
    inside._tell(teller, 2, 0, "stack1.conv1", 0.0)
    inside._tell(teller, 2, 1, "stack1.conv1", 0.5)
    assert [line.partition(",")[0] for line in lines] == ["looking inside the trained networks: 75% done"]


def test_a_long_study_on_images_is_measured_in_full() -> None:
    assert inside._preset(planned(cifar100_elu11(), seeds=1)) == "full"
    assert inside._preset(planned(cifar100_elu11().shortened(0.01), seeds=1)) == "light"
    assert inside._preset(planned(cifar100_elu11().shortened(0.01), seeds=20)) == "full"


def test_images_on_the_disk_are_left_out(trained: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in trained.path.glob("*/*/probe.json"):
        file.unlink()
    lines: list[str] = []
    images = FolderDataset.__new__(FolderDataset)
    inside.look(planned(short(cifar100_elu11()), seeds=1), trained, images, CPU, lines.append)
    assert len(lines) == 1
    assert "does not look inside the networks: the images of 'cifar100-elu11' are read from a folder while" in lines[0]
    assert lines[0].endswith("never all in memory: call zm.probe in Python on a batch of them")
    assert not list(trained.path.glob("*/*/probe.json"))


def test_a_repeated_run_is_measured_anew(trained: Study) -> None:
    plan, dataset = planned(short(cifar100_elu11()), seeds=1), tiny_cifar()
    inside.look(plan, trained, dataset, CPU, lambda line: None)
    one = plan.runs({})[0]
    result = trained.result(one) or {}
    trained.finish(one, {**result, "seconds": 99.0}, trained.weights(one))
    lines: list[str] = []
    inside.look(plan, trained, dataset, CPU, lines.append)
    assert "is of another network than the result beside it" in lines[0]
    assert lines[-1].startswith("looked inside 1 trained network: ")


def test_a_file_of_a_deep_network_is_small(trained: Study) -> None:
    inside.look(planned(short(cifar100_elu11()), seeds=1), trained, tiny_cifar(), CPU, lambda line: None)
    file = next(trained.path.glob("elu/*/probe.json"))
    content = json.loads(file.read_text())
    numbers = sum(len(layer["of_units"]["mean"]) for layer in content["layers"])
    assert file.stat().st_size < 40 * numbers
