"""Passes that repeat are known again, and one that does not repeat is seen as it is."""

import copy
from collections.abc import Callable
from typing import cast

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


class Asks(nn.Module):
    """Notes in each pass whether its layer is called plainly, and may do something else."""

    def __init__(self, also: Callable[["Asks"], object] = lambda net: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.act, self.also = nn.Linear(4, 4), nn.ELU(), also
        self.plainly: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.plainly.append("_compiled_call_impl" not in vars(self.layer))
        self.also(self)
        scores: Tensor = self.act(self.layer(x))
        return scores


def means(net: nn.Module, passes: int = 5, name: str = "layer") -> list[float]:
    """Of the layer's input, as the probe tells them."""
    torch.manual_seed(1)
    with zm.probe(net) as p:
        for _ in range(passes):
            net(torch.rand(3, 4)).sum().backward()
    return cast(list[float], list(p.report()[name].series["input_mean"]))


def test_layers_that_repeat_are_called_in_place() -> None:
    net = Asks()
    means(net)
    assert net.plainly == [True, False, False, False, False]
    assert "_compiled_call_impl" not in vars(net.layer)


def test_a_hook_that_changes_arguments_is_heeded() -> None:
    plain, doubled = Asks(), Asks()
    doubled.layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    assert means(doubled) == pytest.approx([2 * mean for mean in means(plain)], rel=1e-5)
    assert all(doubled.plainly)


def test_a_hook_that_changes_the_output_is_heeded() -> None:
    net = Asks()
    net.layer.register_forward_hook(lambda module, args, output: output + 100)
    with zm.probe(net) as p:
        for _ in range(5):
            net(torch.rand(3, 4)).sum().backward()
    assert min(cast(list[float], p.report()["layer"].series["mean"])) > 90
    assert not net.plainly[-1]


def test_a_copy_made_within_a_pass_is_a_module_of_its_own() -> None:
    copies: list[nn.Linear] = []
    net = Asks(lambda net: copies.append(copy.deepcopy(net.layer)))
    means(net)
    assert not net.plainly[-1]
    with torch.no_grad():
        net.layer.weight.zero_()
    assert all("_compiled_call_impl" not in vars(one) and one(torch.ones(1, 4)).norm() > 0.1 for one in copies)


def test_copies_of_data_parallelism_call_their_own_layers() -> None:
    net = Asks()
    assert means(nn.Sequential(nn.DataParallel(net)), name="0.module.layer") == means(Asks())
    assert all(net.plainly)


def test_a_layer_with_a_call_of_its_own_is_seen() -> None:
    class Direct(nn.Linear):
        def __call__(self, x: Tensor) -> Tensor:
            call: Callable[[Tensor], Tensor] = self._call_impl
            return call(x)

    net = Asks()
    net.layer = Direct(4, 4)
    assert None not in means(net)
    assert all(net.plainly)


def test_a_pass_that_fails_leaves_the_calls_alone() -> None:
    def fail(net: Asks) -> None:
        if len(net.plainly) == 4:
            raise KeyError("failed")

    net = Asks(fail)
    with zm.probe(net) as p:
        for place in range(6):
            if place == 3:
                with pytest.raises(KeyError, match="failed"):
                    net(torch.rand(3, 4))
                assert "_compiled_call_impl" not in vars(net.layer)
            else:
                net(torch.rand(3, 4)).sum().backward()
    assert net.plainly == [True, False, False, False, False, False]
    assert len(p.report().steps) == 5


def test_two_probes_on_one_model_read_the_same() -> None:
    class Functional(Asks):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x))

    net = Functional()
    with zm.probe(net, every=lambda step: step >= 4) as late, zm.probe(net) as early:
        for _ in range(8):
            net(torch.rand(3, 4)).sum().backward()
    assert not any(net.plainly[2:])
    assert early.report()["layer"].series["mean"][4:] == late.report()["layer"].series["mean"]
    assert early.report().unseen == late.report().unseen != ()
    assert "_compiled_call_impl" not in vars(net.layer)


def test_an_encoder_in_evaluation_mode_is_seen_in_every_pass() -> None:
    """It calls no module unless it finds hooks on them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    with torch.no_grad(), zm.probe(model, layers="*linear*") as p:
        for _ in range(5):
            model(torch.randn(2, 3, 8))
    assert None not in p.report()["0.linear1"].series["mean"]
