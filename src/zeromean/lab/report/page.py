"""The report: one HTML file that needs no network, no server and, to be read, no script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from zeromean.lab import summary as summaries
from zeromean.lab.report import drawing, sections
from zeromean.lab.store import Study
from zeromean.lab.summary import Summary


def write_report(study_path: Path) -> Path:
    """Write ``report.html`` into a study's folder from the files in it, and return its path.

    Raises:
        ValueError: the folder holds no study, or a file of it is damaged.
    """
    study = Study(study_path)
    return study.write_text("report.html", build(summaries.load(study)))


def build(summary: Summary) -> str:
    """The page as one HTML text.

    Style and script are inlined and named by hash in the page's content security policy, so nothing else that text
    from the study might smuggle in can run or be fetched.
    """
    package = files("zeromean.lab.report")
    style, script = (
        package.joinpath("page.css").read_text(encoding="utf-8"),
        package.joinpath("page.js").read_text(encoding="utf-8"),
    )
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("zeromean.lab.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    page = environment.get_template("page.html")
    return page.render(**_content(summary), style=style, script=script, policy=policy)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _content(summary: Summary) -> dict[str, Any]:
    grouped = sections.groups(summary)
    forests = [sections.differences(summary, group) for group in grouped]
    return {
        "summary": summary,
        "plan": summary.plan,
        "recipe": summary.plan["recipe"],
        "intro": _intro(summary),
        "key": _key(summary),
        "verdicts": _verdicts(summary),
        "seeds": [sections.seeds(summary, group) for group in grouped],
        "differences": [figure for figure in forests if figure],
        "results": sections.results(summary),
        "runs": sections.runs(summary),
        "learning": [figure for group in grouped for figure in sections.learning(summary, group)],
        "activations": [figure for group in grouped for figure in sections.activations(summary, group)],
        "layers": [found for group in grouped if (found := sections.layers(summary, group))],
        "tuning": sections.tuning(summary),
        "lost": sections.lost(summary),
        "settings": sections.settings(summary),
        "facts": _facts(summary),
        "reading": summaries.READING,
    }


def _key(summary: Summary) -> list[dict[str, Any]]:
    """A swatch an activation."""
    looks = drawing.looks(summary.arms)
    labels = {looks[arm.name]: sections.short(arm).label for arm in summary.arms}
    return [
        {"look": look, "label": label, "colour": drawing.colour(look), "dash": " ".join(map(str, drawing.dash(look)))}
        for look, label in labels.items()
    ]


def _verdicts(summary: Summary) -> list[dict[str, Any]]:
    if not summary.comparisons:
        return [{"verdict": "", "look": None, "sentence": sentence} for sentence in summary.sentences]
    looks = {arm.label: drawing.looks(summary.arms)[arm.name] for arm in summary.arms}
    return [{"verdict": one.verdict, "look": looks[one.arm], "sentence": one.sentence} for one in summary.comparisons]


def _intro(summary: Summary) -> str:
    plan, recipe = summary.plan, summary.plan["recipe"]
    labels = [entry["label"] for entry in _key(summary)]
    error = (
        "The error is the mean squared error of a pixel of the test images, times 1000"
        if recipe["task"] == "reconstruction"
        else "The error is the percentage of test samples that the network gets wrong"
    )
    return (
        f"{_listed(labels)} in a network with {_network(recipe['hidden'])}, trained on {plan['data']['name']} "
        f"({plan['data']['train']} samples) for {recipe['epochs']} epochs of plain stochastic gradient descent in "
        f"batches of {recipe['batch_size']}, {_rates(summary)}. {_seeds(len(plan['seeds']))} "
        f"{error}, read once, after the last epoch, on {plan['data']['test']} samples."
    )


def _seeds(count: int) -> str:
    if count == 1:
        return "Every arm ran with one seed."
    return f"Every arm ran with the same {count} seeds, which fix its initial weights and the order of the samples."


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _network(hidden: Sequence[int]) -> str:
    if len(set(hidden)) == 1:
        return f"{len(hidden)} hidden layers of {hidden[0]} units"
    return f"hidden layers of {', '.join(map(str, hidden))} units"


def _rates(summary: Summary) -> str:
    if summary.plan["tune"]:
        return "each arm at the learning rate that did best on validation data"
    rates = [f"{rate:g}" for rate in dict.fromkeys(arm.learning_rate or 0 for arm in summary.arms)]
    return f"learning rate {rates[0]}" if len(rates) == 1 else f"at each of the learning rates {_listed(rates)}"


def _facts(summary: Summary) -> list[tuple[str, str]]:
    """Where the numbers come from."""
    plan, recipe, device, data = (summary.plan, *(summary.plan[part] for part in ("recipe", "device", "data")))
    samples = f"{data['train']} training, {data['validation']} validation, {data['test']} test samples"
    return [
        ("Recipe", f"{recipe['name']}: {recipe['source']}"),
        ("Design", summaries.detectable(summary)),
        ("Tuning", _tuning_budget(summary)),
        ("Planned", plan["created"]),
        ("Training time", f"{_duration(_seconds(summary))} for the final runs; {_estimate(summary)}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in plan["versions"].items())),
        ("Device", f"{device['name']} ({device['kind']}, {device['threads']} threads), {device['platform']}"),
        ("Code", summaries.commit(plan)),
        ("Data", f"{data['name']}: {samples}; {data['source']}"),
        *((f"SHA-256 of {name}", checksum) for name, checksum in data["checksums"].items()),
    ]


def _tuning_budget(summary: Summary) -> str:
    recipe, each = summary.plan["recipe"], summary.plan["budget"]["tuning_runs_per_arm"]
    if not summary.plan["tune"]:
        return "none: the recipe fixes the learning rate"
    grid = ", ".join(f"{rate:g}" for rate in recipe["tuning_grid"])
    return (
        f"{each} runs per arm, the same for all: learning rates {grid} with {recipe['tuning_seeds']} seeds each, "
        f"judged on {recipe['tuning_validation']} samples held out of the training set"
    )


def _seconds(summary: Summary) -> float:
    return sum(run.result.get("seconds") or 0 for arm in summary.arms for run in arm.runs)


def _estimate(summary: Summary) -> str:
    return f"estimated before, with tuning if any: {_duration(summary.plan['budget']['seconds_estimate'])}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
