"""What does looking cost: the probe's two presets on three networks?

    python benchmarks/probe_cost.py [--device cuda] [--networks mlp8 elu11 transformer] [--rounds 20] [--out DIR]

``light`` watches a training: ten steps without a probe and ten with one that measures a step in their middle take
turns, now the ones first and now the others. Each ten are timed as a training runs them: the device is idle before and
after them, and waited for at no step between, or with --wait at each, as by a training that reads every loss. What the
probe costs is the median over the rounds of the difference between the two, plus a pass's part of what happens once in
many measured passes and is timed apart: the summing up, and the measuring of passes that wait as copies. The writing of
a report is left out. A measured step takes what a step takes and the difference. Small networks, whose differences are
small beside what a machine does besides, take as many rounds as fit into `SECONDS`. A probe's operators are those that
torch dispatches in a measured step and not in another, its launches those of CUDA kernels. Where the host spends what
a measured step takes more is told by parts: in the forward pass, in the backward pass, in the optimizer's step and in
the whole step behind it, whose beginning takes the numbers in.

``full`` measures one batch besides: its price is stated in gradients, the time of one forward and backward pass of that
batch, taken in turns with it.

Medians and quartiles over the rounds; the first rounds of each are thrown away.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import zeromean as zm
from zeromean.diagnostics.history import WAITING
from zeromean.diagnostics.slots import Slots
from zeromean.lab.activation import parse
from zeromean.lab.nets import NETWORKS, mlp
from zeromean.lab.plan import device_facts, git_state

EVERY, MEASURED = 10, 5
SECONDS = 12.0
WARM = 3
SUMMED_UP = 3
MEASURED_STEPS = 40


@dataclass(frozen=True)
class Subject:
    """A network with a batch to train it on."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor


class Block(nn.Module):
    """A transformer's block, normalization first, every product a Linear layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.in_projection, self.out_projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.activation, self.narrow = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, then widen and narrow."""
        parts = self.in_projection(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.movedim(-3, 0).transpose(-2, -3)
        seen = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out_projection(seen.transpose(-2, -3).flatten(-2))
        y: Tensor = x + self.narrow(self.activation(self.widen(self.norm(x))))
        return y


class Transformer(nn.Module):
    """Predicts a token at every place."""

    def __init__(self, blocks: int, width: int, heads: int, tokens: int, places: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, width), nn.Embedding(places, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of every token at every place."""
        places = torch.arange(x.shape[1], device=x.device)
        scores: Tensor = self.head(self.norm(self.blocks(self.tokens(x) + self.places(places))))
        return scores


def mlp8(small: bool) -> Subject:
    """The 8 x 128 network on a batch of 64, as mnist-mlp8 trains it."""
    network = mlp((784, *(128,) * 8, 10), parse("elu"), seed=0)
    return Subject(network, torch.rand(64, 784), torch.randint(10, (64,)))


def elu11(small: bool) -> Subject:
    """The 11-layer network on a batch of 100, as cifar100-elu11 trains it."""
    count = 10 if small else 100
    network = NETWORKS["elu11"](100, parse("elu"), "none", seed=0)
    return Subject(network, torch.randn(count, 3, 32, 32), torch.randint(100, (count,)))


def transformer(small: bool) -> Subject:
    """Twelve blocks of 768 (85 M numbers in them) on 16 x 256 tokens."""
    blocks, width, heads, count, places = (2, 96, 4, 4, 32) if small else (12, 768, 12, 16, 256)
    network = Transformer(blocks, width, heads, tokens=1000, places=places)
    tokens = torch.randint(1000, (count, places + 1))
    return Subject(network, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


SUBJECTS: dict[str, Callable[[bool], Subject]] = {"mlp8": mlp8, "elu11": elu11, "transformer": transformer}


def clock(device: torch.device) -> float:
    """Milliseconds, when everything that was asked for is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * time.perf_counter()


def timed(work: Callable[[], object], device: torch.device) -> float:
    started = clock(device)
    work()
    return clock(device) - started


def loss_of(subject: Subject) -> Tensor:
    """The forward pass of the batch."""
    scores = subject.model(subject.inputs)
    return F.cross_entropy(scores.flatten(0, -2), subject.targets.flatten())


def gradient(subject: Subject) -> None:
    """One forward and backward pass of the batch."""
    loss_of(subject).backward()


class Counting(TorchDispatchMode):
    """Counts the operators that are dispatched."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operators(work: Callable[[], object]) -> int:
    mode = Counting()
    with mode:
        work()
    return mode.count


def launches(work: Callable[[], object]) -> int:
    """How many kernels a CUDA device is asked to run."""
    kinds = (torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as found:
        work()
        torch.cuda.synchronize()
    names = ("cudaLaunchKernel", "cuLaunchKernel")
    return sum(one.name.startswith(names) for one in found.events() or [])


def light(subject: Subject, device: torch.device, rounds: int, wait: bool) -> dict[str, Any]:
    """What ten steps take, without and with a probe on one of them."""
    optimizer = torch.optim.SGD(subject.model.parameters(), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        gradient(subject)
        optimizer.step()
        if wait:
            clock(device)

    def steps() -> None:
        for _ in range(EVERY):
            step()

    def ten() -> float:
        return timed(steps, device)

    probe = zm.probe(subject.model, every=lambda step: step % EVERY == MEASURED)

    def ten_watched() -> float:
        with probe:
            return ten()

    for _ in range(WARM):
        took = ten() + ten_watched()
    turns = max(rounds, int(1000 * SECONDS / took))
    pairs = [(ten(), ten_watched()) if turn % 2 else (ten_watched(), ten())[::-1] for turn in range(turns)]
    plain = statistics.median(a for a, _ in pairs)
    difference = statistics.median(b - a for a, b in pairs)
    probe.report()
    summary = summing_up(subject, step, device)
    return (
        {
            "milliseconds_step": plain / EVERY,
            "milliseconds_measured": plain / EVERY + difference,
            "milliseconds_summing_up": summary,
            "share_at_every_10th_step": (difference + summary) / plain,
            "spread": [(one + summary) / plain for one in statistics.quantiles((b - a for a, b in pairs), n=4)[::2]],
            "n": len(pairs),
            "waits": wait,
        }
        | parts(subject, optimizer, device)
        | effort(subject, step, device)
    )


def summing_up(subject: Subject, step: Callable[[], None], device: torch.device) -> float:
    """A pass's part of it, when as many wait as in a long training, and of measuring passes that wait as copies."""
    measure, spent = Slots.measure, []

    def measured(slots: Slots) -> None:
        spent.append(timed(lambda: measure(slots), device))

    found = []
    with zm.probe(subject.model) as probe, patch.object(Slots, "measure", measured):
        for _ in range(SUMMED_UP):
            spent.clear()
            for _ in range(WAITING):
                step()
            measuring = sum(spent)
            first, second = timed(probe.report, device), timed(probe.report, device)  # the second has nothing to sum up
            found.append(max(0.0, measuring + first - second) / WAITING)
    return statistics.median(found)


def parts(subject: Subject, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, float]:
    """Milliseconds of the host that a measured step takes more than others, medians, and the step behind it."""
    of_step: dict[int, list[list[float]]] = {place: [] for place in range(EVERY)}
    with zm.probe(subject.model, every=lambda step: step % EVERY == MEASURED):
        for step in range(EVERY * (WARM + MEASURED_STEPS)):
            optimizer.zero_grad()
            clock(device)  # so that no launch waits for those before it
            stamps = [time.perf_counter()]
            loss = loss_of(subject)
            stamps.append(time.perf_counter())
            loss.backward()
            stamps.append(time.perf_counter())
            optimizer.step()
            stamps.append(time.perf_counter())
            if step >= EVERY * WARM:
                of_step[step % EVERY].append([1000 * (b - a) for a, b in pairwise(stamps)])

    def middle(places: Iterable[int]) -> list[float]:
        found = [of_part for place in places for of_part in of_step[place]]
        return [statistics.median(part) for part in zip(*found, strict=True)]

    usual = middle(set(range(EVERY)) - {MEASURED, MEASURED + 1})
    measured, behind = middle([MEASURED]), middle([MEASURED + 1])
    names = (f"milliseconds_more_in_{name}" for name in ("forward", "backward", "optimizer"))
    more = dict(zip(names, (a - b for a, b in zip(measured, usual, strict=True)), strict=True))
    return more | {"milliseconds_more_behind": sum(behind) - sum(usual)}


def effort(subject: Subject, step: Callable[[], None], device: torch.device) -> dict[str, int]:
    """Operators, and on CUDA launches, that a measured step takes more; the first pass of a probe is not typical."""
    found = {}
    for name, count in (("operators", operators), *([("launches", launches)] if device.type == "cuda" else [])):
        usual = count(step)
        with zm.probe(subject.model):
            for _ in range(WARM):
                step()
            found[f"{name}_a_measurement"] = count(step) - usual
    return found


def full(subject: Subject, device: torch.device, rounds: int) -> dict[str, Any]:
    """What one full measurement of a batch takes, in gradients of it."""
    plain, measured = [], []
    for _ in range(rounds + 1):
        plain.append(statistics.median(timed(lambda: gradient(subject), device) for _ in range(5)))
        measured.append(timed(lambda: zm.probe.measure(subject.model, subject.inputs, subject.targets), device))
    prices = [b / a for a, b in zip(plain[1:], measured[1:], strict=True)]
    return {
        "milliseconds_gradient": statistics.median(plain[1:]),
        "milliseconds_measured": statistics.median(measured[1:]),
        "gradient_equivalents": statistics.median(prices),
        "spread": [min(prices), max(prices)],
        "n": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--networks", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--presets", nargs="+", default=["light", "full"], choices=["light", "full"])
    parser.add_argument("--rounds", type=int, default=20, help="of light, at least; full takes a tenth")
    parser.add_argument("--wait", action="store_true", help="light waits for the device after each step")
    parser.add_argument("--small", action="store_true", help="a trial: small batches, a small transformer")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = []
    for name in options.networks:
        torch.manual_seed(0)
        made = SUBJECTS[name](options.small)
        subject = Subject(made.model.to(device), made.inputs.to(device), made.targets.to(device))
        for preset in options.presets:
            started = time.perf_counter()
            if preset == "light":
                found = light(subject, device, options.rounds, options.wait)
            else:
                found = full(subject, device, max(2, options.rounds // 10))
            parameters = sum(one.numel() for one in subject.model.parameters())
            facts = {"network": name, "preset": preset, "device": device.type, "parameters": parameters}
            shape = {"inputs": list(subject.inputs.shape), "small": options.small}
            rows.append({key: rounded(value) for key, value in (facts | shape | found).items()})
            print(json.dumps(rows[-1]), f"({time.perf_counter() - started:.0f} s)", flush=True)
    if options.out:
        write(options.out, rows, device)


def rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def write(folder: Path, rows: list[dict[str, Any]], device: torch.device) -> None:
    """Add the rows, and say where they come from."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "results.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    versions = {"zeromean": zm.__version__, "python": sys.version.split()[0], "torch": torch.__version__}
    machine = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_facts(device),
        "versions": versions,
        "git": git_state(),
    }
    (folder / "machine.json").write_text(json.dumps(machine, indent=1) + "\n")


if __name__ == "__main__":
    main()
