"""Several GPUs on one training: how much faster are they, and is it the same training?

    PYTHONPATH=src torchrun --nproc-per-node 2 -m benchmarks.scaling --device cuda --out DIR
    PYTHONPATH=src python -m benchmarks.scaling --draw DIR

**Throughput**: the 18-layer network with its published dropout on random images, 512 a process. Each process alone,
while the others wait, and all of them take turns: GPUs of one kind differ by some percent. The efficiency is

    images a second of all / sum of images a second of each alone

in the same round. **Loss curves**: the 11-layer network at its published rate and batch of 100, without dropout, whose
masks would differ, on images that can be learned. The same seed trains three times: in one process; in all; and in one
process that adds up the gradients of as many parts of each batch as there are processes (of two parts, in a process
alone). The third is the control: it has no exchange, so as far as it is from the first, rounding is why. At the
published rate rounding grows by about a factor of ten in ten steps, up to percents. A row holds the losses of a step
and how far they are apart, |a - b| / b:

    all_from_one    all processes against one       parts_from_one    the control against one
    all_from_parts  all processes against the control

A process alone, started by plain ``python``, compares with itself. ``--draw`` adds the picture, with altair.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from benchmarks.network_step import WARM_UP_STEPS, milliseconds
from benchmarks.norm_cost import CLASSES, IMAGES, Row, Steps, endless, random_images, save

from zeromean.lab.images import Material
from zeromean.lab.nets.convolutional import CHANNELS, PIXELS
from zeromean.lab.recipes.cifar import cifar100_elu11, cifar100_elu18
from zeromean.lab.recipes.images import ImageRecipe, Phase, Precision
from zeromean.lab.recording import arithmetic
from zeromean.lab.sharing import ALONE, Share, launched
from zeromean.lab.store import Run
from zeromean.lab.train import Training

MEASUREMENTS = ("throughput", "curves")
DISTANCES = {"all_from_one": ("all", "one"), "parts_from_one": ("parts", "one"), "all_from_parts": ("all", "parts")}
# Patterns, and the standard deviation of noise beside theirs: a loss that falls all the time and stays well above 0.
PATTERNS, NOISE = 30, 4.0
# Steps before rounding has grown into the losses.
EARLY = 10


def throughput(recipe: ImageRecipe, options: argparse.Namespace, share: Share, device: torch.device) -> list[Row]:
    """A row: images a second of one process and of all, round by round."""
    total, n = WARM_UP_STEPS + options.rounds * options.steps, share.processes
    images, run = random_images(options.images, device), _run(recipe)
    with arithmetic(recipe.precision, device):
        alone = Steps(endless(recipe, options.batch, total), run, images, device)
        together = Steps(endless(recipe, n * options.batch, total), run, images, device, share)
        alone.warm_up()
        _wait(share)
        together.warm_up()
        own, every = list[float](), list[float]()
        for _ in range(options.rounds):
            for turn in range(n):
                _wait(share)
                if share.rank == turn:
                    own.append(milliseconds(alone.take, options.steps, device))
            _wait(share)
            every.append(milliseconds(together.take, options.steps, device))
        alone.check()
        together.check()
    known = _gathered({str(share.rank): own}, share)
    rounds = list(zip(*(known[str(rank)] for rank in range(n)), every, strict=True))
    return [rates(recipe.network, options.batch, rounds) | {"steps": options.steps}] if share.writes else []


def rates(network: str, batch: int, rounds: Sequence[Sequence[float]]) -> Row:
    """The row of such rounds: ms a step of each process alone, and of all."""
    processes = len(rounds[0]) - 1
    efficiencies = [processes / every / sum(1 / one for one in ones) for *ones, every in rounds]
    *ones, every = (1000 * batch / statistics.median(times) for times in zip(*rounds, strict=True))
    return {
        "measurement": "throughput",
        "network": network,
        "processes": processes,
        "images_a_process": batch,
        "images_per_second_alone": [round(one) for one in ones],
        "images_per_second": round(processes * every),
        "efficiency": round(statistics.median(efficiencies), 4),
        "lowest_efficiency": round(min(efficiencies), 4),
        "highest_efficiency": round(max(efficiencies), 4),
        "rounds": [[round(time, 4) for time in one] for one in rounds],
    }


def curves(recipe: ImageRecipe, options: argparse.Namespace, share: Share, device: torch.device) -> list[Row]:
    """A row a step with the losses of the three trainings, in each precision that the device has."""
    none = Phase(options.curve_steps, (0.0,) * len(recipe.phases[0].dropout))
    images = learnable_images(options.curve_images, device)
    precisions: tuple[Precision, ...] = ("float32", "bfloat16") if device.type == "cuda" else ("float32",)
    found: list[Row] = []
    for precision in precisions:
        chosen = replace(recipe, precision=precision, phases=(none,))
        with arithmetic(precision, device):
            found += _three(chosen, images, share, device)
    return found


def _three(recipe: ImageRecipe, images: Material, share: Share, device: torch.device) -> list[Row]:
    """Train three times; the first process and the last one take a training alone at the same time."""
    in_parts = replace(recipe, accumulate=max(2, share.processes))
    own: dict[str, list[float]] = {}
    if share.rank == 0:
        own["one"] = losses(recipe, images, device)
    if share.rank == share.processes - 1:
        own["parts"] = losses(in_parts, images, device)
    known = _gathered(own, share)
    known["all"] = losses(recipe, images, device, share)
    if not share.writes:
        return []
    found: list[Row] = []
    for step in range(recipe.steps):
        here = {name: of[step] for name, of in known.items()}
        apart = {name: abs(here[a] - here[b]) / here[b] for name, (a, b) in DISTANCES.items()}
        told = {"measurement": "curves", "network": recipe.network, "precision": recipe.precision}
        batch = {"processes": share.processes, "batch": recipe.batch_size, "learning_rate": recipe.rate(step)}
        found.append({**told, **batch, "step": step + 1, **here, **apart})
    return found


def losses(recipe: ImageRecipe, images: Material, device: torch.device, share: Share = ALONE) -> list[float]:
    """The loss of every step of a training.

    Raises:
        ValueError: one was not finite.
    """
    training, found = Training(recipe, _run(recipe), images, device, share), []
    while not training.done:
        training.begin_epoch()
        before = 0.0
        while training.steps_left:
            training.advance()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            after = float(training.state()[0]["loss_sum"])
            found.append(after - before)
            before = after
        training.finish_epoch()
    if training.diverged is not None:
        raise ValueError(f"all losses must be finite, got {training.diverged}: lower the rate")
    return found


def learnable_images(count: int, device: torch.device) -> Material:
    """Some classes with a smooth pattern each, of which crops are alike, in noise; the same in every process."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(PATTERNS, CHANNELS, 4, 4, generator=generator)
    patterns = F.interpolate(coarse, size=(PIXELS, PIXELS), mode="bilinear")
    labels = torch.arange(count) % PATTERNS
    noise = torch.randn(count, CHANNELS, PIXELS, PIXELS, generator=generator)
    images = ((patterns[labels] + NOISE * noise) / math.hypot(1, NOISE)).to(device)
    labels = labels.to(device)
    return Material(images, labels, images[:1], labels[:1], images[:1], labels[:1], None, CLASSES)


def _run(recipe: ImageRecipe) -> Run:
    return Run("elu", "elu", recipe.rate(0), 0)


def _wait(share: Share) -> None:
    if share.processes > 1:
        dist.barrier()


def _gathered(own: dict[str, list[float]], share: Share) -> dict[str, list[float]]:
    """What the processes found, together."""
    if share.processes == 1:
        return own
    found: list[Any] = [None] * share.processes
    dist.all_gather_object(found, own)
    return {name: losses for one in found for name, losses in one.items()}


def report(found: Sequence[Row]) -> None:
    for row in found:
        if row["measurement"] == "throughput":
            alone = " and ".join(str(one) for one in row["images_per_second_alone"])
            print(f"{row['network']}, {row['images_a_process']} images a process: alone {alone} images/s, ", end="")
            print(f"{row['processes']} together {row['images_per_second']}, ", end="")
            print(f"efficiency {row['efficiency']:.3f}", end="")
            print(f" ({row['lowest_efficiency']:.3f} to {row['highest_efficiency']:.3f})", flush=True)
    for precision in dict.fromkeys(row["precision"] for row in found if row["measurement"] == "curves"):
        print(told([row for row in found if row.get("precision") == precision]), flush=True)


def told(found: Sequence[Row]) -> str:
    """The curves of one precision in words."""
    first, last = found[:EARLY], found[-max(1, len(found) // 4) :]
    lines = [f"{found[0]['network']}, {found[0]['precision']}, {len(found)} steps, {found[0]['processes']} processes:"]
    lines += [
        f"  loss of {name:<6} {found[0][name]:.6f} at first, {statistics.fmean(row[name] for row in last):.4f} "
        f"in the mean of the last {len(last)} steps"
        for name in ("one", "all", "parts")
    ]
    lines += [
        f"  {name:<15} at most {max(row[name] for row in first):.1e} in the first {len(first)} steps, "
        f"{max(row[name] for row in found):.1e} in all"
        for name in DISTANCES
    ]
    return "\n".join(lines)


def draw(folder: Path) -> None:
    """The losses, and below them how far they are apart, over steps, as SVG."""
    import altair as alt
    import vl_convert

    found = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    found = [row for row in found if row["measurement"] == "curves"]
    names = {"one": "one process", "all": f"{found[0]['processes']} processes", "parts": "one, batch in parts"}
    apart = {name: f"{names[a]} from {names[b]}" for name, (a, b) in DISTANCES.items()}

    def panel(precision: str, texts: dict[str, str], title: str, scale: Literal["linear", "log"]) -> Any:
        points = [
            {"step": row["step"], "value": row[name], "of": text}
            for row in found
            for name, text in texts.items()
            if row["precision"] == precision and (row[name] > 0 or scale == "linear")
        ]
        domain, legend = list(texts.values()), alt.Legend(labelLimit=0)
        colour = alt.Color("of:N", title=None, legend=legend, scale=alt.Scale(domain=domain, range=COLOURS))
        dash = alt.StrokeDash("of:N", title=None, legend=legend, scale=alt.Scale(domain=domain, range=DASHES))
        y = alt.Y("value:Q", title=title, scale=alt.Scale(type=scale))
        lines = alt.Chart(alt.InlineData(values=points)).mark_line(strokeWidth=1.5)
        lines = lines.encode(x=alt.X("step:Q", title="step"), y=y, color=colour, strokeDash=dash)
        return lines.properties(width=340, height=180, title=precision)

    columns = [
        alt.vconcat(panel(one, names, "loss", "linear"), panel(one, apart, "relative difference", "log"))
        .resolve_scale(color="independent", strokeDash="independent")
        for one in dict.fromkeys(row["precision"] for row in found)
    ]  # fmt: skip
    (folder / "losses.svg").write_text(vl_convert.vegalite_to_svg(alt.hconcat(*columns).to_json()))


COLOURS = ("#0072b2", "#d55e00", "#009e73")
DASHES = ([1, 0], [6, 3], [2, 2])


def run(wide: ImageRecipe, small: ImageRecipe, options: argparse.Namespace) -> None:
    """Measure the throughput of one recipe and the curves of the other, as one of the processes."""
    with launched(torch.device(options.device)) as (share, device):
        for measurement in options.measure:
            measured = throughput(wide, options, share, device) if measurement == "throughput" else None
            found = curves(small, options, share, device) if measured is None else measured
            if share.writes:
                report(found)
                save(found, options.out, device)
        if share.writes:
            print(f"written to {options.out} by: {' '.join(sys.argv)}")
        # NCCL does not let go of its group while a recorded step that exchanges by it is still there.
        gc.collect()


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--measure", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS)
    parser.add_argument("--batch", type=int, default=512, help="images a process, for the throughput")
    parser.add_argument("--steps", type=int, default=40, help="of one measurement of the throughput")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=IMAGES, help="of the data set, for the throughput")
    parser.add_argument("--curve-steps", type=int, default=200)
    parser.add_argument("--curve-images", type=int, default=10_000, help="that can be learned")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--out", type=Path)
    goal.add_argument("--draw", type=Path, help="draw the results in this folder, and do nothing else")
    return parser.parse_args(words)


def main() -> None:
    options = arguments()
    if options.draw:
        draw(options.draw)
        return
    run(cifar100_elu18(), cifar100_elu11(), options)


if __name__ == "__main__":
    main()
