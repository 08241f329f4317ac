"""Passes that wait as copies are measured to what they would have been measured to at once."""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zeromean as zm
from tests.diagnostics.test_probe_gradients import Counting
from zeromean.diagnostics import gradients, slots
from zeromean.diagnostics.moments import OF_PASSES, counts, moments, moments_of_passes
from zeromean.diagnostics.report import Report
from zeromean.diagnostics.tails import tails


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients wait on a CPU too."""
    monkeypatch.setattr(gradients, "COPIED", frozenset({"cpu"}))


def network(kind: type[nn.Module], channels: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    layers = ((nn.Linear(channels if place == 0 else 12, 12), kind()) for place in range(4))
    return nn.Sequential(*(one for pair in layers for one in pair), nn.Linear(12, 5))


def watched(model: nn.Module, batches: Iterator[Tensor], looks: int = 0) -> Report:
    """Of a training; a report is asked for after every few steps."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with zm.probe(model) as probe:
        for place, x in enumerate(batches):
            optimizer.zero_grad()
            model(x).float().square().mean().backward()
            optimizer.step()
            if looks and place % looks == looks - 1:
                probe.report()
    return probe.report()


def batches(sizes: list[int], **kind: Any) -> Iterator[Tensor]:
    torch.manual_seed(1)
    return iter([torch.randn(count, 6, **kind) for count in sizes])


def assert_alike(found: object, wanted: object, relative: float = 1e-4, absolute: float = 1e-6) -> None:
    if isinstance(found, dict) and isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key, value in found.items():
            assert_alike(value, wanted[key], relative, absolute)
    elif isinstance(found, list) and isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_alike(one, other, relative, absolute)
    elif isinstance(found, float) and isinstance(wanted, float):
        assert math.isclose(found, wanted, rel_tol=relative, abs_tol=absolute), (found, wanted)
    else:
        assert found == wanted


def numbers(report: Report) -> object:
    """Of all layers; findings are words about them."""
    return json.loads(report.to_json())["layers"]


SIZES = {
    "many alike": [8] * (3 * slots.MOST + 5),
    "in turns": [8, 3] * 20,
    "two by two": [8, 8, 3, 3] * 8,
    "one in between": [*[8] * 20, 3, *[8] * 20],
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", [nn.ReLU, nn.Tanh, nn.LeakyReLU, zm.nn.ELU, nn.PReLU])
def test_what_waits_is_measured_as_it_is(kind: type[nn.Module], sizes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = []
    for room in (0, slots.ROOM):
        monkeypatch.setattr(slots, "ROOM", room)
        reports.append(numbers(watched(network(kind), batches(SIZES[sizes]))))
    assert_alike(reports[0], reports[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_wait_too(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = []
    for room in (0, slots.ROOM):
        monkeypatch.setattr(slots, "ROOM", room)
        reports.append(numbers(watched(network(nn.Tanh).to(dtype), batches([8] * 40, dtype=dtype))))
    assert_alike(reports[0], reports[1])


def test_a_report_in_between_changes_nothing() -> None:
    sizes = [8] * (2 * slots.MOST)
    once, often = (watched(network(zm.nn.ELU), batches(sizes), looks) for looks in (0, 3))
    assert_alike(numbers(often), numbers(once))


def test_a_pass_that_waits_takes_two_operators() -> None:
    """One copies what went through the layers, one the gradients."""
    model, x, counts = network(zm.nn.ELU), torch.randn(8, 6), []
    with zm.probe(model, every=lambda step: step < slots.MOST or step > 2 * slots.MOST) as probe:
        for _ in range(3 * slots.MOST):
            model.zero_grad()
            with Counting() as mode:
                model(x).square().sum().backward()
            counts.append(mode.count)
    usual = counts[slots.MOST]
    assert sorted(counts[2 * slots.MOST + 2 :])[slots.MOST // 2] == usual + 2
    assert len(probe.report().steps) == 2 * slots.MOST - 1


def test_only_small_passes_wait() -> None:
    assert slots.passes(1) == slots.MOST
    assert slots.passes(slots.ROOM // slots.FEWEST) == slots.FEWEST
    assert slots.passes(slots.ROOM // slots.FEWEST + 1) == slots.passes(slots.ROOM) == 0


@pytest.mark.parametrize("kind", [nn.ReLU, nn.Tanh, nn.LeakyReLU, zm.nn.ELU])
def test_passes_one_behind_the_other_are_measured_apart(kind: type[nn.Module]) -> None:
    """As on a GPU, which measures all of them by the operators of one."""
    x, limits = 2 * torch.randn(5, 9, 7, generator=torch.Generator().manual_seed(0)), tails(kind())
    mean, variance = moments_of_passes(x)
    together = counts(x, OF_PASSES, limits)
    for place, one in enumerate(x):
        torch.testing.assert_close((mean[place], variance[place]), moments(one, 1))
        torch.testing.assert_close(together[:, place], counts(one, 1, limits))
