"""Make the record of finished studies on CIFAR: every run as a row, and a table of the arms.

    python benchmarks/cifar_record.py STUDY ... --out DIR

Each STUDY is the folder of a comparison of a convolutional recipe. DIR gets ``results.jsonl``, ``table.md`` and
``runs.svg``, every run beside the published errors (Clevert, Unterthiner, Hochreiter, ICLR 2016, sections 4.2 and 4.3).
A run that is not done, diverged or failed has its row too, with ``test_error`` null.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zeromean.lab.activation import parse
from zeromean.lab.store import Study
from zeromean.lab.summary import Arm, FinalRun, Summary, load, to_markdown

# Published test errors without normalization, in percent: mean and, where it is given, standard deviation over runs.
PUBLISHED: Mapping[tuple[str, str], tuple[float, float]] = {
    ("cifar100-elu11", "ELU"): (28.75, 0.24),
    ("cifar100-elu11", "ShiftedReLU"): (29.35, 0.29),
    ("cifar100-elu11", "LeakyReLU(0.1)"): (30.59, 0.29),
    ("cifar100-elu11", "ReLU"): (31.56, 0.37),
    ("cifar100-elu18", "ELU"): (24.28, 0.0),
    ("cifar10-elu18", "ELU"): (6.55, 0.0),
}
MORE = ("train_error", "validation_error", "diverged", "epochs", "together", "seconds_recording", "overflows")


def rows(summary: Summary) -> list[dict[str, Any]]:
    """Every planned run; ``test_error`` in percent, ``seconds`` of training."""
    return [_row(summary.plan, arm, run) for arm in summary.arms for run in arm.runs]


def _row(plan: Mapping[str, Any], arm: Arm, run: FinalRun) -> dict[str, Any]:
    return {
        "recipe": plan["recipe"]["name"],
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


def picture(found: Sequence[Mapping[str, Any]]) -> str:
    """The runs that have a test error, an arm a line and a panel a recipe, as SVG."""
    import altair as alt
    import vl_convert

    points = [_point(row) for row in found if row["test_error"] is not None]
    arms = dict.fromkeys((point["recipe"], point["arm"]) for point in points)
    published = [
        {"recipe": recipe, "arm": arm, "low": mean - sd, "high": mean + sd, "error": mean}
        for (recipe, arm), (mean, sd) in PUBLISHED.items()
        if (recipe, arm) in arms
    ]
    panels = []
    for recipe in dict.fromkeys(recipe for recipe, _ in arms):
        y = alt.Y("arm:N", title=None, sort=[arm for of, arm in arms if of == recipe])
        x = alt.X("error:Q", title="test error, %", scale=alt.Scale(zero=False))
        values = alt.InlineData(values=[one for one in published if one["recipe"] == recipe])
        spread = (
            alt.Chart(values).mark_bar(height=14, color="#d55e00", opacity=0.25).encode(x="low:Q", x2="high:Q", y=y)
        )
        mean = alt.Chart(values).mark_tick(size=18, thickness=2, color="#d55e00").encode(x=x, y=y)
        own = alt.InlineData(values=[point for point in points if point["recipe"] == recipe])
        dots = alt.Chart(own).mark_point(size=45, color="#0072b2", strokeWidth=1.5).encode(x=x, y=y)
        title = f"{recipe}: our runs (circles) and the paper's mean ± standard deviation (bars)"
        panels.append((spread + mean + dots).properties(width=560, height=alt.Step(26), title=title))
    version = ".".join(alt.SCHEMA_VERSION.split(".")[:2])
    chart = alt.vconcat(*panels, background="white").resolve_scale(x="independent", y="independent")
    return str(vl_convert.vegalite_to_svg(chart.to_dict(), vl_version=version))


def _point(row: Mapping[str, Any]) -> dict[str, Any]:
    arm = parse(row["activation"]).label + (" + BatchNorm" if row["norm"] == "batch" else "")
    return {"recipe": row["recipe"], "arm": arm, "error": row["test_error"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    summaries = [load(Study(path)) for path in options.studies]
    options.out.mkdir(parents=True, exist_ok=True)
    found = [row for summary in summaries for row in rows(summary)]
    (options.out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (options.out / "runs.svg").write_text(picture(found))
    table = "\n".join(to_markdown(summary) for summary in summaries)
    (options.out / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
