"""On a GPU a probe tells what it tells on a CPU, and the training does not notice."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zeromean as zm
from tests.diagnostics.test_probe_slots import assert_alike, numbers
from zeromean.diagnostics import slots, together
from zeromean.diagnostics.report import Report

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def dense() -> nn.Sequential:
    kinds = (zm.nn.ELU, nn.ReLU, nn.Tanh)
    layers = [nn.Sequential(nn.Linear(20, 20), kind()) for kind in kinds]
    return nn.Sequential(*layers, nn.Linear(20, 5))


def learned() -> nn.Sequential:
    """Tails that change with the weights."""
    return nn.Sequential(nn.Linear(20, 20), zm.nn.PReLU(20), nn.Linear(20, 5))


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (5, 2, 2)),
        *(nn.Conv2d(5, 9, 3, padding=2), nn.ELU(), nn.Conv2d(9, 6, 2), nn.LeakyReLU(0.1), nn.Flatten()),
        nn.Linear(6 * 9, 5),
    )


def batches(sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    drawn = [(torch.randn(size, 20, generator=generator), size) for size in sizes]
    return [(x, torch.randint(5, (size,), generator=generator)) for x, size in drawn]


def trained(
    model: nn.Module, drawn: Sequence[tuple[Tensor, Tensor]], device: torch.device, *, watched: bool = True
) -> tuple[nn.Module, Report | None]:
    """A copy of the model after the batches, in float64: so few digits are lost that the devices can be compared."""
    twin = copy.deepcopy(model).to(device, torch.float64)
    optimizer = torch.optim.SGD(twin.parameters(), 0.05)
    with zm.probe(twin, every=1 if watched else lambda step: False) as probe:
        for x, y in drawn:
            optimizer.zero_grad()
            F.cross_entropy(twin(x.to(device, torch.float64)), y.to(device)).backward()
            optimizer.step()
    return twin, probe.report() if watched else None


def assert_told_alike(found: Report, wanted: Report) -> None:
    assert_alike(numbers(found), numbers(wanted), relative=1e-3, absolute=1e-4)


SIZES = {"alike": [32] * (2 * slots.MOST + 5), "in turns": [32, 7] * 10, "two by two": [32, 32, 7, 7] * 5}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("build", [dense, learned, convolutional])
def test_a_watched_training_is_told_as_on_a_cpu(build: Callable[[], nn.Module], sizes: str) -> None:
    torch.manual_seed(0)
    model, drawn = build(), batches(SIZES[sizes])
    reports = [trained(model, drawn, device)[1] for device in (GPU, CPU)]
    assert reports[0] is not None
    assert reports[1] is not None
    assert_told_alike(reports[0], reports[1])


@pytest.mark.parametrize(("join", "room"), [(0, slots.ROOM), (together.JOIN, 0)], ids=["each alone", "at once"])
def test_large_maps_are_measured_as_small_ones(join: int, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, drawn = convolutional(), batches([32] * 6)
    usual = trained(model, drawn, GPU)[1]
    monkeypatch.setattr(together, "JOIN", join)
    monkeypatch.setattr(slots, "ROOM", room)
    other = trained(model, drawn, GPU)[1]
    assert usual is not None
    assert other is not None
    assert_told_alike(other, usual)


@pytest.mark.parametrize("build", [dense, learned, convolutional])
def test_training_is_the_same_bit_for_bit(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, drawn = build(), batches([32] * 20)
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False):
        twins = [trained(model, drawn, GPU, watched=watched)[0] for watched in (True, False)]
    assert all(torch.equal(a, b) for a, b in zip(*(twin.parameters() for twin in twins), strict=True))
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(*(twin.modules() for twin in twins), strict=True))


def test_autocast_is_measured_as_it_runs() -> None:
    torch.manual_seed(0)
    model = dense().to(GPU)
    with zm.probe(model) as probe, torch.autocast("cuda", torch.bfloat16):
        for x, y in batches([32] * 20):
            F.cross_entropy(model(x.to(GPU)), y.to(GPU)).backward()
            model.zero_grad()
    report = probe.report()
    for layer in report.layers:
        assert None not in layer.series["mean"]
    assert None not in report["3"].series["weight_gradient"]


class Halves(nn.Module):
    """One layer on a CPU and one on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.second = nn.Linear(20, 12), nn.ELU(), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.second(self.act(self.first(x)).to(self.second.weight.device))
        return scores


def test_a_network_on_two_devices_is_told_as_on_one() -> None:
    told = []
    for device in (GPU, CPU):
        model = Halves()
        model.second.to(device)
        with zm.probe(model) as probe:
            for x, y in batches([32] * 70):
                F.cross_entropy(model(x), y.to(device)).backward()
                model.zero_grad()
        told.append(probe.report())
    for name in ("first", "second"):
        for quantity, values in told[1][name].series.items():
            assert None not in values
            assert told[0][name].series[quantity] == pytest.approx(values, rel=1e-3, abs=1e-5), (name, quantity)


@pytest.mark.parametrize("build", [dense, convolutional])
@pytest.mark.parametrize("preset", ["light", "full"])
def test_a_measured_batch_is_told_as_on_a_cpu(build: Callable[[], nn.Module], preset: Literal["light", "full"]) -> None:
    torch.manual_seed(0)
    model, (batch,) = build().double(), batches([64])
    found: list[Any] = []
    for device in (GPU, CPU):
        twin = copy.deepcopy(model).to(device)
        found.append(zm.probe.measure(twin, batch[0].double().to(device), batch[1].to(device), preset, fisher="exact"))
    assert_told_alike(*found)
