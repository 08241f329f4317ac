"""The section on the insides of trained networks: the files' numbers, in words, charts and a table."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
from tests.lab.report.conftest import write_probes

from zeromean.diagnostics import MEANINGS, LayerReport, Report
from zeromean.diagnostics.report import NOTHING
from zeromean.lab.inside import Inside, load
from zeromean.lab.report import build, write_report
from zeromean.lab.report.charts import Curve, scale_of
from zeromean.lab.report.curves import Point
from zeromean.lab.report.networks import PROFILES, networks
from zeromean.lab.store import DamagedFileError, Study
from zeromean.lab.summary import load as load_summary

StudyFolder = Callable[..., Study]


def section(file: Path) -> str:
    found = re.search(r'<section id="networks">.*?</section>', file.read_text(), flags=re.DOTALL)
    return found[0] if found else ""


def words(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def reports(file: Path) -> dict[str, Report]:
    study = Study(file.parent)
    return {name: found.report for name, found in load(study, load_summary(study)).items()}


def test_older_studies_have_no_section(page_file: Path) -> None:
    assert not section(page_file)
    assert "#networks" not in page_file.read_text()
    assert "probe.json" not in page_file.read_text()


def test_the_table_has_the_numbers_of_the_files(networks_file: Path) -> None:
    rows = re.findall(r"<tr>(.*?)</tr>", section(networks_file), flags=re.DOTALL)
    cells = [[unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]
    shown = {(row[0], row[1]): row[4:] for row in cells[1:]}
    labels = {"elu": "ELU", "leaky_relu-0.1": "LeakyReLU(0.1)"}
    found = reports(networks_file)
    assert len(shown) == sum(len(report.layers) for report in found.values()) == 14
    for name, report in found.items():
        for layer in report.layers:
            assert shown[labels[name], layer.name] == [text(layer, quantity) for quantity in PROFILES]


def text(layer: LayerReport, quantity: str) -> str:
    value = layer.value(quantity)
    return "" if value is None else f"{value * (100 if MEANINGS[quantity].form == 'share' else 1):.3g}"


def test_an_activation_is_in_the_layer_of_its_weights(networks_file: Path) -> None:
    rows = re.findall(r'<th scope="row">ELU</th><td>(\d)</td><td class="number">(\d)</td>', section(networks_file))
    assert rows == [("0", "1"), ("1", "1"), ("2", "2"), ("3", "2"), ("4", "3"), ("5", "3"), ("6", "4")]


def test_every_chart_is_explained_once_by_its_meaning(networks_file: Path) -> None:
    said = words(section(networks_file))
    for quantity in PROFILES:
        what = MEANINGS[quantity].what
        assert said.count(f"{what[0].upper()}{what[1:]}. Shaded: ") == 1
    assert "Shaded: 0 % to 10 %." in said
    assert "Shaded: 0.5 to 2." in said


def test_the_gravest_findings_are_told(networks_file: Path) -> None:
    said, found = words(section(networks_file)), reports(networks_file)
    for report in found.values():
        gravest = report.findings[0]
        assert f"Layer {1 + int(gravest.layer) // 2}: {gravest.text}." in said
        assert gravest.remedy in said


def test_at_most_three_kinds_of_findings_an_arm(networks_file: Path) -> None:
    study = Study(networks_file.parent)
    summary = load_summary(study)
    worse = alter(load(study, summary)["elu"], dead=0.9, never_off=0.9, input_shift=5, cosine=0.01, spread=99.0)
    assert len({one.quantity for one in worse.report.findings}) > 3
    found = networks(summary, {"elu": worse})
    assert found is not None
    first, *_ = said = found.arms[0].sentences
    assert len(said) == len(found.remedies) == 3
    assert first == "Layer 1: 90 % of units never activate on this batch. Less so in 2 other layers."


def test_networks_that_need_different_remedies_are_named(networks_file: Path) -> None:
    study = Study(networks_file.parent)
    summary = load_summary(study)
    dying = {name: alter(one, dead=0.9) for name, one in load(study, summary).items()}
    same = networks(summary, dying)
    layers = tuple(replace(layer, kind="ELU") for layer in dying["elu"].report.layers)
    dying["elu"] = replace(dying["elu"], report=replace(dying["elu"].report, layers=layers))
    found = networks(summary, dying)
    assert same is not None
    assert found is not None
    shared = MEANINGS["dead"].remedy
    assert [told.endswith(f"): {shared}.") for told in same.remedies if shared in told] == [False]
    for name, label in (("elu", "ELU"), ("leaky_relu-0.1", "LeakyReLU(0.1)")):
        remedy = dying[name].report.findings[0].remedy
        assert any(told.endswith(f" ({label}): {remedy}.") for told in found.remedies), found.remedies


def test_arms_without_a_network_are_named_and_the_seeds_told(networks_file: Path) -> None:
    said = words(section(networks_file))
    assert "ReLU No run ended well, so there is no trained network." in said
    assert "seeds 0, 1, as others did not end well" in said
    assert "200 training samples" in said


def test_an_arm_has_its_colour(networks_file: Path) -> None:
    drawings = re.findall(r'<svg class="any".*?</svg>', section(networks_file), flags=re.DOTALL)
    assert len(drawings) >= 6
    for svg in drawings:
        assert set(re.findall(r'stroke="var\(--arm-(\d)\)"', svg)) == {"0", "2"}


def test_dead_units_are_drawn_only_where_there_are_some(networks_file: Path) -> None:
    study = Study(networks_file.parent)
    summary = load_summary(study)
    found = load(study, summary)
    assert "Dead (%)" in titles(networks(summary, found))
    alive = {name: alter(one, dead=0.0) for name, one in found.items()}
    assert "Dead (%)" not in titles(networks(summary, alive))


def titles(found: object) -> list[str]:
    return [figure.title for group in found.groups for figure in group.figures]  # type: ignore[attr-defined]


def alter(one: Inside, **values: float) -> Inside:
    def change(layer: LayerReport) -> LayerReport:
        known = {name: (value,) for name, value in values.items() if name in layer.series}
        return replace(layer, series={**layer.series, **known})

    return replace(one, report=replace(one.report, layers=tuple(map(change, one.report.layers))))


def test_a_light_probe_says_what_is_missing(networks_file: Path) -> None:
    study = Study(networks_file.parent)
    summary = load_summary(study)
    natural = ("k", "cosine", "norm_ratio", "bias_ratio", "shift_ratio", "residual")

    def lighten(layer: LayerReport) -> LayerReport:
        return replace(layer, series={name: v for name, v in layer.series.items() if name not in natural})

    light = {
        name: replace(one, report=replace(one.report, preset="light", layers=tuple(map(lighten, one.report.layers))))
        for name, one in load(study, summary).items()
    }
    found = networks(summary, light)
    assert found is not None
    assert "without natural gradients" in found.measured
    assert titles(found) == ["Input shift", "Saturated (%)", "Dead (%)"]
    assert found.groups[0].numbers.head[4:] == ("Input shift", "Saturated (%)", "Dead (%)")


def test_a_healthy_network_is_called_so(networks_file: Path) -> None:
    study = Study(networks_file.parent)
    summary = load_summary(study)
    one = load(study, summary)["elu"]
    fine = alter(one, dead=0.0, saturated=0.0, never_off=0.0, input_shift=0.1, bias_ratio=1, shift_ratio=1, cosine=0.9)
    fine = alter(fine, spread=1.0, residual=0.0, shift=0.1)
    found = networks(summary, {"elu": fine})
    assert found is not None
    assert found.arms[0].sentences == [NOTHING]
    assert found.arms[2].sentences == ["Its network was not measured."]
    assert found.remedies == []


def test_learning_rates_are_drawn_apart(study_folder: StudyFolder) -> None:
    study = study_folder(rates=(0.01, 0.001), arms=("elu", "relu"), seeds=2, epochs=3)
    write_probes(study)
    html = section(write_report(study.path))
    assert html.count("<h3>Learning rate 0.01</h3>") == html.count("<h3>Learning rate 0.001</h3>") == 1
    assert html.count("<figcaption>k") == 2


def test_the_page_is_the_same_every_time_and_a_damaged_file_is_refused(study_folder: StudyFolder) -> None:
    study = study_folder(arms=("elu", "relu"), seeds=2, epochs=3)
    write_probes(study)
    page = write_report(study.path).read_text()
    summary = load_summary(study)
    assert build(summary, load(study, summary)) == page
    file = study.path / "elu/seed-000/probe.json"
    file.write_text(file.read_text()[:-9])
    with pytest.raises(DamagedFileError, match=r"probe\.json is damaged .* run the study again to measure anew"):
        write_report(study.path)


def test_a_study_without_results_says_so(study_folder: StudyFolder) -> None:
    missing = tuple(("relu", seed) for seed in range(2))
    study = study_folder(arms=("elu", "relu"), seeds=2, epochs=3, missing=missing)
    write_probes(study)
    assert "ReLU No run has ended well yet." in words(section(write_report(study.path)))


def test_a_scale_shows_enough_of_the_healthy_range() -> None:
    drawn = [Curve("a", 0, [Point(1, 5.0, 5.0, 5.0), Point(2, 50.0, 50.0, 50.0)], [])]
    linear, log = (scale_of(drawn, log=log, healthy=(0, 2)) for log in (False, True))
    assert (linear.low, linear.high) == (0.0, 50.0)
    assert (log.low, log.high) == (1.0, 50.0)
    assert scale_of(drawn, healthy=(0.5, 2)).low == 0.5
