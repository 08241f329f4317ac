"""PyTorch's own samples for these functions and modules, the ones it tests itself with, run on ours."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import zeromean as zm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

F = zm.functional
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    f"nn.functional.{name}": getattr(F, name)
    for name in ("elu", "selu", "celu", "relu", "leaky_relu", "prelu", "rrelu", "silu", "gelu", "mish")
}
OPS = [op for op in op_db if op.name in FUNCTIONS and not op.variant_test_name]
MODULES = [info for info in module_db if info.module_cls.__name__ in vars(zm.nn)]
# How far a slope may be off that is taken from the rounded output.
SLOPE_ATOL = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name.removeprefix("nn.functional."))
each_dtype = pytest.mark.parametrize("dtype", SLOPE_ATOL, ids=str)


def random_slopes(sample: Any) -> bool:
    return bool(sample.kwargs.get("training"))


def samples(op: Any, dtype: torch.dtype) -> Iterator[Any]:
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        yield sample
        yield sample.noncontiguous()


def gradients(out: Tensor, sample: Any) -> tuple[Tensor, ...]:
    values = [sample.input, *sample.args, *sample.kwargs.values()]
    leaves = [value for value in values if torch.is_tensor(value) and value.requires_grad]
    return torch.autograd.grad(out, leaves, torch.ones_like(out))


def test_every_function_that_torch_has_is_among_them() -> None:
    assert {op.name for op in OPS} == FUNCTIONS.keys()
    assert {info.module_cls.__name__ for info in MODULES} >= {"ELU", "SELU", "CELU", "ReLU", "LeakyReLU", "PReLU"}


@each_dtype
@each_op
def test_values_and_gradients_are_torchs(op: Any, dtype: torch.dtype) -> None:
    compared = 0
    for sample in samples(op, dtype):
        if random_slopes(sample):
            continue
        ours = FUNCTIONS[op.name](sample.input, *sample.args, **sample.kwargs)
        theirs = op(sample.input, *sample.args, **sample.kwargs)
        torch.testing.assert_close(ours, theirs)
        for own, expected in zip(gradients(ours, sample), gradients(theirs, sample), strict=True):
            torch.testing.assert_close(own, expected, atol=SLOPE_ATOL[dtype], rtol=1e-2)
        compared += 1
    assert compared


@each_op
def test_float64_gradients_are_torchs_to_the_last_digits(op: Any) -> None:
    for sample in samples(op, torch.float64):
        if not random_slopes(sample):
            ours = FUNCTIONS[op.name](sample.input, *sample.args, **sample.kwargs)
            theirs = op(sample.input, *sample.args, **sample.kwargs)
            torch.testing.assert_close(gradients(ours, sample), gradients(theirs, sample), rtol=1e-12, atol=1e-14)


def test_random_slopes_stay_in_their_bounds() -> None:
    op = next(op for op in OPS if op.name.endswith("rrelu"))
    drawn = [sample for sample in samples(op, torch.float64) if random_slopes(sample)]
    assert drawn
    for sample in drawn:
        out = F.rrelu(sample.input, *sample.args, **sample.kwargs)
        low, high = sample.kwargs.get("lower", 1 / 8), sample.kwargs.get("upper", 1 / 3)
        x = sample.input.detach()
        assert torch.equal(out[x > 0], x[x > 0])
        assert ((out[x < 0] <= low * x[x < 0]) & (out[x < 0] >= high * x[x < 0])).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.module_cls.__name__)
def test_modules_are_torchs(info: Any, training: bool) -> None:
    inputs = info.module_inputs_func(info, "cpu", torch.float64, True, training)
    assert inputs
    for given in inputs:
        words = given.constructor_input
        theirs = info.module_cls(*words.args, **words.kwargs).double().train(training)
        ours = getattr(zm.nn, info.module_cls.__name__)(*words.args, **words.kwargs).double().train(training)
        ours.load_state_dict(theirs.state_dict())
        assert list(ours.state_dict()) == list(theirs.state_dict())
        torch.testing.assert_close(ours(*given.forward_input.args), theirs(*given.forward_input.args))
