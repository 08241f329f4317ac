"""Training on images: against a plain loop, alone against together, evaluated and timed."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab.small_images import (
    CPU,
    DROPOUT,
    MUON,
    NO_DROPOUT,
    begun,
    contents,
    copies,
    material,
    recipe,
    run,
    taken,
)
from torch import Tensor, nn

from zeromean.lab.chance import Chance
from zeromean.lab.data.augment import Batch, Batches
from zeromean.lab.images import Material
from zeromean.lab.observe import Judgement, judge
from zeromean.lab.order import noise_seeds
from zeromean.lab.recipes.images import ImageRecipe, Phase
from zeromean.lab.recording import arithmetic, warm_up
from zeromean.lab.sharing import Share
from zeromean.lab.store import Run, Study
from zeromean.lab.train import Training, build, train
from zeromean.nn import slope_parameters

pytestmark = pytest.mark.usefixtures("small_networks")


def orthogonal(way: Tensor) -> Tensor:
    """Muon's direction, by the singular values themselves."""
    left, values, right = torch.linalg.svd(way.double().flatten(1), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    outputs, inputs = len(way), way[0].numel()
    found: Tensor = max(1, outputs / inputs) ** 0.5 * left @ values.diag() @ right
    return found.view(way.shape).float()


class Plain:
    """The same training written by hand, with autograd alone."""

    def __init__(self, chosen: ImageRecipe, one: Run, images: Material) -> None:
        self.recipe, self.one = chosen, one
        self.network = build(chosen, one, images.classes)
        self.parameters = list(self.network.parameters())
        self.momentum = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.batches = Batches(images.train, images.train_labels, 16, seed=one.seed, pad=chosen.pad)
        self.chance = Chance(CPU, one.seed, 0)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.recipe.label_smoothing
        log_p: Tensor = self.network(x).log_softmax(1)
        right = log_p[torch.arange(len(labels)), labels]
        return -((1 - smoothing) * right + smoothing * log_p.mean(1)).mean()

    def step(self, number: int) -> float:
        chosen = self.recipe
        epoch, place = divmod(number, 5)
        self.batches.set_epoch(epoch)
        noisy = [module for module in self.network.modules() if hasattr(module, "seed")]
        seeds = noise_seeds(torch.tensor([self.one.seed]), len(noisy), torch.tensor(number))
        for module, seed in zip(noisy, seeds, strict=True):
            module.seed = seed[0]
        phase = chosen.phase(number)
        self.network.set_dropout(phase.dropout, everywhere=phase.everywhere)
        with self.chance.of_step(number):
            loss = self.loss(*self.batches.take(torch.tensor([place])))
        gradients = torch.autograd.grad(loss, self.parameters)
        norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
        shrink = min(1, chosen.clip / norm) if chosen.clip else 1.0
        exempt = set(slope_parameters(self.network))
        with torch.no_grad():
            for index, (parameter, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
                decay = 0.0 if parameter in exempt else chosen.weight_decay
                rate, muon = chosen.rate(number), chosen.optimizer == "muon"
                g = gradient * shrink + (0.0 if muon else decay * parameter)
                self.momentum[index] = v = chosen.momentum * self.momentum[index] + g
                way = g + chosen.momentum * v if chosen.nesterov else v
                if muon and parameter.ndim > 1:
                    parameter.mul_(1 - rate * decay)
                    way = orthogonal(way)
                parameter.sub_(rate * way)
                self.average[index] = chosen.ema * self.average[index] + (1 - chosen.ema) * parameter
        return loss.item()


@pytest.mark.parametrize(
    ("changes", "activation", "norm"),
    [
        ({}, "elu", "none"),
        ({"weight_decay": 0.1, "momentum": 0.5}, "elu", "none"),
        ({"nesterov": True, "weight_decay": 0.05}, "elu", "none"),
        ({"label_smoothing": 0.3}, "elu", "none"),
        ({"clip": 0.3}, "elu", "none"),
        ({"clip": 1000.0}, "elu", "none"),
        ({"accumulate": 4}, "elu", "none"),
        ({"ema": 0.7}, "elu", "none"),
        ({"rates": ((0, 0.0), (4, 0.1), (9, 0.01)), "curve": "linear"}, "elu", "none"),
        ({"rates": ((0, 0.05), (3, 0.01))}, "relu", "batch"),
        ({"phases": (Phase(2, NO_DROPOUT), Phase(10, DROPOUT, everywhere=True))}, "elu", "none"),
        ({"weight_decay": 0.1}, "eelu", "none"),
        ({"initialization": "activation"}, "rrelu", "none"),
        (MUON, "prelu", "none"),
        (MUON | {"nesterov": True, "clip": 0.3, "accumulate": 2, "ema": 0.7}, "elu", "none"),
        (MUON, "relu", "batch"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_steps_equal_those_of_a_plain_loop(changes: dict[str, Any], activation: str, norm: str) -> None:
    chosen, one, images = recipe(**changes), run(activation, seed=1, norm=norm), material()
    training, plain = Training(chosen, one, images, CPU), Plain(chosen, one, images)
    losses = [plain.step(number) for number in range(8)]
    found = taken(training, 8).state()[0]
    torch.testing.assert_close(float(found["loss_sum"]), sum(losses[5:]), rtol=1e-5, atol=1e-6)
    wanted = {f"network.{name}": tensor for name, tensor in plain.network.state_dict().items()}
    wanted |= {f"momentum.{index}": tensor for index, tensor in enumerate(plain.momentum)}
    wanted |= {f"average.{index}": tensor for index, tensor in enumerate(plain.average) if chosen.ema}
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-6), name
    assert found.keys() - wanted.keys() == {"place", "number", "loss_sum", "first_void"}


def test_a_last_epoch_that_is_cut_short_counts_whole() -> None:
    training, seen = Training(recipe(), run(), material(), CPU), list[float]()
    while not training.done:
        training.begin_epoch()
        while training.steps_left:
            training.advance()
            seen.append(training.epochs_done)
        training.finish_epoch()
    assert training.epochs_done == 3
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3])


def test_parts_of_a_batch_have_noise_of_their_own() -> None:
    training = begun(Training(recipe(accumulate=2), run("rrelu"), material(), CPU))
    other = begun(Training(recipe(), run("rrelu"), material(), CPU, Share(1, 2)))
    assert [len(x) for x, _ in training._update.parts()] == [8, 8]
    noisy = [module for module in training.network.modules() if hasattr(module, "seed")]
    elsewhere = [module for module in other.network.modules() if hasattr(module, "seed")]
    seeds = [int(module.seed) for _ in training._update.parts() for module in noisy]
    list(other._update.parts())
    seeds += [int(module.seed) for module in elsewhere]
    assert len(set(seeds)) == len(seeds) == 9


def test_dropout_changes_at_the_step_where_its_phase_begins() -> None:
    phases = (Phase(3, (0.0, 0.3, 0.0)), Phase(4, (0.5, 0.0, 0.0), everywhere=True), Phase(2, (0.2, 0.6, 0.0), True))
    training = Training(recipe(phases=phases), run(), material(), CPU)
    shares: dict[str, list[float]] = {}

    def note(name: str, y: Tensor) -> None:
        shares.setdefault(name, []).append(round((y == 0).float().mean().item(), 1))

    for name, module in training.network.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda _, __, y, at=name: note(at, y))
    taken(training, 9)
    assert shares["stack1.dropout1"] == [0.0] * 3 + [0.5] * 4 + [0.2] * 2
    assert shares["stack2.dropout1"] == [0.0] * 3 + [0.0] * 4 + [0.6] * 2
    assert shares["stack2.dropout2"] == [0.3] * 3 + [0.0] * 4 + [0.6] * 2
    assert (training.epoch, training.done) == (2, True)


def test_dropout_rises_in_every_phase() -> None:
    phases = (Phase(4, (0.8, 0.0, 0.0)), Phase(5, (0.5, 0.9, 0.0), everywhere=True))
    training = Training(recipe(phases=phases, dropout_curve="linear"), run(), material(), CPU)
    shares: dict[str, list[float]] = {}
    for name, module in training.network.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(
                lambda _, __, y, at=name: shares.setdefault(at, []).append((y == 0).float().mean().item())
            )
    taken(training, 9)
    assert shares["stack1.dropout1"] == pytest.approx([0, 0.2, 0.4, 0.6, 0, 0.1, 0.2, 0.3, 0.4], abs=0.04)
    assert shares["stack2.dropout1"] == pytest.approx([0] * 4 + [0, 0.18, 0.36, 0.54, 0.72], abs=0.04)
    assert shares["stack1.dropout1"][0] == shares["stack1.dropout1"][4] == 0
    assert "dropout" not in " ".join(training.state()[0])


def test_the_last_epoch_may_be_cut_short(tmp_path: Path) -> None:
    study, chosen = Study(tmp_path), recipe(rates=((0, 0.05), (11, 0.02)))
    train(chosen, [run()], material(), study, device=CPU)
    rows, result = study.metrics(run()), study.result(run()) or {}
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["learning_rate"] for row in rows] == [0.05, 0.05, 0.02]
    assert (result["epochs"], result["status"], result["diverged_at"]) == (3, "ok", None)
    plain = Plain(chosen, run(), material())
    losses = [plain.step(number) for number in range(12)]
    assert [row["train_loss"] for row in rows] == [
        pytest.approx(sum(part) / len(part), rel=1e-4) for part in (losses[:5], losses[5:10], losses[10:])
    ]
    assert result["train_loss"] == rows[-1]["train_loss"]
    assert {"test_error", "seconds", "images_per_second", "activation", "norm", "seed"} <= result.keys()


@pytest.mark.parametrize("together", [2, 3])
def test_alone_and_together_are_the_same_bits(tmp_path: Path, together: int) -> None:
    alone, shared = Study(tmp_path / "alone"), Study(tmp_path / "shared")
    runs = [run("elu"), run("rrelu", norm="batch"), run("eelu", seed=2)]
    chosen = recipe(phases=(Phase(12, DROPOUT),))
    for one in runs:
        train(chosen, [one], material(), alone, device=CPU)
    train(chosen, runs, material(), shared, device=CPU, together=together)
    for one in runs:
        assert contents(shared, one) == contents(alone, one)
    assert [(shared.result(one) or {})["together"] for one in runs] == ([2, 2, 1] if together == 2 else [3, 3, 3])


def test_seeds_repeat_and_differ(tmp_path: Path) -> None:
    chosen = recipe(phases=(Phase(12, DROPOUT),))
    for folder in ("one", "other"):
        torch.manual_seed(len(folder))
        train(chosen, [run(seed=0), run(seed=1)], material(), Study(tmp_path / folder), device=CPU)
    first, second = (
        [contents(Study(tmp_path / folder), run(seed=seed))[0] for seed in (0, 1)] for folder in ("one", "other")
    )
    assert first == second
    assert first[0] != first[1]


def test_the_caller_finds_generators_and_modes_as_they_were(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    modes = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.is_grad_enabled()
    train(recipe(phases=(Phase(12, DROPOUT),)), [run("eelu")], material(), Study(tmp_path), device=CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert modes == (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.is_grad_enabled())
    training = taken(Training(recipe(), run(), material(), CPU), 5)
    training.watch()
    assert training.network.training
    assert not any(module._forward_hooks for module in training.network.modules())


@pytest.mark.parametrize(
    ("precision", "kind", "exact"), [("tf32", "cuda", False), ("float32", "cuda", True), ("tf32", "cpu", True)]
)
def test_arithmetic_is_as_precise_as_asked_for(precision: Any, kind: str, exact: bool) -> None:
    with arithmetic(precision, torch.device(kind)):
        assert torch.backends.cudnn.allow_tf32 is not exact
        assert torch.get_float32_matmul_precision() == ("highest" if exact else "high")
        assert torch.backends.cudnn.benchmark is (kind == "cuda")
    assert not torch.backends.cudnn.benchmark
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cudnn.allow_tf32


def test_validation_images_are_not_trained_on(tmp_path: Path) -> None:
    images = material()
    assert images.validation is not None
    with_split, without = Study(tmp_path / "with"), Study(tmp_path / "without")
    train(recipe(), [run()], images, with_split, device=CPU)
    bare = Material(**{**vars(images), "validation": None})
    train(recipe(), [run()], bare, without, device=CPU)
    assert contents(with_split, run())[0] == contents(without, run())[0]
    assert all(0 <= row["validation_error"] <= 100 for row in with_split.metrics(run()))
    assert (without.result(run()) or {})["validation_error"] is None


def test_the_test_set_is_read_once_by_a_run_that_ends_and_never_by_one_that_diverged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, read = material(), list[bool]()

    def watched(network: Any, batches: Iterable[Batch], dtype: torch.dtype) -> Judgement:
        seen = list(batches)
        read.append(torch.equal(torch.cat([x for x, _ in seen]), images.test))
        return judge(network, seen, dtype)

    monkeypatch.setattr("zeromean.lab.train.judge", watched)
    train(recipe(), [run()], images, Study(tmp_path / "ok"), device=CPU)
    assert read == [False] * 6 + [True]
    train(recipe(rates=((0, 1e30),)), [run()], images, Study(tmp_path / "mad"), device=CPU)
    assert read.count(True) == 1


def test_a_network_that_fails_in_evaluation_alone_is_diverged(tmp_path: Path) -> None:
    images = material()
    images.test[0, 0, 0, 0] = math.nan
    study = Study(tmp_path)
    train(recipe(), [run()], images, study, device=CPU)
    result = study.result(run()) or {}
    assert (result["status"], result["diverged_at"], result["test_error"]) == ("diverged", 3, None)
    assert result["diverged"] == {"epoch": 3, "step": 12, "layer": "output in evaluation mode"}


def test_the_average_is_what_is_evaluated(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    study, chosen = Study(tmp_path), recipe(ema=0.9)
    train(chosen, [run()], material(), study, device=CPU)
    training = taken(Training(chosen, run(), material(), CPU), 12)
    state, saved = training.state()[0], load_file(tmp_path / run().folder / "model.safetensors")
    for index, (name, parameter) in enumerate(training.network.named_parameters()):
        assert torch.equal(saved[name], state[f"average.{index}"])
        assert not torch.equal(parameter.detach(), state[f"average.{index}"])
    with torch.no_grad():
        training.network.load_state_dict(saved)
        wrong = training.network.eval()(material().test).argmax(1) != material().test_labels
    assert (study.result(run()) or {})["test_error"] == pytest.approx(100 * wrong.float().mean().item())


class Clock:
    """Counts how often it was asked for the time."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1
        return self.now

    def monotonic(self) -> float:
        return 0.0


@pytest.mark.parametrize("together", [1, 2])
def test_seconds_of_runs_that_share_a_device_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    study, clock, runs = Study(tmp_path), Clock(), [run("elu"), run("relu")]
    monkeypatch.setattr("zeromean.lab.train.time", clock)
    train(recipe(), runs, material(), study, device=CPU, together=together)
    epochs = 3 * 2 // together  # of each, its beginning, the end of its steps and the end of all are read off
    results = [study.result(one) or {} for one in runs]
    tests = 2  # of each, its beginning and its end
    assert sum(result["seconds"] for result in results) == 2 * epochs + tests
    assert [result["images_per_second"] for result in results] == [12 * 16 * together / 3] * 2
    assert [row["images_per_second"] for row in study.metrics(runs[0])] == [80 * together, 80 * together, 32 * together]
    assert [result["together"] for result in results] == [together] * 2
    assert [result["seconds_recording"] for result in results] == [0.0] * 2


@pytest.mark.parametrize(("activation", "norm"), [("eelu", "none"), ("rrelu", "batch")])
def test_a_warm_up_at_the_last_step_of_all_leaves_everything_as_it_was(activation: str, norm: str) -> None:
    training = taken(Training(recipe(ema=0.5), run(activation, norm=norm), material(), CPU), 10)
    training.begin_epoch()
    training.advance()
    before = copies(training)
    assert (int(before["number"]), int(before["place"])) == (11, 1)
    warm_up(training._update)
    after = copies(training)
    assert all(torch.equal(after[name], before[name]) for name in before)
    training.advance()
    training.finish_epoch()
    assert training.done
    assert training.diverged is None


def test_several_runs_in_several_processes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="together must be 1 where 2 processes train one network, got 3: "):
        train(recipe(), [run()], material(), Study(tmp_path), device=CPU, share=Share(0, 2), together=3)


def test_parts_that_do_not_divide_a_process_s_images_are_refused() -> None:
    with pytest.raises(ValueError, match="accumulate must divide each process's 4 images of a batch, got 8: "):
        Training(recipe(accumulate=8), run(), material(), CPU, Share(0, 4))
