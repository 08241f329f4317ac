"""What works on this machine and what is missing: one check a line, each with its remedy. Nothing is changed."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch.torch_version import TorchVersion

from zeromean.lab.data import Description, data_root, describe
from zeromean.lab.data.folder import VARIABLE

if TYPE_CHECKING:
    from rich.table import Table

State = Literal["ok", "missing", "warning"]

# Our choice: MNIST and Fashion-MNIST together, and a study of some hundred small networks, with room to spare.
MINIMUM_FREE_BYTES = 10**9

PURPOSES = {
    "lab": "the command line, the data sets, the statistics and the report",
    "ray": "spreading the runs of a study over machines",
    "tensorboard": "TensorBoard event files",
    "export": "ONNX export",
    "dev": "the tests and the style checks",
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?:>=(?P<minimum>[\w.]+))?(?:\s*;\s*extra == [\"'](?P<extra>\w+)[\"'])?")


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: What was looked at.
        state: ``missing`` for what is absent, ``warning`` for what is there and not as it should be.
        detail: What was found.
        remedy: What to do about it; empty if there is nothing to do.
    """

    name: str
    state: State
    detail: str
    remedy: str = ""


def diagnose() -> list[Check]:
    """Look at this machine and return every finding, good or bad, in reading order."""
    return [
        Check("python", "ok", f"{platform.python_version()}, {sys.executable}"),
        *_packages(),
        *_devices(),
        _triton(),
        *_data_sets(),
        _data_folder(),
        _free_space(),
        *_browser(),
    ]


def render(checks: list[Check]) -> "Table":
    """Return the findings as a rich table, one row a check.

    Args:
        checks: What `diagnose` returned.
    """
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "missing": "yellow", "warning": "red"}
    table = Table("check", "state", "found", "what to do")
    for check in checks:
        texts = (check.name, Text(check.state, colours[check.state]), check.detail, check.remedy)
        # As Text, since in a plain string rich takes [lab] for a style.
        table.add_row(*(Text(text) if isinstance(text, str) else text for text in texts))
    return table


def _packages() -> list[Check]:
    try:
        requirements = importlib.metadata.requires("zeromean") or []
    except importlib.metadata.PackageNotFoundError:
        detail = "imported from a source tree: what it requires is not known"
        return [Check("zeromean", "warning", detail, "pip install -e '.[lab]' in the source tree")]
    groups = defaultdict(list)
    for requirement in requirements:
        found = _REQUIREMENT.fullmatch(requirement)
        assert found is not None, f"{requirement!r} is not of the form that pyproject.toml uses"
        groups[found["extra"]].append((found["name"], found["minimum"] or "0"))
    return [_group(extra, packages) for extra, packages in groups.items()]


def _group(extra: str | None, packages: list[tuple[str, str]]) -> Check:
    states = {name: _package_state(name, minimum) for name, minimum in packages}
    wrong = {name: state for name, (good, state) in states.items() if not good}
    label = f"extra [{extra}]" if extra else "required"
    if not wrong:
        return Check(label, "ok", ", ".join(f"{name} {state}" for name, (_, state) in states.items()))
    purpose = f"for {PURPOSES[extra]}: " if extra else ""
    remedy = f"{purpose}pip install --upgrade 'zeromean{f'[{extra}]' if extra else ''}'"
    absent = any(state == "absent" for state in wrong.values())
    detail = ", ".join(f"{name} {state}" for name, state in wrong.items())
    return Check(label, "missing" if absent else "warning", detail, remedy)


def _package_state(name: str, minimum: str) -> tuple[bool, str]:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False, "absent"
    if TorchVersion(version) < minimum:
        return False, f"{version} is older than {minimum}"
    return True, version


def _devices() -> list[Check]:
    cpu = Check("CPU", "ok", f"{platform.machine()}, {torch.get_num_threads()} threads for torch")
    if not torch.cuda.is_available():
        return [cpu, Check("GPU", "ok", "no CUDA device: everything runs on the CPU")]
    return [cpu, *(_gpu(index) for index in range(torch.cuda.device_count()))]


def _gpu(index: int) -> Check:
    found = torch.cuda.get_device_properties(index)
    detail = f"{found.name}, capability {found.major}.{found.minor}, {_gigabytes(found.total_memory)}"
    return Check(f"GPU {index}", "ok", detail)


def _triton() -> Check:
    if importlib.util.find_spec("triton"):
        return Check("triton", "ok", importlib.metadata.version("triton"))
    if not torch.cuda.is_available():
        return Check("triton", "ok", "absent, and of no use without a GPU")
    return Check("triton", "missing", "absent: the GPU runs the slower reference path", "pip install triton")


def _data_sets() -> list[Check]:
    return [_data_set(found) for found in describe()]


def _data_set(found: Description) -> Check:
    states: dict[str, State] = {"present": "ok", "absent": "missing", "damaged": "warning"}
    remedies = {
        "present": "",
        "absent": f"nothing, if digits is enough; else a network, or {VARIABLE} set to a folder that has it",
        "damaged": "delete the file that is named and run again",
    }
    detail = f"{found.where}: {found.detail}"
    return Check(f"data set {found.name}", states[found.state], detail, remedies[found.state])


def _data_folder() -> Check:
    root = data_root()
    chosen = f"from {VARIABLE}" if os.environ.get(VARIABLE) else f"the default, {VARIABLE} is not set"
    nearest = _nearest_existing(root)
    if nearest.is_dir() and os.access(nearest, os.W_OK):
        return Check("data folder", "ok", f"{root} ({chosen})")
    return Check("data folder", "warning", f"{root} ({chosen}) cannot be written", f"set {VARIABLE} to another folder")


def _free_space() -> Check:
    root = data_root()
    free = shutil.disk_usage(_nearest_existing(root)).free
    if free >= MINIMUM_FREE_BYTES:
        return Check("free disk space", "ok", _gigabytes(free))
    detail = f"{_gigabytes(free)}, less than {_gigabytes(MINIMUM_FREE_BYTES)}, at {root}"
    return Check("free disk space", "warning", detail, f"free some, or set {VARIABLE} to a folder on another disk")


def _browser() -> list[Check]:
    if not importlib.util.find_spec("playwright"):
        return []
    if found := next(filter(None, map(shutil.which, BROWSERS)), None):
        return [Check("Chromium", "ok", found)]
    remedy = "install the system's chromium package"
    return [Check("Chromium", "missing", "absent: the tests of the report page are skipped", remedy)]


def _nearest_existing(path: Path) -> Path:
    return next(ancestor for ancestor in (path, *path.absolute().parents) if ancestor.exists())


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
