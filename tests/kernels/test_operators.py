"""The registration of every activation's operators, on any device: here they run plain formulas."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import zeromean  # noqa: F401  (registers the operators)
from zeromean.kernels import memory, operator

# From inside torch: tracing makes an instance of an autograd function.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
Layout = Callable[[Tensor], Tensor]


class Sample(NamedTuple):
    """Arguments of one activation's operators, behind the input.

    Attributes:
        parameters: Values of the learnable parameters.
        scalars: In the order of the formulas.
        keeps: What the backward pass can do with: the output, the output and signs, the input.
        seed: Whether there is noise, and whether a flag can switch it off.
    """

    scalars: tuple[float, ...] = ()
    parameters: tuple[float, ...] = ()
    keeps: tuple[str, ...] = ("input",)
    seed: bool = False
    flag: bool = False


BOTH, ALL = ("output", "input"), ("output", "input", "signs")
SAMPLES = {
    "elu": Sample((1.5, 1.0, 0.7), keeps=ALL),
    "bias_elu": Sample((1.5, 1.0, 1.0), (0.3,), keeps=("output",)),
    "elu_add": Sample((0.5, 1.0, 1.0), (1.0,)),
    "shifted_relu": Sample(keeps=BOTH),
    "leaky_relu": Sample((0.2,), keeps=ALL),
    "prelu": Sample((2.0**-100, 0.0), (-0.4,), keeps=("input", "signs")),
    "eprelu": Sample((2.0**-100, 0.4), (-0.4,), keeps=("input", "signs"), seed=True, flag=True),
    "rrelu": Sample((0.1, 0.3), keeps=ALL, seed=True),
    "erelu": Sample((0.4,), keeps=BOTH, seed=True),
    "pelu": Sample((), (1.2, 0.7), keeps=BOTH),
    "mpelu": Sample((), (1.2, 0.7), keeps=BOTH),
    "eelu": Sample((0.8,), (1.2, 0.7), keeps=BOTH, seed=True, flag=True),
    "silu": Sample(),
    "swish": Sample((), (0.7,)),
    "gelu": Sample(),
    "gelu_tanh": Sample(),
    "mish": Sample(),
}
LAYOUTS: dict[str, Layout] = {
    "rows": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
}
KEEPS = [(name, keep) for name, sample in SAMPLES.items() for keep in sample.keeps]
each_name = pytest.mark.parametrize("name", SAMPLES)
each_keep = pytest.mark.parametrize(("name", "keep"), KEEPS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def overload(name: str) -> Any:
    return getattr(torch.ops.zeromean, name).default


def rest(name: str, x: Tensor, noisy: bool = True) -> tuple[Any, ...]:
    """All arguments of the forward operators but x, with learnable parameters in x's type."""
    sample, shape = SAMPLES[name], (1, x.shape[1], *(1,) * (x.ndim - 2))
    if name == "elu_add":
        shape = tuple(x.shape)
    p0, p1, *_ = [torch.full(shape, value, dtype=x.dtype) for value in sample.parameters] + [None, None]
    seed = torch.tensor(7) if sample.seed else None
    flag = torch.tensor(noisy) if sample.flag else None
    return p0, p1, seed, flag, list(sample.scalars)


def inputs(layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return LAYOUTS[layout](torch.randn(2, 3, 5, 4, dtype=dtype) * 2)


def backward_arguments(name: str, keep: str, x: Tensor) -> tuple[Any, ...]:
    """Of the backward operators; elu_add keeps neither its residual nor anything of it."""
    arguments = rest(name, x)
    y, signs = overload(f"{name}_signs")(x, *arguments)
    if name == "elu_add":
        arguments = (None, *arguments[1:])
    kept = x if keep == "input" else y
    return torch.randn_like(y), kept, signs if keep == "signs" else None, *arguments, keep != "input"


def backward_operators(name: str) -> list[str]:
    """The gradient of a residual is the incoming one, so no operator makes it."""
    return [f"{name}_backward"] if name == "elu_add" else [f"{name}_backward", f"{name}_backward_parameters"]


def learnable(arguments: tuple[Any, ...]) -> list[Tensor]:
    return [a for a in arguments[:2] if a is not None]


def test_there_is_a_sample_of_every_operator() -> None:
    assert set(SAMPLES) == set(operator._operators)


@pytest.mark.parametrize("layout", ["rows", "channels_last"])
@each_name
def test_forward_operators_are_registered_in_full(name: str, layout: str) -> None:
    x = inputs(layout)
    torch.library.opcheck(overload(name), (x.requires_grad_(), *rest(name, x)))
    torch.library.opcheck(overload(f"{name}_signs"), (x.detach(), *rest(name, x)))


@pytest.mark.parametrize("layout", ["rows", "channels_last"])
@each_keep
def test_backward_operators_are_registered_in_full(name: str, keep: str, layout: str) -> None:
    arguments = backward_arguments(name, keep, inputs(layout))
    for backward in backward_operators(name):
        torch.library.opcheck(overload(backward), arguments)


@each_layout
@each_name
def test_results_lie_as_the_fake_ones(name: str, layout: str) -> None:
    x = inputs(layout)
    calls = [(overload(name), (x, *rest(name, x))), (overload(f"{name}_signs"), (x, *rest(name, x)))]
    calls += [(overload(f"{name}_backward"), backward_arguments(name, "input", x))]
    for function, arguments in calls:
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = function(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
        for real, fake in zip(as_list(function(*arguments)), as_list(fakes), strict=True):
            assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)
            assert real.stride() == torch.empty_like(x).stride() or real.dtype == torch.uint8


def as_list(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


@pytest.mark.parametrize("layout", ["rows", "channels_last"])
@each_name
def test_gradients_through_the_operator(name: str, layout: str) -> None:
    """Against autograd of the plain formula; a noisy pass teaches nothing."""
    x = inputs(layout, torch.float64).requires_grad_()
    for noisy in (True, False):
        arguments = rest(name, x, noisy)
        leaves = [x, *(p.requires_grad_() for p in learnable(arguments))]
        gradient = torch.randn_like(x)
        actual = torch.autograd.grad(overload(name)(x, *arguments), leaves, gradient)
        y = operator._operators[name].value(x, *arguments[:4], *arguments[4])
        expected = list(torch.autograd.grad(y, leaves, gradient))
        if noisy and SAMPLES[name].flag:
            expected[1:] = [torch.zeros_like(p) for p in expected[1:]]
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other)


@each_keep
def test_backward_operators_equal_autograd_of_the_formula(name: str, keep: str) -> None:
    x = inputs("channels_last", torch.float64)
    arguments = backward_arguments(name, keep, x)
    *_, actual = (as_list(overload(backward)(*arguments)) for backward in backward_operators(name))
    assert torch.equal(overload(f"{name}_backward")(*arguments), actual[0])
    leaves = [x.requires_grad_(), *(p.requires_grad_() for p in learnable(rest(name, x)))]
    padded = (*leaves[1:], None, None)[:2]
    y = operator._operators[name].value(x, *padded, *rest(name, x)[2:4], *SAMPLES[name].scalars)
    expected = torch.autograd.grad(y, leaves, arguments[0])
    learns = not SAMPLES[name].flag
    for index, (one, other) in enumerate(zip(actual, expected, strict=False)):
        torch.testing.assert_close(one, other if learns or index == 0 else torch.zeros_like(other))


@each_name
def test_the_operator_can_be_differentiated_twice(name: str) -> None:
    """In quiet passes, where the parameters learn."""
    x = (torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2).requires_grad_()
    arguments = rest(name, x, noisy=False)
    leaves = [p.requires_grad_() for p in learnable(arguments)]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        padded = (*parameters, None, None)[:2]
        return overload(name)(x, *padded, *arguments[2:])  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(call, (x, *leaves))
    assert torch.autograd.gradgradcheck(call, (x, *leaves))


@pytest.mark.parametrize("dim", [0, 1, 3])
@each_name
def test_vmap_equals_a_loop(name: str, dim: int) -> None:
    batch = torch.randn(4, 3, 5, 3)
    arguments = rest(name, batch.select(dim, 0))

    def backward(one: Tensor) -> Any:
        arguments = backward_arguments(name, SAMPLES[name].keeps[0], one)
        return [r for backward in backward_operators(name) for r in as_list(overload(backward)(*arguments))]

    def forward(one: Tensor) -> Any:
        return overload(name)(one, *arguments), *overload(f"{name}_signs")(one, *arguments)

    for call in (forward, backward):
        torch.manual_seed(0)
        together = torch.vmap(call, in_dims=dim, randomness="same")(batch)
        each = []
        for one in batch.unbind(dim):
            torch.manual_seed(0)
            each.append(call(one))
        for result, parts in zip(together, zip(*each, strict=True), strict=True):
            assert torch.equal(result, torch.stack(parts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_name
def test_autocast_takes_the_input_as_it_is(name: str, dtype: torch.dtype) -> None:
    x = inputs("rows", dtype)
    for other in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", other):
            assert overload(name)(x, *rest(name, x)).dtype == dtype
            assert overload(f"{name}_backward")(*backward_arguments(name, "input", x)).dtype == dtype


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 64, 1001])
def test_unpacking_undoes_packing(size: int) -> None:
    flags = torch.rand(size) > 0.5
    bits = memory.pack(flags)
    assert (bits.dtype, bits.shape) == (torch.uint8, ((size + 7) // 8,))
    assert [int(bits[m // 8]) >> m % 8 & 1 for m in range(size)] == flags.int().tolist()
    assert torch.equal(memory.unpack(bits, flags), flags)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2), (2, 1, 0)], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 3, 5), (3, 1, 1), (2, 0, 3)], ids=str)
def test_bits_lie_in_the_order_of_memory(order: tuple[int, ...], shape: tuple[int, ...]) -> None:
    stored = torch.rand([shape[d] for d in order]) > 0.5
    flags = stored.permute([order.index(d) for d in range(3)])
    assert flags.shape == shape
    assert torch.equal(memory.pack(flags), memory.pack(stored.reshape(-1)))
    unpacked = memory.unpack(memory.pack(flags), flags)
    assert torch.equal(unpacked, flags)
    assert unpacked.stride() == flags.stride() or 1 in shape or 0 in shape


def test_strides_of_a_single_element_do_not_matter() -> None:
    """Maps of 1x1 are channels_last and contiguous in one, whatever their strides."""
    rows = torch.randn(2, 8, 1, 1)
    last = torch.randn(2, 1, 1, 8).permute(0, 3, 1, 2)
    one = torch.randn(1, 3, 4).permute(1, 0, 2)
    assert rows.stride() != last.stride()
    assert memory.laid_out_as(rows, last) is rows
    assert memory.strided(last, rows.stride()) is last
    assert memory.laid_out_as(one, torch.empty(3, 1, 4)) is one
    assert torch.equal(memory.pack(rows > 0), memory.pack((rows > 0).as_strided(rows.shape, last.stride())))


@pytest.mark.parametrize("spread", [lambda x: x[:, ::2], lambda x: x[:, :1].expand(3, 4), lambda x: x[:, :4].t()])
def test_other_strides_do_matter(spread: Layout) -> None:
    x = spread(torch.randn(3, 8))
    copy = memory.laid_out_as(x, torch.empty(x.shape))
    assert copy.is_contiguous()
    assert torch.equal(copy, x)
    assert memory.strided(x, copy.stride()).stride() == copy.stride()


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.zeros(2, 3, 4), True),
        (torch.zeros(2, 3, 4).permute(2, 0, 1), True),
        (torch.zeros(2, 3, 4)[:, :2], False),
        (torch.zeros(2, 3, 4)[:1], True),
        (torch.zeros(2, 3, 4)[:, :, ::2], False),
        (torch.zeros(2, 1, 4).expand(2, 3, 4), False),
        (torch.zeros(0, 3), True),
        (torch.zeros(()), True),
    ],
)
def test_what_is_dense(x: Tensor, expected: bool) -> None:
    assert memory.is_dense(x) is expected
    assert memory.is_dense(memory.dense(x))
    assert torch.equal(memory.dense(x), x)
