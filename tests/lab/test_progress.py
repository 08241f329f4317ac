"""The progress of natural gradients: what a probe tells, and what is shown of it."""

import io

import pytest
import torch
from rich.console import Console
from torch import nn

import zeromean as zm
from zeromean.lab.progress import LayerBar


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
