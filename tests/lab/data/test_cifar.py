import hashlib
import io
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from zeromean.lab import data
from zeromean.lab.data import catalog, cifar
from zeromean.lab.data.cifar import CIFAR10, CIFAR100, CifarDataset, CifarSplit, load_cifar

Change = Callable[[bytes], bytes]
FOLDER = "tiny-batches-bin"


def is_here(published: CifarDataset) -> bool:
    return "ZEROMEAN_DATA" in os.environ and not cifar.absent_files(published, data.data_root())


def needs(published: CifarDataset) -> pytest.MarkDecorator:
    reason = f"the official files of {published.name} are not in $ZEROMEAN_DATA/{published.folder}"
    return pytest.mark.skipif(not is_here(published), reason=reason)


def split_of(files: tuple[str, ...], rows: int, content: np.ndarray) -> CifarSplit:
    sums = sorted(hashlib.sha256(row.tobytes()).digest() for row in content)
    return CifarSplit(files, rows, hashlib.sha256(b"".join(sums)).hexdigest())


@pytest.fixture(params=[1, 2], ids=["one label byte", "coarse and fine"])
def rows(request: pytest.FixtureRequest) -> np.ndarray:
    """Ten training rows, two of them equal, and four test rows of two classes, the coarse byte being 7."""
    made = np.random.default_rng(0).integers(0, 256, (14, request.param + 3072), dtype=np.uint8)
    made[:, 0] = 7
    made[:, request.param - 1] = [0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0]
    made[3] = made[0]
    return made


@pytest.fixture
def tiny(rows: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> CifarDataset:
    published = replace(
        CIFAR10,
        folder=FOLDER,
        train=split_of(("one.bin", "two.bin"), 5, rows[:10]),
        test=split_of(("test.bin",), 4, rows[10:]),
        label_bytes=rows.shape[1] - 3072,
        archive="tiny.tar.gz",
        archive_md5="",
        addresses=(),
        classes=("cat", "dog"),
    )
    monkeypatch.setitem(catalog._CIFAR, "cifar10", published)
    return published


def write(root: Path, rows: np.ndarray) -> Path:
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in zip(("one.bin", "two.bin", "test.bin"), (rows[:5], rows[5:10], rows[10:]), strict=True):
        (folder / name).write_bytes(part.tobytes())
    return folder


def test_rows_become_images_and_classes(tiny: CifarDataset, rows: np.ndarray, tmp_path: Path) -> None:
    write(tmp_path, rows)
    dataset = data.load("cifar10", tmp_path)
    ordered = sorted((row.tobytes() for row in rows[:10]), key=lambda row: hashlib.sha256(row).digest())
    for image, label, row in zip(dataset.train_images, dataset.train_labels, ordered, strict=True):
        assert image.tolist() == np.frombuffer(row[-3072:], np.uint8).reshape(3, 32, 32).tolist()
        assert label == row[-3073]
    assert dataset.train_images.shape == (10, 3, 32, 32)
    assert dataset.test_images.shape == (4, 3, 32, 32)
    assert dataset.train_images.dtype == torch.uint8
    assert dataset.train_labels.dtype == torch.int64
    assert dataset.checksums == {"train": tiny.train.sha256, "test": tiny.test.sha256}


def test_the_order_on_the_disk_does_not_matter(tiny: CifarDataset, rows: np.ndarray, tmp_path: Path) -> None:
    write(tmp_path / "a", rows)
    write(tmp_path / "b", rows[[9, 0, 5, 3, 2, 8, 1, 7, 6, 4, 13, 10, 12, 11]])
    one, other = (load_cifar(tiny, tmp_path / place) for place in "ab")
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "damaged or another data set: expected the SHA-256"),
        (lambda content: bytes([content[0] ^ 1]) + content[1:], "damaged or another data set"),
        (lambda content: content[: len(content) // 2] * 2, "damaged or another data set"),
        (lambda content: content[:-1], r"must hold the \d+ bytes of the official file, got \d+"),
        (lambda content: content + content[: len(content) // 4], "got more"),
    ],
    ids=["a pixel", "a label", "a row twice", "truncated", "a row too many"],
)
def test_other_content_is_refused(
    tiny: CifarDataset, rows: np.ndarray, tmp_path: Path, change: Change, reason: str
) -> None:
    file = write(tmp_path, rows) / "test.bin"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=reason) as raised:
        load_cifar(tiny, tmp_path)
    assert f"Delete {file.parent} and run again" in str(raised.value)
    described = {one.name: one for one in data.describe(tmp_path)}["cifar10"]
    assert described.state == "damaged"
    assert str(raised.value) == described.detail


def test_a_training_row_in_the_test_split_is_refused(tiny: CifarDataset, rows: np.ndarray, tmp_path: Path) -> None:
    write(tmp_path, rows[[10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 11, 12, 13]])
    with pytest.raises(ValueError, match=r"one\.bin, two\.bin of .* are damaged"):
        load_cifar(tiny, tmp_path)


def test_wrong_class_counts_are_noticed(tiny: CifarDataset, rows: np.ndarray, tmp_path: Path) -> None:
    write(tmp_path, rows)
    with pytest.raises(AssertionError, match="are not the published"):
        load_cifar(replace(tiny, classes=("a", "b", "c", "d", "e")), tmp_path)


def test_the_description_follows_the_files(tiny: CifarDataset, rows: np.ndarray, tmp_path: Path) -> None:
    def described() -> data.Description:
        return {one.name: one for one in data.describe(tmp_path)}["cifar10"]

    assert described().state == "absent"
    folder = write(tmp_path, rows)
    expected = data.Description("cifar10", 10, 4, (3, 32, 32), "present", str(folder), rows.size, "checksums ok (2)")
    assert described() == expected
    (folder / "two.bin").unlink()
    assert described().state == "absent"
    assert described().detail.startswith("2 of 3 files")
    (folder / "test.bin").write_bytes(b"other")
    assert described().state == "damaged"


def archive_of(path: Path, rows: np.ndarray, change: Callable[[list[tarfile.TarInfo]], None]) -> None:
    """The three files, a readme and whatever ``change`` makes of their headers."""
    contents = {
        f"{FOLDER}/readme.html": b"read me",
        f"{FOLDER}/one.bin": rows[:5].tobytes(),
        f"{FOLDER}/two.bin": rows[5:10].tobytes(),
        f"{FOLDER}/test.bin": rows[10:].tobytes(),
    }
    members = []
    for name, content in contents.items():
        member = tarfile.TarInfo(name)
        member.size = len(content)
        members.append(member)
    change(members)
    with tarfile.open(path, "w:gz") as archive:
        for member, content in zip(members, contents.values(), strict=True):
            archive.addfile(member, io.BytesIO(content[: member.size]) if member.isreg() else None)


def with_archive(monkeypatch: pytest.MonkeyPatch, path: Path) -> list[tuple[object, ...]]:
    calls: list[tuple[object, ...]] = []

    def download(*arguments: object) -> Path:
        calls.append(arguments)
        return path

    monkeypatch.setattr(cifar, "download", download)
    return calls


def test_absent_files_come_from_the_archive(
    tiny: CifarDataset, rows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    (write(root, rows) / "two.bin").unlink()
    archive_of(tmp_path / "tiny.tar.gz", rows, lambda members: None)
    calls = with_archive(monkeypatch, tmp_path / "tiny.tar.gz")
    for _ in range(2):
        assert len(load_cifar(tiny, root).train_labels) == 10
    assert calls == [("tiny.tar.gz", "", (), root)]
    assert sorted(path.name for path in (root / FOLDER).iterdir()) == ["one.bin", "test.bin", "two.bin"]


def outside(members: list[tarfile.TarInfo]) -> None:
    members[0].name = f"{FOLDER}/../../evil"
    members[1].name = f"../{FOLDER}/one.bin"


def absolute(members: list[tarfile.TarInfo]) -> None:
    members[1].name = f"/{FOLDER}/one.bin"


def symbolic_link(members: list[tarfile.TarInfo]) -> None:
    members[1].type, members[1].linkname = tarfile.SYMTYPE, "/etc/passwd"


def shortened(members: list[tarfile.TarInfo]) -> None:
    members[1].size -= 1


@pytest.mark.parametrize("change", [outside, absolute, symbolic_link, shortened])
def test_another_archive_is_refused_and_writes_nothing(
    tiny: CifarDataset,
    rows: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[list[tarfile.TarInfo]], None],
) -> None:
    archive_of(tmp_path / "tiny.tar.gz", rows, change)
    with_archive(monkeypatch, tmp_path / "tiny.tar.gz")
    with pytest.raises(ValueError, match=r"tiny\.tar\.gz is not the official archive: it must hold a regular file"):
        load_cifar(tiny, tmp_path / "root" / "deep")
    assert [path.name for path in tmp_path.rglob("*")] == ["tiny.tar.gz"]


def test_a_truncated_archive_is_refused(
    tiny: CifarDataset, rows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.tar.gz"
    archive_of(path, rows, lambda members: None)
    path.write_bytes(path.read_bytes()[:9000])
    with_archive(monkeypatch, path)
    with pytest.raises(ValueError, match=r"is not the official archive: .* Delete"):
        load_cifar(tiny, tmp_path)


def test_offline_and_absent_states_every_remedy(tiny: CifarDataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cifar10 needs one\.bin, two\.bin, test\.bin") as raised:
        load_cifar(replace(tiny, addresses=("http://127.0.0.1:1/",)), tmp_path)
    for part in (str(tmp_path / FOLDER), "tiny.tar.gz", "ZEROMEAN_DATA", "connect to the network", "'digits'"):
        assert part in str(raised.value)


def test_offline_another_archive_in_place_is_told(tiny: CifarDataset, tmp_path: Path) -> None:
    (tmp_path / "tiny.tar.gz").write_bytes(b"half of it")
    rule = rf"tiny\.tar\.gz, whose MD5 sum in {tmp_path} is not {'0' * 32}, could not be downloaded"
    with pytest.raises(ValueError, match=rule):
        load_cifar(replace(tiny, archive_md5="0" * 32, addresses=("http://127.0.0.1:1/",)), tmp_path)


@pytest.mark.parametrize(("published", "row", "classes"), [(CIFAR10, 3073, 10), (CIFAR100, 3074, 100)])
def test_published_facts_agree_with_each_other(published: CifarDataset, row: int, classes: int) -> None:
    assert published.train.count == 50_000
    assert published.test.count == 10_000
    assert sum(published.sizes.values()) == 60_000 * row
    assert len(set(published.classes)) == classes
    assert list(published.classes) == sorted(published.classes)
    assert len(published.archive_md5) == 32


@pytest.mark.parametrize(
    ("published", "mean", "std"),
    [
        pytest.param(CIFAR10, [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616], marks=needs(CIFAR10)),
        pytest.param(CIFAR100, [0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762], marks=needs(CIFAR100)),
    ],
    ids=["cifar10", "cifar100"],
)
def test_the_official_images_have_their_well_known_statistics(
    published: CifarDataset, mean: list[float], std: list[float]
) -> None:
    dataset = data.load(published.name)
    channels = dataset.train_images.transpose(0, 1).flatten(1)
    found = torch.stack([torch.bincount(channel, minlength=256) for channel in channels]).double() / channels.shape[1]
    values = torch.arange(256, dtype=torch.float64) / 255
    means = (found * values).sum(1, keepdim=True)
    deviations = (found * (values - means).square()).sum(1).sqrt()
    assert means.flatten().tolist() == pytest.approx(mean, abs=5e-5)
    assert deviations.tolist() == pytest.approx(std, abs=5e-5)
