"""Who runs an activation: this library, torch in its several ways, other libraries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch._functorch.config

from zeromean.lab.bench import libraries
from zeromean.lab.bench.subjects import Call, Subject

DEFAULT = ("zeromean", "eager", "inplace", "textbook", "compile")
CONTENDERS = {
    "zeromean": "this library",
    "eager": "torch.nn.functional",
    "inplace": "torch.nn.functional, overwriting its input",
    "textbook": "the formula in plain operators",
    "compile": "torch.compile of eager, or of textbook where torch has no such function",
    "max-autotune": "the same with mode max-autotune-no-cudagraphs",
    "zeromean-compile": "torch.compile of this library",
    "attorch": "attorch",
    "liger": "Liger-Kernel",
    "flag_gems": "FlagGems",
    "inplace_abn": "inplace_abn without its normalization",
}
_MODES = {"compile": "default", "max-autotune": "max-autotune-no-cudagraphs", "zeromean-compile": "default"}
Session = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Contender:
    """One way to run an activation.

    Attributes:
        name: A key of `CONTENDERS`.
        plain: The function of x and the learnable parameters, before compilation.
        inplace: Whether it overwrites x.
        mode: torch.compile's mode; None runs eagerly.
        session: The context that it runs in.
    """

    name: str
    plain: Call
    inplace: bool = False
    mode: str | None = None
    session: Session = nullcontext

    @cached_property
    def call(self) -> Call:
        """The function that is timed."""
        if self.mode is None:
            return self.plain
        compiled: Call = torch.compile(self.plain, mode=self.mode, dynamic=False)
        return compiled


def missing(names: Sequence[str]) -> dict[str, str]:
    """The contenders that cannot take part on this machine, with the reason."""
    reasons = {name: libraries.missing(name) for name in names if name in libraries.MODULES}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def contenders(names: Sequence[str], subject: Subject, device: torch.device) -> list[Contender]:
    """Those of the named contenders that have this activation, in the order of the names."""
    made = (_make(name, subject, device) for name in names)
    return [contender for contender in made if contender is not None]


def _make(name: str, subject: Subject, device: torch.device) -> Contender | None:
    if name in ("zeromean", "zeromean-compile"):
        return _compiled(name, subject.on(device))
    if name in _MODES:
        return _compiled(name, subject.eager or subject.textbook)
    if name == "flag_gems":
        found = libraries.flag_gems(subject)
        return found and Contender(name, found[0], session=found[1])
    calls: dict[str, Callable[[], Call | None]] = {
        "eager": lambda: subject.eager,
        "inplace": lambda: subject.inplace,
        "textbook": lambda: subject.textbook if subject.eager is None or subject.name == "elu" else None,
        "attorch": lambda: libraries.attorch(subject),
        "inplace_abn": lambda: libraries.inplace_abn(subject),
    }
    call = calls[name]()
    return call and Contender(name, call, inplace=name.startswith("inplace"))


def _compiled(name: str, plain: Call) -> Contender:
    # A donated buffer would forbid the repeated backward passes that are timed.
    session = (lambda: torch._functorch.config.patch(donated_buffer=False)) if name in _MODES else nullcontext
    return Contender(name, plain, mode=_MODES.get(name), session=session)
