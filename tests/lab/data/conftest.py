"""A small data set in the official layout, with sums of its own, that takes the place of MNIST."""

import gzip
import hashlib
import struct
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch import Tensor

from zeromean.lab.data import catalog
from zeromean.lab.data.idx import IdxFile
from zeromean.lab.data.mnist import IdxDataset


def _idx_bytes(values: Tensor) -> bytes:
    """Write the format anew, so that the reader is compared with more than itself."""
    axes = b"".join(struct.pack(">I", length) for length in values.shape)
    return bytes([0, 0, 8, values.ndim]) + axes + bytes(values.flatten().tolist())


def _idx_file(name: str, content: bytes, shape: tuple[int, ...]) -> IdxFile:
    md5 = hashlib.md5(gzip.compress(content, mtime=0)).hexdigest()
    return IdxFile(name, shape, hashlib.sha256(content).hexdigest(), md5)


@pytest.fixture
def contents() -> dict[str, Tensor]:
    """The four files' values: 20 training and 6 test images of 3 by 4 pixels in two classes."""
    generator = torch.Generator().manual_seed(0)
    return {
        "train-images-idx3-ubyte": torch.randint(256, (20, 3, 4), generator=generator, dtype=torch.uint8),
        "train-labels-idx1-ubyte": torch.tensor([0, 1, 1, 1] * 5, dtype=torch.uint8),
        "t10k-images-idx3-ubyte": torch.randint(256, (6, 3, 4), generator=generator, dtype=torch.uint8),
        "t10k-labels-idx1-ubyte": torch.tensor([0, 1, 1] * 2, dtype=torch.uint8),
    }


@pytest.fixture
def tiny(contents: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> IdxDataset:
    """The description of ``contents``, under the name mnist; it has no address."""
    train_images, train_labels, test_images, test_labels = (
        _idx_file(name, _idx_bytes(values), tuple(values.shape)) for name, values in contents.items()
    )
    published = IdxDataset(
        name="mnist",
        folder="MNIST/raw",
        files=(train_images, train_labels, test_images, test_labels),
        addresses=(),
        classes=("zero", "one"),
        train_counts=(5, 15),
        test_counts=(2, 4),
        source="made for the tests",
    )
    monkeypatch.setitem(catalog._IDX, "mnist", published)
    return published


@pytest.fixture
def raw(tmp_path: Path, contents: dict[str, Tensor]) -> Path:
    """The folder of the four plain files."""
    folder = tmp_path / "root" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, values in contents.items():
        (folder / name).write_bytes(_idx_bytes(values))
    return folder


class _Handler(SimpleHTTPRequestHandler):
    """Serves a folder in silence; of a file named in ``/truncated/`` it announces all and sends half."""

    def do_GET(self) -> None:
        if not self.path.startswith("/truncated/"):
            super().do_GET()
            return
        content = (Path(self.directory) / Path(self.path).name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, contents: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a local server that holds the four files as ``.gz``."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    served = tmp_path / "served"
    (served / "other").mkdir(parents=True)
    for name, values in contents.items():
        (served / f"{name}.gz").write_bytes(gzip.compress(_idx_bytes(values), mtime=0))
        (served / "other" / f"{name}.gz").write_bytes(gzip.compress(_idx_bytes(255 - values), mtime=0))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(served))) as listening:
        thread = Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}/"
        listening.shutdown()
        thread.join()
