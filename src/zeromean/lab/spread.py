"""The runs of a study on images, spread over several devices of one machine: a process for each.

The processes share nothing but the study's folder, in which every run has a folder of its own; so a study that was
trained on four GPUs continues on one, and the other way round. They end with the process that started them, however it
ends, as it alone keeps others out of the folder.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.multiprocessing as multiprocessing

from zeromean.lab import data
from zeromean.lab.recipes.images import ImageRecipe
from zeromean.lab.session import Session, sigterm, train_images
from zeromean.lab.store import Run, Study
from zeromean.lab.train import Stopped

if TYPE_CHECKING:
    from zeromean.lab.compare import Progress

_STOPPED = 143
_POLL_SECONDS = 0.2


def first_gpus(count: int) -> tuple[torch.device, ...]:
    """The first so many GPUs.

    Raises:
        ValueError: there are fewer.
    """
    there = torch.cuda.device_count()
    if not there:
        raise ValueError(f"gpus must be GPUs that this process sees, which are none, got {count}: leave --gpus out")
    if not 1 <= count <= there:
        raise ValueError(f"gpus must lie between 1 and {there}, the GPUs that this process sees, got {count}")
    return tuple(torch.device("cuda", index) for index in range(count))


def spread(
    recipe: ImageRecipe,
    runs: Sequence[Run],
    dataset: data.Dataset,
    study: Study,
    session: Session,
    progress: Progress,
) -> None:
    """Train the runs on the session's devices, neighbours on one, as `train_images` does on each.

    Raises:
        Stopped: SIGTERM came; every process has written its checkpoints.
        RuntimeError: a process ended in another way; it has printed why.
    """
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    parts = [part for part in _parts(runs, len(session.devices)) if part]
    sessions = [replace(session, device=device, devices=()) for device in session.devices]
    workers = [
        context.Process(target=_work, args=(index, recipe, part, dataset, study.path, own, told), daemon=True)
        for index, (part, own) in enumerate(zip(parts, sessions, strict=False))
    ]
    with sigterm() as asked:
        for worker in workers:
            worker.start()
        try:
            _follow(workers, told, progress, asked)
        finally:
            for worker in workers:
                worker.terminate()
                worker.join()
        codes = [worker.exitcode for worker in workers]
        if not all(_in_order(code, asked) for code in codes):
            raise RuntimeError(f"the processes on {len(workers)} devices ended with the codes {codes}: see above")
        if any(codes):
            raise Stopped


def _in_order(code: int | None, asked: Callable[[], bool]) -> bool:
    """Whether a process goes on, is done or stopped as asked; one that had hardly begun is ended by the signal."""
    return code in (None, 0, _STOPPED) or (code == -signal.SIGTERM and asked())


def _parts(runs: Sequence[Run], count: int) -> list[Sequence[Run]]:
    """So many stretches of neighbours, the first ones a run longer where they cannot be equal."""
    size, longer = divmod(len(runs), count)
    bounds = [index * size + min(index, longer) for index in range(count + 1)]
    return [runs[first:last] for first, last in pairwise(bounds)]


def _follow(workers: Sequence[Any], told: Any, progress: Progress, asked: Callable[[], bool]) -> None:
    """Pass on what the processes tell, as the sum over all of them, and a request to stop to each."""
    from queue import Empty

    done, of, notes, tell = dict[int, int](), dict[int, int](), dict[int, str](), None
    stopping = False
    while any(worker.is_alive() for worker in workers) or not told.empty():
        if asked() and not stopping:
            stopping = True
            for worker in workers:
                if worker.is_alive():
                    worker.terminate()
        try:
            index, what, value = told.get(timeout=_POLL_SECONDS)
        except Empty:
            if not all(_in_order(worker.exitcode, asked) for worker in workers):
                return
            continue
        if what == "epochs":
            of[index] = value
            if len(of) == len(workers):
                tell = progress.stage("final", sum(of.values()))
        elif what == "note":
            notes[index] = value
        else:
            done[index] = value
        if tell is not None:
            progress.note("; ".join(f"{number}: {notes[number]}" for number in sorted(notes) if notes[number]))
            tell(sum(done.values()), len(workers))


def _work(
    index: int,
    recipe: ImageRecipe,
    runs: Sequence[Run],
    dataset: data.Dataset,
    path: Path,
    session: Session,
    told: Any,
) -> None:
    """A process's part of the study."""
    from zeromean.lab.compare import Progress

    def stage(stage: Any, epochs: int) -> Any:
        told.put((index, "epochs", epochs))
        return lambda epoch, runs: told.put((index, "epoch", epoch))

    if session.device.type == "cuda":
        torch.cuda.set_device(session.device)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    progress = Progress(say=lambda line: None, stage=stage, note=lambda text: told.put((index, "note", text)))
    try:
        train_images(recipe, runs, dataset, Study(path), session, progress)
    except Stopped:
        raise SystemExit(_STOPPED) from None


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
