"""The folder of a benchmark: ``results.jsonl``, a row a measurement, and ``machine.json``, where they come from.

Rows are appended as they are measured, so a killed run continues. It continues only with the same code, machine and
number of rounds, as rows of two kinds in one table would mislead.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import zeromean
from zeromean.lab.bench.ceilings import Ceilings
from zeromean.lab.bench.measure import KEYS, Row
from zeromean.lab.bench.settings import Settings
from zeromean.lab.plan import device_facts, git_state
from zeromean.lab.store import write_whole

RESULTS, MACHINE = "results.jsonl", "machine.json"
_IDENTITY = KEYS[:6]
_CODE = ("nn", "kernels")


class Record:
    """A benchmark's folder.

    Args:
        path: The folder; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[Row]:
        """Every row, each measurement once, the latest; a last line cut short by a kill is left out.

        Raises:
            ValueError: If another line is damaged.
        """
        file = self.path / RESULTS
        lines = file.read_text().splitlines() if file.exists() else []
        rows: dict[tuple[Any, ...], Row] = {}
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                if number < len(lines):
                    raise ValueError(f"{file} is damaged in line {number}: remove that line, or use --fresh") from None
                continue
            rows[identity(row)] = row
        return list(rows.values())

    def machine(self) -> dict[str, Any] | None:
        """The content of ``machine.json``, or None where no benchmark has begun.

        Raises:
            ValueError: If the file is damaged.
        """
        file = self.path / MACHINE
        try:
            facts: dict[str, Any] = json.loads(file.read_text())
        except FileNotFoundError:
            return None
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is damaged ({error}): use --fresh") from None
        return facts

    def clear(self) -> None:
        """Throw away what lies there."""
        for name in (RESULTS, MACHINE):
            (self.path / name).unlink(missing_ok=True)

    def check(self, conditions: Mapping[str, Any]) -> None:
        """Raise ValueError if the folder holds rows that were measured under other conditions."""
        before = (self.machine() or {"conditions": conditions})["conditions"]
        changed = [key for key, value in conditions.items() if before.get(key) != value]
        if changed and self.rows():
            raise ValueError(
                f"{self.path} holds measurements made with another {' and '.join(changed)}: "
                "choose another --output, or --fresh to throw them away"
            )

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Write where the rows to come are measured."""
        write_whole(self.path / RESULTS, "".join(map(_line, self.rows())).encode())
        write_whole(self.path / MACHINE, (json.dumps(facts, indent=1) + "\n").encode())

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows."""
        with (self.path / RESULTS).open("a") as file:
            file.writelines(map(_line, rows))


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells one measurement from another."""
    return tuple(row[key] for key in _IDENTITY)


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def conditions(settings: Settings) -> dict[str, Any]:
    """What all rows of a folder have in common."""
    return {
        "device": device_facts(settings.device),
        "versions": _versions(),
        "rounds": settings.rounds,
        "code": _code(),
    }


def facts(settings: Settings, ceilings: Ceilings, missing: Mapping[str, str]) -> dict[str, Any]:
    """Where and how rows are measured."""
    return {
        "command": _command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "conditions": conditions(settings),
        "git": git_state(),
        "ceilings": asdict(ceilings),
        "missing": dict(missing),
    }


def _command() -> str:
    program = Path(sys.argv[0])
    as_module = ["python", "-m", "zeromean.lab.bench"]
    return shlex.join([*(as_module if program.name == "__main__.py" else [program.name]), *sys.argv[1:]])


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "zeromean": zeromean.__version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for package in ("triton", "attorch", "flag_gems", "inplace_abn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _code() -> str:
    """A checksum of the code that is measured."""
    root = Path(zeromean.__file__).parent
    files = sorted(file for room in _CODE for file in (root / room).rglob("*.py"))
    content = b"".join(file.relative_to(root).as_posix().encode() + file.read_bytes() for file in files)
    return hashlib.sha256(content).hexdigest()[:12]
