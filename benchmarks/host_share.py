"""How small can a tensor be before the host decides: what an activation costs that only launches its programs?

    python benchmarks/host_share.py [--elements 4096 131072] [--out DIR]

Times forward and backward together, the host's share included, of three forms of each activation that torch lacks: the
textbook's plain operators; ours; and `launches`, an autograd function that makes the same launches on the same memory
and does nothing else, which is the least that any program launched from Python can cost. The forms take turns, call by
call; a row holds the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zeromean.kernels import launch
from zeromean.lab.bench.subjects import Subject, find

NAMES = ("swish", "pelu", "mpelu", "erelu", "eprelu", "eprelu:quiet", "eelu", "eelu:quiet")
TURNS, CALLS = 100, 10


def recorded(step: Callable[[], object]) -> list[Callable[[], object]]:
    """The launches that a step makes, each as a call of its own on the same memory."""
    launches: list[Callable[[], object]] = []
    original = launch._launch

    def record(plan: Any, tensors: Any, numbers: Any) -> None:
        original(plan, tensors, numbers)
        x = next(tensor for tensor in tensors if tensor is not None)
        run, *fixed = plan.kernels[x.dtype]
        stream = torch._C._cuda_getCurrentRawStream(x.get_device())
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        arguments = (*plan.grid, stream, *fixed, *addresses, *plan.shape, *numbers, *plan.rest)
        # With the tensors, so that their memory is not given away.
        launches.append(lambda: (run(*arguments), tensors))

    launch._launch = record
    try:
        step()
    finally:
        launch._launch = original
    return launches


def only_launches(subject: Subject, x: Tensor, parameters: list[Tensor]) -> Callable[[], object]:
    """Forward and backward of an autograd function that launches what ours does, into memory of its own."""
    ours = subject.on(x.device)
    inputs = [x, *parameters]
    outputs: list[Tensor] = []
    first = recorded(lambda: outputs.append(ours(x, *parameters)))
    gradient = torch.ones_like(outputs[0])
    second = recorded(lambda: torch.autograd.grad(outputs[0], inputs, gradient, allow_unused=True))

    class Launches(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> Tensor:
            y = torch.empty_like(tensors[0])
            for one in first:
                one()
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
            (y,) = ctx.saved_tensors
            results = tuple(torch.empty_like(tensor) for tensor in (y, *parameters))
            for one in second:
                one()
            return results

    def step() -> None:
        torch.autograd.grad(Launches.apply(*inputs), inputs, gradient)  # type: ignore[no-untyped-call]

    return step


def both(call: Callable[..., Tensor], x: Tensor, parameters: list[Tensor]) -> Callable[[], object]:
    gradient = torch.ones_like(x)
    inputs = [x, *parameters]
    return lambda: torch.autograd.grad(call(x, *parameters), inputs, gradient, allow_unused=True)


def microseconds(steps: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """A number for each turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(TURNS + 1):
        names = list(steps)[turn % len(steps) :] + list(steps)[: turn % len(steps)]
        for name in names:
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(CALLS):
                steps[name]()
            torch.cuda.synchronize()
            times[name].append(1e6 * (time.perf_counter() - started) / CALLS)
    return {name: taken[1:] for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, nargs="+", default=[4096, 131072])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for elements in options.elements:
        for name in NAMES:
            subject = find(name)
            x = torch.randn(elements // 256, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            parameters = [torch.full((256,), 0.9, device="cuda", requires_grad=True) for _ in subject.ranges]
            steps = {
                "textbook": both(subject.textbook, x, parameters),
                "zeromean": both(subject.on(x.device), x, parameters),
                "launches": only_launches(subject, x, parameters),
            }
            times = microseconds(steps)
            medians = {form: statistics.median(taken) for form, taken in times.items()}
            least = medians["launches"] / medians["textbook"]
            own = medians["zeromean"] / medians["textbook"]
            print(
                f"{name:14} {elements:7d} us {medians}: of textbook {own:.2f}, launches alone {least:.2f}", flush=True
            )
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                with (options.out / "results.jsonl").open("a") as file:
                    for form, taken in times.items():
                        p20, p80 = statistics.quantiles(taken, n=5)[0], statistics.quantiles(taken, n=5)[3]
                        row = {
                            "activation": name, "pass": "both", "dtype": "bfloat16", "layout": "contiguous",
                            "elements": elements, "contender": form, "milliseconds": medians[form] / 1000,
                            "p20": p20 / 1000, "p80": p80 / 1000, "n": len(taken),
                        }  # fmt: skip
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
