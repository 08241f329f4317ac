"""What only a GPU can show of training on images: compiled and recorded steps, runs on streams of their own."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab.small_images import (
    CPU,
    DROPOUT,
    MUON,
    NO_DROPOUT,
    Epochs,
    KilledError,
    material,
    overflown,
    poisoned,
    recipe,
    run,
)

from zeromean.lab.images import Material
from zeromean.lab.recipes.images import Curve, ImageRecipe, Phase, Precision
from zeromean.lab.store import Run, Study
from zeromean.lab.train import Training, train

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("small_networks"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
GPU = torch.device("cuda")
# The middle phase begins with the last step of an epoch, the last one is the last step of all.
PHASES = (Phase(4, NO_DROPOUT), Phase(7, DROPOUT), Phase(1, DROPOUT, everywhere=True))


def on_gpu(images: Material) -> Material:
    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        return value.to(GPU) if isinstance(value, torch.Tensor) else value

    return Material(**{field.name: moved(getattr(images, field.name)) for field in fields(images)})


def losses(tmp_path: Path, name: str, chosen: ImageRecipe, runs: list[Run], together: int = 1) -> list[list[float]]:
    study = Study(tmp_path / name)
    train(chosen, runs, on_gpu(material()), study, device=GPU, together=together)
    assert [(study.result(one) or {})["status"] for one in runs] == ["ok"] * len(runs)
    return [[row["train_loss"] for row in study.metrics(one)] for one in runs]


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize(
    "altered", [{}, {"cutout": 2, "mixup": 0.4, "alternate_flip": True}, MUON], ids=["plain", "altered", "muon"]
)
def test_recorded_steps_equal_those_on_a_cpu(tmp_path: Path, norm: str, altered: dict[str, Any]) -> None:
    chosen = recipe(precision="float32", ema=0.5, clip=0.5, **altered)
    one, study = run(norm=norm), Study(tmp_path / "cpu")
    found = losses(tmp_path, "gpu", chosen, [one])
    train(chosen, [one], material(), study, device=CPU)
    wanted = [row["train_loss"] for row in study.metrics(one)]
    assert found[0] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("curve", ["stairs", "linear"])
def test_runs_on_one_gpu_do_not_change_each_other(tmp_path: Path, curve: Curve) -> None:
    chosen = recipe(precision="float32", phases=PHASES, dropout_curve=curve)
    runs = [run("elu"), run("rrelu"), run("elu", seed=1)]
    together = losses(tmp_path, "together", chosen, runs, together=3)
    alone = [losses(tmp_path, "alone", chosen, [one])[0] for one in runs]
    for own, other in zip(together, alone, strict=True):
        assert own == pytest.approx(other, rel=1e-3)
    assert together[0] != pytest.approx(together[2], rel=1e-3)


def test_dropout_rises_without_recording_anew() -> None:
    phases = (Phase(12, (0.8, 0.8, 0.0), everywhere=True),)
    rising, without = (
        Training(recipe(precision="float16", **changes), run(), on_gpu(material()), GPU)
        for changes in ({"phases": phases, "dropout_curve": "linear"}, {})
    )
    found: list[list[float]] = [[], []]
    for one, sums in zip((rising, without), found, strict=True):
        for _ in range(2):
            one.begin_epoch()
            while one.steps_left:
                one.advance()
                one.wait()
                sums.append(float(one._update.loss_sum))
            one.finish_epoch()
    assert float(rising._update._strength) == pytest.approx(9 / 12), "of the last step, the tenth"
    apart = [abs(own - other) / other for own, other in zip(*found, strict=True)]
    assert apart[0] < 1e-3, "no dropout in the first step"
    assert max(apart) > 0.02


def test_a_killed_training_continues_to_the_same_numbers(tmp_path: Path) -> None:
    chosen, one, cut = recipe(precision="float32", phases=PHASES), run("eelu", norm="batch"), Study(tmp_path / "cut")
    whole = losses(tmp_path, "whole", chosen, [one])[0]
    images = on_gpu(material())
    with pytest.raises(KilledError):
        train(chosen, [one], images, cut, device=GPU, checkpoint_seconds=0, on_epoch=Epochs(1))
    train(chosen, [one], images, cut, device=GPU)
    assert [row["train_loss"] for row in cut.metrics(one)] == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("changes", [{}, MUON], ids=["sgd", "muon"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_as_float32_does(tmp_path: Path, precision: Precision, changes: dict[str, Any]) -> None:
    one = [run(norm="batch")]
    exact, half = (recipe(clip=0.5, ema=0.5, precision=kind, **changes) for kind in ("float32", precision))
    found, wanted = losses(tmp_path, "half", half, one)[0], losses(tmp_path, "exact", exact, one)[0]
    assert found == pytest.approx(wanted, rel=0.05 if changes else 0.02)
    assert found != wanted


def test_an_overflow_in_float16_costs_a_recorded_step_and_half_the_scale() -> None:
    training = Training(recipe(precision="float16"), run(norm="batch"), on_gpu(material()), GPU)
    assert overflown(training, torch.cuda.synchronize).dtype == torch.float16


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_step_that_is_not_finite_changes_nothing(precision: Precision) -> None:
    chosen = recipe(ema=0.5, precision=precision)
    training = Training(chosen, run("eelu", norm="batch"), on_gpu(poisoned(60)), GPU)
    training.begin_epoch()
    before = []
    while training.steps_left:
        torch.cuda.synchronize()
        before.append({name: tensor.clone() for name, tensor in training.state()[0].items()})
        torch.cuda.synchronize()
        training.advance()
    training.finish_epoch()
    assert training.diverged is not None
    assert training.diverged["layer"] == "the images"
    kept, after = before[training.diverged["step"] - 1], training.state()[0]
    for name in kept.keys() - {"place", "number", "loss_sum", "first_void", "calm"}:
        assert torch.equal(after[name], kept[name]), name


def test_generators_are_left_as_they_were(tmp_path: Path) -> None:
    torch.cuda.manual_seed(3)
    before = torch.cuda.get_rng_state()
    losses(tmp_path, "one", recipe(phases=PHASES), [run("rrelu")])
    assert torch.equal(torch.cuda.get_rng_state(), before)
