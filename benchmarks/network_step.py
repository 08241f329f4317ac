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

The paper does not say how its 2x2 kernels are padded; `zeromean.lab.nets.convolutional` says what the choices are.
``alternate``, the default here, takes the least arithmetic; ``one`` takes 1.6 times, ``one_ceil`` 1.9 times as much.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zeromean
from zeromean.lab.activation import parse
from zeromean.lab.nets import elu18
from zeromean.lab.nets.convolutional import CHANNELS, PIXELS, Padding
from zeromean.lab.plan import device_facts
from zeromean.nn import ACTIVATIONS, decay_groups, init_

CLASSES = 100
WARM_UP_STEPS = 3
COMPILE_MODES = ["default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"]


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
    parser.add_argument("--cuda-graph", action="store_true")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20, help="steps of one measurement")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
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
    settings = ["padding", "batch", "steps", "compile_mode", "cuda_graph", "channels_last"]
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
    table = activations(options, device)
    report(table)
    if options.out:
        save(table, options, device)


if __name__ == "__main__":
    main()
