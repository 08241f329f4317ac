"""Make the record of finished studies on CIFAR: every run as a row, and a table of the arms.

    python benchmarks/cifar_record.py STUDY ... --out DIR

Each STUDY is the folder of a comparison of a convolutional recipe. DIR gets ``results.jsonl`` and ``table.md``. A run
that is not done, diverged or failed has its row too, with ``test_error`` null.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zeromean.lab.store import Study
from zeromean.lab.summary import Arm, FinalRun, Summary, load, to_markdown

MORE = ("train_error", "validation_error", "diverged", "epochs", "together", "seconds_recording")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    summaries = [load(Study(path)) for path in options.studies]
    options.out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for summary in summaries for row in rows(summary)]
    (options.out / "results.jsonl").write_text("".join(lines))
    table = "\n".join(to_markdown(summary) for summary in summaries)
    (options.out / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
