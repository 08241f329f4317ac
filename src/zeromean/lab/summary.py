"""What a study found, read from its folder alone: the numbers behind ``summary.csv``, ``summary.md`` and the report.

A study that is not done yet can be summarised too, but gets no verdict: deciding after some of the planned runs
would be a second look at the data, which the tests do not account for. Runs that diverged or failed are counted,
never dropped.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from zeromean.lab import stats
from zeromean.lab.plan import written_plan
from zeromean.lab.schedule import duration
from zeromean.lab.store import DamagedFileError, Run, Status, Study

if TYPE_CHECKING:
    from rich.table import Table

Epoch = Mapping[str, Any]
CSV_COLUMNS = (
    "arm",
    "activation",
    "learning_rate",
    "seed",
    "status",
    "epochs",
    "train_loss",
    "train_error",
    "validation_error",
    "test_error",
    "median_mean_activation",
    "norm",
)

READING = (
    "Differences are arm minus baseline over runs that share a seed: negative favours the arm. The interval inverts "
    "the sign-flip test that gives p (below 6 pairs it is Student's t) and is not adjusted; adjusted p-values are "
    "Holm's over all comparisons."
)


@dataclass(frozen=True)
class FinalRun:
    """One final run of an arm, done or not.

    Attributes:
        seed: of the run.
        status: as in ``result.json``, or ``missing`` where there is none.
        result: the content of ``result.json``; empty where it is missing.
        metrics: the rows of ``metrics.jsonl``, an epoch each.
    """

    seed: int
    status: Status | Literal["missing"]
    result: Mapping[str, Any]
    metrics: tuple[Epoch, ...]

    @property
    def test_error(self) -> float | None:
        """At the last epoch; None for a run that is missing, diverged or failed."""
        return self.result.get("test_error") if self.status == "ok" else None

    @property
    def where(self) -> str:
        """The step and the layer in which a run on images diverged; empty for others."""
        found = self.result.get("diverged")
        return f"step {found['step']:,}, {found['layer']}" if found else ""


@dataclass(frozen=True)
class TuningPoint:
    """The validation errors of one arm at one learning rate, by tuning seed; None marks a run that diverged."""

    learning_rate: float
    validation_errors: tuple[float | None, ...]


@dataclass(frozen=True)
class Tuning:
    """How an arm came to its learning rate.

    Attributes:
        chosen: the learning rate with the lowest mean validation error at which no run diverged.
        at_edge: it is the lowest or the highest of the grid, so a better one may lie outside.
        grid: what was tried.
    """

    chosen: float
    at_edge: bool
    grid: tuple[TuningPoint, ...]


@dataclass(frozen=True)
class Arm:
    """One side of the comparisons.

    Attributes:
        name: its folder.
        label: as tables and charts print it.
        activation: its text.
        norm: its normalization layers, ``none`` or ``batch``.
        learning_rate: None as long as tuning has not chosen it.
        runs: one per planned seed, in the order of the plan.
        test_error: mean, spread and interval over the runs that ended well; nan where too few did.
        tuning: None where the study does not tune.
    """

    name: str
    label: str
    activation: str
    norm: str
    learning_rate: float | None
    runs: tuple[FinalRun, ...]
    test_error: stats.Summary
    tuning: Tuning | None

    def count(self, *statuses: str) -> int:
        """How many runs have one of those statuses."""
        return sum(run.status in statuses for run in self.runs)

    @property
    def losses(self) -> str:
        """Counts of the runs that did not end well, in words; empty where all did."""
        return ", ".join(f"{self.count(end)} {end}" for end in ("diverged", "failed") if self.count(end))


@dataclass(frozen=True)
class Summary:
    """A study's numbers.

    Attributes:
        plan: the content of ``plan.json``.
        arms: in the order of the plan.
        comparisons: empty until every planned run is done.
    """

    plan: Mapping[str, Any]
    arms: tuple[Arm, ...]
    comparisons: tuple[stats.Comparison, ...]

    @property
    def metric(self) -> str:
        """The name of the error on the test set."""
        return metric_of(self.plan)

    @property
    def unit(self) -> str:
        """Of the error itself, for the head of a column; differences of percentages are in points."""
        return str(self.plan["recipe"]["error_unit"])

    @property
    def difference_unit(self) -> str:
        """Of a difference of two errors."""
        return difference_unit_of(self.plan)

    @property
    def decimals(self) -> int:
        """Decimals that show two digits of the smallest spread between an arm's runs; 2 to 4."""
        spreads = [arm.test_error.sd for arm in self.arms if arm.test_error.sd > 0]
        return min(4, max(2, 1 - math.floor(math.log10(min(spreads))))) if spreads else 2

    @property
    def planned(self) -> int:
        """Final runs of the plan."""
        return sum(len(arm.runs) for arm in self.arms)

    def count(self, *statuses: str) -> int:
        """How many final runs have one of those statuses."""
        return sum(arm.count(*statuses) for arm in self.arms)

    @property
    def speed(self) -> str:
        """How fast runs on images were, in words; empty where no result says it.

        Over the runs that ended well, as others were cut short; over all where none did.
        """
        timed = [run for arm in self.arms for run in arm.runs if run.result.get("images_per_second")]
        results = [run.result for run in timed if run.status == "ok"] or [run.result for run in timed]
        if not results:
            return ""
        seconds = sum(result["seconds"] for result in results) / len(results)
        rate = sum(result["images_per_second"] for result in results) / len(results)
        return f"{duration(seconds)} a run, {float(f'{rate:.3g}'):,.0f} images/s on average"

    @property
    def progress(self) -> str:
        """How many runs are done, and how they ended."""
        done = self.planned - self.count("missing")
        ends = [f"{self.count(status)} {status}" for status in ("ok", "diverged", "failed") if self.count(status)]
        return f"{done} of {self.planned} runs done" + (f": {', '.join(ends)}." if ends else ".")

    @property
    def sentences(self) -> tuple[str, ...]:
        """The verdicts in words, or why there are none."""
        if self.count("missing"):
            return (f"No verdict yet: {self.count('missing')} of {self.planned} runs are not done.",)
        if not self.comparisons:
            return ("Nothing to compare: the study has one arm.",)
        return tuple(comparison.sentence for comparison in self.comparisons)

    @property
    def exclusions(self) -> str:
        """Which runs are left out of means and comparisons; empty where none are."""
        excluded = [f"{arm.label} ({arm.losses})" for arm in self.arms if arm.losses]
        places = [f"{arm.label} seed {run.seed}: {run.where}" for arm in self.arms for run in arm.runs if run.where]
        told = f" Diverged: {'; '.join(places)}." if places else ""
        return f"Left out of means and comparisons: {'; '.join(excluded)}.{told}" if excluded else ""

    @property
    def edges(self) -> str:
        """Which arms' learning rates are the last of the grid; empty where none are."""
        arms = [f"{arm.label} ({arm.learning_rate:g})" for arm in self.arms if arm.tuning and arm.tuning.at_edge]
        return (
            f"Learning rate at the edge of the tuning grid, so perhaps not the best: {', '.join(arms)}." if arms else ""
        )


def metric_of(plan: Mapping[str, Any]) -> str:
    """The name of the error on the test set of that plan."""
    return "test reconstruction error" if plan["recipe"]["task"] == "reconstruction" else "test error"


def difference_unit_of(plan: Mapping[str, Any]) -> str:
    """Of a difference of two such errors."""
    return f"× {plan['recipe']['error_unit']}" if plan["recipe"]["task"] == "reconstruction" else "points"


def load(study: Study) -> Summary:
    """Read a study's folder.

    Args:
        study: the folder, complete or not.

    Raises:
        ValueError: there is no plan in it, or a file is damaged.
    """
    plan = written_plan(study)
    if plan is None:
        raise ValueError(f"{study.path} holds no study: name a folder with a plan.json, as `zeromean compare` makes it")
    tuning = _tuning(study) if plan["tune"] else {}
    labels = Counter(planned["label"] for planned in plan["arms"])
    arms = tuple(
        _arm(study, plan, {**planned, "label": _unique(planned, labels)}, tuning.get(planned["name"]))
        for planned in plan["arms"]
    )
    return Summary(plan, arms, _compare(plan, arms))


def _unique(planned: Mapping[str, Any], labels: Counter[str]) -> str:
    """MPELU(1) says not which of its two settings is 1; its folder's name does."""
    label = str(planned["label"])
    return label if labels[label] == 1 else f"{label} [{planned['activation']}]"


def _tuning(study: Study) -> dict[str, Tuning]:
    file = study.path / "tuning.json"
    if not file.exists():
        return {}
    try:
        return {name: _arm_tuning(arm) for name, arm in json.loads(file.read_text())["arms"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{file} is damaged ({error!r}): delete it and run the study again") from error


def _arm_tuning(arm: Mapping[str, Any]) -> Tuning:
    grid = tuple(TuningPoint(point["learning_rate"], tuple(point["validation_errors"])) for point in arm["grid"])
    return Tuning(arm["chosen"], arm["at_edge"], grid)


def _arm(study: Study, plan: Mapping[str, Any], planned: Mapping[str, Any], tuning: Tuning | None) -> Arm:
    rate = tuning.chosen if tuning else planned["learning_rate"]
    names, norm = (planned["name"], planned["activation"]), planned["norm"]
    known = math.nan if rate is None else rate
    runs = tuple(_final_run(study, Run(*names, known, seed, norm=norm)) for seed in plan["seeds"])
    described = stats.summarize([run.test_error for run in runs])
    return Arm(planned["name"], planned["label"], planned["activation"], norm, rate, runs, described, tuning)


def _final_run(study: Study, run: Run) -> FinalRun:
    found = study.finished(run)
    if found is None:
        return FinalRun(run.seed, "missing", {}, ())
    result, metrics = found
    return FinalRun(run.seed, result["status"], result, tuple(metrics))


def _compare(plan: Mapping[str, Any], arms: Sequence[Arm]) -> tuple[stats.Comparison, ...]:
    if any(run.status == "missing" for arm in arms for run in arm.runs):
        return ()
    label = {arm.name: arm.label for arm in arms}
    errors = {arm.label: [run.test_error for run in arm.runs] for arm in arms}
    pairs = [(label[arm], label[baseline]) for arm, baseline in plan["comparisons"]]
    return tuple(stats.compare_pairs(errors, pairs, metric=metric_of(plan), unit=difference_unit_of(plan)))


def to_csv(summary: Summary) -> str:
    """A row a run, without times, machines or dates: the same study gives the same bytes."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for arm in summary.arms:
        for run in arm.runs:
            known = {**run.result, "arm": arm.name, "activation": arm.activation, "learning_rate": arm.learning_rate}
            known |= {"seed": run.seed, "status": run.status, "norm": arm.norm}
            writer.writerow(["" if known.get(column) is None else known[column] for column in CSV_COLUMNS])
    return file.getvalue()


def arm_table(summary: Summary) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of the table of arms."""
    head = (
        "arm",
        "learning rate",
        "n",
        f"mean {summary.metric} ({summary.unit})",
        "sd",
        "95 % interval",
        "diverged",
        "failed",
    )
    return head, [_arm_row(arm, summary.decimals) for arm in summary.arms]


def _arm_row(arm: Arm, decimals: int) -> tuple[str, ...]:
    rate = "not chosen yet" if arm.learning_rate is None else f"{arm.learning_rate:g}"
    error = arm.test_error
    numbers = number(error.mean, decimals), number(error.sd, decimals), interval(error.interval, decimals)
    return (arm.label, rate, str(error.n), *numbers, str(arm.count("diverged")), str(arm.count("failed")))


def comparison_table(summary: Summary) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of the table of comparisons."""
    head = (
        "comparison",
        "pairs",
        f"difference ({summary.difference_unit})",
        "95 % interval",
        "p",
        "adjusted p",
        "P(better)",
        "verdict",
    )
    return head, [
        (
            f"{one.arm} - {one.baseline}",
            str(one.n_pairs),
            number(one.difference, summary.decimals, sign=True),
            interval(one.interval, summary.decimals, sign=True),
            p_value(one.p_value),
            p_value(one.p_adjusted),
            number(one.probability_better, 2),
            one.verdict,
        )
        for one in summary.comparisons
    ]


def number(value: float, decimals: int, *, sign: bool = False) -> str:
    """Rounded; empty where there is no number."""
    if not math.isfinite(value):
        return ""
    return f"{value:+.{decimals}f}" if sign else f"{value:.{decimals}f}"


def interval(found: stats.Interval, decimals: int, *, sign: bool = False) -> str:
    """As ``low to high``."""
    if not (math.isfinite(found.low) and math.isfinite(found.high)):
        return "too few runs"
    return f"{number(found.low, decimals, sign=sign)} to {number(found.high, decimals, sign=sign)}"


def p_value(value: float) -> str:
    """To three decimals; smaller ones as a bound."""
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def to_markdown(summary: Summary) -> str:
    """Verdicts first, then the tables and where the numbers come from."""
    plan = summary.plan
    parts = [f"# {_plain(plan['study'])}: {_plain(plan['recipe']['title'])}"]
    parts.append("\n".join(f"- {_plain(sentence)}" for sentence in summary.sentences))
    parts.append(
        "\n\n".join(line for line in (summary.progress, _plain(summary.exclusions), _plain(summary.edges)) if line)
    )
    parts.append(markdown_table(*arm_table(summary), left=2))
    if summary.comparisons:
        parts.append(markdown_table(*comparison_table(summary), left=1))
        parts.append(READING)
    parts.append("\n".join(f"- {line}" for line in _provenance(summary)))
    return "\n\n".join(parts) + "\n"


def _provenance(summary: Summary) -> list[str]:
    plan, data = summary.plan, summary.plan["data"]
    versions = ", ".join(f"{name} {version}" for name, version in plan["versions"].items())
    device = f"{_plain(plan['device']['name'])} ({plan['device']['kind']})"
    return [
        f"Command: `{_plain(plan['command'])}`",
        f"Made {plan['created']} with {versions}, on {device}, {commit(plan)}",
        f"Data: {data['name']}, {data['train']} train, {data['validation']} validation, {data['test']} test samples",
        f"Design: {detectable(summary)}",
        *([f"Speed: {summary.speed}"] if summary.speed else []),
    ]


def commit(plan: Mapping[str, Any]) -> str:
    """The state of the code, in words."""
    if plan["git"] is None:
        return "not in a git repository"
    return f"commit {plan['git']['commit']}{' with uncommitted changes' if plan['git']['dirty'] else ''}"


def detectable(summary: Summary) -> str:
    """What the design can find, in words."""
    count, assumed = len(summary.plan["seeds"]), summary.plan["recipe"]["expected_sd"]
    seeds = "1 seed per arm" if count == 1 else f"{count} seeds per arm"
    if not summary.plan["comparisons"]:
        return f"{seeds}, one arm: nothing to compare"
    found = summary.plan["detectable_difference"]
    if found is None:
        return f"{seeds} cannot reach significance, however large the difference"
    return (
        f"with {seeds} a difference of {number(found, summary.decimals)} {summary.difference_unit} is found with 80 % "
        f"power, if the standard deviation between seeds is {assumed:g}"
    )


def _plain(text: str) -> str:
    """Text of the user's that Markdown shall not interpret."""
    flat = " ".join(str(text).split()).replace("|", "\\|").replace("`", "'")
    return re.sub(r"<(?=\S)", "&lt;", flat)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Padded so that it reads as a table in a terminal too; columns from ``left`` on are set right."""
    cells = [[_plain(cell) for cell in row] for row in (head, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(head))]
    lines = [
        "| "
        + " | ".join(
            _pad(cell, width, column < left) for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in cells
    ]
    rule = (
        "|"
        + "|".join(
            "-" * (width + 2) if column < left else "-" * (width + 1) + ":" for column, width in enumerate(widths)
        )
        + "|"
    )
    return "\n".join([lines[0], rule, *lines[1:]])


def _pad(cell: str, width: int, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)


def to_tables(summary: Summary) -> list[Table]:
    """The tables of arms and comparisons for a terminal of 80 columns, drawn by rich."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    unseen = {"pairs", "p", "P(better)"} | ({"failed"} if not summary.count("failed") else set())
    short = {"learning rate": "lr", f"mean {summary.metric} ({summary.unit})": f"mean error ({summary.unit})"}
    tables = []
    for (head, rows), left in ((arm_table(summary), 1), (comparison_table(summary), 1)):
        shown = [column for column, title in enumerate(head) if title not in unseen]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
        for column in shown:
            title = short.get(head[column], head[column])
            table.add_column(Text(title), justify="left" if column < left else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(row[column]) for column in shown))
        tables += [table] if rows else []
    return tables
