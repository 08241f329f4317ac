"""Bias shift and k - 1 while a network trains: does ELU have less of them, and does batch norm take them away?

    python benchmarks/bias_shift.py mlp8 [--processes 15] [--seeds 10] [--out DIR]
    python benchmarks/bias_shift.py elu11 --device cuda [--processes 8] [--seeds 5] [--out DIR]
    python benchmarks/bias_shift.py --draw DIR

Trains a network of the ELU paper as its recipe does (``mnist-mlp8``: 8 x 128 on MNIST; ``cifar100-elu11``), shortened,
with four activations, each without and with batch normalization in front of it, and measures the hidden layers on a
fixed batch at some steps. Read are the hidden layers that see activations, and of elu11 those with 1x1 kernels, as the
others have more inputs than a batch has rows to tell k from. A row of ``results.jsonl`` is a layer at a step of a run,
medians over its units:

    k_minus_one         |k - 1| of Theorem 2
    shift_ratio         bias shift of the plain gradient against that of the unit natural gradient, sizes
    update_share        |mean| / root mean square over the batch of what an update by the gradient adds to a unit's net:
                        the share of the update that is bias shift
    mean_activation     |E(a)| of a unit below
    bias_shift, natural_bias_shift      sizes, see `zeromean.diagnostics.UnitQuantities`

Verdicts compare runs, by the geometric mean over layers and steps from `FIRST_STEP` on, paired by seed. Nets with batch
normalization are not measured before, as their running statistics are still those of no batch. ``--draw`` adds the
pictures, with altair.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zeromean
from zeromean.diagnostics import UnitQuantities, measure
from zeromean.lab import data
from zeromean.lab.activation import parse
from zeromean.lab.images import Material, material
from zeromean.lab.nets import mlp
from zeromean.lab.plan import device_facts, git_state, splits
from zeromean.lab.recipes import ImageRecipe, Recipe, find
from zeromean.lab.stats import compare_pairs, mean_interval
from zeromean.lab.store import Run
from zeromean.lab.together import Samples
from zeromean.lab.train import Training

ACTIVATIONS = ("elu", "shifted_relu", "leaky_relu:0.1", "relu")
NORMS = ("none", "batch")
QUANTITIES = ("k_minus_one", "shift_ratio", "update_share")
FIRST_STEP = 30
TOGETHER = 5  # seeds of an arm in one process on a GPU
STEPS = {"mlp8": (0, 30, 100, 300, 937, 2811, 9370), "elu11": (0, 30, 100, 300, 1000, 3000)}  # mlp8: 937 an epoch
IMAGES = {"mlp8": 2000, "elu11": 2000}
PAIRS = (
    *((f"elu {norm}", f"{other} {norm}") for norm in NORMS for other in ACTIVATIONS[1:]),
    *((f"{activation} batch", f"{activation} none") for activation in ACTIVATIONS),
)

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Job:
    """One arm of a network, its seeds one after the other: on a GPU its step is compiled once for them."""

    network: str
    activation: str
    norm: str
    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    images: int
    device: str


def run(job: Job) -> list[dict[str, Any]]:
    """Train, and measure on the way."""
    torch.set_num_threads(1)
    if job.device != "cpu":
        torch.cuda.set_device(job.device)
    return [row for seed in job.seeds for row in (mlp8 if job.network == "mlp8" else elu11)(job, seed)]


@functools.cache
def digits(device: str) -> tuple[Recipe, Samples]:
    recipe = find("mnist-mlp8")
    assert isinstance(recipe, Recipe)
    return recipe, splits(recipe, data.load(recipe.data), tuning=False).train.to(torch.device(device))


@functools.cache
def pictures(device: str) -> tuple[ImageRecipe, Material]:
    recipe = find("cifar100-elu11")
    assert isinstance(recipe, ImageRecipe)
    images = material(recipe, data.load(recipe.data), torch.device(device))
    assert isinstance(images, Material)
    return recipe, images


def mlp8(job: Job, seed: int) -> Iterator[dict[str, Any]]:
    """A plain loop with the recipe's weights, rate and batches."""
    recipe, train = digits(job.device)
    probe = train.take(torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: job.images])
    network = with_norm(mlp((784, *recipe.hidden, 10), parse(job.activation), seed=seed), job.norm).to(job.device)
    layers = {name: one for name, one in list(network.named_children())[1:-1] if isinstance(one, nn.Linear)}
    optimizer = torch.optim.SGD(network.parameters(), recipe.learning_rates[0])
    generator, step = torch.Generator().manual_seed(seed), 0
    while True:
        for index in torch.randperm(len(train), generator=generator).split(recipe.batch_size):
            if step in job.steps:
                yield from rows(job, seed, step, network, layers, (probe.inputs, probe.targets))
            if step == job.steps[-1]:
                return
            batch = train.take(index.to(job.device))
            optimizer.zero_grad()
            F.cross_entropy(network(batch.inputs), batch.targets).backward()
            optimizer.step()
            step += 1


def with_norm(network: nn.Sequential, norm: str) -> nn.Sequential:
    """Batch normalization behind every Linear layer but the last, if asked for."""
    if norm == "none":
        return network
    *hidden, last = network.children()
    pairs = [[one, nn.BatchNorm1d(one.out_features)] if isinstance(one, nn.Linear) else [one] for one in hidden]
    return nn.Sequential(*itertools.chain(*pairs), last)


def elu11(job: Job, seed: int) -> Iterator[dict[str, Any]]:
    """The lab's training, dropout, weight decay and augmentation included."""
    (recipe, images), device = pictures(job.device), torch.device(job.device)
    training = Training(recipe, Run("final", job.activation, recipe.rate(0), seed, norm=job.norm), images, device)
    network = training.network
    convolutions = {name: one for name, one in network.named_modules() if isinstance(one, nn.Conv2d)}
    layers = {name: one for name, one in list(convolutions.items())[1:-1] if one.kernel_size == (1, 1)}
    chosen = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(0))[: job.images].to(device)
    batch = images.train[chosen].float(), images.train_labels[chosen]
    while True:
        training.begin_epoch()
        while training.steps_left:
            if training.steps_done in job.steps:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                yield from rows(job, seed, training.steps_done, network, layers, batch)
            if training.steps_done == job.steps[-1]:
                return
            training.advance()
        training.finish_epoch()


def rows(
    job: Job, seed: int, step: int, network: nn.Module, layers: Mapping[str, nn.Module], batch: Batch
) -> list[dict[str, Any]]:
    """What each layer is like now: a row each."""
    if job.norm == "batch" and step < FIRST_STEP:
        return []
    fisher = "exact" if job.network == "mlp8" else "sampled"
    found = measure(network, layers, batch[0], targets=batch[1], fisher=fisher, method="dense")  # type: ignore[arg-type]
    shares = update_shares(network, layers, batch)
    facts = {"network": job.network, "activation": job.activation, "norm": job.norm, "seed": seed, "step": step}
    return [
        facts | {"layer": name, "depth": depth} | of_layer(found[name]) | {"update_share": shares[name]}
        for depth, name in enumerate(layers, 1)
    ]


def of_layer(found: UnitQuantities) -> dict[str, Any]:
    assert found.bias_shift is not None
    assert found.natural_bias_shift is not None
    assert found.cosine is not None
    plain, natural = (one.abs().nanmedian() for one in (found.bias_shift, found.natural_bias_shift))
    numbers = {
        "k_minus_one": (found.k - 1).abs().nanmedian(),
        "bias_shift": plain,
        "natural_bias_shift": natural,
        "shift_ratio": plain / natural,
        "cosine": found.cosine.nanmedian(),
        "mean_activation": found.mean_input.abs().median(),
        "residual": found.residual.nan_to_num(0).amax(),
    }
    return {name: float(value) for name, value in numbers.items()} | {
        "rows": found.samples,
        "inputs": found.mean_input.shape[-1],
        "dead": float(found.k.isnan().double().mean()),
    }


def update_shares(network: nn.Module, layers: Mapping[str, nn.Module], batch: Batch) -> dict[str, float]:
    """Of each layer, the median over units of |mean| / root mean square of what the gradient adds to the net."""
    seen: dict[str, Batch] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: seen.__setitem__(name, (inputs[0].detach(), output))

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    loss = F.cross_entropy(network(batch[0]), batch[1])
    for handle in handles:
        handle.remove()
    for module, training in modes:
        module.training = training
    weights = [layer.get_parameter("weight") for layer in layers.values()]
    gradients = torch.autograd.grad(loss, [*weights, *(seen[name][1] for name in layers)])
    shares = {}
    for (name, layer), gradient, delta in zip(layers.items(), gradients, gradients[len(layers) :], strict=False):
        others = [place for place in range(delta.ndim) if place != 1]
        bias = delta.sum(others)
        given = seen[name][0]
        added = F.linear(given, gradient, bias) if isinstance(layer, nn.Linear) else F.conv2d(given, gradient, bias)
        shares[name] = float((added.mean(others).abs() / added.square().mean(others).sqrt()).nanmedian())
    return shares


def size(found: Sequence[Mapping[str, Any]], quantity: str) -> float | None:
    """The geometric mean of a run's rows; None where one is not a number above 0."""
    values = [row[quantity] for row in found if row["step"] >= FIRST_STEP]
    known = [value for value in values if value is not None and math.isfinite(value) and value > 0]
    return math.exp(statistics.fmean(map(math.log, known))) if len(known) == len(values) > 0 else None


def summary(found: Sequence[Mapping[str, Any]]) -> str:
    """Tables of sizes and of ratios between arms, and verdicts, as Markdown."""
    seeds = sorted({row["seed"] for row in found})
    arms = list(dict.fromkeys(f"{row['activation']} {row['norm']}" for row in found))
    lines: list[str] = []
    for quantity in QUANTITIES:
        values = {
            arm: [
                size([r for r in found if f"{r['activation']} {r['norm']}" == arm and r["seed"] == seed], quantity)
                for seed in seeds
            ]
            for arm in arms
        }
        lines += ["", f"**{quantity}**", "", "| arm | geometric mean | 95 % interval |", "|---|---:|---:|"]
        lines += [f"| {arm} | {interval([v for v in of if v is not None])} |" for arm, of in values.items()]
        lines += ["", "| ratio | geometric mean | 95 % interval |", "|---|---:|---:|"]
        pairs = [pair for pair in PAIRS if set(pair) <= set(arms)]
        for arm, other in pairs:
            both = [a / b for a, b in zip(values[arm], values[other], strict=True) if a is not None and b is not None]
            lines.append(f"| {arm} / {other} | {interval(both)} |")
        logs = {arm: [None if v is None else math.log(v) for v in of] for arm, of in values.items()}
        lines.append("")
        lines += [f"* {one.sentence}" for one in compare_pairs(logs, pairs, metric=f"ln {quantity}", unit="")]
    return "\n".join(lines) + "\n"


def interval(values: Sequence[float]) -> str:
    """A geometric mean and its interval, two cells of a table."""
    if not values:
        return "none | "
    logs = [math.log(value) for value in values]
    middle = math.exp(statistics.fmean(logs))
    if len(logs) < 2:
        return f"{middle:.3g} | "
    found = mean_interval(torch.tensor(logs).double().numpy())
    return f"{middle:.3g} | {math.exp(found.low):.3g} to {math.exp(found.high):.3g}"


def draw(folder: Path) -> None:
    """Each quantity over steps, median over layers, mean and range over seeds, as SVG."""
    import altair as alt
    import vl_convert

    found = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for quantity in (*QUANTITIES, "mean_activation"):
        of_run: dict[tuple[Any, ...], list[float]] = {}
        for row in found:
            if row[quantity] is not None and row[quantity] > 0:
                key = (row["activation"], row["norm"], row["seed"], row["step"])
                of_run.setdefault(key, []).append(row[quantity])
        points = [
            {
                "activation": a,
                "norm": f"normalization: {n}",
                "seed": s,
                "step": max(1, t),
                "value": statistics.median(v),
            }
            for (a, n, s, t), v in of_run.items()
        ]
        base = alt.Chart().encode(
            x=alt.X("step:Q", scale=alt.Scale(type="log"), title="step"),
            color=alt.Color("activation:N", title=None, scale=alt.Scale(domain=ACTIVATIONS, range=COLOURS)),
        )
        y = alt.Y("mean(value):Q", title=quantity.replace("_", " "), scale=alt.Scale(type="log"))
        line = base.mark_line(point=True).encode(y=y)
        band = base.mark_area(opacity=0.15).encode(y="min(value):Q", y2="max(value):Q")
        chart = alt.layer(line, band, data=alt.InlineData(values=points)).properties(width=300, height=200)
        picture = chart.facet(column=alt.Column("norm:N", title=None, sort="descending"))
        (folder / f"{quantity}.svg").write_text(vl_convert.vegalite_to_svg(picture.to_json()))


COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#0072b2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="?", choices=["mlp8", "elu11"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--activations", nargs="+", default=ACTIVATIONS)
    parser.add_argument("--norms", nargs="+", default=NORMS)
    parser.add_argument("--steps", type=int, nargs="+", help="at which to measure; the last one ends the training")
    parser.add_argument("--images", type=int, help="of the fixed batch")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draw", type=Path, help="draw the results in this folder, and do nothing else")
    options = parser.parse_args()
    if options.draw:
        draw(options.draw)
        return
    if options.network is None:
        parser.error("name a network, or --draw a folder")
    found: list[dict[str, Any]] = []
    for found in train_all(options):
        if options.out:
            write(options.out, found, options)
    print(summary(found))


def train_all(options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """A few seeds of an arm in a process, on CPUs one, on GPUs by turns; all rows so far, whenever one is done."""
    seeds = tuple(range(options.seeds or (10 if options.network == "mlp8" else 5)))
    steps = tuple(options.steps or STEPS[options.network])
    images = options.images or IMAGES[options.network]
    size = 1 if options.device == "cpu" else TOGETHER
    groups = [seeds[first : first + size] for first in range(0, len(seeds), size)]
    devices = ["cpu"] if options.device == "cpu" else [f"cuda:{gpu}" for gpu in range(torch.cuda.device_count())]
    arms = itertools.product(groups, options.activations, options.norms)
    jobs = [
        Job(options.network, activation, norm, group, steps, images, device)
        for (group, activation, norm), device in zip(arms, itertools.cycle(devices), strict=False)
    ]
    if options.network == "elu11":
        pictures(devices[0])  # which keeps the whitening, so that no process has to work it out
    place = {name: number for number, name in enumerate((*options.activations, *options.norms))}
    started, context = time.perf_counter(), multiprocessing.get_context("spawn")
    found: list[dict[str, Any]] = []
    with ProcessPoolExecutor(min(options.processes, len(jobs)), context) as pool:
        waiting = {pool.submit(run, job): job for job in jobs}
        for done, future in enumerate(as_completed(waiting), 1):
            found += future.result()
            print(f"{done} of {len(jobs)}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
            found.sort(key=lambda r: (place[r["activation"]], place[r["norm"]], r["seed"], r["step"], r["depth"]))
            yield found


def write(folder: Path, found: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(rounded(row)) + "\n" for row in found))
    (folder / "summary.md").write_text(summary(found))
    machine = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processes": options.processes,
        "device": device_facts(torch.device(options.device)),
        "versions": {"zeromean": zeromean.__version__, "torch": torch.__version__},
        "git": git_state(),
    }
    (folder / "machine.json").write_text(json.dumps(machine, indent=1) + "\n")


def rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Six digits; None for what is no number, which JSON cannot say."""
    known = {key: None if isinstance(one, float) and not math.isfinite(one) else one for key, one in row.items()}
    return {key: float(f"{one:.6g}") if isinstance(one, float) else one for key, one in known.items()}


if __name__ == "__main__":
    main()
