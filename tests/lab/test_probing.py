"""What ``zeromean probe`` refuses before any work is done, and what it says of what it probes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from tests.lab.image_study import CPU, short, tiny_cifar

from zeromean.diagnostics import probe
from zeromean.lab import probing
from zeromean.lab.data import Dataset
from zeromean.lab.recipes import find
from zeromean.lab.recipes.images import ImageRecipe

Zeromean = Callable[..., str]
OWN = "from torch import nn\ndef build(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"


def small(name: str) -> Any:
    """A recipe as it is, but those on images in steps of four."""
    recipe = find(name)
    return short(recipe) if isinstance(recipe, ImageRecipe) and recipe.network != "elu15" else recipe


def tiny(name: str) -> Dataset:
    """Twelve images in the shape of the data set's."""
    if name in ("cifar10", "cifar100"):
        return tiny_cifar(name)
    grey = torch.zeros(12, 1, 28, 28, dtype=torch.uint8)
    return replace(tiny_cifar(name), train_images=grey, test_images=grey[:6])


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets of twelve images: digits, mnist, cifar10 and cifar100."""
    monkeypatch.setattr(probing, "find", small)
    monkeypatch.setattr(probing, "load", tiny)


@pytest.fixture
def refusal(
    few: None, zeromean: Zeromean, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Zeromean:
    """What a refused command printed, which must neither prepare images nor probe."""

    def work(*_: Any, **__: Any) -> NoReturn:
        pytest.fail("this comes before the work")

    monkeypatch.setattr(probing, "training_samples", work)
    monkeypatch.setattr(probing, "run", work)

    def call(*words: str) -> str:
        with pytest.raises(SystemExit) as stop:
            zeromean("probe", *words)
        assert stop.value.code == 2
        assert not Path("runs").exists()
        return capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("cifar100-elu11 --data mnist", "elu11 does not take images of 1x28x28, as those of data=mnist are: choose"),
        ("imagenet-elu15", "'imagenet-elu15' is for a folder of images, data=imagenet, which zeromean probe does not"),
        ("imagenet-elu15", "not read: probe another recipe, or call zm.probe in Python on a batch of your own"),
        ("imagenet-elu15 --data cifar100", "'imagenet-elu15' is for a folder of images, data=imagenet, which"),
        ("cifar100-elu11 --data ./photos", "data=./photos is a folder of images, which zeromean probe does not read:"),
        ("digits-mlp8 --data imagenet", "choose one of digits, mnist, fashion-mnist, cifar10, cifar100, or call"),
        ("my_module:build --data tiny-imagenet", "or call zm.probe in Python on a batch of your own"),
        ("digits-mlp8 --norm batch", "--norm batch is not offered for 'digits-mlp8': its runs are trained as one"),
        ("cifar100-elu11 --norm bach", "unknown normalization 'bach': did you mean 'batch'?"),
        ("digits-mlp8 --flat", "flat is for models of your own, got it for 'digits-mlp8': leave it out"),
        ("my_module:build --norm batch", "norm is for recipes, got 'batch' for 'my_module:build': let its function"),
        ("cifar100-elu11 --samples 13", "samples must be at least 2 and at most 12, as cifar100 has that many"),
        ("digits-mlp8 --samples 13", "as digits has that many training images, got 13: 500 is the default"),
        ("my_module:build --samples 13", "samples must be at least 2 and at most 12, as digits has that many"),
        ("digits-mlp8 --output file", "output must be a folder, old or new, got file, where file is none: name"),
        ("digits-mlp8 --output file/p", "output must be a folder, old or new, got file/p, where file is none: name"),
        ("digits-mlp8 --output link", "output must be a folder, old or new, got link, where link is none: name"),
    ],
)
def test_what_cannot_be_probed_is_refused_before_the_work(
    refusal: Zeromean, tmp_path: Path, words: str, error: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "my_module.py").write_text(OWN)
    assert error in refusal(*words.split())


def test_a_folder_that_cannot_be_written_to(refusal: Zeromean, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(**_: Any) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(probing, "TemporaryFile", forbidden)
    error = refusal("digits-mlp8", "--output", "a/b")
    assert (
        "must be a folder that can be written to, got a/b (Permission denied): name another one, or change the" in error
    )


def test_the_check_of_a_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "new", tmp_path / "new/deep"):
        probing.check_output(folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "norm", "title"),
    [
        ("", "none", "11-layer network on CIFAR-100, ELU"),
        ("", "batch", "11-layer network on CIFAR-100, ELU + BatchNorm"),
        ("cifar10", "batch", "11-layer network on CIFAR-100 (data=cifar10), ELU + BatchNorm"),
    ],
)
def test_the_title_names_what_is_probed(few: None, data: str, norm: str, title: str) -> None:
    chosen = probing.subject("cifar100-elu11", data, None, CPU, flat=False, norm=norm, samples=8)
    assert chosen.title == title
    assert any("norm" in name for name, _ in chosen.model.named_modules()) == (norm == "batch")


OUT_OF_MEMORY = [MemoryError("none"), torch.OutOfMemoryError("none"), RuntimeError("can't allocate memory: none")]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_the_remedy_of_too_little_memory_speaks_of_samples(
    few: None, zeromean: Zeromean, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def measure(*_: Any, **__: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(probe, "measure", measure)
    with pytest.raises(SystemExit):
        zeromean("probe", "digits-mlp8", "--samples", "12")
    assert f"out of memory ({error}): name fewer --samples than 12 or choose --preset light" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        zeromean("probe", "digits-mlp8", "--samples", "12", "--preset", "light")
    assert "name fewer --samples than 12, or make the network smaller" in capsys.readouterr().err


def test_other_errors_of_torch_stay_as_they_are(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = probing.subject("digits-mlp8", "", None, CPU, flat=False, samples=12)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        probing.run(replace(chosen, images=torch.zeros(12, 3)))
