"""What is watched while a network trains: against plain loops, and the layer that is blamed."""

import math
from collections.abc import Iterator
from statistics import mean, median

import pytest
import torch
import torch.nn.functional as F
from tests.lab.small_images import CLASSES, PIXELS, material, small_network
from torch import Tensor, nn

from zeromean.lab.activation import parse
from zeromean.lab.data.augment import whole_batches
from zeromean.lab.nets import ConvolutionalNetwork
from zeromean.lab.observe import blame, judge, logits_of, mean_activations

COUNT = 1003  # more than are taken at once


pytestmark = pytest.mark.usefixtures("small_networks")


def network(activation: str = "elu", norm: str = "none") -> ConvolutionalNetwork:
    built = small_network(CLASSES, parse(activation), norm, seed=1)  # type: ignore[arg-type]
    if norm == "batch":
        built(material().train)
    return built


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(COUNT, 3, PIXELS, PIXELS, generator=generator),
        torch.randint(CLASSES, (COUNT,), generator=generator),
    )


@pytest.mark.parametrize("norm", ["none", "batch"])
@torch.no_grad()
def test_judge_is_the_mean_over_single_images(norm: str) -> None:
    built, (images, labels) = network(norm=norm).eval(), samples()
    losses, wrong = [], 0
    for image, label in zip(images, labels, strict=True):
        logits = built(image.unsqueeze(0))[0].double()
        losses.append(float(logits.exp().sum().log() - logits[label]))
        wrong += int(logits.argmax() != label)
    loss, error, _ = judge(built, whole_batches(images, labels, 1000), torch.float32)
    assert loss == pytest.approx(mean(losses), rel=1e-5)
    assert error == pytest.approx(100 * wrong / COUNT)


def test_a_loss_that_is_not_finite_has_no_error() -> None:
    images, labels = samples()
    images[1001, 0, 0, 0] = math.nan
    batches = whole_batches(images, labels, 1000)
    assert all(math.isnan(value) for value in judge(network().eval(), batches, torch.float32))


@torch.no_grad()
def test_mean_activations_are_those_of_a_plain_loop() -> None:
    built, (images, _) = network("eelu").eval(), samples()
    medians, spreads = mean_activations(built, images, torch.float32)
    assert not any(module._forward_hooks for module in built.modules())
    hidden, layer = images, 0
    for child in [module for stack in built.stacks for module in stack]:
        hidden = child(hidden)
        if type(child).__name__ == "EELU":
            units = hidden.double().mean((0, 2, 3)).tolist()
            quarters = torch.tensor(units).quantile(torch.tensor([0.25, 0.75]))
            assert medians[layer] == pytest.approx(median(units), rel=1e-4, abs=1e-6)
            assert spreads[layer] == pytest.approx(float(quarters[1] - quarters[0]), rel=1e-4, abs=1e-6)
            layer += 1
    assert layer == len(medians) == len(spreads) == 3


def test_logits_are_float32_also_where_the_arithmetic_is_not() -> None:
    images = samples()[0][:2]
    for dtype in (torch.float32, torch.bfloat16):
        assert logits_of(network(), images.to(dtype), dtype).dtype == torch.float32
    exact, coarse = (logits_of(network(), images.to(dtype), dtype) for dtype in (torch.float32, torch.bfloat16))
    assert not torch.equal(exact, coarse)
    torch.testing.assert_close(exact, coarse, rtol=0.1, atol=0.1)


class Explodes(torch.autograd.Function):
    """Finite forward, not finite backward."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient / 0


class Exploding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Explodes.apply(x)  # type: ignore[no-untyped-call]
        return y


def taken_again(built: nn.Module, images: Tensor, parts: int = 1) -> Iterator[Tensor]:
    labels = torch.arange(len(images)) % CLASSES
    for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        yield F.cross_entropy(built(x), y)


def test_a_finite_step_has_nobody_to_blame() -> None:
    built, images = network("eelu", "batch"), samples()[0][:8]
    before = [buffer.clone() for buffer in built.buffers()]
    assert blame(built, lambda: taken_again(built, images, 2)) is None
    assert all(torch.equal(old, new) for old, new in zip(before, built.buffers(), strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in built.modules())
    assert all(parameter.grad is None for parameter in built.parameters())


@pytest.mark.parametrize("layer", ["stack1.conv1", "stack2.conv2", "stack3.conv1"])
def test_the_first_layer_that_is_not_finite_is_named(layer: str) -> None:
    built, images = network(), samples()[0][:8]
    with torch.no_grad():
        built.get_parameter(f"{layer}.weight")[0] = math.inf
    assert blame(built, lambda: taken_again(built, images)) == f"output of {layer}"


def test_images_that_are_not_finite_are_named_in_any_part() -> None:
    built, images = network(norm="batch"), samples()[0][:8]
    images[7] = math.nan
    before = [buffer.clone() for buffer in built.buffers()]
    assert blame(built, lambda: taken_again(built, images, 4)) == "the images"
    assert all(torch.equal(old, new) for old, new in zip(before, built.buffers(), strict=True))


def test_a_gradient_that_is_not_finite_is_named_where_it_began() -> None:
    built, images = network(), samples()[0][:8]
    built.get_submodule("stack2").add_module("activation1", nn.Sequential(nn.ELU(), Exploding()))
    assert blame(built, lambda: taken_again(built, images)) == "gradient of stack2.conv1.bias"


def test_a_norm_that_overflows_is_named() -> None:
    built, images = network(), samples()[0][:8]
    assert blame(built, lambda: (loss * 1e25 for loss in taken_again(built, images))) == "norm of the gradient"


def test_the_top5_error_counts_images_whose_class_is_not_among_the_first_five() -> None:
    logits = torch.eye(7).add(torch.arange(7) / 10)  # image i: class i first, then 6, 5, 4 ...
    known = nn.Linear(7, 7, bias=False)
    with torch.no_grad():
        known.weight.copy_(logits.T)
    images, labels = torch.eye(7), torch.tensor([0, 3, 6, 1, 0, 4, 1])
    batches = whole_batches(images.view(7, 7, 1, 1), labels, 3)
    found = judge(nn.Sequential(nn.Flatten(), known), batches, torch.float32)
    assert found.error == pytest.approx(100 * 6 / 7)
    assert found.top5_error == pytest.approx(100 * 3 / 7)  # the class 1 of image 3, 0 of image 4, 1 of image 6
    few = judge(network().eval(), whole_batches(*samples(), 1000), torch.float32)
    assert math.isnan(few.top5_error)
