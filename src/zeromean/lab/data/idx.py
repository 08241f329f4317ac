"""The idx format of MNIST: two zero bytes, 8 for unsigned bytes, the number of axes, each axis in 4 bytes, data.

The shapes of the official files are known beforehand, so a header is compared and never trusted. A file is read
whole, never past its known size, its sum is checked, and the tensor is made from the very bytes that were checked.
"""

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zeromean.lab.data.checksum import verify


@dataclass(frozen=True)
class IdxFile:
    """One official file.

    Attributes:
        name: The file name without ``.gz``.
        shape: The axes that its header must state.
        sha256: The sum of the uncompressed file.
        gz_md5: The published MD5 sum of the ``.gz`` file; a download is held to it, a file found here is not, since
            anybody may have compressed it again.
    """

    name: str
    shape: tuple[int, ...]
    sha256: str
    gz_md5: str

    @property
    def header(self) -> bytes:
        """The bytes with which the uncompressed file must begin."""
        return struct.pack(f">HBB{len(self.shape)}I", 0, 8, len(self.shape), *self.shape)

    @property
    def size(self) -> int:
        """Bytes of the uncompressed file."""
        return len(self.header) + math.prod(self.shape)


def locate(folder: Path, file: IdxFile) -> Path | None:
    """Return the plain file in ``folder``, else its ``.gz`` form, else None."""
    return next((path for path in (folder / file.name, folder / f"{file.name}.gz") if path.is_file()), None)


def read_idx(path: Path, file: IdxFile) -> Tensor:
    """Return the content of ``path``, plain or ``.gz``, as a uint8 tensor of ``file.shape``.

    Args:
        path: Where the file lies.
        file: Which official file it must be.

    Raises:
        ValueError: If it is damaged, longer than the official file, or another file.
    """
    remedy = f"Delete {path} and run again: it is then downloaded anew."
    content = _read_bounded(path, file.size, remedy)
    verify(content, file.sha256, name=str(path), remedy=remedy)
    if len(content) != file.size or not content.startswith(file.header):
        raise ValueError(
            f"{path} must be an idx file of unsigned bytes of shape {list(file.shape)}, {file.size} bytes in all, got "
            f"{len(content)} bytes that begin with {content[: len(file.header)].hex()}. {remedy}"
        )
    pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=len(file.header))
    return pixels.view(file.shape)


def _read_bounded(path: Path, size: int, remedy: str) -> bytes:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            content = stream.read(size + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}. {remedy}") from error
    if len(content) > size:
        raise ValueError(f"{path} must hold the {size} bytes of the official file, got more. {remedy}")
    return content
