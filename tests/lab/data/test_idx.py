import gzip
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zeromean.lab.data.idx import IdxFile, locate, read_idx
from zeromean.lab.data.mnist import IdxDataset

Change = Callable[[bytes], bytes]


@pytest.fixture
def file(tiny: IdxDataset) -> IdxFile:
    return tiny.files[2]


@pytest.fixture
def content(file: IdxFile, raw: Path) -> bytes:
    return (raw / file.name).read_bytes()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_plain_and_gz_files_read_the_same(
    tmp_path: Path, file: IdxFile, content: bytes, contents: dict[str, Tensor], suffix: str
) -> None:
    path = tmp_path / f"{file.name}{suffix}"
    path.write_bytes(gzip.compress(content, compresslevel=1) if suffix else content)
    found = read_idx(path, file)
    assert found.dtype == torch.uint8
    assert torch.equal(found, contents[file.name])


def test_the_plain_file_is_preferred(tmp_path: Path, file: IdxFile) -> None:
    assert locate(tmp_path, file) is None
    zipped, plain = tmp_path / f"{file.name}.gz", tmp_path / file.name
    zipped.touch()
    assert locate(tmp_path, file) == zipped
    plain.touch()
    assert locate(tmp_path, file) == plain


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: content[:16] + bytes(255 - value for value in content[16:]),
    ],
    ids=["one bit", "truncated", "empty", "another file"],
)
def test_a_wrong_file_is_named_with_both_sums_and_the_remedy(
    tmp_path: Path, file: IdxFile, content: bytes, change: Change, suffix: str
) -> None:
    path, changed = tmp_path / f"{file.name}{suffix}", change(content)
    path.write_bytes(gzip.compress(changed) if suffix else changed)
    with pytest.raises(ValueError, match=file.name) as raised:
        read_idx(path, file)
    message = str(raised.value)
    assert f"expected SHA-256 {file.sha256}, found {hashlib.sha256(changed).hexdigest()}" in message
    assert f"Delete {path} and run again" in message


@pytest.mark.parametrize(
    "change",
    [
        lambda content: gzip.compress(content)[:5],
        lambda content: gzip.compress(content)[:20],
        lambda content: gzip.compress(content)[:-4],
        lambda content: content,
        lambda content: gzip.compress(content)[:10] + b"\xff" + gzip.compress(content)[11:],
    ],
    ids=["header cut", "data cut", "trailer cut", "plain", "damaged"],
)
def test_what_is_not_a_whole_gzip_file_is_refused(
    tmp_path: Path, file: IdxFile, content: bytes, change: Change
) -> None:
    path = tmp_path / f"{file.name}.gz"
    path.write_bytes(change(content))
    with pytest.raises(ValueError, match=r"is not a whole gzip file: .*Delete .* and run again"):
        read_idx(path, file)


def test_a_gz_bomb_is_not_unpacked(tmp_path: Path, file: IdxFile, content: bytes) -> None:
    path = tmp_path / f"{file.name}.gz"
    path.write_bytes(gzip.compress(content) + gzip.compress(bytes(10**6)) + b"what follows is never reached")
    with pytest.raises(ValueError, match=f"must hold the {len(content)} bytes of the official file, got more"):
        read_idx(path, file)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"\0\1" + content[2:],
        lambda content: content[:2] + b"\x0d" + content[3:],
        lambda content: content[:7] + b"\7" + content[8:],
        lambda content: content[:-1],
    ],
    ids=["magic", "type of the values", "an axis", "too short for its shape"],
)
def test_a_wrong_format_is_refused_even_with_the_right_sum(
    tmp_path: Path, file: IdxFile, content: bytes, change: Change
) -> None:
    path, changed = tmp_path / file.name, change(content)
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=rf"unsigned bytes of shape \[6, 3, 4\], {len(content)} bytes in all, got"):
        read_idx(path, replace(file, sha256=hashlib.sha256(changed).hexdigest()))
