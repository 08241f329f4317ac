import math

import pytest
import torch
from torch import nn

import zeromean as zm
from zeromean.nn import init


@pytest.mark.parametrize(
    ("module", "variance_gain"),
    [
        (zm.nn.ELU(), 1.270843),
        (zm.nn.SELU(), 1.0),
        (zm.nn.ReLU(), 1.712859),
        (zm.nn.LeakyReLU(0.1), 1.630637),
        (zm.nn.ShiftedReLU(), 1.153864),
        (zm.nn.CELU(0.075), 1.643317),
        (zm.nn.CELU(0.3), 1.489659),
        (zm.nn.MPELU(alpha=0.25), 1.593315),
        (zm.nn.EELU(), 1.593315),
        (zm.nn.PELU(), 1.270843),
    ],
    ids=repr,
)
def test_variance_gains(module: nn.Module, variance_gain: float) -> None:
    assert zm.gain(module, "variance") == pytest.approx(variance_gain, abs=6e-7)


@pytest.mark.parametrize(
    ("name", "mean"), [("elu", 0.1605), ("shifted_relu", 0.0833), ("relu", 0.3989), ("eelu", 0.3393)]
)
def test_means(name: str, mean: float) -> None:
    assert zm.nn.moments(name).mean == pytest.approx(mean, abs=6e-5)


def test_forward_gains() -> None:
    assert zm.gain("elu") == pytest.approx(1.2452, abs=5e-5)
    assert zm.gain("relu") == pytest.approx(math.sqrt(2), rel=1e-12)
    assert zm.gain("selu") == pytest.approx(1.0, rel=1e-12)
    assert zm.gain(nn.Identity()) == pytest.approx(1.0, rel=1e-12)
    assert zm.gain(nn.LeakyReLU(0.1)) == pytest.approx(math.sqrt(2 / 1.01), rel=1e-12)


def test_backward_gains() -> None:
    assert zm.gain("relu", "backward") == pytest.approx(math.sqrt(2), rel=1e-12)
    assert zm.gain("shifted_relu", "backward") == pytest.approx(1 / math.sqrt(0.841344746068543), rel=1e-12)


def test_moments_of_a_smooth_function_in_closed_form() -> None:
    """E GELU(z) = 1 / (2 sqrt(pi)); the moments of ELU follow from the error function."""
    assert zm.nn.moments("gelu").mean == pytest.approx(0.5 / math.sqrt(math.pi), rel=1e-12)
    tail = math.exp(0.5) * 0.5 * math.erfc(1 / math.sqrt(2))
    assert zm.nn.moments("elu").mean == pytest.approx(1 / math.sqrt(2 * math.pi) + tail - 0.5, rel=1e-12)


@pytest.mark.parametrize("name", zm.nn.ACTIVATIONS)
def test_moments_agree_with_samples(name: str) -> None:
    z = torch.randn(1_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = zm.nn.by_name(name).double().eval()(z).detach()
    measured = zm.nn.moments(name)
    assert measured.mean == pytest.approx(float(y.mean()), abs=0.005)
    assert measured.variance == pytest.approx(float(y.var()), abs=0.01)
    assert measured.second == pytest.approx(measured.variance + measured.mean**2, rel=1e-9)


def test_channels_are_averaged_and_the_module_is_left_alone() -> None:
    module = zm.nn.PReLU(2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([0.0, 1.0]))
    state = module.weight.clone()
    assert zm.nn.moments(module).second == pytest.approx((0.5 + 1.0) / 2, rel=1e-9)
    assert module.training
    assert torch.equal(module.weight, state)
    assert module.weight.dtype == torch.float32
    assert zm.gain(zm.nn.ELU(inplace=True)) == zm.gain("elu")


def test_taylor_gain() -> None:
    assert zm.nn.taylor_gain(0, 1) == pytest.approx(math.sqrt(2))
    assert zm.nn.taylor_gain(1, 1) == pytest.approx(1)
    assert zm.nn.taylor_gain(0.25, 1) == pytest.approx(math.sqrt(2 / 1.0625))


LAYERS: list[tuple[nn.Linear | nn.Conv2d | nn.Conv1d | nn.ConvTranspose2d, float]] = [
    (nn.Linear(400, 300), 400),
    (nn.Conv1d(64, 200, 5), 64 * 5),
    (nn.Conv2d(40, 120, 3, groups=2), 20 * 9),
    (nn.ConvTranspose2d(60, 40, 4, stride=2), 60 * 16 / 4),
]


@pytest.mark.parametrize(("layer", "fan_in"), LAYERS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("gain", [None, 1.0, math.sqrt(2)], ids=["elu", "lecun", "he"])
def test_weights_and_biases(
    layer: nn.Linear | nn.Conv2d | nn.Conv1d | nn.ConvTranspose2d, fan_in: float, gain: float | None
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.ELU())
    assert zm.init_(model, "elu", gain=gain) is model
    expected = (zm.gain("elu") if gain is None else gain) / math.sqrt(fan_in)
    assert float(layer.weight.detach().std()) == pytest.approx(expected, rel=0.02)
    assert layer.bias is not None
    assert (layer.bias == 0).all()


@pytest.mark.parametrize("name", ["elu", "selu", "relu", "shifted_relu", "pelu"])
def test_the_second_moment_is_kept_through_twenty_layers(name: str) -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(20) for m in (nn.Linear(512, 512, bias=False), zm.nn.by_name(name))]
    model = zm.init_(nn.Sequential(*layers), name).eval()
    assert float((model(torch.randn(200, 512)) ** 2).mean().detach()) == pytest.approx(1.0, abs=0.4)


def test_a_gain_does_not_depend_on_where_it_is_first_asked_for() -> None:
    init._normal_quadrature.cache_clear()
    with torch.device("meta"):
        assert zm.gain("relu") == pytest.approx(2**0.5)
    with torch.inference_mode():
        assert zm.gain("mpelu") == zm.gain(zm.nn.MPELU())
    assert zm.gain("relu") == pytest.approx(2**0.5)
