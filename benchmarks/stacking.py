"""How much faster do the runs of a study train together than one after another?

    python benchmarks/stacking.py [--device cuda] [--data mnist] [--out DIR]

Times training steps (the whole step: gathering the batch, forward, backward, update) of the 8 x 128 network: one run
alone in a plain PyTorch loop (``nn.Sequential``, ``torch.optim.SGD``), one run alone in our stack, and R runs stacked.
The contenders take turns, several rounds in one process; a row holds the median and the extremes over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import zeromean
from zeromean.lab import data
from zeromean.lab.activation import parse
from zeromean.lab.nets import mlp
from zeromean.lab.plan import device_facts, make, splits
from zeromean.lab.recipes import Recipe, find
from zeromean.lab.store import Run
from zeromean.lab.together import Samples, Steps, build


def plain_loop(parts: Samples, batch: int, steps: int) -> Callable[[], None]:
    """One run, as a tutorial would write it."""
    network = mlp((parts.inputs.shape[1], *(128,) * 8, 10), parse("elu"), seed=0).to(parts.inputs.device)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)

    def epoch() -> None:
        order = torch.randperm(len(parts), device=parts.inputs.device)
        for index in order[: steps * batch].split(batch):
            loss = F.cross_entropy(network(parts.inputs[index]), parts.targets[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def stacked(runs: list[Run], name: str, parts: Samples, steps: int) -> Callable[[], None]:
    recipe = find(name)
    assert isinstance(recipe, Recipe)
    sample = Samples(parts.inputs[: steps * 64], parts.targets[: steps * 64])
    trainer = Steps(recipe, runs, build(recipe, runs, parts).to(parts.inputs.device), sample)

    def epoch() -> None:
        trainer.epoch(0)

    return epoch


def seconds(work: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", default="digits", choices=["digits", "mnist"])
    parser.add_argument("--steps", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    recipe = find(f"{options.data}-mlp8")
    assert isinstance(recipe, Recipe)
    parts = splits(recipe, data.load(recipe.data), tuning=False).train.to(device)
    all_runs = make(recipe, (), seeds=10).runs({})
    contenders = {
        ("plain loop", 1): plain_loop(parts, recipe.batch_size, options.steps),
        ("stacked", 1): stacked(all_runs[:1], recipe.name, parts, options.steps),
        ("stacked", 10): stacked(all_runs[:10], recipe.name, parts, options.steps),
        ("stacked", 40): stacked(all_runs, recipe.name, parts, options.steps),
    }
    for work in contenders.values():
        seconds(work, device)
    times: dict[tuple[str, int], list[float]] = {key: [] for key in contenders}
    for _ in range(options.rounds):
        for key, work in contenders.items():
            times[key].append(seconds(work, device))
    alone = {kind: statistics.median(times[kind, 1]) for kind in ("plain loop", "stacked")}
    rows = []
    for (kind, runs), taken in times.items():
        median = statistics.median(taken)
        rows.append(
            {
                "contender": kind,
                "runs": runs,
                "activations": 1 if runs < 40 else 4,
                "milliseconds_per_step": round(1000 * median / options.steps, 4),
                "fastest": round(1000 * min(taken) / options.steps, 4),
                "slowest": round(1000 * max(taken) / options.steps, 4),
                "rounds": options.rounds,
                "times_one_plain_run": round(median / alone["plain loop"], 2),
                "speedup_over_plain_one_after_another": round(runs * alone["plain loop"] / median, 2),
                "speedup_over_stacked_one_after_another": round(runs * alone["stacked"] / median, 2),
                "data": options.data,
                "device": device_facts(device),
                "torch": torch.__version__,
                "zeromean": zeromean.__version__,
            }
        )
        row = rows[-1]
        print(f"{kind:>10} {runs:>3} runs: {row['milliseconds_per_step']:8.3f} ms a step", end="")
        print(f" = {row['times_one_plain_run']} plain runs, {row['speedup_over_plain_one_after_another']}x faster")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        with (options.out / "results.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"written to {options.out} by: {' '.join(sys.argv)}")


if __name__ == "__main__":
    main()
