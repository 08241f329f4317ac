"""The three rings: imports go inwards only, and the inner ones need torch alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "zeromean"
RING = {
    "nn": 1,
    "kernels": 1,
    "normfree": 1,
    "surgery": 1,
    "spelling": 1,
    "functional": 1,
    "diagnostics": 2,
    "optim": 2,
    "sparsity": 2,
    "lab": 3,
}
FILES = sorted(SOURCE.rglob("*.py"))
OUTSIDE = {
    "numpy",
    "scipy",
    "sklearn",
    "safetensors",
    "rich",
    "tyro",
    "jinja2",
    "altair",
    "vl_convert",
    "pooch",
    "PIL",
    "pandas",
}
BARE = ["zeromean.lab.data", "zeromean.lab.nets", "zeromean.lab.train", "zeromean.lab.plan", "zeromean.lab.store"]


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively: write the full name"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_go_inwards(file: Path) -> None:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    if parts == ("__init__",):
        return
    own = RING[parts[0]]
    for name in imported(file):
        if name.startswith("zeromean.") and room(name) in RING:
            assert RING[room(name)] <= own, f"{file} (ring {own}) imports {name} (ring {RING[room(name)]})"


def test_every_room_has_a_ring() -> None:
    rooms = {file.relative_to(SOURCE).with_suffix("").parts[0] for file in FILES} - {"__init__"}
    assert rooms <= RING.keys()


def missing_when_blocked(module: str, allowed: str) -> str:
    """Import the module with every third-party package blocked but the allowed ones; returns what it asked for."""
    blocked = OUTSIDE - set(allowed.split())
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import {module}
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


@pytest.mark.parametrize("module", BARE)
def test_training_imports_with_torch_and_numpy_alone(module: str) -> None:
    assert missing_when_blocked(module, "numpy") == ""


def test_the_library_imports_with_torch_alone() -> None:
    assert missing_when_blocked("zeromean", "") == ""


def test_the_block_blocks() -> None:
    assert "scipy" in missing_when_blocked("zeromean.lab.stats", "numpy")


def test_no_file_is_too_long() -> None:
    long = {str(file): count for file in FILES if (count := len(file.read_text().splitlines())) > 500}
    assert not long
