"""How fast is the lab's training step, next to what `torch.compile` makes of the same network in a plain loop?

    PYTHONPATH=src python -m benchmarks.lab_step --device cuda [--network elu18] [--batch 512] [--muon] --out DIR

The lab's step is `zeromean.lab.train.Training`, crops and flips of new images included. The plain one has layers of
torch alone, convolution, ``torch.nn.ELU``, max-pooling and dropout one after the other, in autocast and channels_last,
with fused SGD, always on the same batch. Both have the recipe's dropout, padding and half precision.

The lab lets cuDNN search for the fastest program of each convolution, which torch does not by itself: every plain mode
is there without and with that search (``torch.backends.cudnn.benchmark``). What cuDNN chose stays in a process, so each
contender has one of its own; all wait on the same GPU and take turns, several rounds. Under each time lies that of its
convolutions and matrix products alone, by the profiler: the floor. Muon's own products are among them.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from benchmarks.network_step import COMPILE_MODES, WARM_UP_STEPS, Contender, milliseconds
from benchmarks.norm_cost import CLASSES, IMAGES, RATE, Steps, endless, random_images, save
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from zeromean.lab.nets import NETWORKS
from zeromean.lab.nets.convolutional import CHANNELS, PIXELS
from zeromean.lab.recipes.cifar import cifar100_elu11, cifar100_elu18
from zeromean.lab.recipes.images import ImageRecipe, override
from zeromean.lab.recording import arithmetic, half_of
from zeromean.lab.sharing import ALONE
from zeromean.lab.store import Run

PROFILED_STEPS = 3
EPOCHS_DRAWN = 20
PRODUCTS = ("xmma", "cutlass", "nvjet", "gemm", "fprop", "dgrad", "wgrad", "pooled_convolution")
RECIPES = {"elu11": cifar100_elu11, "elu18": cifar100_elu18}
CROPS = "crops"
LAB = "lab"
MUON = ("optimizer=muon", "decay_biases=false", "weight_decay=0.0005")

Step = Callable[[], Any]
Maker = Callable[[torch.device], Step]


def plain_step(recipe: ImageRecipe, mode: str, searched: bool, device: torch.device) -> Step:
    """The step as a loop without this library takes it; its network has modules of torch alone."""
    inputs = torch.randn(recipe.batch_size, CHANNELS, PIXELS, PIXELS, device=device)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    targets = torch.randint(CLASSES, (recipe.batch_size,), device=device)
    net = NETWORKS[recipe.network](CLASSES, Contender("torch:elu", "before"), seed=0, padding=recipe.padding)
    net.set_dropout(recipe.phases[0].dropout)
    if recipe.drop_before_pooling:
        net.drop_before_pooling()
    stacks = [nn.Sequential(OrderedDict(stack.named_children())) for stack in net.stacks]
    plain = nn.Sequential(*stacks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plain.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(plain.parameters(), RATE, momentum=0.9, weight_decay=5e-4, fused=True)

    half = half_of(recipe.precision)
    assert half is not None, "autocast asks for half precision"

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, half):
            logits = plain(inputs)
        return F.cross_entropy(logits.float(), targets)

    compiled = torch.compile(loss_of, mode=mode, fullgraph=True)

    def step() -> None:
        compiled(inputs, targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    cudnn = torch.backends.cudnn
    with cudnn.flags(cudnn.enabled, searched, deterministic=cudnn.deterministic, allow_tf32=cudnn.allow_tf32):
        for _ in range(WARM_UP_STEPS):
            step()
    return step


def lab_step(recipe: ImageRecipe, device: torch.device) -> Step:
    """The step as the lab takes it."""
    with arithmetic(recipe.precision, device):
        steps = Steps(recipe, Run("elu", "elu", RATE, 0), random_images(IMAGES, device), device)
        steps.warm_up()
    return steps.take


def draws(recipe: ImageRecipe, device: torch.device) -> float:
    """Milliseconds of drawing an epoch's order, crops and flips, spread over its steps."""
    images = random_images(IMAGES, device)
    source = images.source(recipe, seed=0, dtype=torch.float16, share=ALONE)
    epochs = itertools.count()
    return milliseconds(lambda: source.set_epoch(next(epochs)), EPOCHS_DRAWN, device) / source.steps


def makers(recipe: ImageRecipe, modes: Sequence[str], *, muon: bool = False) -> dict[str, Maker]:
    """The contenders by name, the lab's step last, before it the one by Muon if asked for."""
    found: dict[str, Maker] = {}
    for mode in modes:
        for searched in (False, True):
            name = f"plain {mode}{', searched' * searched}"
            found[name] = functools.partial(plain_step, recipe, mode, searched)
    if muon:
        found["lab by Muon"] = functools.partial(lab_step, override(recipe, MUON))
    return found | {LAB: functools.partial(lab_step, recipe)}


class Kernels(NamedTuple):
    """Time that a GPU spends in the kernels of one step, in milliseconds; None on a CPU.

    Attributes:
        all: of them.
        products: in convolutions and matrix products.
        augmentation: in crops and flips of the batch, without `draws`; 0 for a plain step, which has none.
        launches: how many there are.
    """

    all: float | None
    products: float | None
    augmentation: float | None
    launches: float | None


def kernels_of(step: Step, device: torch.device) -> Kernels:
    """Those of a step, by the profiler."""
    if device.type != "cuda":
        return Kernels(None, None, None, None)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(PROFILED_STEPS):
            step()
        torch.cuda.synchronize()
    events = profiled.key_averages()
    times = {event.key: event.device_time_total / PROFILED_STEPS / 1000 for event in events}
    own = [key for key in times if not key.startswith("triton_") and any(name in key for name in PRODUCTS)]
    templates = [key for key in times if key.startswith("triton_tem")]
    count = sum(event.count for event in events) / PROFILED_STEPS
    whole, products = sum(times.values()), sum(times[key] for key in own + templates)
    return Kernels(round(whole, 4), round(products, 4), round(times.get(CROPS, 0.0), 4), count)


def contend(connection: Connection, make: Maker, device: torch.device) -> None:
    """A contender's process: make the step, time as many as asked for until there are no more, then profile it."""
    started = time.perf_counter()
    step = make(device)
    connection.send(time.perf_counter() - started)
    while steps := connection.recv():
        connection.send(milliseconds(step, steps, device))
    connection.send(kernels_of(step, device))


class Found(NamedTuple):
    """What was found of a contender.

    Attributes:
        times: milliseconds a step, of each round.
        kernels: those of a step.
    """

    times: list[float]
    kernels: Kernels


def compare(makers: Mapping[str, Maker], device: torch.device, rounds: int, steps: int) -> dict[str, Found]:
    """Time the contenders in turns, each in a process of its own.

    Raises:
        RuntimeError: a process ended early; it has printed why.
    """
    context = multiprocessing.get_context("spawn")
    ends: dict[str, Connection] = {}
    for name, make in makers.items():
        ends[name], other = context.Pipe()
        context.Process(target=contend, args=(other, make, device), daemon=True).start()
        other.close()
    try:
        for name, end in ends.items():
            print(f"{name}: ready in {end.recv():.0f} s", flush=True)
        times: dict[str, list[float]] = {name: [] for name in ends}
        for _ in range(rounds):
            for name, end in ends.items():
                end.send(steps)
                times[name].append(end.recv())
        return {name: Found(times[name], _last(end)) for name, end in ends.items()}
    except EOFError as error:
        raise RuntimeError("a contender's process ended: see above") from error


def _last(end: Connection) -> Kernels:
    end.send(0)
    found: Kernels = end.recv()
    return found


def rows(found: Mapping[str, Found], batch: int) -> list[dict[str, Any]]:
    """A row a contender; ``times_`` a plain one is the images a second over those of it, round by round."""
    return [_row(name, found, batch) for name in found]


def _row(name: str, found: Mapping[str, Found], batch: int) -> dict[str, Any]:
    taken, kernels = found[name]
    row = {
        "contender": name,
        "milliseconds_per_step": round(statistics.median(taken), 4),
        "fastest": round(min(taken), 4),
        "slowest": round(max(taken), 4),
        "images_per_second": round(1000 * batch / statistics.median(taken)),
        "milliseconds_of_kernels": kernels.all,
        "milliseconds_of_products": kernels.products,
        "milliseconds_of_augmentation": kernels.augmentation,
        "kernels": kernels.launches,
        "rounds": [round(value, 4) for value in taken],
    }
    for plain in found:
        ratios = [other / own for other, own in zip(found[plain].times, taken, strict=True)]
        if plain != LAB:
            row[f"times_{plain}"] = [round(value, 4) for value in (statistics.median(ratios), min(ratios), max(ratios))]
    return row


def report(table: Sequence[Mapping[str, Any]]) -> None:
    plain = [key for key in table[0] if key.startswith("times_")]
    print(f"{'contender':<34} {'ms a step':>10} {'images/s':>9} {'kernels':>9} {'products':>9}", end="")
    print("".join(f"   {key.replace('_', ' ', 1):<26}" for key in plain))
    for row in table:
        print(f"{row['contender']:<34} {row['milliseconds_per_step']:>10.3f} {row['images_per_second']:>9}", end="")
        print(f" {row['milliseconds_of_kernels'] or '-':>9} {row['milliseconds_of_products'] or '-':>9}", end="")
        told = ("{:.3f} ({:.3f} to {:.3f})".format(*row[key]) for key in plain)
        print("".join(f"   {ratio:<26}" for ratio in told))


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--network", default="elu18", choices=list(RECIPES))
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--modes", nargs="*", default=["default"], choices=COMPILE_MODES, help="none: the lab's alone")
    parser.add_argument("--muon", action="store_true", help="the lab's step with that optimizer too")
    parser.add_argument("--steps", type=int, default=20, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(words)
    device = torch.device(options.device)
    recipe = endless(RECIPES[options.network](), options.batch, 100_000)
    contenders = makers(recipe, options.modes, muon=options.muon)
    table = rows(compare(contenders, device, options.rounds, options.steps), options.batch)
    table[-1]["milliseconds_of_draws"] = round(draws(recipe, device), 4)
    report(table)
    if options.out:
        settings = {
            **{name: getattr(options, name) for name in ("network", "batch", "steps")},
            "padding": recipe.padding,
        }
        save([settings | row for row in table], options.out, device)
        print(f"written to {options.out} by: {' '.join(sys.argv)}")


if __name__ == "__main__":
    main()
