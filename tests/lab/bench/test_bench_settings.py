"""What a benchmark is asked for: read, defaulted, refused."""

import pytest
import torch

from zeromean.lab.bench import settings
from zeromean.lab.bench.inputs import make, shape
from zeromean.lab.bench.settings import Case
from zeromean.lab.bench.subjects import SUBJECTS


def test_learnable_activations_have_two_layouts_and_the_others_one() -> None:
    found = settings(["elu", "pelu"], elements=["2**21"], device="cpu")
    assert found.cases == (
        Case("elu", "bfloat16", "contiguous", 2**21),
        Case("pelu", "bfloat16", "nchw", 2**21),
        Case("pelu", "bfloat16", "channels_last", 2**21),
    )
    assert found.contenders == ("zeromean", "eager", "inplace", "textbook", "compile")


def test_small_sizes_are_timed_with_both_passes_together() -> None:
    units = list(settings(["elu"], elements=["4096", "2^20", "2**21"], device="cpu").units())
    assert [(case.elements, which) for case, which in units] == [
        (4096, "both"),
        (2**20, "both"),
        (2**21, "forward"),
        (2**21, "backward"),
    ]


def test_everything_is_measured_unless_activations_are_named() -> None:
    assert {case.activation for case in settings(device="cpu").cases} == set(SUBJECTS)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"activations": ["elux"]}, "did you mean 'elu'"),
        ({"elements": ["many"]}, r"for example 2\*\*28"),
        ({"elements": ["0"]}, r"between 1 and 2\*\*40"),
        ({"elements": ["2**99"]}, r"between 1 and 2\*\*40"),
        ({"elements": ["1000"], "activations": ["prelu"]}, "multiple of 256 in the layout nchw, got 1000: take 1024"),
        ({"dtypes": ["bflaot16"]}, "did you mean 'bfloat16'"),
        ({"layouts": ["nhwc"]}, "did you mean 'nchw'"),
        ({"passes": ["back"]}, "did you mean 'backward'"),
        ({"competitors": ["eagre"]}, "did you mean 'eager'"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"device": "tpu"}, "auto, cpu or cuda, got 'tpu'"),
    ],
)
def test_bad_wishes_are_refused_with_a_remedy(wish: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**{"device": "cpu", **wish})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("elements", "expected"),
    [(2**28, (64, 256, 128, 128)), (2**21, (64, 256, 8, 16)), (4096, (16, 256, 1, 1)), (768 * 5, (1, 256, 3, 5))],
)
def test_shapes_hold_exactly_the_elements(elements: int, expected: tuple[int, ...]) -> None:
    assert shape(elements, "nchw") == expected
    assert torch.Size(expected).numel() == elements


def test_inputs_are_of_the_layout_and_the_same_each_time() -> None:
    one, other = (make(SUBJECTS["pelu"], 2**16, torch.float16, "channels_last", torch.device("cpu")) for _ in range(2))
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in (*one.xs, *one.gradients))
    assert len(one.xs) > 1, "so small an input would stay in the cache"
    for first, second in zip(one.xs + one.parameters, other.xs + other.parameters, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert [p.shape for p in one.parameters] == [(256,), (256,)]
    assert one.xs[0].std().item() == pytest.approx(2, rel=0.02)
