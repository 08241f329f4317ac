"""What does an ELU network without normalization cost, next to ReLU with batch normalization?

    PYTHONPATH=src python -m benchmarks.norm_cost --device cuda [--networks elu11 elu18] [--rounds 5] --out DIR

The network, the published dropout and the engine are the same: `zeromean.lab.train.Training` on random images, with
augmentation, in the recipe's precision, on CUDA as one recorded graph. The contenders take turns within a round, all of
them warm; a time is the wall clock over many steps divided by their number, and a ratio is taken within its round.

    times_relu_batch    ms a step / ms a step of ReLU with batch normalization; below 1 is faster
    peak_mib            the most memory that a compiled step holds: weights, momenta, activations, gradients, its batch.
                        The data set does not count, nor does what recording a graph takes
    peak_ratio          peak_mib / that of ReLU with batch normalization
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.network_step import WARM_UP_STEPS, milliseconds

import zeromean
from zeromean.lab.data.augment import Source
from zeromean.lab.images import Material
from zeromean.lab.nets.convolutional import CHANNELS, PIXELS
from zeromean.lab.plan import device_facts
from zeromean.lab.recipes.cifar import cifar100_elu11, cifar100_elu18
from zeromean.lab.recipes.images import ImageRecipe
from zeromean.lab.recording import arithmetic, half_of, warm_up
from zeromean.lab.sharing import ALONE, Share
from zeromean.lab.store import Run
from zeromean.lab.train import Training, build
from zeromean.lab.update import Update

Row = dict[str, Any]
CLASSES = 100
IMAGES = 50_000
# So small that random labels do no harm.
RATE = 1e-5


@dataclass(frozen=True)
class Contender:
    """An activation and the normalization layers in front of it."""

    activation: str
    norm: str

    @property
    def run(self) -> Run:
        """What trains it."""
        return Run(f"{self.activation}-{self.norm}", self.activation, RATE, 0, norm=self.norm)


REFERENCE = Contender("relu", "batch")
CONTENDERS = (Contender("elu", "none"), REFERENCE, Contender("relu", "none"), Contender("elu", "batch"))


@dataclass(frozen=True)
class Setting:
    """A recipe's network at a batch size, and how many steps a measurement takes."""

    recipe: Callable[[], ImageRecipe]
    batch: int
    steps: int


SETTINGS = {
    "elu11": (Setting(cifar100_elu11, 100, 300), Setting(cifar100_elu11, 512, 80)),
    "elu18": (Setting(cifar100_elu18, 512, 30),),
}


class Steps:
    """A training without an end: where an epoch is over, the next step begins another."""

    def __init__(
        self, recipe: ImageRecipe, run: Run, images: Material, device: torch.device, share: Share = ALONE
    ) -> None:
        self.training = Training(recipe, run, images, device, share)

    def take(self) -> None:
        """Queue a step."""
        if self.training.steps_left == 0:
            if self.training.steps_done:
                self.training.finish_epoch()
            self.training.begin_epoch()
        self.training.advance()

    def warm_up(self) -> None:
        """Compile and record the step, and take it a few times."""
        for _ in range(WARM_UP_STEPS):
            self.take()

    def check(self) -> None:
        """Raise ValueError if a step was not finite."""
        self.training.finish_epoch()
        if self.training.diverged is not None:
            raise ValueError(
                f"all steps must be finite, got {self.training.diverged} of {self.training.run.arm}: their times would "
                "be those of NaN; lower the rate"
            )


def endless(recipe: ImageRecipe, batch: int, steps: int) -> ImageRecipe:
    """The recipe's first phase, in so many steps at that batch size, at a rate that does no harm."""
    first = replace(recipe.phases[0], steps=steps)
    return replace(recipe, batch_size=batch, phases=(first,), rates=((0, RATE),))


def random_images(count: int, device: torch.device) -> Material:
    """Noise with random labels, on the device; the same in every process."""
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(count, CHANNELS, PIXELS, PIXELS, device=device, generator=generator)
    labels = torch.randint(CLASSES, (count,), device=device, generator=generator)
    return Material(images, labels, images[:1], labels[:1], images[:1], labels[:1], None, CLASSES)


def peaks(recipe: ImageRecipe, images: Material, device: torch.device) -> dict[Contender, float | None]:
    """The peak memory of a step of each, in MiB, one after the other; None on a CPU."""
    if device.type != "cuda":
        return dict.fromkeys(CONTENDERS)
    dtype = half_of(recipe.precision) or torch.float32
    source = images.source(recipe, seed=0, dtype=dtype, share=ALONE)
    # Once more than it counts: the first one also pays for the workspaces of cuBLAS, which stay.
    _peak(recipe, CONTENDERS[0], source, dtype, device)
    return {contender: _peak(recipe, contender, source, dtype, device) for contender in CONTENDERS}


def _peak(recipe: ImageRecipe, contender: Contender, source: Source, dtype: torch.dtype, device: torch.device) -> float:
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated(device)
    network = build(recipe, contender.run, CLASSES)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    update = Update(recipe, network, source, seed=0, dtype=dtype)
    started = time.perf_counter()
    warm_up(update)
    torch.cuda.synchronize(device)
    print(f"{recipe.network}, {contender.run.arm}: compiled in {time.perf_counter() - started:.0f} s", flush=True)
    torch.cuda.reset_peak_memory_stats(device)
    update.take()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - held) / 2**20


def times(
    recipe: ImageRecipe, images: Material, steps: int, rounds: int, device: torch.device
) -> dict[Contender, list[float]]:
    """Milliseconds of a step of each, one number a round."""
    contenders = {contender: Steps(recipe, contender.run, images, device) for contender in CONTENDERS}
    for one in contenders.values():
        one.warm_up()
    taken: dict[Contender, list[float]] = {contender: [] for contender in CONTENDERS}
    for _ in range(rounds):
        for contender, one in contenders.items():
            taken[contender].append(milliseconds(one.take, steps, device))
    for one in contenders.values():
        one.check()
    return taken


def rows(recipe: ImageRecipe, taken: dict[Contender, list[float]], peak: dict[Contender, float | None]) -> list[Row]:
    """A row a contender."""
    found = []
    for contender, own in taken.items():
        ratios = [one / other for one, other in zip(own, taken[REFERENCE], strict=True)]
        memory, other_memory = peak[contender], peak[REFERENCE]
        found.append(
            {
                "network": recipe.network,
                "batch": recipe.batch_size,
                "activation": contender.activation,
                "norm": contender.norm,
                "milliseconds_per_step": round(statistics.median(own), 4),
                "lowest": round(min(own), 4),
                "highest": round(max(own), 4),
                "images_per_second": round(1000 * recipe.batch_size / statistics.median(own)),
                "times_relu_batch": round(statistics.median(ratios), 4),
                "lowest_ratio": round(min(ratios), 4),
                "highest_ratio": round(max(ratios), 4),
                "peak_mib": memory and round(memory, 1),
                "peak_ratio": memory and other_memory and round(memory / other_memory, 4),
                "rounds": [round(one, 4) for one in own],
                "padding": recipe.padding,
                "precision": recipe.precision,
            }
        )
    return found


def measure(setting: Setting, options: argparse.Namespace, device: torch.device) -> list[Row]:
    """The rows of a network at a batch size."""
    steps = options.steps or setting.steps
    recipe = endless(setting.recipe(), setting.batch, WARM_UP_STEPS + options.rounds * steps)
    images = random_images(options.images, device)
    with arithmetic(recipe.precision, device):
        peak = peaks(recipe, images, device)
        taken = times(recipe, images, steps, options.rounds, device)
    return [row | {"steps": steps} for row in rows(recipe, taken, peak)]


def report(found: Sequence[Row]) -> None:
    print(f"{'network':<8} {'batch':>5}  {'contender':<12} {'ms a step':>10} {'images/s':>9}", end="")
    print(f"   {'times ReLU with batch norm':<27} {'peak MiB':>9} {'ratio':>6}")
    for row in found:
        ratio = f"{row['times_relu_batch']:.3f} ({row['lowest_ratio']:.3f} to {row['highest_ratio']:.3f})"
        print(f"{row['network']:<8} {row['batch']:>5}  {row['activation'] + ', ' + row['norm']:<12}", end="")
        print(f" {row['milliseconds_per_step']:>10.3f} {row['images_per_second']:>9}   {ratio:<27}", end="")
        print(f" {row['peak_mib'] or '-':>9} {row['peak_ratio'] or '-':>6}", flush=True)


def save(found: Sequence[Row], out: Path, device: torch.device) -> None:
    """Append rows to ``results.jsonl``, with what they were measured on."""
    shared = {"device": device_facts(device), "torch": torch.__version__, "zeromean": zeromean.__version__}
    out.mkdir(parents=True, exist_ok=True)
    with (out / "results.jsonl").open("a") as file:
        file.writelines(json.dumps(row | shared, allow_nan=False) + "\n" for row in found)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--networks", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of one measurement; by default a number for each network and batch")
    parser.add_argument("--images", type=int, default=IMAGES, help="of the data set, by default CIFAR-100's number")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(words)
    device = torch.device(options.device)
    for network in options.networks:
        for setting in SETTINGS[network]:
            found = measure(setting, options, device)
            report(found)
            save(found, options.out, device)
    print(f"written to {options.out} by: {' '.join(sys.argv)}")


if __name__ == "__main__":
    main()
