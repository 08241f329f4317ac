import gzip
import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zeromean.lab import data
from zeromean.lab.data import catalog, digits, mnist
from zeromean.lab.data.idx import locate
from zeromean.lab.data.mnist import FASHION_MNIST, MNIST, IdxDataset


def is_here(published: IdxDataset) -> bool:
    folder = data.data_root() / published.folder
    return "ZEROMEAN_DATA" in os.environ and all(locate(folder, file) for file in published.files)


def needs(published: IdxDataset) -> pytest.MarkDecorator:
    reason = f"the official files of {published.name} are not in $ZEROMEAN_DATA/{published.folder}"
    return pytest.mark.skipif(not is_here(published), reason=reason)


def test_digits() -> None:
    dataset = data.load("digits")
    assert dataset.train_images.shape == (1437, 1, 8, 8)
    assert dataset.test_images.shape == (360, 1, 8, 8)
    assert dataset.train_images.dtype == torch.uint8
    assert dataset.train_labels.dtype == torch.int64
    assert all(vectors.max() == 1 for vectors in data.as_vectors(dataset))
    assert torch.bincount(dataset.test_labels).tolist() == [36, 37, 35, 37, 36, 36, 36, 36, 35, 36]


def test_the_split_of_digits_is_pinned() -> None:
    labels = data.load("digits").test_labels
    assert hashlib.sha256(bytes(labels.tolist())).hexdigest() == DIGITS_TEST_LABELS


DIGITS_TEST_LABELS = "f6e50664db2f92185e3ab8b3def03fc33240546c9db5d3eb13930f934189888f"


def test_digits_of_another_content_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(digits.CHECKSUMS, "digits-labels", "0" * 64)
    with pytest.raises(ValueError, match=r"digits-labels of scikit-learn is damaged .* Reinstall scikit-learn"):
        data.load("digits")


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'zeromean\[lab\]'"):
        data.load("digits")
    assert data.describe("/nowhere")[0].state == "absent"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("mnits", "did you mean 'mnist'? "), ("Fashion_MNIST", "did you mean 'fashion-mnist'? "), ("imagenet", "")],
)
def test_an_unknown_name_lists_all_and_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match="data set") as raised:
        data.load(name)
    assert str(raised.value) == f"unknown data set {name!r}: {hint}Choose one of {', '.join(data.available())}"


def test_idx_files_become_a_data_set(tiny: IdxDataset, raw: Path, contents: dict[str, Tensor]) -> None:
    dataset = data.load("mnist", raw.parent.parent)
    train_images, train_labels, test_images, test_labels = contents.values()
    assert torch.equal(dataset.train_images, train_images.unsqueeze(1))
    assert torch.equal(dataset.train_labels, train_labels.long())
    assert torch.equal(dataset.test_images, test_images.unsqueeze(1))
    assert torch.equal(dataset.test_labels, test_labels.long())
    assert dataset.train_labels.dtype == torch.int64
    assert dataset.checksums == {name: hashlib.sha256((raw / name).read_bytes()).hexdigest() for name in contents}


def test_the_variable_says_where(tiny: IdxDataset, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROMEAN_DATA", str(raw.parent.parent))
    assert len(data.load("mnist").train_labels) == 20


def test_one_damaged_file_spoils_the_load(tiny: IdxDataset, raw: Path) -> None:
    path = raw / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte is damaged or another file"):
        data.load("mnist", raw.parent.parent)


def test_wrong_published_counts_are_noticed(tiny: IdxDataset, raw: Path) -> None:
    with pytest.raises(AssertionError, match=r"\(2, 4\) are not the published \(3, 3\)"):
        mnist.load_idx(replace(tiny, test_counts=(3, 3)), raw.parent.parent)


def test_only_absent_files_are_downloaded(tiny: IdxDataset, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = raw / "train-labels-idx1-ubyte"
    content = absent.read_bytes()
    absent.unlink()
    calls = []

    def download(name: str, md5: str, addresses: tuple[str, ...], folder: Path) -> Path:
        calls.append((name, md5, addresses, folder))
        (folder / name).write_bytes(gzip.compress(content))
        return folder / name

    monkeypatch.setattr(mnist, "download", download)
    for _ in range(2):
        assert len(data.load("mnist", raw.parent.parent).train_labels) == 20
    assert calls == [("train-labels-idx1-ubyte.gz", tiny.files[1].gz_md5, tiny.addresses, raw)]


def test_absent_files_come_from_the_server(
    tiny: IdxDataset, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(catalog._IDX, "mnist", replace(tiny, addresses=(server,)))
    assert len(data.load("mnist", tmp_path / "new").test_labels) == 6
    assert data.describe(tmp_path / "new")[1].state == "present"


def test_offline_and_absent_states_every_remedy(tiny: IdxDataset, tmp_path: Path) -> None:
    offline = replace(tiny, addresses=("http://127.0.0.1:1/",))
    with pytest.raises(ValueError, match="mnist needs train-images-idx3-ubyte") as raised:
        mnist.load_idx(offline, tmp_path)
    for part in (str(tmp_path / "MNIST/raw"), "ZEROMEAN_DATA", "connect to the network", "'digits' needs neither"):
        assert part in str(raised.value)


def test_the_description_follows_the_files(tiny: IdxDataset, raw: Path) -> None:
    def described() -> data.Description:
        return data.describe(raw.parent.parent)[1]

    size = sum(path.stat().st_size for path in raw.iterdir())
    assert described() == data.Description("mnist", 20, 6, (1, 3, 4), "present", str(raw), size, "checksums ok (4)")
    labels = raw / "t10k-labels-idx1-ubyte"
    labels.write_bytes(b"other")
    assert described().state == "damaged"
    assert f"Delete {labels}" in described().detail
    labels.unlink()
    assert described().state == "absent"
    assert described().detail.startswith("3 of 4 files")


def test_every_available_name_is_described(tmp_path: Path) -> None:
    described = data.describe(tmp_path)
    assert tuple(description.name for description in described) == data.available()
    assert [description.state for description in described] == ["present", *["absent"] * 4]
    assert [description.train_count for description in described] == [1437, 60_000, 60_000, 50_000, 50_000]


@pytest.mark.parametrize("published", [MNIST, FASHION_MNIST], ids=lambda published: published.name)
def test_published_facts_agree_with_each_other(published: IdxDataset) -> None:
    assert sum(published.train_counts) == published.files[0].shape[0] == published.files[1].shape[0]
    assert sum(published.test_counts) == published.files[2].shape[0] == published.files[3].shape[0]
    assert len(published.train_counts) == len(published.test_counts) == len(published.classes) == 10
    assert len({file.sha256 for file in (*MNIST.files, *FASHION_MNIST.files)}) == 8
    assert all(len(file.sha256) == 64 and len(file.gz_md5) == 32 for file in published.files)
    assert [file.size for file in published.files] == [47_040_016, 60_008, 7_840_016, 10_008]


@pytest.mark.parametrize(
    "published",
    [pytest.param(MNIST, marks=needs(MNIST)), pytest.param(FASHION_MNIST, marks=needs(FASHION_MNIST))],
    ids=lambda published: published.name,
)
def test_the_official_files(published: IdxDataset) -> None:
    dataset = data.load(published.name)
    assert dataset.train_images.shape == (60_000, 1, 28, 28)
    assert dataset.test_images.shape == (10_000, 1, 28, 28)
    held_out = data.split_validation(dataset.train_labels, 5000)[1]
    assert len(held_out) == 5000


@needs(MNIST)
def test_the_first_labels_and_the_mean_of_mnist() -> None:
    dataset = data.load("mnist")
    assert dataset.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    train, _ = data.as_vectors(dataset)
    assert train.double().mean().item() == pytest.approx(0.1307, abs=5e-5)


def test_torch_and_numpy_are_enough_to_import() -> None:
    lacking = ("sklearn", "pooch", "rich", "scipy", "pandas", "requests", "PIL")
    code = f"import sys; sys.modules.update(dict.fromkeys({lacking!r})); import zeromean.lab.data, zeromean.lab.doctor"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unreadable_file_is_described(tiny: IdxDataset, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, file: object) -> Tensor:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(catalog, "read_idx", refused)
    described = data.describe(raw.parent.parent)[1]
    assert described.state == "damaged"
    assert "Permission denied" in described.detail
