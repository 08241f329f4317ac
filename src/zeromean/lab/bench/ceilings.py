"""What the machine can do at all: a copy and a matrix product, measured in the same run as everything else."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from zeromean.lab.bench.clock import Clock, Step, clock_for, repetitions

_SIZE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Ceilings:
    """The two ceilings, and what they were measured with.

    Attributes:
        copy_gigabytes_per_second: Read and written.
        copy_elements: How many were copied.
        copy_dtype: Of which type.
        product_teraflops: Of a bfloat16 matrix product.
        product_size: Rows and columns of both matrices.
    """

    copy_gigabytes_per_second: float
    copy_elements: int
    copy_dtype: str
    product_teraflops: float
    product_size: int


def copying(xs: tuple[Tensor, ...]) -> Step:
    """A step that copies the next of the tensors."""
    # Targets are written once before, so that the system has given them their pages.
    pairs = itertools.cycle([(x.detach().clone(), x.detach()) for x in xs])

    def step() -> None:
        target, source = next(pairs)
        target.copy_(source)

    return step


def measure(elements: int, dtype: torch.dtype, device: torch.device) -> Ceilings:
    """Time the copy and the product."""
    clock = clock_for("forward", device)
    source = torch.empty(elements, dtype=dtype, device=device).normal_()
    seconds = _median(copying((source,)), clock) / 1000
    size = _SIZE[device.type]
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    product_seconds = _median(lambda: left @ right, clock) / 1000
    return Ceilings(
        copy_gigabytes_per_second=round(2 * elements * dtype.itemsize / seconds / 1e9, 1),
        copy_elements=elements,
        copy_dtype=str(dtype).removeprefix("torch."),
        product_teraflops=round(2 * size**3 / product_seconds / 1e12, 3),
        product_size=size,
    )


def _median(step: Step, clock: Clock) -> float:
    return statistics.median(clock(step, repetitions(step, clock)))
