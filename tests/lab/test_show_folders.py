"""What the terminal says of a folder of images: before it is trained on, and when asked for it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.lab.image_folders import CROP, SIDE, small, write_folder

Zeromean = Callable[..., str]
TINY = [f"resize={SIDE}", f"crop={CROP}", "length=0.00005", "batch_size=4", "probe_samples=4"]


def dry_run(zeromean: Zeromean, *words: str) -> str:
    with small():
        return zeromean("run", "imagenet-elu15", *TINY, *words, "--device", "cpu", "--workers", "0", "--dry-run")


def test_the_plan_tells_images_and_classes(zeromean: Zeromean, tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", classes=3)
    assert "./photos: 24 training, 6 test images, 3 classes\n" in dry_run(zeromean, "data=./photos")
    held_out = dry_run(zeromean, "data=./photos", "validation=6")
    assert "./photos: 18 training, 6 validation, 6 test images, 3 classes\n" in held_out


def test_large_numbers_have_commas(zeromean: Zeromean, tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", classes=1, train=4, val=1)
    for number in range(1200):
        (tmp_path / "photos" / "val" / "n00" / f"{number}.png").touch()
    assert "./photos: 4 training, 1,201 test images, 1 class\n" in dry_run(zeromean, "data=./photos")


def test_a_plan_without_images_tells_none(zeromean: Zeromean) -> None:
    assert " images" not in zeromean("run", "digits-mlp8", "hidden=16,16", "epochs=1", "--dry-run")


def test_a_named_folder_has_a_row(zeromean: Zeromean, tmp_path: Path) -> None:
    write_folder(tmp_path / "photos [1]", classes=3)
    rows = zeromean("data", "./photos [1]").splitlines()
    assert [row.split()[0] for row in rows if "present" in row][-1] == "./photos"
    last = " ".join(rows[-1].split())
    assert last.startswith("./photos [1] 24 6 any present /")
    assert "3 classes, listed; contents are not checked" in " ".join(" ".join(rows).split())


@pytest.mark.parametrize(
    ("words", "message"),
    [("./photos", "photos/train/n00 must hold its images all directly in it or"), ("./none", "none must hold the fol")],
)
def test_a_named_folder_that_is_not_as_it_must_be(
    zeromean: Zeromean, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: str, message: str
) -> None:
    more = write_folder(tmp_path / "photos") / "train" / "n00" / "more"
    more.mkdir()
    (more / "a.jpg").touch()
    with pytest.raises(SystemExit):
        zeromean("data", words)
    assert message in capsys.readouterr().err
