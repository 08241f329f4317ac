"""Several processes training one network: who takes which part of a batch, and how their gradients become one.

Every process has the whole network and differentiates the loss of its part of the batch. Gradients are added up in few
large pieces of memory, and a sum may be under way while gradients of other layers are still computed. What is computed
in half precision is exchanged in it: half the bytes, for one more rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn

_EXPOSED = 0.1


@dataclass(frozen=True)
class Share:
    """One process's place among those that train a network together.

    Attributes:
        rank: counted from 0.
        processes: how many there are.
    """

    rank: int = 0
    processes: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes the study's files."""
        return self.rank == 0

    def begin_sum(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Start adding up tensors over the processes, beside what is computed meanwhile.

        Args:
            tensors: without gaps in memory, of the same shapes, strides and types in every process. Each in half
                precision is added up in its place, and rounded to its type. The others, of one type, are joined.

        Returns:
            What waits for the sums and gives them; on CUDA the stream waits, not the host.
        """
        joined = [tensor for tensor in tensors if not _half(tensor)]
        exchanged = [tensor for tensor in tensors if _half(tensor)]
        if joined:
            exchanged.append(torch.cat([tensor.as_strided((tensor.numel(),), (1,)) for tensor in joined]))
        under_way = [dist.all_reduce(tensor, async_op=True) for tensor in exchanged]

        def sums() -> list[Tensor]:
            for work in under_way:
                assert work is not None
                work.wait()
            parts = iter(exchanged[-1].split([tensor.numel() for tensor in joined]) if joined else ())
            return [
                tensor if _half(tensor) else next(parts).as_strided(tensor.shape, tensor.stride()) for tensor in tensors
            ]

        return sums

    def first(self, finding: str | None) -> str | None:
        """What the first process found, of those that found something."""
        findings = [finding]
        if self.processes > 1:
            findings = [None] * self.processes
            dist.all_gather_object(findings, finding)
        return next((found for found in findings if found is not None), None)


ALONE = Share()


def _half(tensor: Tensor) -> bool:
    return tensor.element_size() == 2


def cut(network: nn.Sequential) -> tuple[nn.Sequential, nn.Sequential]:
    """Cut a network in two, so that the gradients of the back are exchanged while the front is differentiated.

    The front's exchange is what every step waits for: it is the longest one with a tenth of the parameters at most, or
    the first module. In elu18 these are two stacks of eight: 9 % of the parameters, 34 to 55 % of the arithmetic.
    """
    sizes = list(accumulate(sum(parameter.numel() for parameter in child.parameters()) for child in network))
    within = sum(size <= _EXPOSED * sizes[-1] for size in sizes)
    front, back = network[: max(1, within)], network[max(1, within) :]
    assert isinstance(front, nn.Sequential)
    assert isinstance(back, nn.Sequential)
    return front, back


@contextmanager
def launched(device: torch.device) -> Iterator[tuple[Share, torch.device]]:
    """This process's share and device where torchrun has started several, else all of it."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        yield Share(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield Share(dist.get_rank(), processes), device
    finally:
        dist.destroy_process_group()
