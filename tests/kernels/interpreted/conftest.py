import os
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from zeromean.kernels import operator


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers in each test, no tensor so small that torch's own operators would take it, few empty steps."""
    from zeromean.kernels import lane, launch

    torch.manual_seed(0)
    monkeypatch.setattr(operator, "SMALL", -1)
    monkeypatch.setattr(operator, "_calls", {})
    monkeypatch.setattr(lane, "_lanes", {})
    if os.environ.get("TRITON_INTERPRET") == "1":
        monkeypatch.setattr(launch, "_COLUMN_STEPS", 2)
        monkeypatch.setattr(launch, "_NOISE_STEPS", 2)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the programs launched from here on."""
    from zeromean.kernels import launch

    names: list[str] = []
    original = launch._launch

    def spy(plan: launch.Plan, tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> None:
        names.append(plan.program.fn.__name__)
        original(plan, tensors, numbers)

    monkeypatch.setattr(launch, "_launch", spy)
    return names
