"""Training from a folder of images: batches from worker processes, and studies on them through the command line."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.lab.image_folders import CROP, SIDE, pixels_of, small, write_folder, write_tiny
from tests.lab.small_images import untimed
from torch import Tensor

from zeromean.lab import streaming
from zeromean.lab.compare import open_study
from zeromean.lab.data import FolderDataset, load_folder, split_validation
from zeromean.lab.data import imagenet as folders
from zeromean.lab.data.images import ImageSplit, evaluation_batches, mean_image
from zeromean.lab.plan import make
from zeromean.lab.recipes.imagenet import imagenet_elu15
from zeromean.lab.recipes.images import ImageRecipe
from zeromean.lab.sharing import Share
from zeromean.lab.store import Run, Study
from zeromean.lab.streaming import StreamedBatches, StreamedMaterial, streamed_material
from zeromean.lab.train import Training, train

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
CPU = torch.device("cpu")
# 16 training images: 10 steps are two epochs of four steps and one of two.
TINY = [f"resize={SIDE}", f"crop={CROP}", "length=0.00005", "batch_size=4", "probe_samples=4"]
ONE = ["run", "imagenet-elu15", *TINY]
Zeromean = Callable[..., str]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("ZEROMEAN_DATA", str(tmp_path))
    with small():
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "imagenet")


def recipe(**changes: Any) -> ImageRecipe:
    short = imagenet_elu15().shortened(10 / 200_000)
    return replace(short, resize=SIDE, crop=CROP, batch_size=4, probe_samples=4, rates=((0, 0.01),), **changes)


def run(seed: int = 0) -> Run:
    return Run("elu", "elu", 0.01, seed)


def batches_of(path: Path, chosen: ImageRecipe | None = None, **options: Any) -> StreamedBatches:
    split = load_folder(str(path)).folder.train
    given = {"seed": 1, "workers": 0} | options
    return StreamedBatches(split, mean_image(split, workers=0, resize=SIDE), chosen or recipe(), **given)


def epoch_of(batches: StreamedBatches, epoch: int = 0) -> list[tuple[Tensor, Tensor]]:
    batches.set_epoch(epoch)
    taken = []
    for place in range(batches.steps):
        batches.ready(place)
        x, labels = batches.take(torch.tensor([place]))
        taken.append((x.clone(), labels.clone()))
    return taken


def equal(some: list[tuple[Tensor, Tensor]], others: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(torch.equal(x, y) and torch.equal(own, other) for (x, own), (y, other) in pairs)


def all_crops(label: int, number: int, mean: Tensor) -> Tensor:
    """Every crop of an image less the mean, over 64, and each mirrored: ``[n, 3, CROP, CROP]``."""
    image = (torch.from_numpy(pixels_of(label, number)).permute(2, 0, 1) - mean) / 64
    crops = image.unfold(1, CROP, 1).unfold(2, CROP, 1).flatten(1, 2).transpose(0, 1)
    return torch.cat([crops, crops.flip(3)])


def test_batches_are_crops_of_the_images_less_the_mean_image(folder: Path) -> None:
    mean = torch.stack([torch.from_numpy(pixels_of(c, n)).double() for c in range(2) for n in range(8)]).mean(0)
    mean = mean.permute(2, 0, 1).float()
    expected = {(c, n): all_crops(c, n, mean) for c in range(2) for n in range(8)}
    seen = []
    for x, labels in epoch_of(batches_of(folder)):
        assert (x.dtype, x.is_contiguous(memory_format=torch.channels_last)) == (torch.float32, True)
        for image, label in zip(x, labels.tolist(), strict=True):
            found = [key for key, crops in expected.items() if (crops - image).abs().amax((1, 2, 3)).min() < 1e-5]
            assert [key[0] for key in found] == [label]
            seen += found
    assert sorted(seen) == sorted(expected)


def test_flips_are_as_the_recipe_says(folder: Path) -> None:
    flipped, straight = epoch_of(batches_of(folder)), epoch_of(batches_of(folder, recipe(flip=False)))
    pairs = [pair for (x, _), (y, _) in zip(flipped, straight, strict=True) for pair in zip(x, y, strict=True)]
    same = [torch.equal(*pair) for pair in pairs]
    assert 0 < sum(same) < 16


def test_every_seed_and_epoch_has_its_own_batches_whatever_the_workers(folder: Path) -> None:
    one, other = batches_of(folder), batches_of(folder, workers=2)
    first = epoch_of(one)
    assert equal(first, epoch_of(other))
    assert equal(epoch_of(one, 1), epoch_of(other, 1))
    assert equal(first, epoch_of(one))
    assert not equal(first, epoch_of(one, 1))
    assert not equal(first, epoch_of(batches_of(folder, seed=2)))


def test_a_batch_that_is_not_the_next_one_is_found(folder: Path) -> None:
    batches = batches_of(folder)
    taken = epoch_of(batches, 3)
    for place in (2, 3, 0, 0, 3):
        batches.ready(place)
        assert equal([batches.take(torch.tensor([place]))], [taken[place]])


def test_processes_take_parts_of_every_batch(folder: Path) -> None:
    whole, parts = epoch_of(batches_of(folder)), [epoch_of(batches_of(folder, share=(rank, 2))) for rank in range(2)]
    joined = [tuple(map(torch.cat, zip(left, right, strict=True))) for left, right in zip(*parts, strict=True)]
    assert equal(whole, joined)  # type: ignore[arg-type]


def test_processes_add_up_their_parts_of_the_mean_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split, sums = load_folder("imagenet").folder.train, list[Tensor]()

    def begin_sum(share: Share, tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
        sums.append(tensors[0])
        return lambda: [torch.stack(sums).sum(0)]

    monkeypatch.setattr(Share, "begin_sum", begin_sum)
    both = [mean_image(split, workers=0, resize=SIDE, share=Share(rank, 2)) for rank in range(2)]
    assert not torch.equal(sums[0], sums[1])
    assert torch.equal(both[1], mean_image(split, workers=0, resize=SIDE))


def streamed(chosen: ImageRecipe, dataset: FolderDataset | None = None) -> StreamedMaterial:
    return streamed_material(chosen, dataset or load_folder("imagenet"), CPU, workers=0)


def test_held_out_images_are_left_out_of_training_and_mean(folder: Path) -> None:
    chosen, dataset = recipe(validation=4), load_folder("imagenet")
    given = streamed(chosen, dataset)
    assert given.validation is not None
    kept, held_out = (set(split.files) for split in (given.train, given.validation))
    assert (len(kept), len(held_out), kept & held_out) == (12, 4, set())
    places = split_validation(dataset.train_labels, 4)[0]
    pixels = [torch.from_numpy(pixels_of(*divmod(place, 8))).double() for place in places.tolist()]
    torch.testing.assert_close(given.mean, torch.stack(pixels).mean(0).permute(2, 0, 1).float())
    assert not torch.equal(given.mean, streamed(recipe()).mean)
    assert (given.samples, given.classes, given.test) == (12, 2, dataset.folder.val)
    assert sorted(torch.cat([y for _, y in given.validation_batches(torch.float32) or ()]).tolist()) == [0, 0, 1, 1]


def test_the_mean_image_is_found_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mean = streamed(recipe()).mean
    (kept,) = (tmp_path / "cache").glob("mean-image-*.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(folders, "mean_image", None)
        assert torch.equal(streamed(recipe()).mean, mean)
    kept.write_bytes(kept.read_bytes()[:-9] + b"\0" * 9)
    with pytest.warns(UserWarning, match=r"is damaged \(its sum .*\): the mean image is computed anew"):
        assert torch.equal(streamed(recipe()).mean, mean)


def test_other_images_of_these_names_and_sizes_have_a_mean_of_their_own(folder: Path) -> None:
    def found(seed: int) -> Tensor:
        for number, file in enumerate(load_folder("imagenet").folder.train.files):
            Image.fromarray(pixels_of(seed, number)).save(file, "BMP")
        return streamed(recipe()).mean

    means = [found(seed) for seed in range(2)]
    assert not torch.equal(*means)
    split = load_folder("imagenet").folder.train
    assert torch.equal(means[1], mean_image(split, workers=0, resize=SIDE))


def test_the_test_images_are_read_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, read = streamed(recipe(validation=4)), list[ImageSplit]()

    def reading(split: ImageSplit, *words: Any, **options: Any) -> Any:
        read.append(split)
        return evaluation_batches(split, *words, **options)

    monkeypatch.setattr(streaming, "evaluation_batches", reading)
    train(recipe(validation=4), [run()], given, Study(tmp_path / "study"), device=CPU)
    assert read == [given.validation] * 4 + [given.test]  # 12 images are three steps an epoch


def test_a_step_that_is_not_finite_is_taken_again_on_its_own_images(folder: Path) -> None:
    chosen = replace(recipe(), rates=((0, 0.01), (5, 1e30)))
    training = Training(chosen, run(), streamed(chosen), CPU)
    while not training.done:
        training.begin_epoch()
        while training.steps_left:
            training.advance()
        training.finish_epoch()
    assert training.diverged is not None
    step = training.diverged["step"]
    assert training.diverged["layer"].startswith(("output of stack", "gradient of stack"))
    fresh = StreamedBatches(
        training.material.train, training.material.mean, chosen, seed=0, workers=0,  # type: ignore[union-attr, arg-type]
    )  # fmt: skip
    batch = epoch_of(fresh, (step - 1) // 4)[(step - 1) % 4]
    assert equal([next(training._update.parts())], [batch])


def contents(study: Path, arm: str = "elu") -> tuple[bytes, list[dict[str, Any]], dict[str, Any]]:
    files = study / arm / "seed-000"
    rows = [untimed(json.loads(line)) for line in (files / "metrics.jsonl").read_text().splitlines()]
    return (files / "model.safetensors").read_bytes(), rows, untimed(json.loads((files / "result.json").read_text()))


def test_a_study_from_plan_to_report_with_top5(zeromean: Zeromean, tmp_path: Path) -> None:
    write_folder(tmp_path / "imagenet", classes=6, train=3, val=2)
    out = zeromean("compare", "imagenet-elu15", *TINY, "--device", "cpu", "--workers", "0")
    assert "2 runs of 10 steps (3 epochs) each on cpu" in out
    study = tmp_path / "runs" / "imagenet-elu15"
    plan, result = json.loads((study / "plan.json").read_text()), contents(study)[2]
    held = plan["data"]
    assert (held["name"], held["train"], held["test"]) == ("imagenet", 18, 12)
    assert held["classes"] == ["n00", "n01", "n02", "n03", "n04", "n05"]
    assert "not over contents" in held["source"]
    assert sorted(held["checksums"]) == ["classes", "train", "val"]
    assert result["status"] == "ok"
    assert 0 <= result["test_top5_error"] <= result["test_error"] <= 100
    rows = list(csv.DictReader(io.StringIO((study / "summary.csv").read_text())))
    assert [(row["arm"], row["status"]) for row in rows] == [("elu", "ok"), ("relu", "ok")]
    words = "with the mean of every pixel subtracted, resized to 32x32 pixels and cropped at random to 24x24, mirrored"
    assert words in " ".join((study / "report.html").read_text().split())
    assert "2 of 2 final runs are done already" in zeromean("compare", "imagenet-elu15", *TINY, "--device", "cpu")


def test_the_fast_recipe_trains_from_a_folder(zeromean: Zeromean, folder: Path, tmp_path: Path) -> None:
    words = ["imagenet-elu15-fast", *TINY[:2], "length=0.002", *TINY[3:]]
    zeromean("run", *words, "--device", "cpu", "--workers", "0", "--name", "fast")
    _, rows, result = contents(tmp_path / "runs" / "fast")
    assert (result["status"], result["epochs"]) == ("ok", 15)
    losses = [row["train_loss"] for row in rows]
    assert losses[-1] < 0.75 * losses[0], "the two classes differ in brightness"


def test_the_workers_leave_the_numbers_as_they_are(zeromean: Zeromean, folder: Path, tmp_path: Path) -> None:
    zeromean(*ONE, "--device", "cpu", "--workers", "0", "--name", "none")
    (tmp_path / "cache").rename(tmp_path / "old-cache")
    zeromean(*ONE, "--device", "cpu", "--workers", "2", "--name", "two")
    found = contents(tmp_path / "runs" / "none")
    assert contents(tmp_path / "runs" / "two") == found
    assert found[2]["test_top5_error"] is None


def test_tiny_imagenets_layout(zeromean: Zeromean, tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny-imagenet-200")
    zeromean(*ONE, "data=tiny-imagenet", "--device", "cpu", "--workers", "0", "--name", "tiny")
    plan = Study(tmp_path / "runs" / "tiny").plan() or {}
    assert (plan["data"]["train"], plan["data"]["test"], plan["data"]["classes"]) == (16, 4, ["n00", "n01"])
    shown = zeromean("data")
    assert "published are 100000 and 10000" in shown
    assert "not downloaded: unpack it there" in shown


def spawn(folder: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), **variables}
    command = [sys.executable, "-m", "tests.lab.image_folders", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=folder, text=True, env=environment, **pipes)  # type: ignore[call-overload, no-any-return]


def test_a_killed_study_continues_to_the_same_bytes(zeromean: Zeromean, folder: Path, tmp_path: Path) -> None:
    words = ["run", "imagenet-elu15", *TINY[:2], "length=0.0004", *TINY[3:], "--device", "cpu"]
    process = spawn(tmp_path, *words, "--workers", "1", "--name", "killed")
    files = tmp_path / "runs" / "killed" / "elu" / "seed-000"
    while not (files / "metrics.jsonl").exists() or (files / "metrics.jsonl").read_text().count("\n") < 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    out = process.communicate()[0]
    assert (process.returncode, "Stopped by SIGTERM" in out) == (143, True), out
    assert (files / "checkpoint.safetensors").exists()
    zeromean(*words, "--workers", "0", "--name", "killed")
    zeromean(*words, "--workers", "0", "--name", "undisturbed")
    assert contents(tmp_path / "runs" / "killed") == contents(tmp_path / "runs" / "undisturbed")


def test_two_processes_make_one_study(folder: Path, tmp_path: Path) -> None:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + os.getpid() % 20_000)}
    words = [*ONE, "validation=4", "--device", "cpu", "--name", "shared"]
    processes = [spawn(tmp_path, *words, **shared, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]
    outs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outs
    _, rows, result = contents(tmp_path / "runs" / "shared")
    assert result["status"] == "ok"
    assert all(0 <= row["validation_error"] <= 100 for row in rows)


def refused(zeromean: Zeromean, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        zeromean(*words)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["imagenet-elu15"], "imagenet must hold the folders train and val of imagenet, got no train and no val: "),
        (["imagenet-elu15"], "set ZEROMEAN_DATA to the folder that holds imagenet, or name any folder of images by"),
        (["imagenet-elu15", "data=./photos"], "photos must hold the folders train and val of ./photos"),
        (["imagenet-elu15", "crop=300"], "crop must be in [1, 256], which resize is, got 300"),
        (["imagenet-elu15", "data=cifar100"], "normalization must be gcn-zca or mean-std for the data 'cifar100'"),
        (["cifar100-elu11", "data=imagenet"], "normalization must be pixel-mean for the data 'imagenet', got gcn-zca"),
        (["imagenet-elu15", "--gpus", "2"], "start it with torchrun --nproc-per-node 2, which shares every batch"),
        (["imagenet-elu15", "--workers", "-1"], "workers must be 0 or more, got -1"),
        (["cifar100-elu11", "--workers", "2"], "--workers is not for 'cifar100', whose images lie in memory"),
        (["digits-mlp8", "data=imagenet"], "data=imagenet is a folder of images, which 'digits-mlp8' cannot train on"),
    ],
)
def test_bad_words_are_refused_with_a_remedy(
    zeromean: Zeromean, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], message: str
) -> None:
    assert message in refused(zeromean, capsys, "compare", *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_image_that_cannot_be_read_is_named_in_a_sentence(
    zeromean: Zeromean, capsys: pytest.CaptureFixture[str], folder: Path, workers: str
) -> None:
    (folder / "train" / "n01" / "train_3.png").write_bytes(b"no image")
    said = refused(zeromean, capsys, *ONE, "--device", "cpu", "--workers", workers)
    assert said.startswith(f"error: {folder}/train/n01/train_3.png cannot be read as an image (")
    assert said.count("\n") == 1


def test_a_folder_that_changed_is_another_study(folder: Path, tmp_path: Path) -> None:
    plan, study = make(recipe(), ["elu"], seeds=1), Study(tmp_path / "study")
    study.write_plan(open_study(plan, study, load_folder("imagenet"), CPU))
    assert open_study(plan, study, load_folder("imagenet"), CPU)["data"]["train"] == 16
    file = folder / "val" / "n01" / "val_1.png"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"another plan: its checksums\.val is "):
        open_study(plan, study, load_folder("imagenet"), CPU)
