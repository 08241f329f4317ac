"""What to measure, checked before anything runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, get_args

import torch

from zeromean.lab.bench import contenders, inputs, subjects
from zeromean.lab.bench.clock import Pass
from zeromean.lab.bench.inputs import Layout
from zeromean.spelling import nearest

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ROUNDS = 5
ELEMENTS = {"cuda": 2**28, "cpu": 2**22}
# Up to here the host decides, so both passes are timed together, with its share.
SMALL = 2**20
Name = TypeVar("Name", bound=str)
_NUMBER = re.compile(r"(\d+)(?:(?:\*\*|\^)(\d+))?")


@dataclass(frozen=True)
class Case:
    """One activation on one kind of input."""

    activation: str
    dtype: str
    layout: Layout
    elements: int


@dataclass(frozen=True)
class Settings:
    """What to measure, as `settings` makes it.

    Attributes:
        cases: In the order in which they are measured.
        passes: Asked for; empty chooses by size.
        contenders: Keys of `contenders.CONTENDERS`.
        rounds: How often the contenders take turns.
        device: Where.
    """

    cases: tuple[Case, ...]
    passes: tuple[Pass, ...]
    contenders: tuple[str, ...]
    rounds: int
    device: torch.device

    def units(self) -> Iterator[tuple[Case, Pass]]:
        """Every case with each of its passes."""
        for case in self.cases:
            by_size: tuple[Pass, ...] = ("both",) if case.elements <= SMALL else ("forward", "backward")
            for which in self.passes or by_size:
                yield case, which


def settings(
    activations: Sequence[str] = (),
    *,
    elements: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    layouts: Sequence[str] = (),
    passes: Sequence[str] = (),
    competitors: Sequence[str] = (),
    rounds: int = ROUNDS,
    device: str = "auto",
) -> Settings:
    """Read what was asked for; what is empty takes its default.

    Args:
        activations: Keys of `subjects.SUBJECTS`; all by default.
        elements: Numbers, or powers such as ``2**28``; by default 2^28 on a GPU and 2^22 on a CPU.
        dtypes: Keys of `DTYPES`; bfloat16 by default.
        layouts: For all activations; by default nchw and channels_last for learnable ones with a value a channel,
            contiguous for the others. In contiguous a learnable one has one value.
        passes: forward, backward or both; by default both together up to 2^20 elements, else each alone.
        competitors: Keys of `contenders.CONTENDERS`; by default those without libraries and without max-autotune.
        rounds: How often the contenders take turns.
        device: auto, cpu or cuda.

    Raises:
        ValueError: An unknown name (names the nearest), or a number that is none or does not fit.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}: {ROUNDS} give a median worth the name")
    where = _device(device)
    layouts_asked = _known(layouts, get_args(Layout), "layout")
    sizes = [_count(text) for text in elements] or [ELEMENTS[where.type]]
    cases = [
        Case(name, dtype, layout, size)
        for size in sizes
        for dtype in _known(dtypes, DTYPES, "dtype") or ["bfloat16"]
        for name in activations or subjects.SUBJECTS
        for layout in layouts_asked or inputs.own_layouts(subjects.find(name))
    ]
    for case in cases:
        inputs.shape(case.elements, case.layout)
    return Settings(
        tuple(dict.fromkeys(cases)),
        _known(passes, get_args(Pass), "pass"),
        _known(competitors, contenders.CONTENDERS, "contender") or contenders.DEFAULT,
        rounds,
        where,
    )


def _known(names: Iterable[str], known: Iterable[Name], kind: str) -> tuple[Name, ...]:
    found = {str(name): name for name in known}
    for name in names:
        if name not in found:
            raise ValueError(f"unknown {kind} {name!r}: {nearest(name, found)}")
    return tuple(dict.fromkeys(found[name] for name in names))


def _count(text: str) -> int:
    match = _NUMBER.fullmatch(text.replace("_", "").strip())
    count = int(match[1]) ** int(match[2] or 1) if match else 0
    if not 1 <= count < 2**40:
        raise ValueError(f"elements must be a number between 1 and 2**40, got {text!r}: for example 2**28")
    return count


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}: leave it at auto if unsure")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda is not available here: zeromean doctor says why; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
