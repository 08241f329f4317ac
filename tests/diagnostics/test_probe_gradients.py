"""Norms of gradients, whatever a training does with them, and how few operators a measured pass takes."""

import math
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import zeromean as zm
from zeromean.diagnostics import gradients

Step = Callable[[nn.Sequential, torch.optim.Optimizer, Tensor, Tensor], None]


def zero_first(model: nn.Sequential, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def zero_between(model: nn.Sequential, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def zero_in_place(model: nn.Sequential, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad(set_to_none=False)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def never_zero(model: nn.Sequential, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def clip_and_scale(model: nn.Sequential, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()


def twice(model: nn.Sequential, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    scores = model(x)
    F.cross_entropy(scores, y).backward(retain_graph=True)
    scores.square().mean().backward()
    optimizer.step()


def without_grad_fields(model: nn.Sequential, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    weights = list(model.parameters())
    for one, gradient in zip(weights, torch.autograd.grad(F.cross_entropy(model(x), y), weights), strict=True):
        one.data -= 0.1 * gradient


def with_a_graph(model: nn.Sequential, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward(create_graph=True)
    optimizer.step()


STEPS: tuple[Step, ...] = (
    *(zero_first, zero_between, zero_in_place, never_zero, clip_and_scale, twice, without_grad_fields, with_a_graph),
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 9), nn.PReLU(), nn.Linear(9, 3))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("held", [gradients.HELD, 0], ids=["together", "as they arrive"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_norms_are_those_that_hooks_hear(step: Step, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "HELD", held)
    batches = [(torch.randn(12, 6), torch.randint(0, 3, (12,))) for _ in range(4)]
    states, heard = [], defaultdict[tuple[str, int], float](float)
    for watched in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if watched:
            with zm.probe(model) as p:
                for x, y in batches:
                    step(model, optimizer, x, y)
            report = p.report()
        else:
            for number, (x, y) in enumerate(batches):
                handles = [
                    layer.weight.register_hook(hearing(heard, name, number))
                    for name, layer in model.named_children()
                    if isinstance(layer, nn.Linear | nn.PReLU)
                ]
                step(model, optimizer, x, y)
                for handle in handles:
                    handle.remove()
        states.append([one.detach().clone() for one in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    for name in ("0", "2", "3", "4"):
        expected = [heard[name, number] for number in range(4)]
        assert report[name].series["weight_gradient"] == pytest.approx(expected, rel=1e-5), name
        if name != "3":
            assert None not in report[name].series["output_gradient"]


def hearing(heard: dict[tuple[str, int], float], name: str, number: int) -> Callable[[Tensor], None]:
    def hear(gradient: Tensor) -> None:
        heard[name, number] = math.hypot(heard[name, number], float(gradient.detach().norm()))

    return hear


def test_an_optimizer_within_the_backward_pass() -> None:
    model, (x, y) = network(), (torch.randn(12, 6), torch.randint(0, 3, (12,)))

    def update(weight: Tensor) -> None:
        assert weight.grad is not None
        weight.data -= 0.1 * weight.grad
        weight.grad = None

    for one in model.parameters():
        one.register_post_accumulate_grad_hook(update)
    with zm.probe(model) as p:
        for _ in range(3):
            F.cross_entropy(model(x), y).backward()
    assert None not in p.report()["2"].series["weight_gradient"]


def test_a_backward_pass_that_fails_leaves_nothing_behind() -> None:
    model, x = network(), torch.randn(12, 6)

    def fail(gradient: Tensor) -> None:
        raise KeyError("failed")

    with zm.probe(model) as p:
        for place in range(4):
            model.zero_grad()
            scores = model(x)
            if place == 1:
                model[2].weight.register_hook(fail)  # type: ignore[operator]
                with pytest.raises(KeyError, match="failed"):
                    scores.sum().backward()
                model[2].weight._backward_hooks.clear()  # type: ignore[union-attr]
            else:
                scores.sum().backward()
    values = p.report()["0"].series["weight_gradient"]
    assert [value is None for value in values] == [False, True, False, False]


class Heads(nn.Module):
    """Two linear heads on one trunk.

    Attributes:
        used: which of them the loss reads.
        hidden: the trunk's output.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.act, self.first, self.second = nn.Linear(6, 8), nn.ELU(), nn.Linear(8, 3), nn.Linear(8, 3)
        self.used: tuple[int, ...] = (0, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.trunk(x)
        activations = self.act(self.hidden)
        scores = [(place + 2) * head(activations) for place, head in enumerate((self.first, self.second))]
        return torch.stack([scores[place] for place in self.used]).sum(0)


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each pass that repeats another takes the gradients of its outputs into lists."""
    found: list[bool] = []
    usual = gradients.Gradients.of_pass

    def noted(self: gradients.Gradients, wanted: gradients.Wanted, outputs: list[Tensor]) -> None:
        usual(self, wanted, outputs)
        found.append(bool(self._lists))

    monkeypatch.setattr(gradients.Gradients, "of_pass", noted)
    return found


Norms = dict[str, dict[str, tuple[float | None, ...]]]


def norms(model: Heads, passes: int, behind: Callable[[int], object] = lambda number: None) -> Norms:
    """Of every layer and pass; `behind` is called with the pass's number between forward and backward pass."""
    torch.manual_seed(1)
    batches = [torch.randn(7, 6) for _ in range(passes)]
    with zm.probe(model) as p:
        for number, x in enumerate(batches):
            loss = model(x).square().sum()
            behind(number)
            loss.backward()
            model.zero_grad()
    return {
        one.name: {key: values for key, values in one.series.items() if "gradient" in key} for one in p.report().layers
    }


@pytest.mark.parametrize("copied", [False, True])
def test_lists_hold_what_functions_hear(copied: bool, listed: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    if copied:
        monkeypatch.setattr(gradients, "COPIED", frozenset({"cpu"}))
    by_list = norms(Heads(), 6)
    monkeypatch.setattr(gradients.Gradients, "_is_orderly", lambda *given: False)
    by_function = norms(Heads(), 6)
    assert listed == [False, True, True, True] + [False] * 4
    for name, series in by_function.items():
        for key, values in series.items():
            assert None not in values
            assert by_list[name][key] == pytest.approx(values, rel=1e-5), (name, key)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each pass whose gradients came into lists had those of the last one, of the same kinds."""
    found: list[bool] = []
    usual = gradients.Gradients._measure_known

    def noted(self: gradients.Gradients) -> bool:
        found.append(usual(self))
        return found[-1]

    monkeypatch.setattr(gradients.Gradients, "_measure_known", noted)
    return found


@pytest.mark.parametrize("copied", [False, True])
def test_gradients_of_known_kinds_are_measured_as_others(
    copied: bool, known: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    if copied:
        monkeypatch.setattr(gradients, "COPIED", frozenset({"cpu"}))

    def once_without(model: Heads) -> Norms:
        def let_go(number: int) -> None:
            if number == 6:
                model.second.weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))

        return norms(model, 9, let_go)

    found = once_without(Heads())
    first, *later = known
    assert (first, later.count(True)) == (False, 1 if copied else 2)
    assert known[3:] == [False, False, False]
    assert [value is None for value in found["second"]["weight_gradient"]] == [number >= 6 for number in range(9)]
    monkeypatch.setattr(gradients.Gradients, "_measure_known", lambda self: False)
    assert once_without(Heads()) == found


def test_where_the_last_output_has_no_gradient_functions_hear_from_then_on(listed: list[bool]) -> None:
    model = Heads()

    def leave_out(number: int) -> None:
        model.used = (0,) if number == 3 else (0, 1)  # of the next pass

    found = norms(model, 7, leave_out)
    assert listed == [False, True, True, False, False]
    assert None not in found["trunk"]["output_gradient"]
    # The pass in which it happened has lost the gradients of weights.
    for name in ("trunk", "first", "second"):
        assert [value is None for value in found[name]["weight_gradient"]] == [number == 4 for number in range(7)]


def test_a_gradient_written_to_later_is_not_measured(listed: list[bool]) -> None:
    model = Heads()

    def write(number: int) -> None:
        if number == 3:
            model.hidden.register_hook(lambda gradient: gradient.mul_(2))

    found, usual = norms(model, 5, write), norms(Heads(), 5)
    assert listed[:3] == [False, True, True]
    assert found["trunk"]["output_gradient"][3] is None
    assert found["trunk"]["weight_gradient"][3] == pytest.approx(
        2 * (usual["trunk"]["weight_gradient"][3] or 0), rel=1e-5
    )
    assert found["first"] == usual["first"]


def test_passes_that_are_not_orderly_stay_with_functions(listed: list[bool]) -> None:
    model = Heads()
    model.used = (0,)
    found = norms(model, 5)
    assert not any(listed)
    assert None not in found["trunk"]["weight_gradient"]


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Callable[..., object], types: object, args=(), kwargs=None) -> object:  # type: ignore[no-untyped-def]
        self.count += str(func) != "aten.view.default"  # which computes nothing
        return func(*args, **(kwargs or {}))


def linear_layers(depth: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), zm.nn.ELU()) for _ in range(depth)))


def convolutions(depth: int) -> nn.Sequential:
    return nn.Sequential(nn.Unflatten(1, (2, 2, 2)), *(nn.Conv2d(2, 2, 2, padding=1) for _ in range(depth)))


@pytest.mark.parametrize("build", [linear_layers, convolutions])
@pytest.mark.parametrize("depth", [2, 9])
def test_operators_of_a_measured_pass_do_not_grow_with_the_depth(
    build: Callable[[int], nn.Sequential], depth: int
) -> None:
    torch.manual_seed(0)
    model = build(depth)
    x, counts = torch.randn(16, 8), []
    probe = zm.probe(model, every=lambda step: step != 2)
    with probe:
        for _ in range(4):
            model.zero_grad()
            with Counting() as mode:
                model(x).square().sum().backward()
            counts.append(mode.count)
    assert counts[3] - counts[2] <= 14


def test_larger_batches_have_the_same_gradients_found_in_other_portions() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ELU(), nn.Linear(8, 256))
    assert 16 * 256 < gradients.HELD < 200 * 256
    batches, weights = (
        [torch.randn(count, 8) for count in (16, 16, 200, 16, 200)],
        [net.get_parameter(f"{name}.weight") for name in ("0", "2")],
    )
    found = [torch.autograd.grad(net(x).square().mean(), weights) for x in batches]
    with zm.probe(net) as probe:
        for x in batches:
            net(x).square().mean().backward()
    for place, name in enumerate(("0", "2")):
        (layer,) = [layer for layer in probe.report().layers if layer.name == name]
        wanted = [float(of_batch[place].norm()) for of_batch in found]
        assert layer.series["weight_gradient"] == pytest.approx(wanted, rel=1e-5)
