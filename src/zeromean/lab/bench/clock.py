"""How long a step takes: events on a GPU, where the host must run ahead; the system's clock elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch

Pass = Literal["forward", "backward", "both"]
Step = Callable[[], object]
Clock = Callable[[Step, int], list[float]]
"""Runs a step so many times, after one or two more that are not timed, and returns milliseconds for one run of it."""

# Our choice: the time that one contender's repetitions take in one turn.
TARGET_MILLISECONDS = 20.0
# Turns in a round where the host's share counts: other work on the host comes and goes, so contenders alternate fast.
_SHORT_TURNS = 10
_FEWEST, _MOST = 3, 300
# Of a GPU at 2 GHz; a slower one waits longer.
_CYCLES_PER_SECOND = 2e9
_LONGEST_HEAD_START = 0.05


def clock_for(which: Pass, device: torch.device) -> Clock:
    """Both passes together are timed with the host's share; single ones without it, on a GPU."""
    if which == "both":
        return _batch(device)
    return _events if device.type == "cuda" else _seconds


def turns_of(which: Pass) -> int:
    """How many turns a contender has in a round."""
    return _SHORT_TURNS if which == "both" else 1


def repetitions(step: Step, clock: Clock, turns: int = 1) -> int:
    """As many as take about `TARGET_MILLISECONDS` in all turns of a round."""
    once = min(clock(step, _FEWEST))
    return min(_MOST, max(_FEWEST, round(TARGET_MILLISECONDS / turns / max(once, 1e-6))))


def _events(step: Step, count: int) -> list[float]:
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(count)] for _ in range(2))
    torch.cuda._sleep(_head_start(step, count))
    for start, end in zip(starts, ends, strict=True):
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]


def _head_start(step: Step, count: int) -> int:
    """Cycles in which the host queues the steps, so that the GPU never waits for it between two events."""
    step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    host = time.perf_counter() - started
    return int(_CYCLES_PER_SECOND * min(_LONGEST_HEAD_START, 1.5 * host * count))


def _seconds(step: Step, count: int) -> list[float]:
    step()
    times = []
    for _ in range(count):
        started = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - started))
    return times


def _batch(device: torch.device) -> Clock:
    """Wall clock of all calls with one synchronisation at their end, divided by the calls."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def clock(step: Step, count: int) -> list[float]:
        step()
        finish()
        started = time.perf_counter()
        for _ in range(count):
            step()
        finish()
        return [1000 * (time.perf_counter() - started) / count]

    return clock
