"""Is a linear layer with its activation inside faster than cuBLAS and an activation of its own?

    python benchmarks/linear.py [--sizes 512 1024] [--rows 65536] [--check] [--out DIR]

Times Linear + ELU in bfloat16, K = N = each size: whole passes of the contenders, then the parts they are made of; as
called from Python, and as replays of a CUDA graph, which the host does not slow down. The contenders take turns,
several rounds in one process; a row holds the median. --check compares with float64 first, and repeats runs bit by bit.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import zeromean as zm
from zeromean.kernels import linear_launch as launch
from zeromean.nn.linear import linear_act

ELU = ("elu", (1.0, 1.0, 1.0))
CALLS, ROUNDS = 10, 7

Work = Callable[[], Any]
Contender = tuple[str, str, Callable[[], Work]]
"""Name, pass, and what prepares the work to be timed."""

Row = dict[str, Any]


class Problem:
    """The tensors of one layer."""

    def __init__(self, rows: int, inner: int, units: int, dtype: torch.dtype = torch.bfloat16) -> None:
        torch.manual_seed(rows + inner + units)
        self.shape = {"rows": rows, "inner": inner, "units": units}
        x, weight = torch.randn(rows, inner, device="cuda"), torch.randn(units, inner, device="cuda") / inner**0.5
        self.x, self.weight = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        self.bias = torch.randn(units, device="cuda", dtype=dtype, requires_grad=True)
        self.gradient = torch.randn(rows, units, device="cuda", dtype=dtype)
        self.inputs = (self.x, self.weight, self.bias)

    def twin(self) -> Problem:
        """The same numbers as other leaves: autograd ties a leaf to the stream that it first saw."""
        twin = copy.copy(self)
        twin.inputs = tuple(tensor.detach().requires_grad_() for tensor in self.inputs)  # type: ignore[assignment]
        return twin

    def both(self, layer: Callable[..., Tensor]) -> Work:
        """Forward and backward pass."""
        return lambda: torch.autograd.grad(layer(*self.inputs), self.inputs, self.gradient)

    def forward(self, layer: Callable[..., Tensor]) -> Work:
        """The forward pass, which keeps what the backward pass needs."""
        return lambda: layer(*self.inputs)

    def backward(self, layer: Callable[..., Tensor]) -> Work:
        """The backward pass alone, to be run again and again."""
        y = layer(*self.inputs)
        return lambda: torch.autograd.grad(y, self.inputs, self.gradient, retain_graph=True)


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.elu(F.linear(x, weight, bias))


compiled = torch.compile(eager)


def unfused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return zm.functional.elu(F.linear(x, weight, bias))


def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear_act(x, weight, bias, fused="always")


def fused_rounded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear_act(x, weight, bias, fused="always", round_preact=True)


def whole(problem: Problem) -> Iterator[Contender]:
    layers = {
        "eager": eager,
        "compile": compiled,
        "unfused": unfused,
        "zeromean": fused,
        "zeromean_rounded": fused_rounded,
    }
    for name, layer in layers.items():
        for which in ("forward", "backward", "both"):
            yield name, which, partial(getattr(problem, which), layer)


def parts(problem: Problem) -> Iterator[Contender]:
    x, weight, bias = (tensor.detach() for tensor in problem.inputs)
    gradient, (name, scalars) = problem.gradient, ELU
    y = launch.run_forward(x, weight, bias, name, scalars, False)
    dz = launch.run_slopes(gradient, y, True, name, scalars)[0]
    other = torch.empty_like(y)
    one_pass = torch.ops.zeromean.bias_elu_backward_parameters
    rest = (bias[None], None, None, None, scalars, True)
    works: dict[str, Work] = {
        "copy": lambda: other.copy_(y),
        "cublas x Wᵀ + b": lambda: F.linear(x, weight, bias),
        "cublas dz W": lambda: torch.mm(dz, weight),
        "cublas dzᵀ x": lambda: torch.mm(dz.t(), x),
        "eager elu": lambda: F.elu(y),
        "eager elu backward": lambda: torch.ops.aten.elu_backward(gradient, *scalars, True, y),
        "eager sum": lambda: dz.sum(0),
        "zeromean elu(x Wᵀ + b)": lambda: launch.run_forward(x, weight, bias, name, scalars, False),
        "zeromean dz and db": lambda: launch.run_slopes(gradient, y, True, name, scalars),
        "zeromean bias_elu backward": lambda: one_pass(gradient, y, None, *rest),
    }
    for part, work in works.items():
        yield part, "part", partial(_itself, work)


def _itself(work: Work) -> Work:
    return work


def called(work: Work) -> Work:
    def calls() -> None:
        for _ in range(CALLS):
            work()

    return calls


def replayed(problem: Problem, works: Callable[[Problem], Iterable[Contender]], index: int) -> Work:
    """A contender's calls as one CUDA graph; what they differentiate is made on the stream that is recorded.

    A graph knows addresses, not tensors: the work that owns them has to live as long.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        _, _, prepare = list(works(problem.twin()))[index]
        work = prepare()
        called(work)()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        called(work)()

    def replay(owner: Work = work) -> None:
        graph.replay()

    return replay


def milliseconds(contenders: dict[Any, Work]) -> dict[Any, float]:
    """Median time of a call of each contender, which take turns."""
    times: dict[Any, list[float]] = {name: [] for name in contenders}
    for _ in range(1 + ROUNDS):
        for name, work in contenders.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / CALLS)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def measure(problem: Problem, works: Callable[[Problem], Iterable[Contender]]) -> list[Row]:
    """A row for each contender, pass and way of calling."""
    contenders: dict[Any, Work] = {}
    for index, (name, which, prepare) in enumerate(works(problem)):
        contenders[name, which, "called"] = called(prepare())
        try:
            contenders[name, which, "graph"] = replayed(problem, works, index)
        except RuntimeError as error:
            torch.cuda.synchronize()
            print(f"no graph of {name} {which}: {str(error).splitlines()[0]}")
    shape = problem.shape
    common = {
        "activation": "linear_elu",
        "dtype": "bfloat16",
        "layout": "contiguous",
        "elements": shape["rows"] * shape["units"],
        **shape,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    times = milliseconds(contenders)
    return [
        {**common, "pass": which, "contender": name, "clock": clock, "milliseconds": time}
        for (name, which, clock), time in times.items()
    ]


def show(rows: list[Row]) -> None:
    times = {(row["contender"], row["pass"], row["clock"]): row["milliseconds"] for row in rows}
    first = rows[0]
    print(f"M={first['rows']} K={first['inner']} N={first['units']}: microseconds called / as a graph, times eager's")
    for name, which in dict.fromkeys(key[:2] for key in times):
        line = f"{name:>28} {which:>9}"
        for clock in ("called", "graph"):
            own, other = times.get((name, which, clock)), times.get(("eager", which, clock))
            line += f" {1000 * own:9.1f}" if own else f"{'':10}"
            line += f" {other / own:5.2f}x" if own and other else f"{'':7}"
        print(line)


@torch.no_grad()
def check(problem: Problem, repeats: int = 20) -> None:
    """Against float64, and again and again."""
    x, weight, bias = (tensor.detach() for tensor in problem.inputs)
    gradient = problem.gradient

    def run() -> dict[str, Tensor]:
        y = launch.run_forward(x, weight, bias, *ELU, False)
        dz, db = launch.run_slopes(gradient, y, True, *ELU)
        return {"y": y, "rounded": launch.run_forward(x, weight, bias, *ELU, True), "dz": dz, "db": db}

    results = run()
    z64 = x.double() @ weight.double().t() + bias.double()
    dz64 = gradient.double() * torch.where(results["y"] > 0, 1.0, results["y"].double() + 1)
    oracle = {"y": F.elu(z64), "rounded": F.elu(z64), "dz": dz64, "db": dz64.sum(0)}
    errors = {name: f"{((results[name].double() - o).norm() / o.norm()).item():.1e}" for name, o in oracle.items()}
    runs = [run() for _ in range(repeats)]
    same = sum(all(torch.equal(results[name], again[name]) for name in again) for again in runs)
    print(f"{problem.shape} {x.dtype} distance from float64: {errors}; {same} of {repeats} repeats are equal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 512])
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    # Otherwise a compiled backward pass cannot be timed alone, again and again.
    torch._functorch.config.donated_buffer = False
    if options.check:
        for dtype in (torch.bfloat16, torch.float16):
            for shape in ((4096, 512, 512), (20001, 1024, 1024), (9999, 264, 520), (30000, 2048, 256), (1, 64, 8)):
                check(Problem(*shape, dtype))
    for size in options.sizes:
        problem = Problem(options.rows, size, size)
        for works in (whole, parts):
            rows = measure(problem, works)
            show(rows)
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                with (options.out / "results.jsonl").open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
