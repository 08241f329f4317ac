"""The random numbers of a run's steps: functions of the run's seed, the process and the step alone.

Dropout draws from torch's default generator. Here each step finds that generator at a state of its own, so a resumed
run needs no saved state, runs that take turns do not change each other's numbers, and a step can be taken again.

    seed of a step = the first 8 bytes of BLAKE2b(run's seed, process, step)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Chance:
    """What a run's steps draw from.

    On CUDA a recorded graph keeps the state that was the default generator's when it was recorded, and reads its seed
    at every replay; each run has a state of its own, since replays that overlap must not share one.

    Args:
        device: whose default generator.
        key: tells runs and processes apart.
    """

    def __init__(self, device: torch.device, *key: int) -> None:
        self._key = key
        self._cuda: tuple[torch.Generator, torch.Generator] | None = None
        if device.type == "cuda":
            torch.cuda.init()
            index = torch.cuda.current_device() if device.index is None else device.index
            generator = torch.cuda.default_generators[index]
            self._cuda = generator, generator.clone_state()

    @contextmanager
    def of_step(self, step: int) -> Iterator[None]:
        """Within, torch's default generator gives the step's numbers; afterwards it is as it was."""
        seed = self._seed(step)
        if self._cuda is None:
            before = torch.default_generator.get_state()
            torch.default_generator.manual_seed(seed)
            try:
                yield
            finally:
                torch.default_generator.set_state(before)
            return
        generator, own = self._cuda
        caller = generator.graphsafe_get_state()
        own.manual_seed(seed)
        generator.graphsafe_set_state(own)
        try:
            yield
        finally:
            generator.graphsafe_set_state(caller)

    def _seed(self, step: int) -> int:
        key = repr((*self._key, step)).encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
