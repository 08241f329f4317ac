"""What does an activation cost in a whole training step, next to the same network without one?

    python benchmarks/network_step.py --device cuda [--contenders identity relu torch:elu elu] [--orders before after]

The network is the 18-layer one that the ELU paper trained on CIFAR-100 (Clevert et al., ICLR 2016; 39.3 million
parameters), with 2x2 max-pooling after each stack, without dropout, on random 32x32 images. A step is the forward pass
under bfloat16 autocast, cross entropy, the backward pass and fused SGD; forward and backward are compiled. A plain name
is this library's activation, ``torch:elu`` is ``torch.nn.ELU``, ``identity`` is none at all.

The contenders take turns, several rounds in one process, each measurement between two CUDA events; a ratio is taken
within its round. ``--cuda-graph`` records the whole step as one graph, which leaves no launch for the host to be late
with. ``--orders after`` puts a stack's last activation behind its pooling: the same function for one that never falls,
on a quarter of the elements.

    python benchmarks/network_step.py --device cuda --plain [default reduce-overhead max-autotune-no-cudagraphs]

compares the lab's training, data augmentation and all, with what `torch.compile` makes of the same network in a plain
loop, in each of those modes, both with the published dropout: layers of torch alone, convolution, ``torch.nn.ELU``,
max-pooling and dropout one after the other, in bfloat16 autocast and channels_last, with fused SGD. Under each time
lies that of its convolutions and matrix products alone, by the profiler: the floor.

The paper does not say how its 2x2 kernels are padded; `zeromean.lab.nets.convolutional` says what the choices are.
``alternate``, the default here, takes the least arithmetic; ``one`` takes 1.6 times, ``one_ceil`` 1.9 times as much.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import zeromean
from zeromean.lab import train
from zeromean.lab.activation import parse
from zeromean.lab.images import Material
from zeromean.lab.nets import elu18
from zeromean.lab.nets.convolutional import CHANNELS, PIXELS, Padding
from zeromean.lab.plan import device_facts
from zeromean.lab.recipes.cifar import cifar100_elu18
from zeromean.lab.store import Run
from zeromean.nn import ACTIVATIONS, decay_groups, init_

CLASSES = 100
WARM_UP_STEPS = 3
# Batches of the lab's training set, which it goes through again and again.
BATCHES = 40
COMPILE_MODES = ["default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"]
PROFILED_STEPS = 3
PRODUCTS = ("xmma", "cutlass", "nvjet", "gemm", "fprop", "dgrad", "wgrad", "pooled_convolution")


@dataclass(frozen=True)
class Contender:
    """An activation by name, and whether a stack's last one comes before or after its pooling."""

    name: str
    order: str

    def check(self) -> None:
        """Raise ValueError for an activation that does not commute with max-pooling."""
        known = self.name.removeprefix("torch:")
        if self.order == "after" and known != "identity" and not parse(known).commutes_with_maximum:
            raise ValueError(f"{self.name} may fall somewhere or is noisy: behind the pooling it is another function")

    @property
    def commutes_with_maximum(self) -> bool:
        """Whether the network puts it behind the pooling."""
        return self.order == "after"

    def build(self, width: int = 1) -> nn.Module:
        """The module behind a convolution of this width; learnable ones have a value a channel."""
        name = self.name.removeprefix("torch:")
        if name == "identity":
            return nn.Identity()
        if name != self.name:
            return getattr(nn, ACTIVATIONS[name].__name__)()  # type: ignore[no-any-return]
        return parse(name).build(width)


def network(contender: Contender, padding: Padding) -> nn.Module:
    """Build the network; its weights are N(0, 1 / fan_in) for every activation, so that nothing grows."""
    built = elu18(CLASSES, contender, seed=0, padding=padding)
    built.set_dropout((0.0,) * len(built.stacks))
    return init_(built, "relu", gain=1.0)


class Training:
    """One contender's network, ready to take steps on the same batch again and again."""

    def __init__(self, contender: Contender, options: argparse.Namespace, inputs: Tensor, targets: Tensor) -> None:
        held = _memory(inputs.device)
        torch.manual_seed(0)
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        net = network(contender, options.padding).to(inputs.device, memory_format=layout)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(decay_groups(net, 5e-4), 1e-5, momentum=0.9, fused=True)

        def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
            with torch.autocast(inputs.device.type, torch.bfloat16):
                logits = net(inputs)
            return F.cross_entropy(logits.float(), targets)

        if options.compile_mode != "eager":
            loss_of = torch.compile(loss_of, mode=options.compile_mode, dynamic=False, fullgraph=True)

        def step() -> Tensor:
            loss = loss_of(inputs, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        self.step: Callable[[], Tensor] = step
        self.parameters = sum(parameter.numel() for parameter in net.parameters())
        self.loss = float(self._warm_up(step))
        self.peak_mib = self._peak_mib(inputs.device, held)
        if options.cuda_graph:
            self.step = Recording(step)
            self.loss = float(self.step())
        if not self.loss < float("inf"):
            raise ValueError(f"{contender} diverged to a loss of {self.loss}: its times would be those of NaN")

    @staticmethod
    def _warm_up(step: Callable[[], Tensor]) -> Tensor:
        for _ in range(WARM_UP_STEPS):
            loss = step()
        return loss

    def _peak_mib(self, device: torch.device, held: int) -> float | None:
        """Peak memory of one step, everything the contender holds included."""
        if device.type != "cuda":
            return None
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.step()
        torch.cuda.synchronize(device)
        return round((torch.cuda.max_memory_allocated(device) - held) / 2**20, 1)


def _memory(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


class Recording:
    """A step as a CUDA graph.

    A graph knows the network, the momenta and the batch by their addresses alone, so it keeps the step that owns them:
    without, the next recording would give their memory back to the driver, and a replay would be an illegal access.
    """

    def __init__(self, step: Callable[[], Tensor]) -> None:
        self.owner = step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = step()

    def __call__(self) -> Tensor:
        """Take the step; its loss is there once the GPU has come so far."""
        self.graph.replay()
        return self.loss


def milliseconds(step: Callable[[], Any], steps: int, device: torch.device) -> float:
    """Time of one step, the mean of several, on whichever stream they run."""
    _wait(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    _wait(device)
    return 1000 * (time.perf_counter() - started) / steps


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def plain_step(mode: str, options: argparse.Namespace, inputs: Tensor, targets: Tensor) -> Callable[[], Any]:
    """The step as a loop without this library takes it; its network has modules of torch alone."""
    net = elu18(CLASSES, Contender("torch:elu", "before"), seed=0, padding=options.padding)
    stacks = [nn.Sequential(OrderedDict(stack.named_children())) for stack in net.stacks]
    net = nn.Sequential(*stacks, nn.AdaptiveAvgPool2d(1), nn.Flatten())  # type: ignore[assignment]
    net.to(inputs.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(net.parameters(), 1e-5, momentum=0.9, weight_decay=5e-4, fused=True)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16):
            logits = net(inputs)
        return F.cross_entropy(logits.float(), targets)

    compiled = torch.compile(loss_of, mode=mode, fullgraph=True)

    def step() -> None:
        compiled(inputs, targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(WARM_UP_STEPS):
        step()
    return step


def lab_step(options: argparse.Namespace, device: torch.device) -> Callable[[], Any]:
    """The step as the lab takes it, crops and flips of new images included; each pass over them is begun anew."""
    recipe = cifar100_elu18()
    endless = replace(recipe.phases[0], steps=100_000)
    recipe = replace(recipe, batch_size=options.batch, padding=options.padding, phases=(endless,), rates=((0, 1e-5),))
    images = torch.randn(BATCHES * options.batch, CHANNELS, PIXELS, PIXELS, device=device)
    labels = torch.randint(CLASSES, (len(images),), device=device)
    material = Material(images, labels, images[:1], labels[:1], images[:1], labels[:1], None, CLASSES)
    training = train.Training(recipe, Run("elu", "elu", 1e-5, 0), material, device)

    def step() -> None:
        if training.steps_left == 0:
            training.begin_epoch()
        training.advance()

    training.steps_left = 0
    for _ in range(WARM_UP_STEPS):
        step()
    return step


class Kernels(NamedTuple):
    """Time that a GPU spends in the kernels of one step, in milliseconds.

    Attributes:
        all: of them.
        products: in convolutions and matrix products.
    """

    all: float | None
    products: float | None


def kernels_of(step: Callable[[], Any], device: torch.device) -> Kernels:
    """Those of a step, by the profiler; none on a CPU."""
    if device.type != "cuda":
        return Kernels(None, None)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(PROFILED_STEPS):
            step()
        torch.cuda.synchronize()
    events = profiled.key_averages()
    times = {event.key: event.device_time_total / PROFILED_STEPS / 1000 for event in events}
    own = [key for key in times if not key.startswith("triton_") and any(name in key for name in PRODUCTS)]
    templates = [key for key in times if key.startswith("triton_tem")]
    return Kernels(round(sum(times.values()), 4), round(sum(times[key] for key in own + templates), 4))


def against_plain(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row for the lab's training and one for each mode of the plain loop, measured in turns."""
    inputs = torch.randn(options.batch, CHANNELS, PIXELS, PIXELS, device=device)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    targets = torch.randint(CLASSES, (options.batch,), device=device)
    steps: dict[str, Callable[[], Any]] = {}
    for mode in options.plain:
        started = time.perf_counter()
        steps[f"plain {mode}"] = plain_step(mode, options, inputs, targets)
        print(f"plain {mode}: ready in {time.perf_counter() - started:.0f} s", flush=True)
    steps["lab"] = lab_step(options, device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name].append(milliseconds(step, options.steps, device))
    kernels = {name: kernels_of(step, device) for name, step in steps.items()}
    return [plain_row(name, times, kernels[name], options) for name in steps]


def plain_row(
    name: str, times: dict[str, list[float]], kernels: Kernels, options: argparse.Namespace
) -> dict[str, Any]:
    """One contender; ``times_plain`` is its images a second over those of the first plain mode, round by round."""
    first, taken = times[f"plain {options.plain[0]}"], times[name]
    ratios = [plain / own for plain, own in zip(first, taken, strict=True)]
    return {
        "contender": name,
        "milliseconds_per_step": round(statistics.median(taken), 4),
        "fastest": round(min(taken), 4),
        "slowest": round(max(taken), 4),
        "images_per_second": round(1000 * options.batch / statistics.median(taken)),
        "times_plain": round(statistics.median(ratios), 4),
        "lowest_ratio": round(min(ratios), 4),
        "highest_ratio": round(max(ratios), 4),
        "milliseconds_of_kernels": kernels.all,
        "milliseconds_of_products": kernels.products,
        "rounds": [round(value, 4) for value in taken],
    }


def report_plain(table: list[dict[str, Any]]) -> None:
    print(f"{'contender':<34} {'ms a step':>10} {'images/s':>9}   times plain (lowest to highest)   kernels  products")
    for row in table:
        ratio = f"{row['times_plain']:.3f} ({row['lowest_ratio']:.3f} to {row['highest_ratio']:.3f})"
        print(f"{row['contender']:<34} {row['milliseconds_per_step']:>10.3f} {row['images_per_second']:>9}", end="")
        print(
            f"   {ratio:<31}  {row['milliseconds_of_kernels'] or '-':>8}  {row['milliseconds_of_products'] or '-':>8}"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--contenders", nargs="+", default=["identity", "relu", "torch:elu", "elu"], metavar="NAME")
    parser.add_argument("--orders", nargs="+", default=["before", "after"], choices=["before", "after"])
    parser.add_argument("--padding", default="alternate", choices=["alternate", "one", "one_ceil"])
    parser.add_argument(
        "--compile-mode",
        default="default",
        choices=["eager", *COMPILE_MODES],
    )
    parser.add_argument("--plain", nargs="*", choices=COMPILE_MODES, help="modes of the plain loop, for the lab's")
    parser.add_argument("--cuda-graph", action="store_true")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20, help="steps of one measurement")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.plain == []:
        options.plain = ["default"]
    if "identity" not in options.contenders:
        raise ValueError(f"contenders must name identity, which all are compared with, got {options.contenders}")
    return options


def build(options: argparse.Namespace, device: torch.device) -> dict[Contender, Training]:
    """Every contender, compiled and warm; they share one batch."""
    contenders = [Contender(name, order) for order in options.orders for name in options.contenders]
    for contender in contenders:
        contender.check()
    torch._dynamo.config.recompile_limit = 8 * len(contenders)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    inputs = torch.randn(options.batch, CHANNELS, PIXELS, PIXELS, device=device).contiguous(memory_format=layout)
    targets = torch.randint(CLASSES, (options.batch,), device=device)
    trainings = {}
    for contender in contenders:
        started = time.perf_counter()
        trainings[contender] = Training(contender, options, inputs, targets)
        print(f"{contender.name} {contender.order} pooling: ready in {time.perf_counter() - started:.0f} s", flush=True)
    return trainings


def rows(times: dict[Contender, list[float]], trainings: dict[Contender, Training]) -> list[dict[str, Any]]:
    """A row a contender, its ratios to the identity network of the same order, round by round."""
    table = []
    for contender, taken in times.items():
        identity = times[Contender("identity", contender.order)]
        ratios = [own / other for own, other in zip(taken, identity, strict=True)]
        table.append(
            {
                "contender": contender.name,
                "activation_and_pooling": contender.order,
                "milliseconds_per_step": round(statistics.median(taken), 4),
                "fastest": round(min(taken), 4),
                "slowest": round(max(taken), 4),
                "times_identity": round(statistics.median(ratios), 4),
                "lowest_ratio": round(min(ratios), 4),
                "highest_ratio": round(max(ratios), 4),
                "peak_mib": trainings[contender].peak_mib,
                "parameters": trainings[contender].parameters,
                "loss": round(trainings[contender].loss, 4),
                "rounds": [round(value, 4) for value in taken],
            }
        )
    return table


def report(table: list[dict[str, Any]]) -> None:
    print(
        f"{'activation':<14} {'pooling':<7} {'ms a step':>10}   times identity (lowest to highest)   peak MiB    loss"
    )
    for row in table:
        ratio = f"{row['times_identity']:.3f} ({row['lowest_ratio']:.3f} to {row['highest_ratio']:.3f})"
        print(
            f"{row['contender']:<14} {row['activation_and_pooling']:<7} {row['milliseconds_per_step']:>10.3f}", end=""
        )
        print(f"   {ratio:<35}  {row['peak_mib'] or '-':>8}  {row['loss']:.4f}")


def activations(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row for each activation and order, measured in turns."""
    trainings = build(options, device)
    times: dict[Contender, list[float]] = {contender: [] for contender in trainings}
    for _ in range(options.rounds):
        for contender, training in trainings.items():
            times[contender].append(milliseconds(training.step, options.steps, device))
    return rows(times, trainings)


def save(table: Sequence[dict[str, Any]], options: argparse.Namespace, device: torch.device) -> None:
    """Append the rows to ``results.jsonl``."""
    settings = ["padding", "batch", "steps"]
    settings += [] if options.plain else ["compile_mode", "cuda_graph", "channels_last"]
    shared = {name: getattr(options, name) for name in settings} | {
        "device": device_facts(device),
        "torch": torch.__version__,
        "zeromean": zeromean.__version__,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "results.jsonl").open("a") as file:
        file.writelines(json.dumps(row | shared) + "\n" for row in table)
    print(f"written to {options.out} by: {' '.join(sys.argv)}")


def main() -> None:
    options = arguments()
    device = torch.device(options.device)
    if options.plain:
        table = against_plain(options, device)
        report_plain(table)
    else:
        table = activations(options, device)
        report(table)
    if options.out:
        save(table, options, device)


if __name__ == "__main__":
    main()
