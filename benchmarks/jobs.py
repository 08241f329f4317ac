"""Run a list of commands over the GPUs of a machine, each as soon as its GPUs are free, within a time.

    PYTHONPATH=src python -m benchmarks.jobs LIST.json --gpus 2 --seconds 1600 --out DIR

LIST.json is a list of jobs in the order in which they begin on each of their GPUs:

    {"name": "curves", "gpus": [0, 1], "seconds": 150, "needs": ["$ZEROMEAN_DATA/cifar-100-binary/test.bin"],
     "command": "torchrun --nproc-per-node 2 -m benchmarks.scaling --device cuda --out $OUT"}

A job sees its own GPUs only (CUDA_VISIBLE_DEVICES) and, where the system can say so, keeps to their part of the
processors, so that what is timed on one GPU is not disturbed by the work of another. ``$OUT`` is DIR/name, which also
gets its ``log``. ``needs`` are files that must exist before it begins. ``seconds`` are those that it is expected to
take: one that would not end in time is left out, and one that still runs when the time is over is ended. ``jobs.jsonl``
has a row a job: when it began and ended, in seconds since the start, and its exit code, null if it was left out.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Job:
    """A command and what it takes.

    Attributes:
        name: of its folder.
        command: for the shell.
        gpus: by number.
        seconds: that it is expected to take.
        needs: files that it reads.
    """

    name: str
    command: str
    gpus: tuple[int, ...] = (0,)
    seconds: float = 0.0
    needs: tuple[str, ...] = ()


def read(file: Path, gpus: int) -> list[Job]:
    """The jobs of a list.

    Raises:
        ValueError: two have one name, or one asks for a GPU that is not offered.
    """
    entries: list[dict[str, Any]] = json.loads(file.read_text())
    jobs = []
    for one in entries:
        fields: dict[str, Any] = {key: tuple(of) if isinstance(of, list) else of for key, of in one.items()}
        jobs.append(Job(**fields))
    names = [job.name for job in jobs]
    for job in jobs:
        if names.count(job.name) > 1:
            raise ValueError(f"names of jobs must differ, got {job.name!r} twice in {file}: rename one")
        if not job.gpus or not set(job.gpus) <= set(range(gpus)):
            raise ValueError(f"gpus of {job.name!r} must be some of 0 to {gpus - 1}, got {job.gpus}: see --gpus")
    return jobs


def processors(gpus: Sequence[int], count: int) -> set[int] | None:
    """Those that belong to some of so many GPUs; None where the system cannot say."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    own = sorted(os.sched_getaffinity(0))
    share = len(own) // count
    found = {cpu for gpu in gpus for cpu in own[gpu * share : (gpu + 1) * share]}
    return found or set(own)


class Runner:
    """Begins and ends jobs.

    Args:
        jobs: in the order in which they begin.
        gpus: how many there are.
        out: gets a folder a job, and ``jobs.jsonl``.
        ends: by `time.monotonic`.
    """

    def __init__(self, jobs: Sequence[Job], gpus: int, out: Path, ends: float) -> None:
        self._left, self._gpus, self._out, self._ends = list(jobs), gpus, out, ends
        self._running: dict[Job, tuple[subprocess.Popen[bytes], float]] = {}
        self._started = time.monotonic()

    def run(self) -> list[dict[str, Any]]:
        """Until every job has ended or was left out; returns the rows."""
        found = []
        while self._left or self._running:
            over = time.monotonic() > self._ends
            for job, (process, began) in list(self._running.items()):
                if over:
                    _end(process)
                if process.poll() is not None:
                    del self._running[job]
                    found.append(self._told(job, began, process.returncode))
            for job in self._next():
                if time.monotonic() + job.seconds > self._ends:
                    self._left.remove(job)
                    found.append(self._told(job, None, None))
                elif all(Path(os.path.expandvars(file)).exists() for file in job.needs):
                    self._left.remove(job)
                    self._running[job] = self._begun(job), time.monotonic()
            time.sleep(_POLL_SECONDS)
        return found

    def _next(self) -> list[Job]:
        """Those whose GPUs are free, and that no earlier job waits for."""
        taken = {gpu for job in self._running for gpu in job.gpus}
        found = []
        for job in self._left:
            if not taken & set(job.gpus):
                found.append(job)
            taken |= set(job.gpus)
        return found

    def _begun(self, job: Job) -> subprocess.Popen[bytes]:
        folder = self._out / job.name
        folder.mkdir(parents=True, exist_ok=True)
        visible = ",".join(map(str, job.gpus))
        own = processors(job.gpus, self._gpus)
        with (folder / "log").open("ab") as log:
            return subprocess.Popen(
                job.command,
                shell=True,  # the list is the caller's own
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": visible, "OUT": str(folder), "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
                preexec_fn=None if own is None else lambda: os.sched_setaffinity(0, own),
            )

    def _told(self, job: Job, began: float | None, code: int | None) -> dict[str, Any]:
        row = {
            "name": job.name,
            "gpus": list(job.gpus),
            "began": None if began is None else round(began - self._started, 1),
            "ended": None if began is None else round(time.monotonic() - self._started, 1),
            "exit": code,
            "command": job.command,
        }
        with (self._out / "jobs.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        words = "left out: no time" if began is None else f"{row['began']} to {row['ended']} s, exit {code}"
        print(f"{job.name}: {words}", flush=True)
        return row


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask it and what it started to end, then end them."""
    for what in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, what)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
            return


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", type=Path)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(words)
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = read(options.jobs, options.gpus)
    found = Runner(jobs, options.gpus, options.out.resolve(), time.monotonic() + options.seconds).run()
    if failed := [row["name"] for row in found if row["exit"]]:
        raise SystemExit(f"not all ended well: {', '.join(failed)}")


if __name__ == "__main__":
    main()
