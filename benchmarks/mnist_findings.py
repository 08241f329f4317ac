"""Test the ELU paper's findings on MNIST in finished studies, and write their records.

    python benchmarks/mnist_findings.py STUDY ... --record DIR

Each STUDY is the folder of a ``mnist-mlp8`` or ``mnist-autoencoder`` comparison. DIR gets ``results.jsonl`` (a row a
run) and ``verdicts.md``. What is tested was fixed before the runs. For the 8 x 128 network, ELU against each other arm:

1. distance of the mean activation from zero: the absolute median over units of the unit's mean activation on the fixed
   training subset, averaged over the hidden layers and over all epochs (the paper plots this median by epoch);
2. speed of training: the mean over epochs 1 to 25 of the training loss (the paper's curves are flat after 25);

and for the autoencoder, ELU against every other arm at each learning rate in the reconstruction error on training and
test images after the last epoch. Paired by seed, sign-flip test, Holm over the comparisons of one finding.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from zeromean.lab import stats
from zeromean.lab.store import Study
from zeromean.lab.summary import Arm, FinalRun, load

Measure = Callable[[FinalRun], float]
KEYS = ("activation", "learning_rate", "seed", "status", "train_loss", "train_error", "test_error")
MORE = ("median_mean_activation", "seconds", "together")


def distance_from_zero(run: FinalRun) -> float:
    return statistics.fmean(abs(layer) for row in run.metrics for layer in row["mean_activation"])


def early_loss(run: FinalRun) -> float:
    return statistics.fmean(row["train_loss"] for row in run.metrics[:25])


def final_of(key: str) -> Measure:
    return lambda run: float(run.result[key])


FINDINGS: dict[str, dict[str, Measure]] = {
    "classification": {
        "distance of the mean activation from zero": distance_from_zero,
        "mean training loss of epochs 1 to 25": early_loss,
        "training loss at the last epoch": final_of("train_loss"),
        "test error": final_of("test_error"),
    },
    "reconstruction": {
        "training reconstruction error": final_of("train_error"),
        "test reconstruction error": final_of("test_error"),
    },
}


def judge(arms: Sequence[Arm], name: str, measure: Measure) -> list[str]:
    """A table of the arms and the verdicts on ELU against each other arm of the same learning rate."""
    values = {arm.label: [measure(run) if run.status == "ok" else None for run in arm.runs] for arm in arms}
    elus = {arm.learning_rate: arm.label for arm in arms if arm.activation == "elu"}
    pairs = [(elus[arm.learning_rate], arm.label) for arm in arms if arm.activation != "elu"]
    table = [f"## {name.capitalize()}", "", "| arm | n | mean | sd |", "|---|---|---|---|"]
    for label, numbers in values.items():
        found = stats.summarize(numbers)
        table.append(f"| {label} | {found.n} | {found.mean:.5g} | {found.sd:.2g} |")
    return [*table, "", *(f"- {one.sentence}" for one in stats.compare_pairs(values, pairs, metric=name, unit="")), ""]


def rows(study: Study) -> list[str]:
    summary = load(study)
    recipe = summary.plan["recipe"]["name"]
    found = []
    for arm in summary.arms:
        for run in arm.runs:
            kept = {key: run.result.get(key) for key in (*KEYS, *MORE)}
            found.append(json.dumps({"recipe": recipe, "study": summary.plan["study"], "seed": run.seed, **kept}))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path)
    parser.add_argument("--record", type=Path, required=True)
    options = parser.parse_args()
    lines, results = [], []
    for path in options.studies:
        summary = load(Study(path))
        lines += [f"# {summary.plan['recipe']['title']} ({summary.plan['study']})", "", summary.progress, ""]
        for name, measure in FINDINGS[summary.plan["recipe"]["task"]].items():
            lines += judge(summary.arms, name, measure)
        results += rows(Study(path))
    options.record.mkdir(parents=True, exist_ok=True)
    (options.record / "verdicts.md").write_text("\n".join(lines))
    (options.record / "results.jsonl").write_text("".join(line + "\n" for line in results))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
