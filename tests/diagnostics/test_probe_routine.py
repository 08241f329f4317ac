"""Passes that repeat are known again, and one that does not repeat is seen as it is."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zeromean as zm
from zeromean.diagnostics.routine import Routine


class Net(nn.Module):
    """What may change between passes, by attributes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.second, self.third = nn.Linear(6, 5), nn.ELU(), nn.Linear(5, 5), nn.Linear(5, 5)
        self.swapped = self.apart = self.frozen = self.by_name = self.overwritten = False

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.frozen):
            hidden = self.first(x)
        hidden = self.act(hidden)
        after = (self.third, self.second) if self.swapped else (self.second, self.third)
        for layer in after:
            hidden = layer(input=hidden) if self.by_name else layer(hidden.clone() if self.apart else hidden)
        if self.overwritten:
            hidden.add_(100)
        scores: Tensor = hidden
        return scores


def set_to(name: str) -> Callable[[Net], object]:
    return lambda net: setattr(net, name, True)


CHANGES: dict[str, Callable[[Net], object]] = {
    **{name: set_to(name) for name in ("swapped", "apart", "frozen", "by_name", "overwritten")},
    "evaluation": lambda net: net.second.eval(),
    "weight frozen": lambda net: net.second.weight.requires_grad_(False),
    "another weight": lambda net: setattr(net.second, "weight", nn.Parameter(torch.randn(5, 5))),
    "wider input": lambda net: setattr(net.first, "weight", nn.Parameter(torch.randn(5, 9))),
    "other type": lambda net: net.double(),
}


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each pass behind the second repeated it."""
    found: list[bool] = []
    tensors = Routine.tensors

    def noted(self: Routine, notes: list[object]) -> object:
        result = tensors(self, notes)  # type: ignore[arg-type]
        found.append(result is not None)
        return result

    monkeypatch.setattr(Routine, "tensors", noted)
    return found


@pytest.mark.parametrize("change", CHANGES)
def test_a_pass_that_differs_is_measured_as_it_is(change: str, repeated: list[bool]) -> None:
    """The changed network is measured by a probe that knew it otherwise, and by one that did not."""
    reports = []
    for known in (3, 0):
        net, x = Net(), torch.randn(7, 6)
        with zm.probe(net) as p:
            for _ in range(known):
                net(x).square().sum().backward()
                net.zero_grad()
            torch.manual_seed(2)
            CHANGES[change](net)
            x = torch.randn(7, net.first.weight.shape[1]).to(net.first.weight.dtype)
            for _ in range(2):
                net(x).square().sum().backward()
                net.zero_grad()
        reports.append(p.report())
    assert repeated[0]
    assert change == "another weight" or repeated[1:2] != [True]
    changed, fresh = reports
    for layer in fresh.layers:
        if change == "overwritten" and layer.name == "third":
            assert changed["third"].series["mean"][3] is None
            continue
        assert changed[layer.name].notes == layer.notes
        for quantity, values in layer.series.items():
            assert changed[layer.name].series[quantity][3:] == pytest.approx(values, rel=1e-4, abs=1e-6), quantity


def test_batches_of_other_sizes_are_not_mixed_up(repeated: list[bool]) -> None:
    net = Net()
    with zm.probe(net) as p:
        for count in (7, 7, 7, 3, 3, 7):
            net(torch.ones(count, 6)).sum().backward()
            net.zero_grad()
    assert repeated == [True, False, True, False]
    for name in ("first", "act", "third"):
        assert p.report()[name].series["mean"] == pytest.approx([p.report()[name].series["mean"][0]] * 6, rel=1e-5)
    norms = p.report()["third"].series["weight_gradient"]
    assert norms[3] == pytest.approx(3 / 7 * float(norms[0] or 0), rel=1e-4)


def test_an_input_written_between_call_and_end_is_not_read() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.writes = nn.Linear(4, 3), False

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            if self.writes:
                x.zero_()
            return y

    net = Writes()
    with zm.probe(net) as p, torch.no_grad():
        for place in range(5):
            net.writes = place == 3
            net(torch.ones(5, 4))
    means = p.report()["layer"].series["input_mean"]
    assert [value is None for value in means] == [False, False, False, True, False]
