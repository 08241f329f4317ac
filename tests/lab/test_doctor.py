import importlib.metadata
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from zeromean.lab import doctor
from zeromean.lab.doctor import Check, diagnose, render


@pytest.fixture(autouse=True)
def empty_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZEROMEAN_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def find(name: str) -> Check:
    return next(check for check in diagnose() if check.name == name)


def with_requirements(monkeypatch: pytest.MonkeyPatch, *requirements: str) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: list(requirements))


def test_every_finding_that_is_not_ok_has_a_remedy() -> None:
    checks = diagnose()
    assert len({check.name for check in checks}) == len(checks)
    assert all(check.remedy for check in checks if check.state != "ok")
    assert not any(check.remedy for check in checks if check.state == "ok")


def test_the_declared_extras_are_all_looked_at() -> None:
    names = {check.name for check in diagnose()}
    assert {"python", "required", *(f"extra [{extra}]" for extra in doctor.PURPOSES)} <= names
    assert f"torch {torch.__version__}" in find("required").detail


def test_an_extra_is_judged_by_presence_and_age(monkeypatch: pytest.MonkeyPatch) -> None:
    with_requirements(
        monkeypatch,
        "torch>=2.11",
        "numpy; extra == 'lab'",
        'torch>=999; extra == "ray"',
        'no-such-package>=1; extra == "export"',
        'torch>=999; extra == "export"',
    )
    assert find("required").state == "ok"
    assert find("extra [lab]").state == "ok"
    assert find("extra [ray]").state == "warning"
    assert find("extra [ray]").detail == f"torch {torch.__version__} is older than 999"
    assert find("extra [export]").state == "missing"
    assert find("extra [export]").detail.startswith("no-such-package absent, torch")
    assert find("extra [export]").remedy == "for ONNX export: pip install --upgrade 'zeromean[export]'"


def test_a_version_is_compared_as_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.10.0")
    with_requirements(monkeypatch, "torch>=1.9")
    assert find("required").state == "ok"
    with_requirements(monkeypatch, "torch>=1.11")
    assert find("required").state == "warning"


def test_a_source_tree_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert find("zeromean").state == "warning"


def test_each_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="Some GPU", major=9, minor=0, total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert find("GPU 1") == Check("GPU 1", "ok", "Some GPU, capability 9.0, 80.0 GB")
    assert find("triton").state == "missing"


def test_triton_is_not_missed_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find("triton").state == "ok"
    assert find("GPU").state == "ok"


def test_data_sets_are_looked_for(empty_root: Path) -> None:
    assert find("data set digits").state == "ok"
    assert find("data set mnist").state == "missing"
    (empty_root / "MNIST/raw").mkdir(parents=True)
    (empty_root / "MNIST/raw/t10k-labels-idx1-ubyte").write_bytes(b"other")
    assert find("data set mnist").state == "warning"


def test_the_data_folder_must_be_writable(empty_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find("data folder") == Check("data folder", "ok", f"{empty_root} (from ZEROMEAN_DATA)")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        assert find("data folder").state == "warning"
    empty_root.write_text("a file where the folder should be")
    assert find("data folder").state == "warning"


def test_little_disk_space_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=doctor.MINIMUM_FREE_BYTES))
    assert find("free disk space") == Check("free disk space", "ok", "1.0 GB")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=doctor.MINIMUM_FREE_BYTES - 1))
    assert find("free disk space").state == "warning"


def test_chromium_matters_only_with_playwright(monkeypatch: pytest.MonkeyPatch) -> None:
    present: set[str] = {"playwright"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: name in present)
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/browser" if name == "google-chrome" else None)
    assert find("Chromium") == Check("Chromium", "ok", "/bin/browser")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert find("Chromium").state == "missing"
    present.clear()
    assert "Chromium" not in {check.name for check in diagnose()}


def test_the_table_shows_names_in_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    checks = [Check("extra [lab]", "missing", "pooch absent", "pip install 'zeromean[lab]'")]
    Console(width=120, file=sys.stdout).print(render(checks))
    printed = capsys.readouterr().out
    for text in ("extra [lab]", "missing", "pooch absent", "pip install 'zeromean[lab]'"):
        assert text in printed
