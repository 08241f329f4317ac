from pathlib import Path

import pytest

from zeromean.lab.data import data_root


def test_the_root_given_goes_before_the_variable_before_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.setenv("ZEROMEAN_DATA", "~/named")
    assert data_root("~/given") == Path("/home/somebody/given")
    assert data_root() == Path("/home/somebody/named")
    monkeypatch.delenv("ZEROMEAN_DATA")
    assert data_root() == Path("/cache/zeromean")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data_root() == Path("/home/somebody/.cache/zeromean")
