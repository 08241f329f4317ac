"""Trainings on images with a step that is not finite: what is left of them, and how the layer is found."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab.small_images import (
    CPU,
    DROPOUT,
    NO_DROPOUT,
    Epochs,
    begun,
    contents,
    copies,
    material,
    poisoned,
    recipe,
    run,
    taken,
)
from torch import Tensor, nn

from zeromean.lab.nets.dropout import Dropout
from zeromean.lab.recipes.images import ImageRecipe, Phase
from zeromean.lab.store import Run, Study
from zeromean.lab.train import Training, train

pytestmark = pytest.mark.usefixtures("small_networks")


@pytest.mark.parametrize(
    ("activation", "norm", "changes"),
    [("elu", "none", {}), ("elu", "batch", {"ema": 0.8}), ("eelu", "none", {"accumulate": 2}), ("eprelu", "batch", {})],
)
def test_a_step_that_is_not_finite_changes_nothing(activation: str, norm: str, changes: dict[str, Any]) -> None:
    training = begun(Training(recipe(**changes), run(activation, norm=norm), poisoned(60), CPU))
    before: list[dict[str, Tensor]] = []
    while training.steps_left:
        before.append(copies(training))
        training.advance()
    training.finish_epoch()
    assert training.diverged is not None
    step = training.diverged["step"]
    assert training.diverged == {"epoch": 1, "step": step, "layer": "the images"}
    after = copies(training)
    assert after["first_void"] == step - 1
    assert not torch.equal(before[step - 2]["network.stack1.conv1.weight"], before[0]["network.stack1.conv1.weight"])
    for name in after.keys() - {"place", "number", "loss_sum", "first_void"}:
        assert torch.equal(after[name], before[step - 1][name]), name
    row = training.watch()
    assert json.dumps(row, allow_nan=False)
    assert (row["train_loss"], row["train_error"]) == (None, None)
    assert None not in row["mean_activation"]


def test_the_step_that_is_taken_again_has_the_same_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = recipe(phases=(Phase(12, DROPOUT),), rates=((0, 0.0),), accumulate=2)
    training = begun(Training(chosen, run("rrelu"), material(), CPU))
    sums = [0.0]
    while training.steps_left:
        training.advance()
        sums.append(float(training.state()[0]["loss_sum"]))
    again: list[float] = []

    def blamed(network: Any, losses: Any) -> str:
        again.append(sum(loss.item() for loss in losses()) / 2)
        return "nobody"

    monkeypatch.setattr("zeromean.lab.train.blame", blamed)
    assert training._blame(2) == "nobody"
    assert again == [pytest.approx(sums[3] - sums[2], rel=1e-6)]
    assert again != [pytest.approx(sums[2] - sums[1], rel=1e-6)]


def test_the_step_that_is_taken_again_drops_as_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = recipe(phases=(Phase(3, DROPOUT), Phase(2, NO_DROPOUT)), rates=((0, 0.0),))
    training = begun(Training(chosen, run("rrelu"), material(), CPU))
    while training.steps_left:
        training.advance()
    rates: list[float] = []

    def blamed(network: Any, losses: Any) -> str:
        rates.append(max(module.p for module in network.modules() if isinstance(module, nn.Dropout)))
        return "nobody"

    monkeypatch.setattr("zeromean.lab.train.blame", blamed)
    assert [training._blame(step) for step in (4, 2)] == ["nobody"] * 2
    assert rates == [0.0, max(DROPOUT)]


def test_the_step_that_is_taken_again_drops_as_strongly(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = recipe(phases=(Phase(4, DROPOUT), Phase(1, NO_DROPOUT)), dropout_curve="linear", rates=((0, 0.0),))
    training = taken(Training(chosen, run(), material(), CPU), 5)

    def blamed(network: Any, losses: Any) -> str:
        next(iter(losses()))
        strengths = [module.strength for module in network.modules() if isinstance(module, Dropout)]
        return ", ".join({f"{strength:g}" for strength in strengths if strength is not None})

    monkeypatch.setattr("zeromean.lab.train.blame", blamed)
    assert [training._blame(step) for step in (4, 3, 1)] == ["0", "0.75", "0.25"]


def test_a_void_step_late_in_the_training_is_found(tmp_path: Path) -> None:
    study = Study(tmp_path)
    chosen = recipe(rates=((0, 0.05), (7, 1e30)))
    train(chosen, [run()], material(), study, device=CPU)
    result = study.result(run()) or {}
    assert result["diverged"]["epoch"] == result["diverged_at"] == result["epochs"] == 2
    assert result["diverged"]["step"] == 9
    assert result["diverged"]["layer"].startswith(("output of stack", "gradient of stack"))
    assert [row["train_loss"] is None for row in study.metrics(run())] == [False, True]


def test_a_diverged_run_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, mixed = Study(tmp_path / "alone"), Study(tmp_path / "mixed")
    sound, mad = run("elu"), run("relu")
    train(recipe(), [sound], material(), alone, device=CPU)
    make = Training.__init__

    def poison(self: Training, chosen: ImageRecipe, one: Run, *rest: Any) -> None:
        make(self, chosen if one == sound else recipe(rates=((0, 1e30),)), one, *rest)

    monkeypatch.setattr(Training, "__init__", poison)
    epochs = Epochs()
    train(recipe(), [mad, sound], material(), mixed, device=CPU, together=2, on_epoch=epochs)
    assert contents(mixed, sound) == contents(alone, sound)
    assert epochs.seen == [(0, 2), (1, 2), (2, 1), (3, 1)]
    result = mixed.result(mad) or {}
    assert (result["status"], result["diverged_at"], result["epochs"]) == ("diverged", 1, 1)
    for key in ("train_loss", "train_error", "validation_error", "test_loss", "test_error", "median_mean_activation"):
        assert result[key] is None
    assert not (mixed.path / mad.folder / "model.safetensors").exists()
    assert mixed.pending([mad, sound]) == []
