"""Run in a process of its own with TRITON_INTERPRET=1: saves what the programs of `linear_programs` make."""

import math
import sys
from typing import Any

import torch
import triton.runtime.interpreter as interpreter
from torch import Tensor

from tests.kernels.test_linear import CASES, FAR, Case, Result, scalars_of
from zeromean.kernels import linear_launch
from zeromean.kernels.linear_launch import Tile


def count_with_new_numpy() -> None:
    """Since NumPy 2.4 an array of one element is no number, so the interpreter's loops need one taken out."""
    before = interpreter._patch_lang_tensor

    def after(tensor: Any, scope: Any) -> None:
        before(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = after


def run(case: Case) -> Result:
    torch.manual_seed(0)
    tile = Tile(rows=32, columns=32, depth=16, parts=case.parts)
    name, scalars = case.activation, scalars_of(case)
    x = torch.randn(case.rows, case.inner, dtype=torch.float16)
    weight = torch.randn(case.units, case.inner, dtype=torch.float16) / case.inner**0.5
    bias = torch.randn(case.units, dtype=torch.float16) if case.bias else None
    gradient = torch.randn(case.rows, case.units, dtype=torch.float16)
    y = linear_launch.run_forward(x, weight, bias, name, scalars, case.round_preact, tile)
    return Result(x, weight, bias, gradient, y, *linear_launch.run_slopes(gradient, y, case.bias, name, scalars))


def run_far() -> tuple[Tensor, Tensor]:
    """Pre-activations from far left to far right, infinite and not a number, and the outputs."""
    z = torch.cat([torch.linspace(-100, 100, 1002), torch.tensor([-math.inf, math.inf, math.nan, 0.0, 1e-4, -1e-4])])
    x, weight, bias = torch.zeros(4, 16).half(), torch.zeros(len(z), 16).half(), z.half()
    tile = Tile(rows=32, columns=32, depth=16, parts=1)
    return bias, linear_launch.run_forward(x, weight, bias, "elu", (1.0, 1.0, 1.0), False, tile)[0]


if __name__ == "__main__":
    count_with_new_numpy()
    torch.save({**{tuple(case): tuple(run(case)) for case in CASES}, FAR: run_far()}, sys.argv[1])
