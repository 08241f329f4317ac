"""A training step on CUDA, recorded as one graph and replayed, the precision of its arithmetic, and lack of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from zeromean.kernels.linear import HALF_TYPES
from zeromean.lab.recipes.images import Precision
from zeromean.lab.update import Update

_WARM_UP = 3
# A compiled step for every activation, norm and dropout of a study, shared by its seeds.
_VARIANTS = 1000


def record(update: Update, stream: torch.cuda.Stream) -> Callable[[], None]:
    """Compile a step, record it, and leave all that it changes as it was.

    The graph knows tensors by their addresses alone: whoever replays it must keep the update.

    Args:
        update: whose step.
        stream: the current one, on which the step will be replayed.

    Returns:
        What takes a step.
    """
    warm_up(update)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # Other threads, such as NCCL's watchdog, may ask the device something meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        update.take()
    return graph.replay


def warm_up(update: Update) -> None:
    """Take the next step a few times, always the same one, and leave all that it changes as it was."""
    before = {name: tensor.clone() for name, tensor in update.tensors().items()}
    with torch._dynamo.config.patch(recompile_limit=_VARIANTS):
        for _ in range(_WARM_UP):
            update.take()
            update.load(before)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether it says so, of the host or the device; torch tells of the host's in words alone."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def half_of(precision: Precision) -> torch.dtype | None:
    """The half precision that it is, or None."""
    dtype = getattr(torch, precision, None)
    return dtype if dtype in HALF_TYPES else None


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Within, convolutions and matrix products in float32 are as precise as asked for; exact on a CPU.

    On CUDA, cuDNN times its programs for each convolution that is new to the process and keeps the fastest.
    """
    exact = precision == "float32" or device.type == "cpu"
    before, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    search = cudnn.benchmark or device.type == "cuda"
    torch.set_float32_matmul_precision("highest" if exact else "high")
    try:
        with cudnn.flags(cudnn.enabled, search, deterministic=cudnn.deterministic, allow_tf32=not exact):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
