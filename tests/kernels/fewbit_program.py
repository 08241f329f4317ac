"""Run in a process of its own with TRITON_INTERPRET=1: saves what the programs of `fewbit_programs` make."""

import sys

import torch

from tests.kernels.test_fewbit import CASES, Case, Result
from zeromean.kernels import fewbit_programs
from zeromean.kernels.fewbit_tables import table


def run(case: Case) -> Result:
    torch.manual_seed(0)
    x, gradient = (2 * torch.randn(2, case.size)).to(case.dtype)
    if case.size > 3:
        edges = torch.tensor([torch.nan, 100.0, -100.0, 0.0, *table(case.name, case.bits).thresholds])
        x[: len(edges)] = edges[: case.size]
    y, planes = fewbit_programs.forward(x, case.name, case.bits)
    return Result(x, gradient, y, planes, fewbit_programs.backward(gradient, planes, case.name))


if __name__ == "__main__":
    torch.save({tuple(case): tuple(run(case)) for case in CASES}, sys.argv[1])
