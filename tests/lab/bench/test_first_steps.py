"""The benchmark of the 15-layer network's first steps, with few units."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from benchmarks import first_steps
from tests.lab.image_folders import small
from tests.lab.image_study import tiny_cifar
from torch import nn


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("zeromean.lab.data.load", lambda name: tiny_cifar())
    with small():
        yield


def test_a_row_an_activation_and_initialization(tmp_path: Path) -> None:
    words = ["--batch", "4", "--steps", "3", "--activations", "elu", "relu", "--out", str(tmp_path)]
    first_steps.main(words)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["activation"], row["initialization"]) for row in rows] == [
        (activation, initialization) for activation in ("elu", "relu") for initialization in ("he", "lecun")
    ]
    assert all(len(row["losses"]) == len(row["gradient_norms"]) == 3 for row in rows)
    assert rows[0]["gradient_norms"][0] > 2 * rows[1]["gradient_norms"][0], "He's weights are larger"


def test_a_row_ends_where_the_loss_is_not_finite() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 10))
    found = first_steps.first_steps(model, first_steps.batches(tiny_cifar(train=16), 4, 4), rate=1e30)
    assert found["losses"][0] == pytest.approx(2.3, abs=1.5)
    assert found["losses"][-1] is found["gradient_norms"][-1] is None
    assert None not in found["losses"][:-1]
    assert len(found["losses"]) < 4


def test_every_step_has_other_images() -> None:
    dataset = tiny_cifar()
    first, second = first_steps.batches(dataset, 4, 2)
    assert first[0].shape == second[0].shape == (4, 3, 32, 32)
    assert not torch.equal(first[0], second[0])
    assert torch.cat([first[1], second[1]]).tolist() == dataset.train_labels[:8].tolist()
    with pytest.raises(ValueError, match="batch x steps must be at most"):
        next(first_steps.batches(dataset, 1000, 1000))
