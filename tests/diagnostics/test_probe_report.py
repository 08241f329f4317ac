"""Findings in plain words for networks with a known illness; JSON, rows, table and pictures."""

import json
import math
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import zeromean as zm
from zeromean.diagnostics import MEANINGS, Report


def network(activation: nn.Module, features: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(features, 20), activation, nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3))
    zm.init_(model, "elu")
    return model


def linear(model: nn.Sequential, place: int) -> nn.Linear:
    layer = model[place]
    assert isinstance(layer, nn.Linear)
    return layer


def batch(count: int = 64, features: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, features, generator=generator), torch.arange(count) % 3


def first(report: Report) -> str:
    return str(report.findings[0])


def test_a_healthy_network_has_no_finding() -> None:
    model, (x, y) = network(nn.ELU()), batch()
    report = zm.probe.measure(model, x, y, preset="light")
    assert report.findings == ()
    assert str(report) == "Every number lies in its healthy range."


def test_dead_units_are_counted_and_named() -> None:
    model, (x, y) = network(nn.ReLU()), batch()
    with torch.no_grad():
        linear(model, 0).bias[:5] = -100
    report = zm.probe.measure(model, x, y, preset="light")
    assert report["1"].value("dead") == pytest.approx(0.25)
    assert first(report) == (
        "layer 1: 25 % of units never activate on this batch; lower the learning rate, or use an activation with a "
        "slope below zero (ELU, LeakyReLU)"
    )
    assert not any(one.quantity == "saturated" for one in report.findings)


def test_a_dead_layer_stops_the_gradient() -> None:
    model, (x, y) = network(nn.ReLU()), batch()
    with torch.no_grad():
        linear(model, 0).bias.fill_(-100)
    report = zm.probe.measure(model, x, y, preset="light")
    assert first(report).startswith("layer 1: 100 % of units never activate on this batch")
    assert "layer 0: its weights get a gradient of zero" in str(report)


@pytest.mark.parametrize(
    ("activation", "bias", "words"),
    [
        (nn.Tanh(), -4.0, "are saturated on at least 90 % of this batch"),
        (nn.Sigmoid(), 8.0, "are saturated on at least 90 % of this batch"),
        (nn.ELU(), -3.7, "are switched off on at least 90 % of this batch"),
    ],
)
def test_saturated_units(activation: nn.Module, bias: float, words: str) -> None:
    model, (x, y) = network(activation), batch(400)
    with torch.no_grad():
        linear(model, 0).bias[:11] = bias
        linear(model, 0).weight[:11] *= 0.3
    report = zm.probe.measure(model, x, y, preset="light")
    assert report["1"].value("saturated") == pytest.approx(0.55)
    found = next(one for one in report.findings if one.layer == "1" and one.quantity == "saturated")
    assert str(found).startswith(f"layer 1: 55 % of units {words}; lower the learning rate")


def test_shifted_means_of_data_and_what_they_do_to_the_update() -> None:
    model, (x, y) = network(nn.ELU()), batch()
    found = [one for one in zm.probe.measure(model, x + 2, y).findings if one.layer == "0"]
    assert found[0].quantity == "input_shift"
    text = str(found[0])
    assert text.startswith("layer 0: mean input 2, the inputs' means are 2x their spread: ")
    assert "an update moves its units' means" in text
    assert "as far as a natural one" in text
    light = zm.probe.measure(model, x + 2, y, preset="light").findings[0]
    assert "(a unit Gaussian has 0.68x behind ReLU, 0.21x behind ELU)" in str(light)


def test_numbers_that_are_not_finite_come_first_and_alone() -> None:
    model, (x, y) = network(nn.ELU()), batch()
    with torch.no_grad():
        linear(model, 2).weight[0, 0] = math.inf
    report = zm.probe.measure(model, x, y)
    assert first(report).startswith("layer 2: outputs are not finite; lower the learning rate")
    assert report["2"].of_units["mean"][0] is None
    assert "natural gradients were not measured at step 0" in report.notes[0]
    assert Report.from_json(report.to_json()) == report


def test_never_off_and_scale_and_vanishing_gradient() -> None:
    model, (x, y) = network(nn.ReLU()), batch()
    with torch.no_grad():
        linear(model, 0).bias.fill_(100)
    assert "100 % of units are never off on this batch: the layer is nearly linear" in str(
        zm.probe.measure(model, x, y)
    )
    model = network(nn.ELU())
    with torch.no_grad():
        linear(model, 2).weight.mul_(1e-5)
        linear(model, 2).bias.fill_(1)
    report = zm.probe.measure(model, x, y, preset="light")
    texts = str(report)
    assert "layer 2: outputs hardly vary over the samples" in texts
    assert "layer 0: the gradient of its weights vanishes" in texts


def test_a_finding_tells_where_it_began() -> None:
    model, (x, _) = network(nn.ReLU()), batch()
    with zm.probe(model) as p:
        model(x)
        with torch.no_grad():
            linear(model, 0).bias[:10] = -100
        model(x)
    text = next(str(one) for one in p.report().findings if one.quantity == "dead")
    assert text.startswith("layer 1: 50 % of units never activate on this batch (0 % at step 0)")


def test_too_few_rows_for_the_inputs_are_told() -> None:
    model, told = network(nn.ELU()), "its k and natural gradient are rough"
    few, enough = (str(zm.probe.measure(model, *batch(count), preset="full")) for count in (64, 320))
    assert f"layer 0: {told}: 64 rows tell of 8 inputs; probe with 128 values of each unit" in few
    assert f"layer 2: {told}: 64 rows tell of 20 inputs; probe with 320 values of each unit" in few
    assert told not in enough
    wide = zm.probe.measure(network(nn.ELU(), 300), *batch(40, 300), preset="full")
    assert "layer 0: its k and natural gradient are rough: 40 rows tell of 300 inputs; measure it with" in str(wide)
    assert "max_samples=4800" in str(wide)


def test_findings_are_ranked() -> None:
    model, (x, y) = network(nn.ReLU()), batch()
    findings = zm.probe.measure(model, x + 3, y).findings
    assert len(findings) > 2
    assert [one.gravity for one in findings] == sorted((one.gravity for one in findings), reverse=True)
    assert all(0 < one.gravity <= 1 for one in findings)


@pytest.fixture(scope="module")
def report() -> Report:
    model, (x, y) = network(nn.ReLU()), batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with zm.probe(model, "full", every=2, inputs=x + 1, targets=y) as p:
        for _ in range(6):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return replace(p.report(), unseen=("relu called as a function behind 2",))


def test_json_holds_everything_and_is_read_again(report: Report) -> None:
    assert Report.from_json(report.to_json()) == report
    content = json.loads(report.to_json())
    assert content["steps"] == [0, 2, 4]
    assert [one["text"] for one in content["findings"]] == [one.text for one in report.findings]
    with pytest.raises(ValueError, match="must have format 1"):
        Report.from_json('{"format": 0}')


def test_rows_and_frame(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = report.rows()
    assert len(rows) == 3 * 5
    assert rows[1]["layer"] == "0"
    assert rows[1]["step"] == 2
    assert rows[1]["k"] == report["0"].series["k"][1]
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert report.frame() == rows


def test_every_quantity_has_a_meaning(report: Report) -> None:
    shown = {name for layer in report.layers for name in layer.series}
    assert shown == MEANINGS.keys()
    for meaning in MEANINGS.values():
        assert all((meaning.title, meaning.what, meaning.moves, meaning.remedy))
        assert meaning.healthy[0] < meaning.healthy[1]


def test_the_page_fits_a_terminal(report: Report) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    text = console.export_text()
    console.file.close()
    assert "…" not in text
    assert text.index("Findings") < text.index("Activations, step 4") < text.index("Weights, step 4")
    assert "Against the unit natural gradient" in text
    assert "unseen: relu called as a function behind 2" in text
    assert text.count("-> use an activation with negative values") == 1


@pytest.mark.parametrize("picture", ["heat_map", "histograms", "arrows"])
def test_pictures_are_svg(report: Report, picture: str) -> None:
    svg = getattr(report, picture)()
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg")
    assert all(layer.name in "".join(root.itertext()) for layer in report.layers if layer.role == "unit")


def test_pictures_refuse_what_is_not_there(report: Report) -> None:
    with pytest.raises(ValueError, match=r"no layer has 'shif'.*did you mean 'shift'"):
        report.heat_map("shif")
    light = replace(report, layers=tuple(replace(one, of_units={"mean": (1.0,)}) for one in report.layers))
    with pytest.raises(ValueError, match="no layer has 'cosine'"):
        light.arrows()
    assert "svg" in light.histograms()
