"""R networks trained as one: x [R, B, F] with parameters [R, 1, 1] put in from outside."""

import pytest
import torch
from torch.func import functional_call

import zeromean as zm


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["prelu", "swish", "pelu", "mpelu", "eprelu", "eelu"])
def test_stacked_parameters_give_what_each_gives_alone(name: str, training: bool) -> None:
    torch.manual_seed(0)
    runs, x = 3, torch.randn(3, 6, 4, requires_grad=True)
    module = zm.nn.by_name(name).train(training)
    if isinstance(module, zm.nn.EPReLU | zm.nn.EELU):
        module.seed = torch.arange(runs).reshape(runs, 1, 1)
        module.noisy_next.fill_(False)
    parameters = {key: (torch.rand(runs, 1, 1) + 0.2).requires_grad_() for key, _ in module.named_parameters()}
    y = functional_call(module, parameters, (x,))
    gradients = torch.autograd.grad((y**2).sum(), [x, *parameters.values()])
    for run in range(runs):
        alone = zm.nn.by_name(name).train(training)
        if isinstance(alone, zm.nn.EPReLU | zm.nn.EELU):
            alone.seed = torch.tensor(run)
            alone.noisy_next.fill_(False)
        own = {key: value[run].reshape(1).detach().requires_grad_() for key, value in parameters.items()}
        x_own = x[run].detach().requires_grad_()
        y_own = functional_call(alone, own, (x_own,))
        torch.testing.assert_close(y[run], y_own)
        expected = torch.autograd.grad((y_own**2).sum(), [x_own, *own.values()])
        for stacked, single in zip(gradients, expected, strict=True):
            torch.testing.assert_close(stacked[run].reshape(single.shape), single)


@pytest.mark.parametrize("shape", [(1,), (), (3,), (1, 3, 1), (2, 1, 1), (2, 3, 4)], ids=str)
def test_every_way_a_parameter_may_lie(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(2, 3, 4), torch.rand(shape).requires_grad_()
    y = zm.functional.prelu(x, weight)
    wide = weight.detach().reshape(1, 3, 1) if shape == (3,) else weight.detach()
    torch.testing.assert_close(y.detach(), torch.where(x > 0, x, wide * x))
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    assert gradient.shape == weight.shape
    torch.testing.assert_close(gradient.sum(), x.clamp(max=0).sum())


@pytest.mark.parametrize("shape", [(4,), (2, 1), (5, 1, 1), (1, 1, 2)], ids=str)
def test_a_parameter_that_lies_nowhere(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="weight must hold one value"):
        zm.functional.prelu(torch.randn(2, 3, 4), torch.rand(shape))
