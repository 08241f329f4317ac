"""Schedules and times in words; a recipe's fields are taken as ``plan.json`` holds them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def setting(name: str, value: Any) -> str:
    """A field of a recipe as tables print it."""
    if name == "phases":
        return phases_in_words(value)
    if name == "rates":
        return ", ".join(f"{rate:g} at step {step:,}" for step, rate in value)
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def rates_in_words(rates: Sequence[tuple[int, float]], curve: str) -> str:
    """Such as ``0.01, then 0.005 from step 35,000``."""
    (_, first), *later = rates
    if curve == "linear" and later:
        return f"{first:g}, " + ", ".join(f"in a straight line to {rate:g} at step {step:,}" for step, rate in later)
    return ", ".join([f"{first:g}", *(f"then {rate:g} from step {step:,}" for step, rate in later)])


def phases_in_words(phases: Sequence[Mapping[str, Any]]) -> str:
    """Such as ``85,000 steps with dropout 0, 0.1, 0 behind the stacks``, one after the other."""
    return "; ".join(f"{phase['steps']:,} steps with {_dropout(phase)}" for phase in phases)


def _dropout(phase: Mapping[str, Any]) -> str:
    if not any(phase["dropout"]):
        return "no dropout"
    rates = ", ".join(f"{rate:g}" for rate in phase["dropout"])
    return f"dropout {rates} behind {'every layer of the stacks' if phase['everywhere'] else 'the stacks'}"


def duration(seconds: float) -> str:
    """Such as ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Teller:
    """Says now and then how much of something is done, and how long the rest will take.

    Args:
        say: told.
        seconds: of silence, at least.
    """

    def __init__(self, say: Callable[[str], None], seconds: float) -> None:
        self._say, self._seconds = say, seconds
        self._started = self._spoken = time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._started

    def tell(self, done: float, words: str) -> None:
        """Say them, if it is time to, with what is left after that share of the whole."""
        now = time.monotonic()
        if done and now - self._spoken >= self._seconds:
            self._spoken = now
            self._say(f"{words}, {duration(max(1.0, (now - self._started) / done * (1 - done)))} left")


def length(recipe: Mapping[str, Any], epochs: int) -> str:
    """Of a training: ``100 epochs``, or ``165,000 steps (330 epochs)`` where steps are what the recipe fixes."""
    passes = f"{epochs:,} epoch{'' if epochs == 1 else 's'}"
    if "phases" not in recipe:
        return passes
    return f"{sum(phase['steps'] for phase in recipe['phases']):,} steps ({passes})"
