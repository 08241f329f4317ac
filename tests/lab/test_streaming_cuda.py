"""What only a GPU can show of training from a folder: batches copied beside recorded steps that read them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.lab.image_folders import CROP, SIDE, small, write_folder

from zeromean.lab.data import load_folder
from zeromean.lab.recipes.imagenet import imagenet_elu15
from zeromean.lab.recipes.images import ImageRecipe, Phase
from zeromean.lab.sharing import ALONE
from zeromean.lab.store import Run, Study
from zeromean.lab.streaming import StreamedMaterial, streamed_material
from zeromean.lab.train import Training, train

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
RUN = Run("elu", "elu", 0.01, 0)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("ZEROMEAN_DATA", str(tmp_path))
    write_folder(tmp_path / "imagenet")
    with small():
        yield


def recipe(rates: tuple[tuple[int, float], ...] = ((0, 0.01),)) -> ImageRecipe:
    return replace(
        imagenet_elu15(), phases=(Phase(22, (0.0,) * 6),), rates=rates, resize=SIDE, crop=CROP, batch_size=4,
        probe_samples=4, precision="float32",
    )  # fmt: skip


def material(device: torch.device, workers: int) -> StreamedMaterial:
    return streamed_material(recipe(), load_folder("imagenet"), device, workers=workers)


def losses(study: Study, device: torch.device, workers: int) -> list[float]:
    train(recipe(), [RUN], material(device, workers), study, device=device)
    assert (study.result(RUN) or {})["status"] == "ok"
    return [row["train_loss"] for row in study.metrics(RUN)]


@pytest.mark.parametrize("workers", [0, 2])
def test_recorded_steps_read_the_batches_that_a_cpu_reads(tmp_path: Path, workers: int) -> None:
    wanted = losses(Study(tmp_path / "cpu"), CPU, 0)
    assert losses(Study(tmp_path / "gpu"), GPU, workers) == pytest.approx(wanted, rel=1e-3)


def test_every_step_reads_its_own_batch_however_far_the_host_is_ahead() -> None:
    given = material(GPU, 0)
    batches, taken = given.source(recipe(), seed=0, dtype=torch.float32, share=ALONE), []
    batches.set_epoch(0)
    for place in range(batches.steps):
        torch.cuda._sleep(50_000_000)
        batches.ready(place)
        x, own = batches.take(torch.zeros(1, dtype=torch.int64, device=GPU))
        taken.append((x.clone(), own.clone()))
    torch.cuda.synchronize()
    slow = material(CPU, 0).source(recipe(), seed=0, dtype=torch.float32, share=ALONE)
    for place, (x, own) in enumerate(taken):
        slow.ready(place)
        expected, wanted = slow.take(torch.zeros(1, dtype=torch.int64))
        assert torch.equal(own.cpu(), wanted)
        torch.testing.assert_close(x.cpu(), expected)


def test_a_step_that_is_not_finite_is_taken_again_on_its_own_images() -> None:
    chosen = recipe(((0, 0.01), (5, 1e30)))
    training = Training(chosen, RUN, material(GPU, 2), GPU)
    while not training.done:
        training.begin_epoch()
        while training.steps_left:
            training.advance()
        training.finish_epoch()
    assert training.diverged is not None
    assert training.diverged["layer"].startswith(("output of stack", "gradient of stack"))
