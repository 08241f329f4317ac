from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from zeromean.lab.data import Dataset, prepare, whiten

TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12}


def close(found: Tensor, expected: np.ndarray | Tensor) -> None:
    tolerance = TOLERANCES[found.dtype]
    torch.testing.assert_close(found, torch.as_tensor(expected).to(found.dtype), rtol=tolerance, atol=tolerance)


@pytest.fixture
def dataset() -> Dataset:
    """Smooth images of 3 by 4 by 4 pixels, so that they correlate; the fourth is all of one grey."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(70, 3, 4, 4, generator=generator, dtype=torch.float64).cumsum(2).cumsum(3)
    images = (noise * 15).to(torch.uint8)
    images[3] = 9
    labels = torch.arange(70) % 2
    return Dataset("made", images[:50], labels[:50], images[50:], labels[50:], 255, ("a", "b"), {}, "made")


def contrast_oracle(images: Tensor) -> np.ndarray:
    rows = []
    for image in images.flatten(1).double().numpy():
        centred = image - image.mean()
        divisor = np.linalg.norm(centred) / 55
        rows.append(centred / divisor if divisor >= 1e-8 else centred)
    return np.stack(rows)


def zca_oracle(fitted_on: np.ndarray, applied_to: np.ndarray) -> np.ndarray:
    mean = fitted_on.mean(0)
    covariance = np.cov(fitted_on, rowvar=False, bias=True) + 0.1 * np.eye(len(mean))
    left, values, _ = np.linalg.svd(covariance)
    return np.asarray((applied_to - mean) @ (left / np.sqrt(values)) @ left.T)


def test_contrast_is_that_of_a_plain_loop(dataset: Dataset) -> None:
    normalized = whiten.contrast_normalize(dataset.train_images)
    close(normalized, contrast_oracle(dataset.train_images))
    norms = normalized.norm(dim=1)
    assert norms[3] == 0
    close(norms[norms > 0], torch.full((49,), 55.0))


@pytest.mark.parametrize("kept", [None, torch.arange(5, 45)], ids=["all", "kept"])
def test_zca_is_that_of_a_dense_oracle(dataset: Dataset, tmp_path: Path, kept: Tensor | None) -> None:
    images = prepare(dataset, "gcn-zca", kept=kept, root=tmp_path)
    train, test = contrast_oracle(dataset.train_images), contrast_oracle(dataset.test_images)
    fitted_on = train if kept is None else train[kept.numpy()]
    assert images.train.dtype == torch.float32
    close(images.train, zca_oracle(fitted_on, train).reshape(50, 3, 4, 4))
    close(images.test, zca_oracle(fitted_on, test).reshape(20, 3, 4, 4))


def test_blocks_do_not_show(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = whiten.whiten(whiten.fit_whitening(dataset.train_images), dataset.test_images)
    monkeypatch.setattr(whiten, "_BLOCK", 7)
    close(whiten.whiten(whiten.fit_whitening(dataset.train_images), dataset.test_images), whole)


def test_the_whitened_covariance_is_what_the_formula_leaves(dataset: Dataset, tmp_path: Path) -> None:
    """Each principal direction of variance v is left with v / (v + 0.1)."""
    whitened = prepare(dataset, "gcn-zca", root=tmp_path).train.flatten(1).double().numpy()
    variances = np.linalg.eigvalsh(np.cov(contrast_oracle(dataset.train_images), rowvar=False, bias=True))
    found = np.linalg.eigvalsh(np.cov(whitened, rowvar=False, bias=True))
    np.testing.assert_allclose(found, variances / (variances + 0.1), atol=2e-6)


@pytest.mark.parametrize("how", ["gcn-zca", "mean-std"])
def test_held_out_and_test_images_do_not_matter(dataset: Dataset, tmp_path: Path, how: whiten.How) -> None:
    kept = torch.arange(10, 50)
    before = prepare(dataset, how, kept=kept, root=tmp_path / "a")
    train_images = dataset.train_images.clone()
    train_images[:10] = 255 - train_images[:10]
    other = replace(dataset, train_images=train_images, test_images=255 - dataset.test_images)
    after = prepare(other, how, kept=kept, root=tmp_path / "b")
    assert torch.equal(before.train[10:], after.train[10:])
    assert not torch.equal(before.train[:10], after.train[:10])
    assert not torch.equal(before.train, prepare(dataset, how, root=tmp_path).train)


def test_mean_and_deviation_of_each_channel(dataset: Dataset) -> None:
    images = prepare(dataset, "mean-std", kept=torch.arange(30))
    pixels = dataset.train_images[:30].double() / 255
    mean, std = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), correction=0, keepdim=True)
    close(images.train, (dataset.train_images / 255 - mean) / std)
    close(images.test, (dataset.test_images / 255 - mean) / std)


def test_a_second_fit_comes_from_the_cache(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(dataset, "gcn-zca", root=tmp_path)
    (file,) = (tmp_path / "cache").iterdir()
    with monkeypatch.context() as changed:
        changed.setattr(whiten, "fit_whitening", lambda images: pytest.fail("fitted again"))
        again = prepare(dataset, "gcn-zca", root=tmp_path)
    assert torch.equal(first.train, again.train)
    assert torch.equal(first.test, again.test)
    prepare(dataset, "gcn-zca", kept=torch.arange(40), root=tmp_path)
    monkeypatch.setattr(whiten, "FILTER_BIAS", 0.2)
    assert not torch.equal(prepare(dataset, "gcn-zca", root=tmp_path).train, first.train)
    assert len({*(tmp_path / "cache").iterdir(), file}) == 3


def flipped_bit(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


@pytest.mark.parametrize(
    "change",
    [lambda content: b"", lambda content: content[:-8], flipped_bit, lambda content: bytes(len(content))],
    ids=["empty", "truncated", "a bit", "zeros"],
)
def test_a_damaged_cache_is_said_and_made_anew(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes]
) -> None:
    first = prepare(dataset, "gcn-zca", root=tmp_path)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(change(file.read_bytes()))
    with pytest.warns(UserWarning, match=r"zca-\w+\.safetensors is damaged"):
        again = prepare(dataset, "gcn-zca", root=tmp_path)
    assert torch.equal(first.train, again.train)
    monkeypatch.setattr(whiten, "fit_whitening", lambda images: pytest.fail("fitted again"))
    assert torch.equal(first.train, prepare(dataset, "gcn-zca", root=tmp_path).train)


def test_a_fit_of_other_images_under_this_name_is_not_used(dataset: Dataset, tmp_path: Path) -> None:
    prepare(dataset, "gcn-zca", root=tmp_path)
    (file,) = (tmp_path / "cache").iterdir()
    prepare(dataset, "gcn-zca", kept=torch.arange(40), root=tmp_path)
    (other,) = set((tmp_path / "cache").iterdir()) - {file}
    other.replace(file)
    with pytest.warns(UserWarning, match="is damaged"):
        prepare(dataset, "gcn-zca", root=tmp_path)


def test_a_cache_that_cannot_be_written_is_said(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = prepare(dataset, "gcn-zca", root=tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.warns(UserWarning, match="not kept for the next time"):
        found = prepare(dataset, "gcn-zca", root=tmp_path / "file")
    assert torch.equal(found.train, expected.train)


def test_an_unknown_normalization(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="unknown normalization 'gcn_zca': did you mean 'gcn-zca'"):
        prepare(dataset, "gcn_zca")  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu(dataset: Dataset, tmp_path: Path) -> None:
    for how in ("gcn-zca", "mean-std"):
        here = prepare(dataset, how, root=tmp_path / "cpu")
        there = prepare(dataset, how, root=tmp_path / "cuda", device="cuda")
        close(there.train.cpu(), here.train)
        close(there.test.cpu(), here.test)
