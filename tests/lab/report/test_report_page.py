"""The page as text: complete, self-contained, the same every time, and harmless."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.lab.image_study import write_image_study

from zeromean.lab.report import build, charts, write_report
from zeromean.lab.report.charts import Curve, can_log, scale_of
from zeromean.lab.report.curves import Point
from zeromean.lab.report.drawing import COLOURS, colour, dash, repeated
from zeromean.lab.report.methods import paragraph
from zeromean.lab.store import Study
from zeromean.lab.summary import load

StudyFolder = Callable[..., Study]
ALL = tuple((arm, seed) for arm in ("elu", "relu") for seed in range(7))


class Tags(HTMLParser):
    """Every tag with its attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_nothing_points_outside(page_file: Path) -> None:
    page = Tags(page_file.read_text())
    addresses = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert addresses
    assert all(value == "data:," or (value or "").startswith("#") for value in addresses)
    assert "url(" not in page_file.read_text()
    assert "@import" not in page_file.read_text()


def test_links_within_the_page_have_their_ends(page_file: Path) -> None:
    page = Tags(page_file.read_text())
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert {link["href"] for link in page.all("a")} <= {f"#{identifier}" for identifier in identifiers}
    sections = (
        "verdicts",
        "seeds",
        "differences",
        "results",
        "learning",
        "activations",
        "tuning",
        "lost",
        "provenance",
    )
    assert set(sections) <= set(identifiers)


@pytest.mark.parametrize("tag", ["style", "script"])
def test_policy_allows_only_what_is_inlined(page_file: Path, tag: str) -> None:
    text = page_file.read_text()
    inlined = re.findall(f"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
    assert len(inlined) == 1
    digest = base64.b64encode(hashlib.sha256(inlined[0].encode()).digest()).decode()
    policy = next(
        meta["content"] for meta in Tags(text).all("meta") if meta.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_page_is_the_same_every_time(page_file: Path) -> None:
    assert build(load(Study(page_file.parent))) == page_file.read_text()


def test_size_does_not_grow_with_the_seeds(study_folder: StudyFolder) -> None:
    sizes = {seeds: write_report(study_folder(seeds=seeds, epochs=200).path).stat().st_size for seeds in (8, 24)}
    assert sizes[24] < 600_000
    # What grows is a dot and a row a run.
    assert sizes[24] - sizes[8] < 4 * 16 * 1200


def test_every_chart_has_words_and_every_figure_a_drawing(page_file: Path) -> None:
    text = page_file.read_text()
    drawings = [svg for svg in Tags(text).all("svg") if svg.get("role") == "img"]
    assert len(drawings) >= 4 + 4 + 8 + 4
    assert all(len(svg["aria-label"] or "") > 40 for svg in drawings)
    figures = re.findall(r"<figure>.*?</figure>", text, flags=re.DOTALL)
    assert all("<svg" in figure for figure in figures)


def test_colours_are_left_to_the_page(page_file: Path) -> None:
    drawings = re.findall(r"<svg class=.*?</svg>", page_file.read_text(), flags=re.DOTALL)
    used = set(re.findall(r'(?:fill|stroke)="([^"]*)"', "".join(drawings)))
    assert {colour(arm) for arm in range(4)} <= used
    assert {value for value in used if not value.startswith("var(--")} <= {"none", "transparent"}


def test_an_arm_has_one_colour_in_all_charts(page_file: Path, rates_file: Path) -> None:
    text = rates_file.read_text()
    used = set(re.findall(r"var\(--arm-\d\)", "".join(re.findall(r"<svg class=.*?</svg>", text, flags=re.DOTALL))))
    assert used == {colour(arm) for arm in range(3)}
    labels = re.findall(r'aria-label="(\S+), seed \d+: [^>]*?fill="([^"]*)"', page_file.read_text())
    assert dict(labels) == {
        "ELU": colour(0),
        "ReLU": colour(1),
        "LeakyReLU(0.1)": colour(2),
        "ShiftedReLU": colour(3),
    }
    assert len(set(labels)) == 4


def test_every_seed_is_drawn(page_file: Path) -> None:
    dots = re.findall(r'aria-label="(\S+, seed \d+): ', page_file.read_text())
    # Once in the wide drawing and once in the narrow one; one of the 40 runs diverged.
    assert len(dots) == 2 * 39
    assert len(set(dots)) == 39
    assert "LeakyReLU(0.1), seed 3" not in dots


def test_divergence_is_shown(page_file: Path) -> None:
    text = page_file.read_text()
    assert "n = 9, 1 diverged" in text
    assert "LeakyReLU(0.1): a run diverged at epoch 15" in text
    assert "Left out of means and comparisons: LeakyReLU(0.1) (1 diverged)." in text
    assert "1 of 3 diverged" in text
    assert "is at the edge of the grid" in text


def test_provenance(page_file: Path) -> None:
    page = Tags(page_file.read_text())
    text = " ".join(page.texts)
    for fact in (
        "zeromean compare digits-mlp8 --seeds 10 --tune",
        "0123456789abcdef0123456789abcdef01234567 with uncommitted changes",
        "torch 2.13.0",
        "AMD EPYC (cpu, 2 threads), Linux-6.1-x86_64",
        "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "15 runs per arm, the same for all: learning rates 0.001, 0.003, 0.01, 0.03, 0.1 with 3 seeds each",
        "a difference of 0.65 points is found with 80 % power, if the standard deviation between seeds is 0.5",
        "summary.csv",
    ):
        assert fact in text


def test_learning_rates_are_drawn_apart(rates_file: Path) -> None:
    text = rates_file.read_text()
    assert text.count("<figcaption>learning rate 0.01") == 2
    assert "Training loss, learning rate 0.001" in text
    assert "test reconstruction error (1e-3)" in text


def test_hostile_text_is_only_text(hostile_file: Path, page_file: Path) -> None:
    hostile, sound = Tags(hostile_file.read_text()), Tags(page_file.read_text())
    assert len(hostile.all("script")) == len(sound.all("script")) == 1
    assert hostile.all("img") == []
    assert not [name for _, attributes in hostile.tags for name in attributes if name.startswith("on")]
    assert "window.hacked=1" in "".join(hostile.texts)


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ({"missing": ALL}, "No verdict yet: 14 of 14 runs are not done."),
        ({"missing": ALL[3:9]}, "No verdict yet: 6 of 14 runs are not done."),
        ({"diverged": ALL}, "14 of 14 runs done: 14 diverged."),
        ({"diverged": ALL[:7]}, "0 seeds cannot support a verdict on ELU against ReLU"),
        ({"arms": ("elu",)}, "Nothing to compare: the study has one arm."),
        ({"seeds": 3}, "3 seeds cannot support a verdict on ELU against ReLU"),
        ({"seeds": 1, "epochs": 1}, "Every arm ran with one seed."),
        ({"tune": True, "missing": ALL}, "No verdict yet"),
        ({"plan_changes": {"git": None}}, "not in a git repository"),
    ],
)
def test_incomplete_and_unlucky_studies(study_folder: StudyFolder, wishes: dict[str, object], expected: str) -> None:
    study = study_folder(**{"arms": ("elu", "relu"), "seeds": 7, "epochs": 3, **wishes})
    text = " ".join(Tags(write_report(study.path).read_text()).texts)
    assert expected in " ".join(text.split())
    assert "nan" not in text.lower().split()


def test_a_folder_without_a_study(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no study"):
        write_report(tmp_path)


def test_a_logarithm_needs_positive_values() -> None:
    curve = Curve("ELU", 0, [Point(1, 2.0, 1.0, 3.0), Point(2, 0.5, 0.0, 1.0)], [])
    assert not can_log([curve])
    assert can_log([Curve("ELU", 0, curve.points[:1], [])])


def test_scale_holds_every_band_and_zero() -> None:
    curves = [Curve("a", 0, [Point(1, 2.0, 1.0, 3.0)], []), Curve("b", 1, [Point(1, 5.0, 4.0, 6.0)], [])]
    found = scale_of(curves)
    assert (found.low, found.high) == (1.0, 6.0)
    assert scale_of(curves, zero_line=True).low == 0.0


def test_arms_differ_without_colour_and_beyond_the_colours() -> None:
    assert len({tuple(dash(arm)) for arm in range(COLOURS)}) == COLOURS
    assert len({(arm % COLOURS, *dash(arm)) for arm in range(3 * COLOURS)}) == 3 * COLOURS


def test_methods_of_an_image_study(image_file: Path) -> None:
    text = " ".join(" ".join(Tags(image_file.read_text()).texts).split())
    for fact in (
        "ELU, ReLU, ELU + BatchNorm and ReLU + BatchNorm in the convolutional network elu18, trained on cifar100",
        "100 images, contrast-normalized and ZCA-whitened, cropped at random out of 4 pixels of padding, mirrored",
        "for 125,000 steps (12 epochs) of stochastic gradient descent with momentum 0.9 in batches of 100.",
        "Learning rate 0.01, then 0.001 from step 85,000, then 0.0001 from step 120,000.",
        "35,000 steps with dropout 0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0 behind the stacks; 50,000 steps with",
        "L2 weight decay 0.0005.",
        "A unit of a convolution is a channel",
        "18 s a run, 40,000 images/s on average",
        "step 7, output of stacks.2.convolution",
        "none: the recipe fixes the learning rates",
    ):
        assert fact in text
    assert "Labels smoothed" not in text


def test_a_deep_network_has_a_profile_and_few_panels(image_file: Path) -> None:
    text = image_file.read_text()
    assert "Mean activation at the last epoch" in text
    assert "for 8 of the 18 layers:" in text
    captions = re.findall(r"<figcaption>Layer (\d+)\s", text)
    assert captions == ["1", "3", "6", "8", "11", "13", "16", "18"]
    assert ">layer 18</th>" in text
    assert "First to last layer: ELU 0.003 to 0.513;" in text


def test_normalized_arms_have_colours_of_their_own(image_file: Path) -> None:
    labels = re.findall(r'aria-label="([^,"]+), seed \d+: [^>]*?fill="([^"]*)"', image_file.read_text())
    assert dict(labels) == {
        "ELU": colour(0),
        "ReLU": colour(1),
        "ELU + BatchNorm": colour(2),
        "ReLU + BatchNorm": colour(3),
    }


def test_an_image_study_that_has_not_begun(tmp_path: Path) -> None:
    study = write_image_study(tmp_path, seeds=1)
    for file in study.path.glob("*/*/*"):
        file.unlink()
    text = " ".join(Tags(write_report(study.path).read_text()).texts)
    assert "No verdict yet: 4 of 4 runs are not done." in " ".join(text.split())


def drawings(text: str, label: str) -> list[str]:
    """The SVGs whose description begins so."""
    return re.findall(f'<svg class="[^>]*aria-label="{label}.*?</svg>', text, flags=re.DOTALL)


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_training_of_one_epoch_is_drawn_as_dots(study_folder: StudyFolder, seeds: int) -> None:
    text = write_report(study_folder(arms=("elu", "relu"), seeds=seeds, epochs=1).path).read_text()
    for label in ("Training loss", "Training error", "Mean activation against", "Spread over", "Layer 1 "):
        for drawing in drawings(text, label):
            dots = re.findall(r'<path [^>]*d="[^"]*A[^"]*"[^>]*fill="([^"]*)"', drawing)
            assert set(dots) == {colour(arm) for arm in range(2)}, label
    assert len(drawings(text, "Training")) == 4  # two charts, each with two scales
    assert "The dot is the mean over all runs" in text
    assert "Dots are means over seeds, bars reach" in text


def ticks(drawing: str) -> list[float]:
    """The numbers on the axes, hyphens for minus signs."""
    found = re.findall(r'fill="var\(--quiet\)">([^<]+)<', drawing)
    return [float(text.replace("\u2212", "-")) for text in found if re.fullmatch(r"[\u2212\d.]+", text)]


def test_a_single_run_stands_between_ticks_that_say_where(study_folder: StudyFolder) -> None:
    study = study_folder(arms=("elu",), seeds=1, epochs=2)
    (error,) = (run.test_error for run in load(study).arms[0].runs)
    assert error is not None
    wide, narrow = drawings(write_report(study.path).read_text(), "test error")
    for drawing in (wide, narrow):
        shown = ticks(drawing)
        assert len(shown) > 2
        assert min(shown) < error < max(shown)
        # Where the error's dot is, by the ticks' own places.
        places = [float(x) for x in re.findall(r'<text text-anchor="middle" transform="translate\(([\d.]+),', drawing)]
        slope = (places[len(shown) - 1] - places[0]) / (shown[-1] - shown[0])
        (dot,) = re.findall(r'aria-label="ELU, seed 0[^>]*translate\(([\d.]+),', drawing)
        assert places[0] + slope * (error - shown[0]) == pytest.approx(float(dot), abs=1)


@pytest.mark.parametrize("ends", [(4.2, 4.6), (4.2, 4.2), (97.5, 99.1), (0.021, 0.024)])
def test_a_narrow_logarithmic_scale_has_ticks(ends: tuple[float, float]) -> None:
    curve = Curve("ELU", 0, [Point(place, value, value, value) for place, value in enumerate(ends, 1)], [])
    drawing = charts.panel([curve], label="loss", scale=scale_of([curve], log=True), against="layer")
    assert len([tick for tick in ticks(drawing) if tick not in (1, 2)]) >= 3


def test_every_arm_has_a_colour_name_of_its_own(study_folder: StudyFolder, page_file: Path) -> None:
    assert repeated(COLOURS) == ""
    assert repeated(COLOURS + 2) == ":root { --arm-8: var(--arm-0); --arm-9: var(--arm-1); }\n"
    assert len({colour(arm) for arm in range(3 * COLOURS)}) == 3 * COLOURS
    assert "--arm-8" not in page_file.read_text()


def test_one_arm_is_told_nothing_of_differences(study_folder: StudyFolder) -> None:
    study = study_folder(arms=("elu",), seeds=8, epochs=2)
    text = " ".join(" ".join(Tags(write_report(study.path).read_text()).texts).split())
    for word in ("Differences", "differences below", "P(better)", "Better or worse", "80 % power"):
        assert word not in text
    assert "8 seeds per arm, one arm: nothing to compare" in text


def test_methods_tell_the_optimizer_and_know_plans_from_before_it(tmp_path: Path) -> None:
    summary = load(write_image_study(tmp_path, seeds=1))
    recipe = summary.plan["recipe"]
    by_sgd = paragraph(summary, ["ELU"])
    del recipe["optimizer"], recipe["dropout_curve"]
    assert paragraph(summary, ["ELU"]) == by_sgd
    recipe |= {"optimizer": "muon", "dropout_curve": "linear"}
    text = paragraph(summary, ["ELU"])
    assert "of Muon (biases, slopes and scales by stochastic gradient descent, without decay) with momentum 0.9" in text
    assert " Weight decay 0.0005." in text
    assert "behind the stacks; in each, dropout rises from 0 to these rates in a straight line." in text
    assert "L2" not in text


def test_methods_say_where_dropout_stands(tmp_path: Path) -> None:
    summary = load(write_image_study(tmp_path, seeds=1))
    assert "pooling" not in paragraph(summary, ["ELU"])
    summary.plan["recipe"]["drop_before_pooling"] = True
    assert "Behind a stack, dropout stands in front of its pooling." in paragraph(summary, ["ELU"])
