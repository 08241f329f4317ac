"""Which files of a folder are its images, and that none of them is left out in silence."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tests.lab.image_folders import pixels_of, write_folder, write_tiny

from zeromean.lab.data import load_folder
from zeromean.lab.data.images import SUFFIXES, read_image_folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "photos")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny")


def put(file: Path, count: int = 1) -> None:
    """Write images of that suffix, each with a number of its own."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.fromarray(pixels_of(0, number)).save(file.with_stem(f"{file.stem}_{number}"))


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".WebP", ".BMP"])
def test_every_suffix_that_is_read_is_found(root: Path, suffix: str) -> None:
    put(root / "train" / "n00" / f"a{suffix}")
    files = read_image_folder(root).train.files
    assert len(files) == 17
    assert files[0].name == f"a_0{suffix}"


@pytest.mark.parametrize("part", ["train", "train/n00", "train/n00/more", "val/n01"])
def test_images_of_other_formats_are_refused(root: Path, part: str) -> None:
    put(root / part / "a.gif", 2)
    put(root / part / "b.TIFF")
    with pytest.raises(ValueError, match=rf"{part} must end in \.bmp, .* got 3 of another .* a_0\.gif: convert them"):
        read_image_folder(root)


def test_other_files_may_lie_anywhere(root: Path) -> None:
    before = read_image_folder(root)
    for folder in (root, root / "train", root / "train" / "n00", root / "train" / "n00" / "notes", root / "val"):
        folder.mkdir(exist_ok=True)
        for name in (".DS_Store", "Thumbs.db", "boxes.txt", "labels.csv", "jpg", ".png"):
            (folder / name).write_text("no image")
    assert read_image_folder(root) == before


@pytest.mark.parametrize("part", ["train", "val"])
def test_images_beside_the_classes_are_refused(root: Path, part: str) -> None:
    put(root / part / "a.jpg", 3)
    with pytest.raises(ValueError, match=rf"{part} must hold a folder .* got 3 directly in it, such as a_0\.jpg: move"):
        read_image_folder(root)


@pytest.mark.parametrize(
    ("place", "got"),
    [
        ("more", "8 directly in it, 2 in more: move"),
        ("more/and/more", "8 directly in it, 2 in more/and/more: move"),
        ("images", "8 directly in it, 2 in images: move"),
        ("images/more", "8 directly in it, 2 in images/more: move"),
    ],
)
def test_images_deeper_in_a_class_are_refused(root: Path, place: str, got: str) -> None:
    put(root / "train" / "n01" / place / "a.jpg", 2)
    with pytest.raises(ValueError, match=rf"n01 must hold its images all directly in it or all in images, got {got}"):
        read_image_folder(root)


def test_images_behind_a_link_are_refused(root: Path, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "a.jpg", 2)
    (root / "train" / "n01" / "more").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="got 8 directly in it, 2 in more"):
        read_image_folder(root)


def test_classes_may_be_links(root: Path, tmp_path: Path) -> None:
    before = read_image_folder(root)
    (root / "train" / "n01").rename(tmp_path / "elsewhere")
    (root / "train" / "n01").symlink_to(tmp_path / "elsewhere")
    assert read_image_folder(root) == before


@pytest.mark.parametrize("parts", [("train",), ("train", "val")])
def test_classes_whose_link_leads_nowhere_are_refused(root: Path, parts: tuple[str, ...]) -> None:
    for part in parts:
        (root / part / "n02").symlink_to(root / "unmounted")
    with pytest.raises(ValueError, match=r"every link in .*train must lead .* got 1 that leads nowhere, such as n02: "):
        read_image_folder(root)


def test_a_class_may_have_a_name_that_is_not_utf_8(root: Path) -> None:
    for part in ("train", "val"):
        (root / part / "n01").rename(root / part / os.fsdecode(b"caf\xe9"))
    assert os.fsencode(load_folder(str(root)).classes[0]) == b"caf\xe9"


def test_a_home_of_nobody_is_a_folder_that_is_absent() -> None:
    with pytest.raises(ValueError, match=r"~nobody_at_all/photos must hold the folders train and val"):
        load_folder("~nobody_at_all/photos")


def test_of_many_places_four_are_named(root: Path) -> None:
    for number in range(5):
        put(root / "train" / "n01" / str(number) / "a.jpg")
    with pytest.raises(ValueError, match=r"got 8 directly in it, 1 in 0, 1 in 1, 1 in 2 and others: move"):
        read_image_folder(root)


def test_a_folder_named_images_without_any_changes_nothing(root: Path) -> None:
    before = read_image_folder(root)
    (root / "train" / "n00" / "images").mkdir()
    assert read_image_folder(root) == before


@pytest.mark.parametrize(
    ("place", "got"),
    [(".", "1 directly in it, 4 in images"), ("n00", "4 in images, 1 in n00"), ("images/n00", "1 in images/n00")],
)
def test_images_beside_those_of_the_annotations_are_refused(tiny: Path, place: str, got: str) -> None:
    put(tiny / "val" / place / "a.jpg")
    with pytest.raises(ValueError, match=rf"val must hold its images all in images, got .*{got}: .* delete val_annot"):
        read_image_folder(tiny)


Change = Callable[[bytes], bytes]


def annotate(tiny: Path, change: Change) -> None:
    file = tiny / "val" / "val_annotations.txt"
    file.write_bytes(change(file.read_bytes()))


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines + b"\n",
        lambda lines: b"\n" + lines + b" \t\n\n",
        lambda lines: b"\xef\xbb\xbf" + lines,
        lambda lines: lines.replace(b"\n", b"\r\n"),
        lambda lines: lines + lines,
    ],
    ids=["blank last line", "blank lines", "byte order mark", "Windows", "twice the same"],
)
def test_annotations_that_mean_the_same(tiny: Path, change: Change) -> None:
    before = read_image_folder(tiny)
    annotate(tiny, change)
    assert read_image_folder(tiny) == before


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda lines: b"\xff\xfe" + lines, r"txt must be text in UTF-8, got byte 0xff at position 0: save"),
        (lambda lines: lines + b"val_0.JPEG\tn01\n", r"txt must .* one class, got n00 and n01 for val_0\.JPEG: delete"),
        (lambda lines: lines + b"val_0.JPEG\t\t1\n", r"txt must be a file name, a tab and a class, got 'val_0\.JPEG"),
    ],
    ids=["not UTF-8", "two classes", "no class"],
)
def test_annotations_that_are_refused(tiny: Path, change: Change, rule: str) -> None:
    annotate(tiny, change)
    with pytest.raises(ValueError, match=rf"val_annotations\.{rule}"):
        read_image_folder(tiny)
