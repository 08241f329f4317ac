"""The report: one HTML file that needs no network, no server and, to be read, no script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from zeromean.lab import summary as summaries
from zeromean.lab.inside import Inside
from zeromean.lab.inside import load as load_inside
from zeromean.lab.report import drawing, methods, sections
from zeromean.lab.report.networks import networks
from zeromean.lab.schedule import duration
from zeromean.lab.store import Study
from zeromean.lab.summary import Summary


def write_report(study_path: Path) -> Path:
    """Write ``report.html`` into a study's folder from the files in it, and return its path.

    Raises:
        ValueError: the folder holds no study, or a file of it is damaged.
    """
    study = Study(study_path)
    summary = summaries.load(study)
    return study.write_text("report.html", build(summary, load_inside(study, summary)))


def build(summary: Summary, inside: Mapping[str, Inside] | None = None) -> str:
    """The page as one HTML text.

    Args:
        summary: of the study.
        inside: what was found in a trained network of each arm, by the arm's name; None leaves its section out.

    Style and script are inlined and named by hash in the page's content security policy, so nothing else that text
    from the study might smuggle in can run or be fetched.
    """
    package = files("zeromean.lab.report")
    style, script = (
        package.joinpath("page.css").read_text(encoding="utf-8"),
        package.joinpath("page.js").read_text(encoding="utf-8"),
    )
    style += drawing.repeated(len(summary.arms))
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
    return page.render(**_content(summary, inside or {}), style=style, script=script, policy=policy)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _content(summary: Summary, inside: Mapping[str, Inside]) -> dict[str, Any]:
    grouped = sections.groups(summary)
    forests = [sections.differences(summary, group) for group in grouped]
    return {
        "summary": summary,
        "plan": summary.plan,
        "recipe": summary.plan["recipe"],
        "intro": methods.paragraph(summary, [entry["label"] for entry in _key(summary)]),
        "key": _key(summary),
        "verdicts": _verdicts(summary),
        "seeds": [sections.seeds(summary, group) for group in grouped],
        "differences": [figure for figure in forests if figure],
        "results": sections.results(summary),
        "runs": sections.runs(summary),
        "learning": [figure for group in grouped for figure in sections.learning(summary, group)],
        "activations": [figure for group in grouped for figure in sections.activations(summary, group)],
        "layers": [found for group in grouped if (found := sections.layers(summary, group))],
        "networks": networks(summary, inside),
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


def _facts(summary: Summary) -> list[tuple[str, str]]:
    """Where the numbers come from."""
    plan, recipe, device, data = (summary.plan, *(summary.plan[part] for part in ("recipe", "device", "data")))
    samples = f"{data['train']} training, {data['validation']} validation, {data['test']} test samples"
    return [
        ("Recipe", f"{recipe['name']}: {recipe['source']}"),
        ("Design", summaries.detectable(summary)),
        ("Tuning", _tuning_budget(summary)),
        ("Planned", plan["created"]),
        ("Training time", _time(summary)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in plan["versions"].items())),
        ("Device", _machine(device)),
        ("Code", summaries.commit(plan)),
        ("Data", f"{data['name']}: {samples}; {data['source']}"),
        *((f"SHA-256 of {name}", checksum) for name, checksum in data["checksums"].items()),
    ]


def _tuning_budget(summary: Summary) -> str:
    recipe, each = summary.plan["recipe"], summary.plan["budget"]["tuning_runs_per_arm"]
    if not summary.plan["tune"]:
        return f"none: the recipe fixes the learning rate{'s' if 'phases' in recipe else ''}"
    grid = ", ".join(f"{rate:g}" for rate in recipe["tuning_grid"])
    return (
        f"{each} runs per arm, the same for all: learning rates {grid} with {recipe['tuning_seeds']} seeds each, "
        f"judged on {recipe['tuning_validation']} samples held out of the training set"
    )


def _machine(device: Mapping[str, Any]) -> str:
    processes = f", {device['processes']} processes" if device["processes"] > 1 else ""
    return f"{device['name']} ({device['kind']}, {device['threads']} threads{processes}), {device['platform']}"


def _time(summary: Summary) -> str:
    spent = sum(run.result.get("seconds") or 0 for arm in summary.arms for run in arm.runs)
    estimate = summary.plan["budget"]["seconds_estimate"]
    before = "" if estimate is None else f"; estimated before, with tuning if any: {duration(estimate)}"
    return f"{duration(spent)} for the final runs{f' ({summary.speed})' if summary.speed else ''}{before}"
