"""The progress of natural gradients: what a probe tells, and what is shown of it."""

import io

import pytest
import torch
from rich.console import Console
from torch import nn

import zeromean as zm
from zeromean.lab.progress import Bar, LayerBar


def test_a_full_probe_tells_each_layer_and_the_share_that_is_done() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ELU(), nn.Linear(8, 16), nn.ELU(), nn.Linear(16, 3))
    told: list[tuple[str, float]] = []
    inputs, targets = torch.randn(20, 6), torch.randint(3, (20,))

    def tell(name: str, share: float) -> None:
        told.append((name, share))

    zm.probe.measure(model, inputs, targets, on_layer=tell)
    assert [name for name, _ in told] == ["0", "2", "4"]
    shares = [share for _, share in told]
    assert shares[0] == 0
    # Work is units times the smaller of what their inputs and what the rows cost.
    assert shares == sorted(shares)
    assert 1 - shares[2] < shares[2] - shares[1]
    with zm.probe(model, "full", inputs=inputs, targets=targets, on_layer=tell):
        model(inputs)
    assert told[3:] == told[:3]


def test_a_light_probe_solves_nothing_and_tells_nothing() -> None:
    told: list[str] = []

    def tell(name: str, share: float) -> None:
        told.append(name)

    zm.probe.measure(nn.Linear(3, 2), torch.randn(4, 3), torch.tensor([0, 1, 0, 1]), "light", on_layer=tell)
    assert told == []


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("zeromean.lab.progress.time.monotonic", lambda: now)
    file = io.StringIO()
    with LayerBar(Console(file=file, width=100)) as bar:
        for now, share in ((0.0, 0.0), (4.0, 0.1), (12.0, 0.25), (13.0, 0.5)):  # noqa: B007  (the clock reads it)
            bar.on_layer("head", share)
    assert file.getvalue() == "natural gradients: 25% done, head is next, 36 s left\n"


def test_a_bar_on_a_terminal_is_taken_away() -> None:
    file = io.StringIO()
    with LayerBar(Console(file=file, force_terminal=True, width=100)) as bar:
        bar.on_layer("head", 0.0)
        bar.on_layer("tail", 0.5)
        bar._bar.refresh()
    assert "natural gradients: tail" in file.getvalue()
    assert "50%" in file.getvalue()
    assert file.getvalue().endswith("\x1b[2K")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is."""
    now = [0.0]
    monkeypatch.setattr("zeromean.lab.progress.time.monotonic", lambda: now[0])
    return now


def drawn(clock: list[float], width: int, *, seconds: float) -> str:
    """The last drawing of the bar of a study whose ten epochs of 300 took so many seconds each."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system=None, width=width)
    console.get_time = lambda: clock[0]
    with Bar(console) as bar:
        on_epoch = bar.progress.stage("final", 300)
        for epoch in range(11):
            bar.progress.note("239,000 images/s, training error 8.45 %, 1 diverged, 12 steps overflowed")
            on_epoch(epoch, 4)
            clock[0] += seconds * (epoch < 10)
    return file.getvalue().split("\x1b[2K")[-1]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_narrow_terminal_shows_what_is_done_and_left_before_the_pace(clock: list[float], width: int) -> None:
    first, *below = drawn(clock, width, seconds=8.0).split("\n")
    assert "10/300 epochs, 39 min left" in first
    told = "4 runs together, 239,000 images/s, training error 8.45 %, 1 diverged, 12 steps overflowed"
    assert told in " ".join(" ".join(below).split())


def test_long_epochs_tell_the_time_left_too(clock: list[float]) -> None:
    assert "10/300 epochs, 2.8 h left" in drawn(clock, 80, seconds=35.0)


def test_the_last_line_tells_the_time_taken(clock: list[float]) -> None:
    file = io.StringIO()
    with Bar(Console(file=file, width=100)) as bar:
        on_epoch = bar.progress.stage("final", 3)
        on_epoch(0, 2)
        clock[0] = 30.0
        on_epoch(3, 2)
    assert file.getvalue() == "final: epoch 3 of 3, 2 runs together, 0.2 run-epochs/s, took 30 s\n"
