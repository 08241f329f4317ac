from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zeromean.lab.data.imagenet import cached_mean_image
from zeromean.lab.data.images import (
    ImageBatch,
    ImageFolder,
    evaluation_batches,
    mean_image,
    read_image_folder,
    subtract_mean,
    training_batches,
)

CLASSES = ("n01", "n02")
forking = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def pixels_of(number: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "PNG")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """ImageNet's layout: two classes of five training images and two validation images of 8 by 8 pixels."""
    for index, name in enumerate(CLASSES):
        for number in range(5):
            save(tmp_path / "train" / name / f"{name}_{number}.JPEG", pixels_of(10 * index + number))
        for number in range(2):
            save(tmp_path / "val" / name / f"val_{index}{number}.png", pixels_of(50 + 10 * index + number))
    (tmp_path / "train" / "n01" / "n01_boxes.txt").write_text("no image")
    return tmp_path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Tiny ImageNet's layout of the same."""
    for index, name in enumerate(CLASSES):
        for number in range(5):
            save(tmp_path / "train" / name / "images" / f"{name}_{number}.JPEG", pixels_of(10 * index + number))
    lines = []
    for number, name in enumerate(("n02", "n01", "n02", "n01")):
        save(tmp_path / "val" / "images" / f"val_{number}.JPEG", pixels_of(number))
        lines.append(f"val_{number}.JPEG\t{name}\t0\t32\t44\t62")
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def an_epoch(folder: ImageFolder, *, seed: int = 1, epoch: int = 0, workers: int = 0) -> list[ImageBatch]:
    batches = training_batches(folder.train, 4, seed=seed, epoch=epoch, workers=workers, resize=8, crop=6)
    return list(batches)


def test_classes_are_folders(root: Path) -> None:
    folder = read_image_folder(root)
    assert folder.classes == CLASSES
    assert [file.name for file in folder.train.files[:5]] == [f"n01_{number}.JPEG" for number in range(5)]
    assert folder.train.labels == (0,) * 5 + (1,) * 5
    assert [file.name for file in folder.val.files] == ["val_00.png", "val_01.png", "val_10.png", "val_11.png"]
    assert folder.val.labels == (0, 0, 1, 1)


def test_tiny_imagenet_has_its_validation_classes_in_a_file(tiny: Path) -> None:
    folder = read_image_folder(tiny)
    assert folder.classes == CLASSES
    assert len(folder.train.files) == 10
    assert [file.name for file in folder.val.files] == [f"val_{number}.JPEG" for number in (1, 3, 0, 2)]
    assert folder.val.labels == (0, 0, 1, 1)


def test_training_images_are_crops_and_flips_of_the_files(root: Path) -> None:
    folder = read_image_folder(root)
    seen = []
    for batch in an_epoch(folder):
        for image, label, (top, left, flipped) in zip(batch.images, batch.labels, batch.crops.tolist(), strict=True):
            expected = [
                number
                for number in range(20)
                if torch.equal(
                    torch.from_numpy(
                        pixels_of(number)[top : top + 6, left : left + 6][:, :: -1 if flipped else 1].copy()
                    ),
                    image.permute(1, 2, 0),
                )
            ]
            assert len(expected) == 1
            assert label == expected[0] // 10
            seen += expected
    assert len(seen) == len(set(seen)) == 8


@forking
def test_the_workers_do_not_show(root: Path) -> None:
    folder = read_image_folder(root)
    torch.manual_seed(1)
    alone, state = an_epoch(folder), torch.get_rng_state()
    for workers in (1, 2):
        torch.manual_seed(workers)
        for one, other in zip(alone, an_epoch(folder, workers=workers), strict=True):
            assert all(torch.equal(left, right) for left, right in zip(one, other, strict=True))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


def test_seeds_and_epochs_differ(root: Path) -> None:
    folder = read_image_folder(root)
    first = [
        torch.stack([batch.images for batch in an_epoch(folder, seed=s, epoch=e)]) for s, e in ((1, 0), (1, 1), (2, 0))
    ]
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_processes_share_every_batch(root: Path) -> None:
    folder = read_image_folder(root)
    shares = [
        list(training_batches(folder.train, 4, seed=1, epoch=0, workers=0, resize=8, crop=6, share=(rank, 2)))
        for rank in range(2)
    ]
    for whole, left, right in zip(an_epoch(folder), *shares, strict=True):
        assert all(torch.equal(all_, torch.cat([one, two])) for all_, one, two in zip(whole, left, right, strict=True))


def test_evaluation_takes_the_centre_of_every_image_in_order(root: Path) -> None:
    folder = read_image_folder(root)
    batches = list(evaluation_batches(folder.val, 3, workers=0, resize=8, crop=4))
    assert [len(batch.labels) for batch in batches] == [3, 1]
    expected = [torch.from_numpy(pixels_of(number)[2:6, 2:6].copy()) for number in (50, 51, 60, 61)]
    assert torch.equal(torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1), torch.stack(expected))
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0, 0, 1, 1]
    assert batches[0].images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(8, 14), (14, 8)])
def test_an_oblong_image_is_cut_and_not_squeezed(root: Path, shape: tuple[int, int]) -> None:
    pixels = pixels_of(0, *shape)
    save(root / "val" / "n01" / "val_00.png", pixels)
    top, left = ((side - 8) // 2 for side in shape)
    square = torch.from_numpy(pixels[top : top + 8, left : left + 8].copy())
    batch = next(evaluation_batches(read_image_folder(root).val, 1, workers=0, resize=8, crop=8))
    assert torch.equal(batch.images[0].permute(1, 2, 0), square)


def test_a_grey_image_has_three_channels_and_any_size_is_resized(root: Path) -> None:
    save(root / "val" / "n01" / "val_00.png", np.full((20, 30), 77, dtype=np.uint8))
    batch = next(evaluation_batches(read_image_folder(root).val, 1, workers=0, resize=8, crop=6))
    assert batch.images.shape == (1, 3, 6, 6)
    assert batch.images.unique().tolist() == [77]


@pytest.mark.parametrize("name", ["val_00.webp", "val_00.bmp"])
def test_other_formats_keep_their_pixels(root: Path, name: str) -> None:
    (root / "val" / "n01" / "val_00.png").unlink()
    Image.fromarray(pixels_of(50)).save(root / "val" / "n01" / name, lossless=True)
    batch = next(evaluation_batches(read_image_folder(root).val, 1, workers=0, resize=8, crop=8))
    assert torch.equal(batch.images[0].permute(1, 2, 0), torch.from_numpy(pixels_of(50)))


def grey(root: Path, values: np.ndarray, kind: str) -> list[list[int]]:
    """What is read of a file of those values, which pillow opens in the mode of its kind: the first channel."""
    Image.fromarray(values).save(root / "val" / "n01" / "val_00.png", kind)
    batch = next(evaluation_batches(read_image_folder(root).val, 1, workers=0, resize=8, crop=8))
    assert torch.equal(batch.images[0, 0], batch.images[0, 2])
    rows: list[list[int]] = batch.images[0, 0].tolist()
    return rows


@pytest.mark.parametrize(("kind", "dtype"), [("PNG", np.uint16), ("TIFF", np.uint16), ("PPM", np.int32)])
def test_sixteen_bits_of_grey_become_eight(root: Path, kind: str, dtype: type) -> None:
    row = [0, 255, 256, 0x7FFF, 0x8000, 0xABCD, 0xFF00, 0xFFFF]
    assert grey(root, np.array([row] * 8, dtype=dtype), kind) == [[0, 0, 1, 127, 128, 0xAB, 255, 255]] * 8


@pytest.mark.parametrize(
    ("values", "found"),
    [(np.full((8, 8), 1 << 16, np.int32), "65536 to 65536"), (np.full((8, 8), 0.5, np.float32), "0.5 to 0.5")],
)
def test_grey_without_a_known_range_is_refused(root: Path, values: np.ndarray, found: str) -> None:
    with pytest.raises(ValueError, match=rf"val_00\.png cannot be read .*whole numbers in \[0, 65535\], got {found}"):
        grey(root, values, "TIFF")


def test_the_mean_image_tells_how_far_it_is(root: Path) -> None:
    split, told = read_image_folder(root).train, list[tuple[int, int]]()
    many = split.take([number % 10 for number in range(150)])
    mean = mean_image(many, workers=0, resize=8, tell=lambda done, of: told.append((done, of)))
    assert told == [(64, 150), (128, 150), (150, 150)]
    torch.testing.assert_close(mean, mean_image(split, workers=0, resize=8))


def test_a_mean_image_of_the_cache_tells_nothing(root: Path, tmp_path: Path) -> None:
    split, told = read_image_folder(root).val, list[tuple[int, int]]()

    def find() -> torch.Tensor:
        return cached_mean_image(
            split, "key", resize=8, workers=0, root=tmp_path / "data", tell=lambda done, of: told.append((done, of))
        )

    assert torch.equal(find(), find())
    assert told == [(4, 4)]


def test_the_mean_image_is_taken_off_under_each_crop(root: Path) -> None:
    folder = read_image_folder(root)
    mean = mean_image(folder.train, workers=0, resize=8)
    stacked = np.stack([pixels_of(10 * index + number) for index in range(2) for number in range(5)])
    torch.testing.assert_close(mean, torch.from_numpy(stacked.mean(0)).permute(2, 0, 1).float())
    flips = set()
    for batch in an_epoch(folder):
        found = subtract_mean(batch, mean)
        assert found.is_contiguous(memory_format=torch.channels_last)
        for image, less, (top, left, flipped) in zip(batch.images, found, batch.crops.tolist(), strict=True):
            under = mean[:, top : top + 6, left : left + 6]
            assert torch.equal(less, image - (under.flip(2) if flipped else under))
            flips.add(flipped)
    assert flips == {0, 1}


@forking
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "damage",
    [lambda content: b"", lambda content: content[:60], lambda content: b"<html>" * 40],
    ids=["0", "cut", "html"],
)
def test_an_unreadable_image_is_named(root: Path, workers: int, damage: Callable[[bytes], bytes]) -> None:
    file = root / "train" / "n02" / "n02_3.JPEG"
    file.write_bytes(damage(file.read_bytes()))
    split = read_image_folder(root).train
    with pytest.raises(ValueError, match=r"n02_3\.JPEG cannot be read as an image .*restore it or take it out"):
        list(evaluation_batches(split, 5, workers=workers, resize=8, crop=8))


def remove(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink()


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_class_without_images(root: Path, part: str) -> None:
    remove(list((root / part / "n02").iterdir()))
    with pytest.raises(ValueError, match=rf"{part} must have an image .* got none in n02 \(1 of 2 classes\)"):
        read_image_folder(root)


def test_classes_that_differ(root: Path) -> None:
    (root / "val" / "n02").rename(root / "val" / "n03")
    with pytest.raises(ValueError, match=r"same classes, got 2 .*: n02 \(only in train\), n03 \(only in val\)"):
        read_image_folder(root)


def test_no_folders_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train must hold a folder of images for each class, got none"):
        read_image_folder(tmp_path)


@pytest.mark.parametrize("missing", ["val_1.JPEG", None], ids=["no image", "no annotation"])
def test_annotations_that_do_not_fit(tiny: Path, missing: str | None) -> None:
    if missing:
        (tiny / "val" / "images" / missing).unlink()
    else:
        save(tiny / "val" / "images" / "val_9.JPEG", pixels_of(0))
    with pytest.raises(ValueError, match=rf"got 1 in one of them alone, such as {missing or 'val_9.JPEG'}"):
        read_image_folder(tiny)


def test_an_annotation_without_a_class(tiny: Path) -> None:
    with (tiny / "val" / "val_annotations.txt").open("a") as file:
        file.write("val_4.JPEG\n")
    with pytest.raises(ValueError, match=r"a file name, a tab and a class, got 'val_4\.JPEG'"):
        read_image_folder(tiny)


@pytest.mark.parametrize(
    ("batch_size", "crop", "rule"),
    [(11, 6, r"batch_size must lie in \[1, 10\], got 11"), (4, 9, r"crop must lie in \[1, 8\], got 9")],
)
def test_sizes_that_do_not_fit(root: Path, batch_size: int, crop: int, rule: str) -> None:
    split = read_image_folder(root).train
    with pytest.raises(ValueError, match=rule):
        training_batches(split, batch_size, seed=0, epoch=0, workers=0, resize=8, crop=crop)
