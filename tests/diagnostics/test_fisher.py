"""Deltas, patches and measurements of whole nets, against the dense Fisher matrix and finite differences of KL."""

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zeromean as zm
from tests.diagnostics import oracle
from zeromean.diagnostics import collect, measure, squared_deltas, unit_fisher
from zeromean.diagnostics.collect import Fisher, Output
from zeromean.diagnostics.patches import Layer, input_rows, output_rows, row_count

TIGHT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.ELU(), nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 3))


def one_place() -> nn.Module:
    """Convolutions that see the whole image: one place each, so patches as samples is the net's own Fisher."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ELU(), nn.Conv2d(4, 3, 1), nn.Flatten(), nn.Linear(3, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 2, stride=2, groups=2),
        nn.ELU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def batch(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)}


@pytest.mark.parametrize("output", ["softmax", "gaussian"])
@pytest.mark.parametrize(("make", "shape"), [(mlp, (12, 5)), (one_place, (10, 2, 3, 3))])
def test_unit_blocks_are_diagonal_blocks_of_the_nets_fisher(
    make: Callable[[], nn.Module], shape: tuple[int, ...], output: Output
) -> None:
    model, x = build(make), batch(shape)
    fisher, places = oracle.network_fisher(model, x, output)
    outputs, records = collect(model, layers_of(model), x)
    squares = squared_deltas(outputs, records, fisher="exact", output=output)
    for name, record in records.items():
        blocks = unit_fisher(record.inputs[0], squares[name][0])
        for unit, block in enumerate(blocks):
            expected = oracle.unit_block(fisher, places, name, unit, record.inputs.shape[-1])
            torch.testing.assert_close(block, expected, **TIGHT)


@pytest.mark.parametrize("output", ["softmax", "gaussian"])
@pytest.mark.parametrize(("make", "shape"), [(mlp, (8, 5)), (cnn, (6, 2, 4, 4))])
def test_kl_is_the_fisher_quadratic_form(make: Callable[[], nn.Module], shape: tuple[int, ...], output: str) -> None:
    """KL(theta, theta + h d) / h^2 tends to d^T F d / 2, with an error that shrinks with h."""
    model, x = build(make), batch(shape)
    fisher, _ = oracle.network_fisher(model, x, output)
    direction = batch((len(fisher),), seed=1)
    quadratic = direction @ fisher @ direction / 2
    old = model(x).detach()
    errors = []
    for h in (1e-3, 1e-4):
        moved = copy.deepcopy(model)
        start = nn.utils.parameters_to_vector(moved.parameters())
        nn.utils.vector_to_parameters(start + h * direction, moved.parameters())
        errors.append(abs(oracle.divergence(old, moved(x).detach(), output) / h**2 / quadratic - 1))
    assert errors[0] < 0.03
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize("unit", [0, 2])
def test_kl_of_one_unit_is_its_own_blocks_quadratic_form(unit: int) -> None:
    model, x = build(mlp), batch((12, 5))
    outputs, records = collect(model, layers_of(model), x)
    squares = squared_deltas(outputs, records, fisher="exact", output="softmax")
    block = unit_fisher(records["2"].inputs[0], squares["2"][0])[unit]
    step = 1e-4 * batch((5,), seed=2)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.get_parameter("2.weight")[unit] += step[:-1]
        moved.get_parameter("2.bias")[unit] += step[-1]
    change = oracle.divergence(model(x).detach(), moved(x).detach(), "softmax")
    torch.testing.assert_close(change, step @ block @ step / 2, rtol=1e-3, atol=0)


def test_patches_as_samples_leave_out_the_products_of_different_places() -> None:
    """The net's Fisher block of a convolution's unit is ours plus the cross terms, which are not small."""
    model, x = build(cnn), batch((6, 2, 4, 4))
    layer = model.get_submodule("0")
    fisher, places = oracle.network_fisher(model, x, "gaussian")
    outputs, records = collect(model, {"0": layer}, x)
    squares = squared_deltas(outputs, records, fisher="exact", output="gaussian")["0"][0]
    assert records["0"].available == 6 * 16
    blocks = unit_fisher(records["0"].inputs[0], squares, places=16)
    patches = oracle.places_of(layer, x)
    for unit in range(4):
        ours, cross = torch.zeros(19, 19).double(), torch.zeros(19, 19).double()
        extended = torch.cat((patches[:, unit], torch.ones(6, 16, 1).double()), 2)
        for f in range(3):
            (gradient,) = torch.autograd.grad(outputs[:, f].sum(), records["0"].offset, retain_graph=True)
            terms = gradient[:, unit].flatten(1)[..., None] * extended
            ours += torch.einsum("nsi,nsj->ij", terms, terms) / 6
            cross += (torch.einsum("nsi,ntj->ij", terms, terms) - torch.einsum("nsi,nsj->ij", terms, terms)) / 6
        torch.testing.assert_close(blocks[unit], ours, **TIGHT)
        torch.testing.assert_close(ours + cross, oracle.unit_block(fisher, places, "0", unit, 18), **TIGHT)
        assert cross.norm() > 0.1 * ours.norm()


CONVOLUTIONS: list[tuple[Callable[[], Layer], tuple[int, ...]]] = [
    (lambda: nn.Linear(4, 3), (2, 5, 4)),
    (lambda: nn.Conv1d(2, 3, 3, padding=1), (2, 2, 6)),
    (lambda: nn.Conv1d(2, 3, 2, padding="same", dilation=3), (2, 2, 7)),
    (lambda: nn.Conv1d(2, 4, 4, padding="same", padding_mode="circular", bias=False), (2, 2, 7)),
    (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), groups=2), (2, 4, 7, 5)),
    (lambda: nn.Conv2d(3, 3, 3, groups=3, dilation=2, padding=(1, 2), padding_mode="replicate"), (2, 3, 6, 5)),
    (lambda: nn.Conv2d(2, 2, (1, 3), padding=(0, 1), padding_mode="reflect"), (2, 2, 3, 4)),
    (lambda: nn.Conv2d(2, 2, 2, padding="valid"), (2, 2, 3, 4)),
    (lambda: nn.Conv3d(2, 2, (2, 1, 3), padding=(1, 0, 1), stride=(1, 2, 1)), (2, 2, 2, 3, 4)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("make", "shape"), CONVOLUTIONS, ids=lambda case: str(case() if callable(case) else case))
def test_rows_are_what_the_units_see(make: Callable[[], Layer], shape: tuple[int, ...]) -> None:
    layer = make().double()
    x = batch(shape)
    seen = oracle.places_of(layer, x)
    rows = input_rows(layer, x)
    output = layer(x).detach()
    count = row_count(layer, output)
    assert rows.shape[1] == count
    units = seen.shape[1]
    for unit in range(units):
        group = unit * rows.shape[0] // units
        torch.testing.assert_close(rows[group], seen[:, unit].flatten(0, 1), **TIGHT)
    net = rows @ layer.weight.flatten(1).unflatten(0, (rows.shape[0], -1)).mT
    if layer.bias is not None:
        net = net + layer.bias.view(rows.shape[0], 1, -1)
    torch.testing.assert_close(output_rows(layer, output), net, **TIGHT)
    index = torch.tensor([count - 1, 0, count // 2])
    assert torch.equal(input_rows(layer, x, index), rows[:, index])
    assert torch.equal(output_rows(layer, output, index), output_rows(layer, output)[:, index])


def test_an_unbatched_image_is_a_batch_of_one() -> None:
    layer, x = nn.Conv2d(2, 3, 2).double(), batch((2, 4, 4))
    assert torch.equal(input_rows(layer, x), input_rows(layer, x[None]))
    assert torch.equal(output_rows(layer, layer(x)), output_rows(layer, layer(x[None])))


@pytest.mark.parametrize("output", ["softmax", "gaussian"])
def test_sampled_labels_have_the_exact_fisher_as_their_mean(output: Output) -> None:
    model, x = build(mlp), batch((6, 5)).repeat(4000, 1)
    outputs, records = collect(model, layers_of(model), x)
    generator = torch.Generator().manual_seed(0)
    sampled = squared_deltas(outputs, records, fisher="sampled", output=output, generator=generator)
    exact = squared_deltas(outputs, records, fisher="exact", output=output)
    for name in records:
        mean = sampled[name].unflatten(1, (4000, 6)).mean(1)
        torch.testing.assert_close(mean, exact[name][:, :6], rtol=0.15, atol=0.02 * float(exact[name].max()))


def test_the_empirical_fisher_takes_the_labels_of_the_data() -> None:
    model, x, targets = build(mlp), batch((7, 5)), torch.arange(7) % 3
    outputs, records = collect(model, layers_of(model), x)
    squares = squared_deltas(outputs, records, fisher="empirical", output="softmax", targets=targets)
    loss = nn.functional.cross_entropy(outputs, targets, reduction="sum")
    for name, record in records.items():
        (expected,) = torch.autograd.grad(loss, record.offset, retain_graph=True)
        torch.testing.assert_close(squares[name][0], expected.square(), **TIGHT)


@pytest.mark.parametrize(("make", "shape"), [(mlp, (60, 5)), (cnn, (40, 2, 4, 4))])
def test_measure_gives_the_dense_quantities(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """From autograd's own weight gradient and the oracle's patches, one unit at a time."""
    model, x = build(make), batch(shape)
    targets = torch.arange(len(x)) % 3
    measured = measure(model, layers_of(model), x, targets=targets, damping=0.01, max_samples=None)
    nn.functional.cross_entropy(model(x), targets).backward()
    outputs, records = collect(model, layers_of(model), x)
    squares = squared_deltas(outputs, records, fisher="exact", output="softmax")
    for name, layer in layers_of(model).items():
        got, rows, weight = measured[name], squares[name], layer.get_parameter("weight").grad
        assert weight is not None
        bias = layer.get_parameter("bias").grad
        assert bias is not None
        places = records[name].available / len(x)
        for unit in range(len(bias)):
            group, column = divmod(unit, rows.shape[-1])
            block = unit_fisher(records[name].inputs[group], rows[group], damping=got.damping, places=places)[column]
            step = torch.linalg.solve(block, torch.cat((weight[unit].flatten(), bias[unit, None])))
            assert got.natural_bias_shift is not None
            assert got.natural_bias is not None
            assert got.mean_input.shape == (rows.shape[0] * records[name].inputs.shape[-1],)
            mean = got.mean_input.unflatten(0, (rows.shape[0], -1))[group]
            torch.testing.assert_close(mean, records[name].inputs[group].mean(0), **TIGHT)
            torch.testing.assert_close(got.natural_bias[unit], step[-1], **TIGHT)
            shift = mean @ step[:-1] + step[-1]
            torch.testing.assert_close(got.natural_bias_shift[unit], shift, **TIGHT)
            assert got.samples == records[name].available


def test_the_damping_of_measure_is_a_fraction_of_the_mean_square_input() -> None:
    model, x = build(mlp), batch((30, 5))
    measured = measure(model, layers_of(model), x, damping=0.25)
    assert measured["0"].damping == pytest.approx(0.25 * float(x.square().mean()))
    assert measured["0"].bias_shift is None


def test_a_subset_of_rows_is_bounded_random_and_repeatable() -> None:
    model, x = build(cnn), batch((20, 2, 4, 4))
    layers, targets = layers_of(model), torch.arange(20) % 3
    some = measure(model, layers, x, targets=targets, max_samples=50)
    again = measure(model, layers, x, targets=targets, max_samples=50)
    other = measure(model, layers, x, targets=targets, max_samples=50, generator=torch.Generator().manual_seed(9))
    assert [some[name].samples for name in some] == [50, 50, 20]
    assert torch.equal(some["0"].k, again["0"].k)
    assert not torch.equal(some["0"].k, other["0"].k)


def test_places_of_a_sequence_count_like_those_of_an_image() -> None:
    """A Linear on [N, T, I] is a Conv1d with kernel 1."""
    x, targets = batch((20, 6, 4)), torch.arange(20) % 3

    class Tokens(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(self.layer, nn.Conv1d):
                return nn.functional.elu(self.layer(x.mT)).mean(2)
            return nn.functional.elu(self.layer(x)).mean(1)

    linear, convolution = nn.Linear(4, 3).double(), nn.Conv1d(4, 3, 1).double()
    with torch.no_grad():
        convolution.weight.copy_(linear.weight[..., None])
        assert linear.bias is not None
        assert convolution.bias is not None
        convolution.bias.copy_(linear.bias)
    results = []
    for layer in (linear, convolution):
        model = Tokens(layer)
        results.append(measure(model, {"layer": layer}, x, targets=targets)["layer"])
    for field in fields(results[0]):
        first, second = (getattr(result, field.name) for result in results)
        if isinstance(first, Tensor) and field.name != "residual":
            torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-8)


class Restless(nn.Module):
    """Draws random numbers, counts its calls in a buffer and keeps a mode of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.RReLU(), nn.Linear(8, 3))
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        torch.rand(1)
        result: Tensor = self.body(x)
        return result


@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
def test_measuring_leaves_no_trace(fisher: Fisher) -> None:
    torch.manual_seed(0)
    model = Restless()
    model.body[1].eval()
    x, targets = torch.randn(16, 5), torch.arange(16) % 3
    model(x).sum().backward()
    state = copy.deepcopy(model.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes, calls, random = [m.training for m in model.modules()], model.calls, torch.get_rng_state()
    measure(model, {"first": model.body[0], "last": model.body[4]}, x, targets=targets, fisher=fisher)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert model.calls is calls
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    for p, before in zip(model.parameters(), gradients, strict=True):
        assert p.grad is not None
        assert before is not None
        assert torch.equal(p.grad, before)


def test_a_net_in_training_is_measured_in_evaluation_mode() -> None:
    model, x = Restless(), torch.randn(16, 5)
    layers = {"first": model.body[0], "last": model.body[4]}
    training, evaluation = measure(model.train(), layers, x), measure(model.eval(), layers, x)
    for name in layers:
        assert torch.equal(training[name].k, evaluation[name].k)


def test_a_failing_forward_leaves_no_trace_either() -> None:
    model = Restless()
    with pytest.raises(RuntimeError):
        measure(model, {"first": model.body[0]}, torch.randn(2, 4))
    assert model.training
    assert not model.body[0]._forward_hooks


def test_frozen_layers_and_inference_mode_are_measured_too() -> None:
    model, x = build(mlp), batch((20, 5))
    expected = measure(model, layers_of(model), x)
    model.requires_grad_(False)
    with torch.no_grad():
        frozen = measure(model, layers_of(model), x)
    assert torch.equal(expected["0"].k, frozen["0"].k)


def test_inputs_may_be_arguments_and_outputs_objects_with_logits() -> None:
    class Answer:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = build(mlp)

        def forward(self, x: Tensor, scale: Tensor) -> Answer:
            return Answer(self.body(x * scale))

    model, x, one = Model(), batch((20, 5)), torch.ones(()).double()
    layers = {"0": model.body.get_submodule("0")}
    by_place, by_name = measure(model, layers, (x, one)), measure(model, layers, {"x": x, "scale": one})
    assert torch.equal(by_place["0"].k, by_name["0"].k)
    assert torch.equal(by_place["0"].k, measure(model.body, layers, x)["0"].k)


def test_sequence_outputs_are_joint_and_skip_unlabelled_places() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), batch((10, 5, 4))
    targets = torch.arange(50).view(10, 5) % 3
    targets[:, 0] = -100
    measured = measure(model, {"": model}, x, targets=targets, fisher="sampled")[""]
    loss = nn.functional.cross_entropy(model(x).flatten(0, 1), targets.flatten(), reduction="sum") / 10
    (expected,) = torch.autograd.grad(loss, model.bias)
    assert measured.bias_gradient is not None
    torch.testing.assert_close(measured.bias_gradient * measured.fisher_scale, expected, **TIGHT)
    with pytest.raises(ValueError, match=r"fisher 'exact' needs outputs \[inputs, classes\], got \(10, 5, 3\)"):
        measure(model, {"": model}, x)


def test_a_layer_without_influence_has_no_q() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(5, 3), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            result: Tensor = self.used(x)
            return result

    model = Aside()
    measured = measure(model, {"unused": model.unused}, torch.randn(20, 5))["unused"]
    assert not measured.fisher_scale.any()
    assert measured.k.isnan().all()


def test_what_cannot_be_measured_is_named() -> None:
    model, x = build(mlp), batch((6, 5))
    first = model.get_submodule("0")
    for layers, message in (
        ({}, "layers must hold at least one layer"),
        ({"act": model.get_submodule("1")}, "layer 'act' must be a Linear, Conv1d, .* got ELU"),
        ({"fused": zm.nn.LinearAct(5, 5)}, "layer 'fused' must be a Linear, .* got LinearAct"),
        ({"absent": nn.Linear(5, 4)}, "layer 'absent': it must be called once in a forward pass, got 0 calls"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(model, layers, x)
    twice = nn.Sequential(nn.Linear(5, 5), nn.ELU()).double()
    with pytest.raises(ValueError, match="layer 'shared': it must be called once in a forward pass, got 2 calls"):
        measure(nn.Sequential(twice, twice), {"shared": twice[0]}, x)
    with pytest.raises(ValueError, match="layer '0': its inputs must be finite"):
        measure(model, {"0": first}, x * float("nan"))
    with pytest.raises(
        ValueError, match="layer '0': the weighted covariance of a unit's 5 inputs over 3 rows is singular"
    ):
        measure(model, {"0": first}, x[:3], damping=0, method="dense")
    for settings, message in (
        ({"fisher": "mc"}, "fisher must be one of sampled, exact, empirical, got 'mc'"),
        ({"output": "poisson"}, "output must be one of softmax, gaussian, got 'poisson'"),
        ({"fisher": "empirical"}, "fisher 'empirical' needs targets, got None"),
        ({"damping": -1.0}, "damping must be 0 or more, got -1.0"),
        ({"targets": torch.zeros(5).long()}, r"targets of a softmax output \(6, 3\) must have the shape \(6,\)"),
        ({"targets": torch.full((6,), 3)}, "targets must be classes from 0 to 2, got 3 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(model, {"0": first}, x, **settings)
    with pytest.raises(ValueError, match=r"must return a tensor, or an object with \.logits, got tuple"):
        measure(nn.LSTM(5, 4).double(), {"0": first}, x)
