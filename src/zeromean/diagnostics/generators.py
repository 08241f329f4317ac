"""Leave every random generator as it was: torch's, Python's, and numpy's if somebody has loaded it."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def generators_put_back(model: nn.Module) -> Iterator[None]:
    """Put back the state of all generators, torch's on the CPU and on the model's devices."""
    devices = sorted({one.device.index or 0 for one in model.parameters() if one.device.type == "cuda"})
    state = random.getstate()
    numpy = sys.modules.get("numpy")
    drawn = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(drawn)
