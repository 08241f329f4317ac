"""One case: the contenders take turns, round by round, each round with its own copy as the measure of speed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zeromean.lab.bench import contenders as parties
from zeromean.lab.bench import inputs as data
from zeromean.lab.bench import subjects
from zeromean.lab.bench.accuracy import Errors, errors
from zeromean.lab.bench.ceilings import copying
from zeromean.lab.bench.clock import Clock, Pass, Step, clock_for, repetitions, turns_of
from zeromean.lab.bench.contenders import Contender
from zeromean.lab.bench.inputs import Inputs
from zeromean.lab.bench.memory import saved_bytes_per_element
from zeromean.lab.bench.settings import DTYPES, Case

Row = dict[str, Any]

KEYS = (
    "activation",
    "pass",
    "dtype",
    "layout",
    "elements",
    "contender",
    "milliseconds",
    "fraction_of_copy",
    "saved_bytes_per_element",
    "max_relative_error",
)
# Tensors of the input's size that a perfect kernel reads and writes; a copy moves 2.
IDEAL_TENSORS: dict[Pass, int] = {"forward": 2, "backward": 3, "both": 5}


class _Produced(torch.autograd.Function):
    """A buffer as if some layer had just made it, so that it may be overwritten."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, buffer: Tensor) -> Tensor:
        return buffer.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def _produced(anchor: Tensor, buffer: Tensor) -> Tensor:
    x: Tensor = _Produced.apply(anchor, buffer)  # type: ignore[no-untyped-call]
    return x


@dataclass(frozen=True)
class Quality:
    """What is found once for a contender, beside its speed."""

    errors: Errors
    saved_bytes: float


class Bench:
    """A case with its tensors and contenders, ready for its passes.

    Args:
        case: What to measure.
        names: Of the contenders.
        device: Where.
    """

    def __init__(self, case: Case, names: Sequence[str], device: torch.device) -> None:
        self.case, self.device = case, device
        self.subject = subjects.find(case.activation)
        self.inputs = data.make(self.subject, case.elements, DTYPES[case.dtype], case.layout, device)
        self.contenders = parties.contenders(names, self.subject, device)
        if any(contender.mode for contender in self.contenders):
            torch._dynamo.reset()
        self.quality: dict[str, Quality] = {}
        self.failures: dict[str, str] = {}
        for contender in self.contenders:
            self._guarded(contender, self._examine)

    def rows(self, which: Pass, rounds: int, names: Sequence[str], clock: Clock | None = None) -> list[Row]:
        """Time a pass of the named contenders; one that errs has a row with its error and no time."""
        clock = clock or clock_for(which, self.device)
        taking_part = [contender for contender in self.contenders if contender.name in names]
        copies, times = self._take_turns(which, rounds, clock, taking_part)
        rows = []
        for contender in taking_part:
            row = dict(zip(KEYS, (*self._place(which), contender.name, None, None, None, None), strict=True))
            if contender.name not in self.failures:
                row |= timing(which, times[contender.name], copies) | self._found(which, contender.name)
            else:
                row |= {"error": self.failures[contender.name]}
            rows.append(row)
        return rows

    def _place(self, which: Pass) -> tuple[str, Pass, str, str, int]:
        case = self.case
        return case.activation, which, case.dtype, case.layout, case.elements

    def _guarded(self, contender: Contender, act: Any) -> None:
        """Nothing that a contender does may end the run; what it did is told in its row."""
        if contender.name in self.failures:
            return
        try:
            with contender.session():
                act(contender)
        except Exception as error:
            self.failures[contender.name] = f"{type(error).__name__}: {error}".strip().partition("\n")[0][:300]
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _examine(self, contender: Contender) -> None:
        found = errors(contender, self.subject, self.inputs)
        self.quality[contender.name] = Quality(found, saved_bytes_per_element(contender, self.inputs))

    def _take_turns(
        self, which: Pass, rounds: int, clock: Clock, taking_part: Sequence[Contender]
    ) -> tuple[list[float], dict[str, list[list[float]]]]:
        inputs = self.inputs.alone() if which == "both" else self.inputs
        copy = copying(inputs.xs)
        turns = turns_of(which)
        counts = {"copy": repetitions(copy, clock, turns)}
        copies: list[float] = []
        times: dict[str, list[list[float]]] = {contender.name: [] for contender in taking_part}

        def warm_up(contender: Contender) -> None:
            counts[contender.name] = repetitions(prepare(which, contender, inputs), clock, turns)

        def measure(contender: Contender) -> None:
            times[contender.name].append(clock(prepare(which, contender, inputs), counts[contender.name]))

        for contender in taking_part:
            self._guarded(contender, warm_up)
        for turn in range(rounds * turns):
            copies.append(statistics.median(clock(copy, counts["copy"])))
            # Whoever comes first finds the host's caches cold.
            first = turn % len(taking_part)
            for contender in (*taking_part[first:], *taking_part[:first]):
                self._guarded(contender, measure)
        return copies, times

    def _found(self, which: Pass, name: str) -> Row:
        quality = self.quality[name]
        relevant = {"forward": ("forward",), "backward": ("backward",), "both": ("forward", "backward")}[which]
        found = [asdict(quality.errors)[one] for one in relevant]
        relative, absolute = (float(np.max([one[key] for one in found])) for key in ("relative", "absolute"))
        row: Row = {
            "saved_bytes_per_element": round(quality.saved_bytes, 4),
            "max_relative_error": relative,
            "max_absolute_error": absolute,
        }
        if which != "forward" and quality.errors.parameters is not None:
            row["parameter_gradient_error"] = quality.errors.parameters
        if np.isnan(list(row.values())).any():
            row = {key: None if np.isnan(value) else value for key, value in row.items()}
            row["remark"] = "NaN where float64 has a number"
        return row


def candidates(case: Case, which: Pass, names: Sequence[str], device: torch.device) -> list[str]:
    """Those of the named contenders that have this activation and pass."""
    found = parties.contenders(names, subjects.find(case.activation), device)
    # An input that every call overwrites would have to be made anew in the time that is measured.
    return [contender.name for contender in found if not (contender.inplace and which == "both")]


def timing(which: Pass, times: Sequence[Sequence[float]], copies: Sequence[float]) -> Row:
    """The part of a row that times give: medians over rounds of each round's median, milliseconds.

    ``fraction_of_copy`` is (ideal bytes / time) / (copied bytes / time of the copy), each round with its own copy.

    Args:
        which: The pass.
        times: Of all repetitions, one list a round.
        copies: Median time of the copy, one a round.
    """
    rounds = [statistics.median(one) for one in times]
    fractions = [IDEAL_TENSORS[which] / 2 * copy / own for copy, own in zip(copies, rounds, strict=True)]
    p20, p80 = np.percentile([time for one in times for time in one], [20, 80])
    return {
        "milliseconds": round(statistics.median(rounds), 6),
        "fraction_of_copy": round(statistics.median(fractions), 4),
        "rounds": [round(one, 6) for one in rounds],
        "n": sum(map(len, times)),
        "p20": round(float(p20), 6),
        "p80": round(float(p80), 6),
        "fraction_lowest": round(min(fractions), 4),
        "fraction_highest": round(max(fractions), 4),
        "copy_milliseconds": round(statistics.median(copies), 6),
    }


def prepare(which: Pass, contender: Contender, inputs: Inputs) -> Step:
    """Everything that is not timed; returns the step that is."""
    makers = {"forward": _forward, "backward": _backward, "both": _both}
    return makers[which](contender, inputs)


def _forward(contender: Contender, inputs: Inputs) -> Step:
    anchor = torch.zeros((), device=inputs.xs[0].device, requires_grad=True)
    xs = [x.detach().clone() if contender.inplace else x for x in inputs.xs]
    # Outputs live until their place comes round, so that a new one does not lie in the cache already.
    outputs: list[Tensor | None] = [None] * len(xs)
    turns = itertools.cycle(range(len(xs)))

    def step() -> None:
        turn = next(turns)
        x = _produced(anchor, xs[turn]) if contender.inplace else xs[turn]
        outputs[turn] = contender.call(x, *inputs.parameters)

    return step


def _backward(contender: Contender, inputs: Inputs) -> Step:
    graphs = [
        (contender.call(x.clone() if contender.inplace else x, *inputs.parameters), x, gradient)
        for x, gradient in zip(inputs.xs, inputs.gradients, strict=True)
    ]
    results: list[tuple[Tensor, ...] | None] = [None] * len(graphs)
    turns = itertools.cycle(range(len(graphs)))

    def step() -> None:
        turn = next(turns)
        y, x, gradient = graphs[turn]
        wanted = (x, *inputs.parameters)
        results[turn] = torch.autograd.grad(y, wanted, gradient, retain_graph=True, allow_unused=True)

    return step


def _both(contender: Contender, inputs: Inputs) -> Step:
    x, gradient = inputs.xs[0], inputs.gradients[0]

    def step() -> None:
        y = contender.call(x, *inputs.parameters)
        torch.autograd.grad(y, inputs.wanted, gradient, allow_unused=True)

    return step
