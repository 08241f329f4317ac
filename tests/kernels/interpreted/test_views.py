"""Shapes, memory layouts, places of the parameters: every way in which the programs see memory."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import zeromean as zm
from tests.kernels.interpreted.calls import CALLS, Call, assert_exact, normal, results
from tests.kernels.interpreted.device import DEVICE
from zeromean.kernels import launch, tiles
from zeromean.nn.parameters import align

F = zm.functional
# One call for each path: signs or not, no to two parameters, each kind of noise, what is added before and after.
PATHS = [
    "elu:1.0,auto",
    "elu:-2.0,output",
    "prelu:-0.5,auto",
    "pelu:1.5,0.7,input",
    "swish:0.7",
    "rrelu:0.125,0.3333333333333333",
    "rrelu:-0.5,0.5",
    "eprelu:noisy,0.1,auto",
    "eprelu:quiet,-0.3,output",
    "eelu:noisy,1.0,auto",
    "eelu:quiet,1.0,auto",
    "bias_elu:1.5",
    "elu_add:0.5",
]
NOISY = ["rrelu:-0.5,0.5", "erelu:0.4", "eprelu:noisy,0.1,auto", "eelu:noisy,1.0,auto"]
LEARNING = [name for name in PATHS if CALLS[name].parameters]


class Layout(NamedTuple):
    """Of x: its shape, and whether the channels in dimension 1 run fastest."""

    shape: tuple[int, ...]
    last: bool = False

    def __str__(self) -> str:
        return "x".join(map(str, self.shape)) + ("-last" if self.last else "")

    def place(self, name: str) -> tuple[int, ...]:
        """A parameter's shape: one for all, one a channel, or one a slice."""
        return {"one": (1,), "channels": self.shape[1:2], "slices": (self.shape[0], 1, 1)}[name]


# Whole tiles and rests, planes that are multiples of eight and not, more units than a strip has.
LAYOUTS = [
    Layout((6, 24)),
    Layout((6, 10)),
    Layout((3, 264)),
    Layout((2, 3, 8, 8)),
    Layout((2, 3, 8, 8), last=True),
    Layout((2, 3, 7, 7)),
    Layout((2, 3, 7, 7), last=True),
    Layout((2, 8, 4, 6), last=True),
    Layout((2, 16, 5, 3), last=True),
    Layout((2, 8, 1, 1)),
    Layout((1, 8, 3, 1), last=True),
    Layout((2, 3, 2, 2, 4), last=True),
]
each_path = pytest.mark.parametrize("call", [CALLS[name] for name in PATHS], ids=lambda call: call.name)
each_learning = pytest.mark.parametrize("call", [CALLS[name] for name in LEARNING], ids=lambda call: call.name)
each_noisy = pytest.mark.parametrize("call", [CALLS[name] for name in NOISY], ids=lambda call: call.name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@each_path
def test_layouts(call: Call, layout: Layout) -> None:
    x = normal(*layout.shape, last=layout.last)
    assert_exact(call, x, call.tensors(*layout.place("channels")))


@pytest.mark.parametrize("layout", [Layout((6, 10)), Layout((2, 3, 8, 8), last=True)], ids=str)
@each_learning
def test_one_parameter_for_all(call: Call, layout: Layout) -> None:
    assert_exact(call, normal(*layout.shape, last=layout.last), call.tensors(1))


@pytest.mark.parametrize(
    ("name", "layout", "place", "program"),
    [
        ("elu:1.0,auto", Layout((2, 3, 7, 7), last=True), "one", "rows"),
        ("pelu:1.5,0.7,input", Layout((2, 3, 7, 7), last=True), "one", "rows"),
        ("pelu:1.5,0.7,input", Layout((2, 3, 7, 7), last=True), "channels", "columns"),
        ("pelu:1.5,0.7,input", Layout((2, 3, 7, 7)), "channels", "rows"),
        ("pelu:1.5,0.7,input", Layout((6, 10)), "channels", "columns"),
        ("prelu:-0.5,auto", Layout((6, 24)), "channels", "columns"),
        ("prelu:-0.5,auto", Layout((6, 10)), "channels", "columns"),
        ("rrelu:-0.5,0.5", Layout((2, 8, 5, 3), last=True), "one", "columns"),
        ("rrelu:-0.5,0.5", Layout((2, 3, 7, 7), last=True), "one", "columns"),
        ("eprelu:noisy,0.1,auto", Layout((2, 3, 7, 7), last=True), "one", "columns"),
        ("eprelu:noisy,0.1,auto", Layout((2, 3, 7, 7), last=True), "channels", "columns"),
        ("eelu:noisy,1.0,auto", Layout((2, 3, 7, 7)), "channels", "rows"),
        ("eelu:noisy,1.0,auto", Layout((2, 3, 7, 7), last=True), "channels", "columns"),
    ],
    ids=str,
)
def test_the_program_that_runs(name: str, layout: Layout, place: str, program: str, launched: list[str]) -> None:
    """Not the plain operators, which would be right as well."""
    x, parameters = normal(*layout.shape, last=layout.last), CALLS[name].tensors(*layout.place(place))
    results(CALLS[name], x, parameters, torch.randn_like(x))
    assert launched == [f"forward_{program}", f"backward_{program}", *["finish"] * bool(parameters)]


@pytest.mark.parametrize("setting", [{"_TILE": 128}, {"_TILE": 128, "_MOST_ROWS": 2}, {"_LONGEST_INT32": 0}], ids=str)
@pytest.mark.parametrize("layout", [Layout((2, 3, 24, 24)), Layout((2, 8, 5, 3), last=True)], ids=str)
@pytest.mark.parametrize("name", ["pelu:1.5,0.7,input", "prelu:-0.5,auto", "eelu:noisy,1.0,auto"])
def test_what_only_large_tensors_need(
    name: str, layout: Layout, setting: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows longer than a tile, more of them than a grid's second axis has, and positions in 64 bits."""
    for key, value in setting.items():
        monkeypatch.setattr(launch, key, value)
    x = normal(*layout.shape, last=layout.last)
    assert_exact(CALLS[name], x, CALLS[name].tensors(*layout.place("channels")))


@pytest.mark.parametrize("shape", [(3, 5, 16), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("name", [*LEARNING, "rrelu:-0.5,0.5"])
def test_stacked_networks(
    name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, launched: list[str]
) -> None:
    """Parameters and seeds [R, 1, 1]."""
    seeds = torch.tensor([5, 6, 7], device=DEVICE).reshape(3, 1, 1)
    monkeypatch.setattr("tests.cases.seed", lambda x: seeds)
    assert_exact(CALLS[name], normal(*shape), CALLS[name].tensors(3, 1, 1))
    if not name.endswith("output"):
        assert launched[:2] == ["forward_rows", "backward_rows"]


@pytest.mark.parametrize(
    "spread",
    [
        lambda x: x.t(),
        lambda x: x[::2, ::3],
        lambda x: x.t()[1:],
        lambda x: x[:, :1].expand(-1, 16),
        lambda x: x.reshape(2, 3, 24).permute(2, 0, 1),
        lambda x: x.reshape(2, 3, 24).permute(1, 2, 0)[:, ::2],
    ],
    ids=range(6),
)
@each_path
def test_strided_inputs(call: Call, spread: Callable[[Tensor], Tensor]) -> None:
    assert_exact(call, spread(normal(6, 24)), call.tensors(1))


@pytest.mark.parametrize(
    "gradient",
    [
        lambda x: torch.tensor(1.5, device=DEVICE).expand(x.shape),
        lambda x: torch.randn(*x.shape, 2, device=DEVICE)[..., 0],
        lambda x: torch.randn(x.shape, device=DEVICE),
        lambda x: torch.randn(x.shape, device=DEVICE).movedim(1, -1).contiguous().movedim(-1, 1),
        lambda x: torch.randn(math.prod(x.shape) + 1, device=DEVICE)[1:].view(x.shape),
    ],
    ids=["expanded", "strided", "rows", "last", "unaligned"],
)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", ["elu:1.0,auto", "prelu:-0.5,auto", "pelu:1.5,0.7,input", "bias_elu:1.5"])
def test_gradients_of_any_layout(name: str, last: bool, gradient: Callable[[Tensor], Tensor]) -> None:
    x = normal(2, 8, 3, 4, last=last)
    assert_exact(CALLS[name], x, CALLS[name].tensors(8), gradient(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [Layout((2, 3, 8, 8)), Layout((6, 10))], ids=str)
@each_learning
def test_parameters_of_another_type(call: Call, layout: Layout, dtype: torch.dtype) -> None:
    assert_exact(call, normal(*layout.shape), call.tensors(layout.shape[1], dtype=dtype))


@pytest.mark.parametrize("layout", [Layout((2, 3, 8, 8)), Layout((2, 16, 5, 3), last=True), Layout((4000,))], ids=str)
@each_learning
def test_sums_are_the_same_bits_each_time(call: Call, layout: Layout) -> None:
    x, parameters = normal(*layout.shape, last=layout.last), call.tensors(*(layout.place("channels") or (1,)))
    gradient = torch.randn_like(x)
    first = results(call, x, parameters, gradient)
    for one, other in zip(first, results(call, x, parameters, gradient), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (2, 8, 5, 3)], ids=str)
@each_noisy
def test_noise_belongs_to_the_logical_position(call: Call, shape: tuple[int, ...]) -> None:
    x, parameters = normal(*shape), call.tensors(1)
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    gradient = torch.ones_like(x)
    for one, other in zip(
        results(call, x, parameters, gradient), results(call, last, parameters, gradient), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layout", [Layout((4999,)), Layout((2, 8, 4, 6), last=True)], ids=str)
@each_noisy
def test_both_passes_make_the_same_noise(call: Call, layout: Layout) -> None:
    """On the noisy side the function is a line through 0 for each element."""
    sign = -1.0 if call.name.startswith("rrelu") else 1.0
    x = sign * (normal(*layout.shape, last=layout.last).abs() + 0.5)
    y, dx, *_ = results(call, x, call.tensors(1), torch.ones_like(x))
    assert dx.std() > 0.01
    torch.testing.assert_close(dx, y / x, rtol=1e-6, atol=1e-7)


def test_the_layouts_have_groups_of_every_kind() -> None:
    kinds = set()
    for layout in LAYOUTS:
        x = normal(*layout.shape, last=layout.last)
        slopes = align(torch.ones(layout.shape[1], device=DEVICE), x, "slopes")
        view = launch.view_of(x, [slopes], torch.tensor(1, device=DEVICE))
        assert view is not None
        kinds.add(launch._columns(view, True, 128, 8, 1)[2]["GROUPED"] if view.columns else view.inner % 8 == 0)
    assert kinds == {tiles.SCATTERED.value, tiles.BY_PLANE.value, tiles.BY_ROW.value, True, False}


@pytest.mark.parametrize("last", [False, True])
def test_a_residual_of_another_layout(last: bool) -> None:
    call = Call("elu_add", F.elu_add)
    assert_exact(call, normal(2, 8, 3, 4, last=last), [normal(2, 8, 3, 4, last=not last)])
