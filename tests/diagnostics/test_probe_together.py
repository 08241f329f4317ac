"""Layers that are measured side by side show what each of them would alone."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zeromean as zm
from zeromean.diagnostics import Report
from zeromean.diagnostics.tails import tails


def maps(activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Maps of three sizes, then features: every layer is measured beside the others."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 5, 3), activation(), nn.MaxPool2d(2), nn.Conv2d(5, 4, 2), activation()),
        *(nn.Flatten(), nn.Linear(16, 6), activation(), nn.Linear(6, 6), activation(), nn.Linear(6, 2)),
    )


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels last"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.ELU, nn.Tanh, nn.LeakyReLU], ids=lambda one: one.__name__)
def test_maps_beside_each_other_are_not_mixed_up(
    activation: Callable[[], nn.Module], memory: torch.memory_format
) -> None:
    model = maps(activation)
    model.to(memory_format=memory)  # type: ignore[call-overload]
    x = (100 + torch.arange(1.0, 4)[:, None, None] * torch.randn(7, 3, 8, 8)).contiguous(memory_format=memory)
    report = watched(model, x)
    outputs = [x]
    for layer in model:
        outputs.append(layer(outputs[-1]).detach())
    for place, (before, after) in enumerate(itertools.pairwise(outputs)):
        if isinstance(model[place], nn.MaxPool2d | nn.Flatten):
            continue
        y = after.double().transpose(0, 1).flatten(1)
        of_units = report[str(place)].of_units
        assert of_units["mean"] == pytest.approx(y.mean(1).tolist(), rel=1e-5, abs=1e-6)
        assert report[str(place)].value("mean") == pytest.approx(float(y.mean()), rel=1e-5, abs=1e-6)
        assert of_units["spread"] == pytest.approx(y.std(1, correction=0).tolist(), rel=1e-4, abs=1e-6)
        if "off" in of_units:
            off = before.transpose(0, 1).flatten(1) <= float(tails(model[place]).knee)
            assert of_units["off"] == pytest.approx(off.float().mean(1).tolist())
    spread = x.double().var((0, 2, 3), correction=0).mean().sqrt()
    shift = x.double().mean((0, 2, 3)).square().mean().sqrt() / spread
    assert report["0"].value("input_shift") == pytest.approx(float(shift), rel=1e-5)


def watched(model: nn.Module, x: Tensor) -> Report:
    """What the third of three passes shows, which like the second one measures layers together."""
    with zm.probe(model) as p:
        for _ in range(3):
            model(x)
    return p.report()


def test_one_map_that_is_not_finite_does_not_spoil_the_others() -> None:
    model, x = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ELU(), nn.Conv2d(3, 3, 1, groups=3)), torch.randn(5, 1, 4, 4)
    with zm.probe(model) as p:
        model(x)
        with torch.no_grad():
            model.get_parameter("0.weight")[1] = torch.nan
        model(x)
    for name in ("0", "1", "2"):
        assert [value is None for value in p.report()[name].of_units["mean"]] == [False, True, False]


def test_an_activation_told_to_work_in_place_is_measured_before() -> None:
    elu, x = nn.ELU(), torch.randn(9, 4)
    model = nn.Sequential(nn.Linear(4, 5), elu, nn.Linear(5, 2))
    with zm.probe(model) as p:
        for step in range(5):
            elu.inplace = step >= 3
            model(x)
    off = (model[0](x) <= float(tails(elu).knee)).float().mean(0)
    assert p.report()["1"].of_units["off"] == pytest.approx(off.tolist())
    assert len(set(p.report()["1"].series["mean"])) == 1
