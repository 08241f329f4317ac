"""Make the record of finished studies on CIFAR: every run as a row, and a table of the arms.

    python benchmarks/cifar_record.py STUDY ... --out DIR

Each STUDY is the folder of a comparison of a convolutional recipe. DIR gets ``results.jsonl``, ``table.md`` and
``runs.svg``, the last two beside the published errors (Clevert, Unterthiner, Hochreiter, ICLR 2016, sections 4.2 and
4.3), which are those of the ``-fast`` recipes' networks too. A run that is not done, diverged or failed has its row as
well, with ``test_error`` null; where all are such, there is no picture.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zeromean.lab.activation import parse
from zeromean.lab.store import Study
from zeromean.lab.summary import Arm, FinalRun, Summary, load, markdown_table, number, to_markdown

# Published test errors without normalization, in percent: mean, and standard deviation over runs where it is given.
PUBLISHED: Mapping[tuple[str, str], tuple[float, float | None]] = {
    ("cifar100-elu11", "ELU"): (28.75, 0.24),
    ("cifar100-elu11", "ShiftedReLU"): (29.35, 0.29),
    ("cifar100-elu11", "LeakyReLU(0.1)"): (30.59, 0.29),
    ("cifar100-elu11", "ReLU"): (31.56, 0.37),
    ("cifar100-elu18", "ELU"): (24.28, None),
    ("cifar10-elu18", "ELU"): (6.55, None),
}
MORE = ("train_error", "validation_error", "diverged", "epochs", "together", "seconds_recording", "overflows")


def rows(summary: Summary) -> list[dict[str, Any]]:
    """Every planned run; ``test_error`` in percent, ``seconds`` of training."""
    return [_row(summary.plan, arm, run) for arm in summary.arms for run in arm.runs]


def _row(plan: Mapping[str, Any], arm: Arm, run: FinalRun) -> dict[str, Any]:
    return {
        "recipe": plan["recipe"]["name"],
        "title": plan["recipe"]["title"],
        "study": plan["study"],
        "activation": arm.activation,
        "norm": arm.norm,
        "seed": run.seed,
        "test_error": run.test_error,
        "seconds": run.result.get("seconds"),
        "images_per_second": run.result.get("images_per_second"),
        "status": run.status,
        **{key: run.result.get(key) for key in MORE},
        "device": plan["device"]["name"],
        "processes": plan["device"]["processes"],
    }


def published(recipe: str, arm: str) -> tuple[float, float | None] | None:
    """The paper's error of that arm's network; None where it gives none."""
    return PUBLISHED.get((recipe.removesuffix("-fast"), arm))


def table(summaries: Sequence[Summary]) -> str:
    """Every arm beside the paper, as Markdown."""
    head = ("training", "arm", "n", "lost", "test error, %", "the paper's, %", "difference, points")
    return markdown_table(head, [_beside(summary, arm) for summary in summaries for arm in summary.arms], left=2)


def _beside(summary: Summary, arm: Arm) -> tuple[str, ...]:
    found, paper = arm.test_error, published(summary.plan["recipe"]["name"], arm.label)
    difference = number(found.mean - paper[0], 2, sign=True) if paper else ""
    own = _spread(found.mean, found.sd) if found.n else ""
    counts = str(found.n), str(arm.count("diverged", "failed"))
    return summary.plan["recipe"]["title"], arm.label, *counts, own, _spread(*paper) if paper else "", difference


def _spread(mean: float, sd: float | None) -> str:
    return f"{mean:.2f}" if sd is None or math.isnan(sd) else f"{mean:.2f} ± {sd:.2f}"


def picture(found: Sequence[Mapping[str, Any]]) -> str:
    """The runs that have a test error, an arm a line and a panel a recipe with its changes, as SVG."""
    import altair as alt
    import vl_convert

    points = [_point(row) for row in found if row["test_error"] is not None]
    panels = []
    for name in dict.fromkeys(point["title"] for point in points):
        own = [point for point in points if point["title"] == name]
        arms = dict.fromkeys(point["arm"] for point in own)
        paper = [_published(own[0]["recipe"], arm) for arm in arms]
        values = alt.InlineData(values=[one for one in paper if one])
        y = alt.Y("arm:N", title=None, sort=list(arms))
        x = alt.X("error:Q", title="test error, %", scale=alt.Scale(zero=False, padding=12))
        spread = (
            alt.Chart(values).mark_bar(height=14, color="#d55e00", opacity=0.25).encode(x="low:Q", x2="high:Q", y=y)
        )
        mean = alt.Chart(values).mark_tick(size=18, thickness=2, color="#d55e00").encode(x=x, y=y)
        dots = alt.Chart(alt.InlineData(values=own)).mark_point(size=45, color="#0072b2", strokeWidth=1.5)
        title = alt.TitleParams(name, subtitle=f"circles: our runs{_legend(paper)}", anchor="start")
        layers = spread + mean + dots.encode(x=x, y=y)
        panels.append(layers.properties(width=560, height=alt.Step(26), title=title))
    version = ".".join(alt.SCHEMA_VERSION.split(".")[:2])
    chart = alt.vconcat(*panels, background="white").resolve_scale(x="independent", y="independent")
    return str(vl_convert.vegalite_to_svg(chart.to_dict(), vl_version=version))


def _point(row: Mapping[str, Any]) -> dict[str, Any]:
    arm = parse(row["activation"]).label + (" + BatchNorm" if row["norm"] == "batch" else "")
    return {"recipe": row["recipe"], "title": row["title"], "arm": arm, "error": row["test_error"]}


def _published(recipe: str, arm: str) -> dict[str, Any] | None:
    found = published(recipe, arm)
    if found is None:
        return None
    mean, sd = found
    return {"arm": arm, "error": mean, "low": mean - (sd or 0), "high": mean + (sd or 0)}


def _legend(paper: Sequence[Mapping[str, Any] | None]) -> str:
    """What is said of the paper's numbers, if there are any."""
    shown = [one for one in paper if one]
    if not shown:
        return ""
    spread = any(one["low"] < one["high"] for one in shown)
    return "; bars: the paper's mean ± standard deviation" if spread else "; line: the paper's error"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    summaries = [load(Study(path)) for path in options.studies]
    options.out.mkdir(parents=True, exist_ok=True)
    found = [row for summary in summaries for row in rows(summary)]
    (options.out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    if any(row["test_error"] is not None for row in found):
        (options.out / "runs.svg").write_text(picture(found))
    text = "\n".join([table(summaries) + "\n", *map(to_markdown, summaries)])
    (options.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
