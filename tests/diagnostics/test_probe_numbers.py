"""What the probe measures, against plain loops; which layers it reads; when."""

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zeromean as zm
from zeromean.diagnostics import light
from zeromean.diagnostics.tails import tails


def network(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), activation(), nn.Linear(20, 9), activation(), nn.Linear(9, 3))


def linear(model: nn.Sequential, place: int) -> nn.Linear:
    layer = model[place]
    assert isinstance(layer, nn.Linear)
    return layer


def norm(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    size: Tensor = weight.grad.norm()
    return size


def batch(count: int = 32, features: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, features, generator=generator)
    return x, torch.randint(0, 3, (count,), generator=generator)


def test_numbers_of_an_activation_against_loops() -> None:
    model, (x, y) = network(), batch()
    layer = zm.probe.measure(model, x, y, preset="light")["1"]
    net = model[0](x).detach()
    columns = [[max(0.0, float(net[n, unit])) for n in range(len(x))] for unit in range(20)]
    means = [sum(column) / len(column) for column in columns]
    variances = [sum((v - m) ** 2 for v in column) / len(column) for column, m in zip(columns, means, strict=True)]
    off = [sum(v <= 0 for v in net[:, unit].tolist()) / len(x) for unit in range(20)]
    assert layer.of_units["mean"] == pytest.approx(means, rel=1e-5, abs=1e-7)
    assert layer.of_units["spread"] == pytest.approx([math.sqrt(v) for v in variances], rel=1e-4)
    assert layer.of_units["off"] == pytest.approx(off)
    assert layer.value("dead") == pytest.approx(sum(share == 1 for share in off) / 20)
    assert layer.value("never_off") == pytest.approx(sum(share == 0 for share in off) / 20)
    assert layer.value("saturated") == pytest.approx(sum(share >= 0.9 for share in off) / 20)
    spread = math.sqrt(sum(variances) / 20)
    assert layer.value("spread") == pytest.approx(spread, rel=1e-5)
    assert layer.value("shift") == pytest.approx(math.sqrt(sum(m * m for m in means) / 20) / spread, rel=1e-5)
    assert (layer.units, layer.samples, layer.role) == (20, 32, "activation")


def test_numbers_of_a_layer_against_autograd() -> None:
    model, (x, y) = network(), batch()
    report = zm.probe.measure(model, x, y, preset="light")
    hidden = model[1](model[0](x))
    net = model[2](hidden)
    net.retain_grad()
    F.cross_entropy(model[4](model[3](net)), y).backward()
    layer = report["2"]
    assert layer.value("weight_gradient") == pytest.approx(float(norm(linear(model, 2).weight)), rel=1e-5)
    assert layer.value("output_gradient") == pytest.approx(float(net.grad.norm()), rel=1e-5)
    assert layer.value("input_mean") == pytest.approx(float(hidden.detach().mean()), rel=1e-5)
    assert layer.of_units["mean"] == pytest.approx(net.detach().mean(0).tolist(), rel=1e-4, abs=1e-6)
    assert report["1"].value("mean") == layer.value("input_mean")


def test_dead_and_never_off_mean_every_sample() -> None:
    model = nn.Sequential(nn.Linear(1, 4), nn.ReLU())
    with torch.no_grad():
        linear(model, 0).weight.fill_(1)
        linear(model, 0).bias.copy_(torch.tensor([-9.5, -8.5, -0.5, 0.5]))
    layer = zm.probe.measure(model, torch.arange(10.0)[:, None], preset="light")["1"]
    assert layer.of_units["off"] == pytest.approx([1, 0.9, 0.1, 0])
    assert (layer.value("dead"), layer.value("never_off"), layer.value("saturated")) == (0.25, 0.25, 0.5)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.second(self.first(x).relu_())
        return scores


def test_what_is_overwritten_is_measured_before_and_after() -> None:
    model, x = InPlace(), torch.randn(9, 4)
    report = zm.probe.measure(model, x, preset="light")
    net = model.first(x).detach()
    assert report["first"].value("mean") == pytest.approx(float(net.mean()), rel=1e-4)
    assert report["second"].value("input_mean") == pytest.approx(float(net.relu().mean()), rel=1e-4)


def test_channels_are_the_units_of_a_convolution_and_of_its_activation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ELU(), nn.Conv2d(5, 4, 1), nn.PReLU(4), nn.Flatten(), nn.Linear(64, 2))
    x = torch.randn(7, 3, 6, 6)
    report = zm.probe.measure(model, x, preset="light")
    out = model[1](model[0](x)).detach()
    assert report["1"].units == 5
    assert report["1"].samples == 7 * 16
    assert report["1"].of_units["mean"] == pytest.approx(out.mean((0, 2, 3)).tolist(), rel=1e-4, abs=1e-6)
    assert report["3"].of_units["off"] == pytest.approx((model[2](out) <= 0).float().mean((0, 2, 3)).tolist())
    assert report["0"].value("weight_gradient") is None


def test_features_are_the_units_behind_a_linear_layer_of_any_shape() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))
    for shape in ((5, 4), (3, 5, 4), (2, 3, 5, 4)):
        report = zm.probe.measure(model, torch.randn(shape), preset="light")
        assert (report["0"].units, report["1"].units) == (6, 6)


@pytest.mark.parametrize(
    ("activation", "limits"),
    [
        (nn.ReLU(), (0, 0, math.inf)),
        (zm.nn.ShiftedReLU(), (-1, -1, math.inf)),
        (nn.LeakyReLU(0.01), (-math.inf, 0, math.inf)),
        (zm.nn.ELU(), (math.log(0.05), math.log(0.5), math.inf)),
        (nn.Tanh(), (-math.acosh(20**0.5), -math.inf, math.acosh(20**0.5))),
        (nn.Hardtanh(), (-1, -math.inf, 1)),
        (nn.Identity(), (-math.inf, -math.inf, math.inf)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_tails_of_activations(activation: nn.Module, limits: tuple[float, ...]) -> None:
    found = tails(activation)
    assert (found.lower, found.knee, found.upper) == pytest.approx(limits, abs=1 / 16)


def test_tails_follow_a_learned_slope() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4))
    x = torch.randn(50, 3)
    assert zm.probe.measure(model, x, preset="light")["1"].value("dead") == 0
    with torch.no_grad():
        next(model[1].parameters()).zero_()
        linear(model, 0).bias.sub_(100)
    assert zm.probe.measure(model, x, preset="light")["1"].value("dead") == 1


def test_a_step_is_a_forward_pass_and_every_chooses_some() -> None:
    model, (x, y) = network(), batch()
    with zm.probe(model, every=3) as p:
        for _ in range(8):
            F.cross_entropy(model(x), y).backward()
            model.eval()
            with torch.no_grad():
                model(x)
            model.train()
    report = p.report()
    assert report.steps == (0, 3, 6)
    assert all(len(values) == 3 for values in report["0"].series.values())
    assert None not in report["0"].series["weight_gradient"]
    with zm.probe(model, every=lambda step: step in (1, 2)) as p:
        for _ in range(4):
            model(x)
    assert p.report().steps == (1, 2)
    with zm.probe(model, every=np.int64(2)) as p:  # type: ignore[arg-type]
        for _ in range(4):
            model(x)
    assert p.report().steps == (0, 2)


def test_many_passes_are_summed_up_together() -> None:
    model, (x, y) = network(), batch()
    with zm.probe(model) as p:
        for shift in range(130):
            F.cross_entropy(model(x + shift), y).backward()
    single = [zm.probe.measure(model, x + shift, y, preset="light")["1"].value("mean") for shift in (0, 64, 129)]
    assert [p.report()["1"].series["mean"][shift] for shift in (0, 64, 129)] == pytest.approx(single, rel=1e-5)


@pytest.mark.parametrize("grouped", [frozenset(), frozenset({"cpu"})], ids=["each", "grouped"])
@pytest.mark.parametrize("name", ["mlp", "convolutional", "in place", "slopes"])
def test_layers_that_wait_show_what_they_show_at_once(
    name: str, grouped: frozenset[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first pass measures at once; the later ones when the forward pass ends, where nothing overwrites."""
    monkeypatch.setattr(light, "GROUPED", grouped)
    torch.manual_seed(0)
    model, x = {
        "mlp": (nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), zm.nn.ELU()) for _ in range(4))), torch.randn(32, 6)),
        "convolutional": (
            nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)),
            torch.randn(5, 2, 6, 6),
        ),
        "in place": (InPlace(), torch.randn(9, 4)),
        "slopes": (nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.LeakyReLU(), nn.Sigmoid()), torch.randn(9, 4)),
    }[name]
    with zm.probe(model) as p:
        for _ in range(3):
            model(x).square().sum().backward()
    for layer in p.report().layers:
        once = zm.probe.measure(model, x, preset="light")[layer.name]
        for quantity, (first, *later) in layer.series.items():
            assert first is not None
            assert later == pytest.approx([first, first], rel=1e-5, abs=1e-7), (layer.name, quantity)
        for quantity, values in once.of_units.items():
            assert layer.of_units[quantity] == pytest.approx(values, rel=1e-4, abs=1e-6), (layer.name, quantity)


class Sometimes(nn.Module):
    """Overwrites what a layer gave out, in its second pass only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.passes = nn.Linear(4, 5), nn.Linear(5, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        self.passes += 1
        if self.passes == 2:
            hidden.mul_(100)
        scores: Tensor = self.second(hidden)
        return scores


def test_what_is_overwritten_unexpectedly_is_not_read() -> None:
    model, x = Sometimes(), torch.randn(9, 4)
    with zm.probe(model) as p:
        for _ in range(3):
            model(x).sum().backward()
    report = p.report()
    first, second, third = report["first"].series["mean"]
    assert second is None
    assert first == third == pytest.approx(float(model.first(x).detach().mean()), rel=1e-4)
    means = report["second"].series["input_mean"]
    assert means[1] == pytest.approx(100 * float(model.first(x).detach().mean()), rel=1e-4)


class Hidden(nn.Module):
    """Overwrites what a layer gave out behind autograd's back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden.data.add_(7)
        scores: Tensor = self.second(hidden)
        return scores


def test_what_is_overwritten_in_secret_is_measured_before() -> None:
    model, x = Hidden(), torch.randn(9, 4)
    with zm.probe(model) as p:
        model(x).sum().backward()
        model(x).sum().backward()
    means = p.report()["first"].series["mean"]
    assert means == pytest.approx([float(model.first(x).detach().mean())] * 2, rel=1e-4)


class Remembering(nn.Module):
    """Takes note of its input, and of whether the one that it is to watch is alive."""

    def __init__(self, watched: nn.Module | None = None) -> None:
        super().__init__()
        self.watched, self.alive = watched, False

    def forward(self, x: Tensor) -> Tensor:
        self.noted = weakref.ref(x)
        if isinstance(self.watched, Remembering):
            self.alive = self.watched.noted() is not None
        return x


@pytest.mark.parametrize(("width", "held"), [(8, True), (2**13, False)])
def test_only_small_layers_wait(width: int, held: bool) -> None:
    first = Remembering()
    last = Remembering(first)
    model = nn.Sequential(nn.Linear(4, width), first, nn.Linear(width, width), nn.ReLU(), last)
    with zm.probe(model) as p, torch.no_grad():
        model(torch.randn(9, 4))
        model(torch.randn(9, 4))
    assert last.alive == held
    assert None not in p.report()["0"].series["mean"]


def test_numbers_without_units_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 3), Total())
    x = torch.randn(5, 4)
    report = zm.probe.measure(model, x, preset="light", layers=["0", "1"])
    assert [layer.name for layer in report.layers] == ["0"]
    assert "no units" in next(one.reason for one in report.skipped if one.name == "1")
    flat = zm.probe.measure(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), x[0], preset="light")
    assert (flat["1"].units, flat["1"].samples) == (3, 1)


class Total(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum()


def test_many_rows_are_summed_up_exactly() -> None:
    x = torch.randn(300_000, 3) + 30
    report = zm.probe.measure(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), x, preset="light", layers=["0"])
    exact = x.double().std(0, correction=0).square().mean().sqrt()
    assert report["0"].value("input_shift") == pytest.approx(float(x.double().mean() / exact), rel=2e-6)


def test_a_layer_called_again_is_another_layer() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 8), shared, nn.Linear(8, 3), shared)
    report = zm.probe.measure(model, torch.randn(9, 4), preset="light")
    assert [layer.name for layer in report.layers] == ["0", "1", "2", "1#2"]
    assert [report["1"].units, report["1#2"].units] == [8, 3]


def test_a_layer_called_again_is_left_out_of_the_natural_gradient() -> None:
    model, (x, y) = network(), batch()
    twice = nn.Linear(9, 9)
    shared = nn.Sequential(*list(model)[:4], twice, nn.ELU(), twice, nn.ELU(), model[4])
    report = zm.probe.measure(shared, x, y)
    assert "k" in report["0"].series
    assert "k" not in report["4"].series


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.own = nn.Linear(4, 5), nn.Linear(5, 3), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.own(self.second(F.relu(self.first(x)).relu()))
        return torch.tanh(hidden)


def test_activations_called_as_functions_are_named() -> None:
    report = zm.probe.measure(Functional(), torch.randn(5, 4), preset="light")
    expected = ("relu called as a function behind first, 2 times", "tanh called as a function behind second")
    assert report.unseen == expected


@dataclass
class Output:
    loss: None
    logits: Tensor


class Structured(nn.Module):
    def __init__(self, form: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.layer, self.form = nn.Linear(4, 3), form

    def forward(self, x: Tensor, *, twice: bool = False) -> object:
        return self.form(self.layer(x))


@pytest.mark.parametrize(
    "form",
    [lambda y: (y, None), lambda y: {"loss": y.sum(), "logits": y}, lambda y: Output(None, y), lambda y: [None, y]],
)
def test_outputs_and_inputs_of_any_form(form: Callable[[Tensor], object]) -> None:
    x, y = batch(5, 4)
    model = Structured(form)
    for inputs in (x, (x,), [x], {"x": x, "twice": True}):
        report = zm.probe.measure(model, inputs, y, preset="light")
        assert report["layer"].value("weight_gradient")
    named = zm.probe.measure(model, x, preset="light", layers="*")
    assert named["Structured"].units == 3


class Fancy(nn.Module):
    """An activation that nobody listed."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0) ** 2


def test_an_unknown_activation_is_known_by_what_it_does() -> None:
    model = nn.Sequential(nn.Linear(4, 5), Fancy(), nn.Dropout(), nn.Softmax(-1), nn.Flatten())
    report = zm.probe.measure(model, torch.randn(6, 4), preset="light")
    assert [layer.kind for layer in report.layers] == ["Linear", "Fancy"]
    assert {one.kind for one in report.skipped} == {"Dropout", "Softmax", "Flatten"}
    assert all("neither" in one.reason for one in report.skipped)


class Scaled(nn.Module):
    """Has layers in it and weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 5), nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scale * self.layer(x)
        return y


def test_weights_beside_layers_are_named_as_not_read() -> None:
    report = zm.probe.measure(
        nn.Sequential(Scaled(), nn.Sequential(nn.Linear(5, 2))), torch.randn(6, 4), preset="light"
    )
    assert [layer.name for layer in report.layers] == ["0.layer", "1.0"]
    assert [(one.name, one.kind) for one in report.skipped] == [("0", "Scaled")]


def test_layers_by_name_glob_and_class() -> None:
    model, (x, _) = network(), batch()
    chosen: Mapping[str, list[str]] = {"2": ["2"], "[13]": ["1", "3"]}
    for pattern, names in chosen.items():
        assert [layer.name for layer in zm.probe.measure(model, x, None, "light", pattern).layers] == names
    both = zm.probe.measure(model, x, preset="light", layers=[nn.ReLU, "0"])
    assert [layer.name for layer in both.layers] == ["0", "1", "3"]
    norms = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
    assert zm.probe.measure(norms, x, preset="light", layers=nn.LayerNorm)["1"].role == "other"


def test_what_did_not_run_is_listed() -> None:
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    report = zm.probe.measure(attention, torch.randn(2, 3, 8), preset="light")
    reasons = {one.name: one.reason for one in report.skipped}
    assert reasons["self_attn.out_proj"] == "did not run as a module in a measured pass"
    assert "neither" in reasons["norm1"]


def test_frozen_layers_and_layers_in_evaluation_mode_say_so() -> None:
    model, (x, y) = network(), batch()
    model[0].requires_grad_(False)
    model[2].eval()
    report = zm.probe.measure(model, x, y, preset="light")
    assert report["0"].notes == ("weights are frozen",)
    assert report["0"].value("weight_gradient") is None
    assert report["2"].notes == ("in evaluation mode",)
    assert report["2"].value("weight_gradient")


def test_errors_teach() -> None:
    model, (x, y) = network(), batch()
    with pytest.raises(ValueError, match="no layer of Sequential can be read, among its modules Dropout"):
        zm.probe(nn.Sequential(nn.Dropout()))
    with pytest.raises(ValueError, match="layers='9' matches no module"):
        zm.probe(model, layers=["0", "9"])
    with pytest.raises(ValueError, match="layers=Conv2d matches no module"):
        zm.probe(model, layers=nn.Conv2d)
    with pytest.raises(ValueError, match="preset must be light or full, got 'heavy'"):
        zm.probe(model, "heavy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every must be at least 1 step, got 0"):
        zm.probe(model, every=0)
    with pytest.raises(ValueError, match="needs a probe batch"):
        zm.probe(model, "full")
    with pytest.raises(ValueError, match="measured no pass, of 0"), zm.probe(model) as p:
        p.report()
    with zm.probe(model) as p, pytest.raises(ValueError, match="entered already"):
        p.__enter__()
    assert zm.probe.measure(model, x, y).preset == "full"


def test_full_quantities_are_those_of_measure() -> None:
    model, (x, y) = network(nn.ELU), batch(40)
    report = zm.probe.measure(model, x, y)
    linear = {name: model[int(name)] for name in ("0", "2", "4")}
    found = zm.diagnostics.measure(model, linear, x, targets=y)
    for name, layer in found.items():
        assert report[name].of_units["k"] == pytest.approx(layer.k.tolist(), rel=1e-6)
        assert report[name].value("k") == pytest.approx(float(layer.k.nanmedian()), rel=1e-6)
        assert layer.bias_shift is not None
        assert layer.natural_bias_shift is not None
        ratio = layer.bias_shift.abs().median() / layer.natural_bias_shift.abs().median()
        assert report[name].value("shift_ratio") == pytest.approx(float(ratio), rel=1e-6)
    assert report["1"].value("k") is None


def test_full_over_steps_on_a_probe_batch() -> None:
    model, (x, y) = network(nn.ELU), batch(40)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with zm.probe(model, "full", every=2, inputs=x, targets=y) as p:
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x[:8]), y[:8]).backward()
            optimizer.step()
    series = p.report()["2"].series["cosine"]
    assert len(series) == 2
    assert series[0] != series[1]


def test_regression_and_own_loss() -> None:
    model, (x, _) = network(), batch()
    targets = torch.randn(32, 3)
    default = zm.probe.measure(model, x, targets)
    own = zm.probe.measure(model, x, targets, "light", loss=lambda out, y: 0.5 * (out - y).square().mean())
    assert default["0"].value("weight_gradient") == pytest.approx(own["0"].value("weight_gradient"), rel=1e-5)
    assert default["4"].value("k")
