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
