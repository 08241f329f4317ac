import gzip
import sys
from pathlib import Path

import pytest

from zeromean.lab.data.download import download
from zeromean.lab.data.mnist import IdxDataset

NAME = "t10k-images-idx3-ubyte.gz"


@pytest.fixture
def md5(tiny: IdxDataset) -> str:
    return tiny.files[2].gz_md5


@pytest.fixture
def goal(tmp_path: Path) -> Path:
    return tmp_path / "a" / "b"


def test_a_download_ends_whole_under_its_name(server: str, md5: str, goal: Path, raw: Path) -> None:
    path = download(NAME, md5, (server,), goal)
    assert path == goal / NAME
    assert gzip.decompress(path.read_bytes()) == (raw / path.stem).read_bytes()
    assert list(goal.iterdir()) == [path]


@pytest.mark.parametrize(
    ("place", "reason"),
    [("other/", "does not match the known hash"), ("truncated/", "IncompleteRead|does not match"), ("no/", "404")],
)
def test_a_bad_download_leaves_nothing(server: str, md5: str, goal: Path, place: str, reason: str) -> None:
    with pytest.raises(ConnectionError, match=reason):
        download(NAME, md5, (server + place,), goal)
    assert list(goal.iterdir()) == []


def test_the_next_address_is_tried(server: str, md5: str, goal: Path) -> None:
    closed = "http://127.0.0.1:1/"
    assert download(NAME, md5, (closed, f"{server}other/", server), goal).is_file()


def test_every_address_is_named_with_its_reason(server: str, md5: str, goal: Path) -> None:
    with pytest.raises(ConnectionError) as raised:
        download(NAME, md5, ("http://127.0.0.1:1/", f"{server}no/"), goal)
    first, second = str(raised.value).split("; ")
    assert first.startswith("http://127.0.0.1:1/: HTTPConnectionPool")
    assert second.startswith(f"{server}no/: 404")


def test_rich_shows_the_size(server: str, md5: str, goal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def update(self: object, task: int, **values: float) -> None:
        seen.append(values)

    monkeypatch.setattr("rich.progress.Progress.update", update)
    size = download(NAME, md5, (server,), goal).stat().st_size
    assert seen[-1] == {"total": size, "advance": size}


def test_rich_is_not_needed(server: str, md5: str, goal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert download(NAME, md5, (server,), goal).is_file()


def test_without_pooch_the_remedy_is_said(md5: str, goal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ConnectionError, match=r"pip install 'zeromean\[lab\]'"):
        download(NAME, md5, ("http://127.0.0.1:1/",), goal)
