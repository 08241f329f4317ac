"""What does the exact unit natural gradient gain over tuned gradient descent, with ReLU, with ELU, with batch norm?

    python benchmarks/natural_gradient.py [--processes 15] [--seeds 8] [--samples 10000] [--out DIR]
    python benchmarks/natural_gradient.py --draw DIR

Trains the 8 x 128 network of ``mnist-mlp8`` (He weights, batches of 64) on a fixed random part of MNIST's training set,
in three ways: ``sgd``; ``sgd+norm``, with batch normalization in front of each activation; ``natural``, the optimizer
`zeromean.optim.UnitNaturalGradient` with the exact Fisher of the batch. Rate and momentum of the first two, bound and
damping of the third, are those with the lowest training loss after some epochs on other seeds. The loss is that of the
whole part in evaluation mode, taken four times an epoch, outside of the clock; every run has one core (or the device)
for itself. A target is reached at the first loss at or below it.

Writes ``tuning.jsonl`` and ``results.jsonl`` (a row a run), ``summary.md``, ``machine.json``; ``--draw`` adds the
picture, with altair.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zeromean
from zeromean.lab import data
from zeromean.lab.activation import parse
from zeromean.lab.nets import mlp
from zeromean.lab.plan import device_facts, git_state, splits
from zeromean.lab.recipes import Recipe, find
from zeromean.lab.stats import compare_pairs, summarize
from zeromean.lab.together import Samples
from zeromean.optim import UnitNaturalGradient

ACTIVATIONS = ("relu", "elu")
METHODS = ("sgd", "sgd+norm", "natural")
TARGETS = (0.1, 0.03, 0.01)
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # each with momentum 0 and 0.9
BOUNDS, DAMPINGS = (3e-4, 1e-3, 3e-3), (0.1, 1.0, 10.0)
FIRST_TUNING_SEED = 1000
LOOKS = 4  # at the loss, an epoch
PAIRS = (
    *((f"natural {activation}", f"sgd {activation}") for activation in ACTIVATIONS),
    *((f"sgd+norm {activation}", f"sgd {activation}") for activation in ACTIVATIONS),
    *((f"{method} elu", f"{method} relu") for method in ("sgd", "natural")),
)


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        method: of `METHODS`.
        activation: of the hidden layers.
        seed: of weights and order.
        epochs: at most.
        setting: the optimizer's numbers.
    """

    method: str
    activation: str
    seed: int
    epochs: float
    setting: Mapping[str, float]

    @property
    def arm(self) -> str:
        """Method and activation."""
        return f"{self.method} {self.activation}"


class Place:
    """What a worker process keeps: the data, on its device."""

    samples: Samples
    batch_size: int


def settle(device: str, samples: int) -> None:
    """Load the data; called once in every worker."""
    torch.set_num_threads(1)
    recipe = find("mnist-mlp8")
    assert isinstance(recipe, Recipe)
    train = splits(recipe, data.load(recipe.data), tuning=False).train
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:samples]
    Place.samples, Place.batch_size = train.take(chosen).to(torch.device(device)), recipe.batch_size


def build(job: Job) -> nn.Sequential:
    network = mlp((784, *(128,) * 8, 10), parse(job.activation), seed=job.seed)
    if job.method != "sgd+norm":
        return network
    *hidden, last = network.children()
    pairs = [[layer, nn.BatchNorm1d(128)] if isinstance(layer, nn.Linear) else [layer] for layer in hidden]
    return nn.Sequential(*itertools.chain(*pairs), last)


class Descent:
    """A network and its way down."""

    def __init__(self, job: Job) -> None:
        self.network = build(job).to(Place.samples.inputs.device)
        setting = dict(job.setting)
        self.natural = UnitNaturalGradient(self.network, **setting) if job.method == "natural" else None  # type: ignore[arg-type]
        self.plain = None if self.natural else torch.optim.SGD(self.network.parameters(), **setting)  # type: ignore[arg-type]

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """Learn from a batch."""
        if self.natural is not None:
            self.natural.step(inputs, targets)
            return
        assert self.plain is not None
        self.plain.zero_grad()
        F.cross_entropy(self.network(inputs), targets).backward()
        self.plain.step()

    @torch.no_grad()
    def loss(self) -> float:
        """Of all samples, in evaluation mode."""
        self.network.eval()
        loss = float(F.cross_entropy(self.network(Place.samples.inputs), Place.samples.targets))
        self.network.train()
        return loss


def batches(seed: int) -> Iterator[Samples]:
    """Without end: whole batches of one epoch after the other; the same for all methods."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(Place.samples), generator=generator).to(Place.samples.inputs.device)
        for index in order.split(Place.batch_size):
            if len(index) == Place.batch_size:
                yield Place.samples.take(index)


def run(job: Job) -> dict[str, Any]:
    """Train until the lowest target is reached, the loss is lost, or the epochs are over."""
    descent, per_epoch = Descent(job), len(Place.samples) // Place.batch_size
    looks = [round(per_epoch * look / LOOKS) for look in range(1, math.ceil(job.epochs * LOOKS) + 1)]
    curve, seconds, done = [(0.0, 0.0, descent.loss())], 0.0, 0
    source = batches(job.seed)
    for look in looks:
        parts = [next(source) for _ in range(look - done)]
        started = now()
        try:
            for part in parts:
                descent.step(part.inputs, part.targets)
        except ValueError:  # a block became singular
            break
        seconds, done = seconds + now() - started, look
        loss = descent.loss()
        if not math.isfinite(loss):
            break
        curve.append((done / per_epoch, seconds, loss))
        if loss <= TARGETS[-1]:
            break
    return {"arm": job.arm, **asdict(job), "diverged": done < looks[-1] and curve[-1][2] > TARGETS[-1], "curve": curve}


def now() -> float:
    if Place.samples.inputs.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def reached(row: Mapping[str, Any], target: float, place: int) -> float | None:
    """Epochs (place 0) or seconds (1) until the loss was at the target; None if it never was."""
    return next((point[place] for point in row["curve"] if point[2] <= target), None)


def tuning_jobs(epochs: Mapping[str, float], seeds: int) -> list[Job]:
    sgd = [{"lr": lr, "momentum": m} for lr in RATES for m in (0.0, 0.9)]
    natural = [{"max_kl": kl, "damping": damping} for kl in BOUNDS for damping in DAMPINGS]
    grids = {"sgd": sgd, "sgd+norm": sgd, "natural": natural}
    return [
        Job(method, activation, FIRST_TUNING_SEED + number, epochs[method], setting)
        for method in METHODS
        for activation in ACTIVATIONS
        for setting in grids[method]
        for number in range(1 if method == "natural" else seeds)
    ]


def best(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """The setting of each arm with the lowest last loss, or the fewest epochs where that is the last target."""
    found: dict[tuple[str, str], dict[str, tuple[float, ...]]] = {}
    for row in rows:
        end = (math.inf, 0.0) if row["diverged"] else (max(row["curve"][-1][2], TARGETS[-1]), row["curve"][-1][0])
        setting = json.dumps(row["setting"])
        of_arm = found.setdefault((row["method"], row["activation"]), {})
        of_arm[setting] = tuple(a + b for a, b in zip(of_arm.get(setting, (0.0, 0.0)), end, strict=True))
    return {arm: json.loads(min(ends, key=lambda one: ends[one])) for arm, ends in found.items()}


def work(jobs: Iterable[Job], pool: ProcessPoolExecutor, note: str) -> list[dict[str, Any]]:
    """The longest first."""
    started, ordered = time.perf_counter(), sorted(jobs, key=lambda job: job.method != "natural")
    rows = list(pool.map(run, ordered))
    print(f"{note}: {len(rows)} runs in {time.perf_counter() - started:.0f} s", flush=True)
    return rows


def summary(rows: Sequence[Mapping[str, Any]], settings: Mapping[tuple[str, str], Any]) -> str:
    """Tables and verdicts, as Markdown."""
    seeds = sorted({row["seed"] for row in rows})
    by_arm = {
        arm: {row["seed"]: row for row in rows if row["arm"] == arm}
        for arm in dict.fromkeys(row["arm"] for row in rows)
    }
    lines = ["| arm | setting | " + " | ".join(f"epochs to {t} | seconds to {t}" for t in TARGETS) + " |"]
    lines.append("|---|---|" + "---:|" * 2 * len(TARGETS))
    for arm, of_seed in by_arm.items():
        cells = []
        for target, place in itertools.product(TARGETS, (0, 1)):
            values = [reached(of_seed[seed], target, place) for seed in seeds]
            cells.append(cell(values))
        method, activation = arm.split()
        setting = ", ".join(f"{name} {value:g}" for name, value in settings[method, activation].items())
        lines.append(f"| {arm} | {setting} | " + " | ".join(cells) + " |")
    for place, unit in enumerate(("epochs", "seconds")):
        for target in TARGETS:
            lines += ["", f"**{unit.capitalize()} to a training loss of {target}**", ""]
            of_arms = {arm: [reached(of[seed], target, place) for seed in seeds] for arm, of in by_arm.items()}
            metric = f"{unit} to {target}"
            verdicts = compare_pairs(of_arms, PAIRS, metric=metric, unit=unit)
            lines += [f"* {one.sentence.replace('diverged or failed', 'did not get there')}" for one in verdicts]
    return "\n".join(lines) + "\n"


def cell(values: Sequence[float | None]) -> str:
    """Mean and 95 % interval, and how many runs got there where not all did."""
    some = summarize(values)
    if some.n == 0:
        return "never"
    interval = f" ({some.interval.low:.3g} to {some.interval.high:.3g})" if some.n > 1 else ""
    return f"{some.mean:.3g}{interval}" + (f", {some.n} of {len(values)}" if some.excluded else "")


def draw(folder: Path) -> None:
    """The runs' losses over epochs and over seconds, as SVG."""
    import altair as alt
    import vl_convert

    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    points = [
        {
            "method": row["method"],
            "activation": row["activation"],
            "run": row["seed"],
            "epochs": e,
            "seconds": s,
            "loss": v,
        }
        for row in rows
        for e, s, v in row["curve"][1:]
    ]
    base = alt.Chart(alt.InlineData(values=points)).mark_line(strokeWidth=1, opacity=0.7)

    def panel(across: str, activation: str) -> Any:
        return (
            base.transform_filter(alt.datum.activation == activation)
            .encode(
                x=alt.X(f"{across}:Q", title=across, scale=alt.Scale(type="log")),
                y=alt.Y("loss:Q", title="training loss", scale=alt.Scale(type="log", domain=[0.008, 3], clamp=True)),
                color=alt.Color("method:N", title=None, scale=alt.Scale(domain=METHODS, range=COLOURS)),
                detail="run:N",
            )
            .properties(width=300, height=200, title=activation)
        )

    both = [alt.hconcat(*(panel(across, one) for one in ACTIVATIONS)) for across in ("epochs", "seconds")]
    (folder / "losses.svg").write_text(vl_convert.vegalite_to_svg(alt.vconcat(*both).to_json()))


COLOURS = ("#d55e00", "#009e73", "#0072b2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--tuning-seeds", type=int, default=2)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--epochs", type=float, nargs=3, default=[40, 40, 10], metavar=METHODS)
    parser.add_argument("--tuning-epochs", type=float, nargs=3, default=[10, 10, 1], metavar=METHODS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draw", type=Path, help="draw the results in this folder, and do nothing else")
    options = parser.parse_args()
    if options.draw:
        draw(options.draw)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        options.processes, context, initializer=settle, initargs=(options.device, options.samples)
    ) as pool:
        tuning_epochs = dict(zip(METHODS, options.tuning_epochs, strict=True))
        tuned = work(tuning_jobs(tuning_epochs, options.tuning_seeds), pool, "tuning")
        settings = best(tuned)
        jobs = [
            Job(method, activation, seed, epochs, settings[method, activation])
            for method, epochs in zip(METHODS, options.epochs, strict=True)
            for activation in ACTIVATIONS
            for seed in range(options.seeds)
        ]
        rows = work(jobs, pool, "reported")
    text = summary(rows, settings)
    print(text)
    if options.out:
        write(options.out, tuned, rows, text, options)


def write(folder: Path, tuned: Sequence[Any], rows: Sequence[Any], text: str, options: argparse.Namespace) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("tuning", tuned), ("results", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(rounded(row)) + "\n" for row in content))
    (folder / "summary.md").write_text(text)
    machine = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processes": options.processes,
        "median_milliseconds_a_step": {arm: round(step, 3) for arm, step in step_times(rows, options).items()},
        "device": device_facts(torch.device(options.device)) | {"threads": 1},
        "versions": {"zeromean": zeromean.__version__, "torch": torch.__version__},
        "git": git_state(),
    }
    (folder / "machine.json").write_text(json.dumps(machine, indent=1) + "\n")


def step_times(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> dict[str, float]:
    steps = options.samples // 64
    times: dict[str, list[float]] = {}
    for row in rows:
        if len(row["curve"]) > 1:
            epochs, seconds, _ = row["curve"][-1]
            times.setdefault(row["arm"], []).append(1000 * seconds / (epochs * steps))
    return {arm: statistics.median(of) for arm, of in times.items()}


def rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
