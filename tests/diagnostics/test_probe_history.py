"""However many passes are summed up together, in whatever order they come, the numbers are the same."""

import math

import pytest
import torch
from torch import Tensor, nn

import zeromean as zm
from tests.diagnostics.test_probe_slots import numbers
from zeromean.diagnostics import gradients, history
from zeromean.diagnostics.averages import Averages, fetched
from zeromean.diagnostics.report import Report
from zeromean.diagnostics.slots import Kept, Slots, side_by_side


def network() -> nn.Sequential:
    """Layers of several widths, one of them used twice, and one that works in place."""
    torch.manual_seed(0)
    twice = nn.Linear(12, 12)
    middle = (nn.Linear(6, 12), nn.ReLU(), twice, nn.Tanh(), twice, nn.ReLU(inplace=True))
    return nn.Sequential(*middle, nn.Linear(12, 9), nn.LayerNorm(9), nn.Hardtanh(), nn.Linear(9, 5))


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    first = (nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 3, padding=1), nn.ELU(), nn.Conv2d(4, 4, 1), nn.LeakyReLU())
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(24, 5))


def watched(model: nn.Module, sizes: list[int]) -> Report:
    """Of a training on batches of such sizes; one backward pass in five is repeated, and one is left out."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with zm.probe(model) as probe:
        for place, size in enumerate(sizes):
            optimizer.zero_grad()
            loss = model(torch.randn(size, 6)).square().mean()
            if place % 7 != 3:
                loss.backward(retain_graph=place % 5 == 4)
            if place % 7 != 3 and place % 5 == 4:
                loss.backward()
            optimizer.step()
    return probe.report()


SIZES = {
    "many alike": [8] * 150,
    "in turns": [8, 3] * 40,
    "of four kinds, out of order": [8, 3, 3, 8, 8, 5, 2, 8, 8, 8, 8, 5] * 7,
    "several memories": [*[8] * 40, 3, *[8] * 40],
}


@pytest.mark.parametrize(("copied", "held"), [(True, gradients.HELD), (False, 40)])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("build", [network, convolutions])
def test_numbers_do_not_depend_on_how_many_passes_wait(
    build: type[nn.Module], sizes: str, copied: bool, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "HELD", held)
    monkeypatch.setattr(gradients, "COPIED", frozenset({"cpu"} if copied else ()))
    together = watched(build(), SIZES[sizes])
    monkeypatch.setattr(history, "WAITING", 1)
    assert numbers(watched(build(), SIZES[sizes])) == numbers(together)


@pytest.mark.parametrize("count", [1, 20, history.WAITING, history.WAITING + 1, 3 * history.WAITING + 20])
def test_values_of_units_are_those_of_the_last_pass(count: int) -> None:
    model, inputs = network(), [torch.randn(9, 6) for _ in range(count)]
    with zm.probe(model) as probe:
        for x in inputs:
            model(x).sum().backward()
    y = model[:2](inputs[-1]).detach()
    units = probe.report()["1"].of_units
    assert units["mean"] == pytest.approx(y.mean(0).tolist(), rel=1e-5, abs=1e-7)
    assert units["off"] == pytest.approx((y == 0).float().mean(0).tolist())
    means = [model[:2](x).mean().item() for x in inputs]
    assert probe.report()["1"].series["mean"] == pytest.approx(means, rel=1e-4, abs=1e-6)


def test_units_may_be_more_or_fewer_where_the_samples_are_as_many() -> None:
    model, inputs = nn.Sequential(nn.ELU(inplace=True)), [torch.randn(2, 3, 4), torch.randn(2, 3, 8)] * 3
    wanted = [torch.nn.functional.elu(x).mean().item() for x in inputs]
    with zm.probe(model) as probe:
        for x in inputs:
            model(x.clone())
    assert probe.report()["0"].series["mean"] == pytest.approx(wanted, rel=1e-5, abs=1e-7)


def test_what_waits_does_not_grow() -> None:
    model, widths = network(), 500
    with zm.probe(model) as probe:
        for _ in range(3 * history.WAITING):
            model(torch.randn(4, 6))
            probe._end_pass()
            assert len(probe._history._waiting) <= history.WAITING
    kept = [one for _, found in probe._history._summed_up for of in found.values() for one in of.values()]
    assert all(one.untyped_storage().nbytes() < 4 * widths * history.WAITING for one in kept)


def test_rows_of_one_memory_are_taken_in_one_piece() -> None:
    memory = torch.zeros(4, 3)
    waiting = Slots(4, lambda count: [memory[:count].clone(), memory[:count].sum(1)])
    kept = []
    for place in range(10):
        memory[waiting.next()] = float(place)
        kept.append(waiting.keep())
    alone = Kept([torch.full((3,), 10.0), torch.tensor(30.0)])
    taken = [alone, *kept[:5], *kept[6:], kept[5]]
    values, sums = side_by_side(taken)
    wanted = [10.0, 0, 1, 2, 3, 4, 6, 7, 8, 9, 5]
    assert values.tolist() == [[value] * 3 for value in wanted]
    assert sums.tolist() == [[3 * value] for value in wanted]
    assert [side_by_side([one])[0][0, 0].item() for one in taken] == wanted
    lone = side_by_side(kept[4:8])[0]
    assert lone.untyped_storage().data_ptr() == kept[4].place[0][0].untyped_storage().data_ptr()


def test_averages_keep_calls_apart() -> None:
    """Of one width, of other samples, and what is asked for twice."""
    torch.manual_seed(2)
    mean, variance, low = torch.randn(3, 4), torch.rand(3, 4), torch.tensor([[0.0, 4, 5, 9]] * 3)
    averages = Averages()
    unit = {"mean": mean, "variance": variance}
    places = [
        averages.add(5, unit | {"low": low, "off": low}),
        averages.add(10, {"mean": mean + 1, "variance": variance, "low": low, "off": low}),
        averages.add(5, {"mean": -mean, "variance": variance, "input_mean": mean, "input_variance": variance}),
    ]
    found = averages.found()

    def of(call: int, prefix: str, quantity: str) -> Tensor:
        for begins, group, start in places[call]:
            if begins == prefix and quantity in found[group]:
                return found[group][quantity][start : start + 3]
        raise KeyError(quantity)

    assert of(0, "", "saturated").tolist() == [0.5] * 3
    assert of(1, "", "saturated").tolist() == [0.25] * 3
    assert of(0, "", "dead").tolist() == [0.5] * 3
    assert of(1, "", "dead").tolist() == [0.0] * 3
    assert of(1, "", "never_off").tolist() == [0.25] * 3
    torch.testing.assert_close(of(1, "", "mean"), mean.mean(1) + 1)
    torch.testing.assert_close(of(2, "", "mean"), -mean.mean(1))
    torch.testing.assert_close(of(2, "input_", "mean"), mean.mean(1))
    torch.testing.assert_close(of(2, "", "shift"), (mean.square().mean(1) / variance.mean(1)).sqrt())
    assert len(found[places[0][1][1]]["mean"]) == 9, "nine and not twelve: the first output is the last input"


def test_what_is_fetched_keeps_shape_and_type() -> None:
    tensors = [torch.tensor(1.0), torch.ones(2, 3, dtype=torch.float64), torch.arange(3.0), torch.zeros(0)]
    for found, wanted in zip(fetched(tensors), tensors, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_norms_of_several_backward_passes_add_up_as_squares() -> None:
    found = history._of_all_passes(
        [("a", "weight_gradient"), ("b", "weight_gradient"), ("a", "weight_gradient")], [[3.0, 5], [1.0, 2], [4.0, 12]]
    )
    assert found == {("a", "weight_gradient"): [5.0, math.hypot(5, 12)], ("b", "weight_gradient"): [1.0, 2.0]}
