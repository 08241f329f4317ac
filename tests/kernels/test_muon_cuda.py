"""Muon's matrices on a GPU, recorded as graphs, of trainings that are replayed at once."""

import pytest
import torch

from zeromean.kernels.muon import orthogonalize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHAPES = ((384, 1536), (640, 2560), (1024, 1024), (384, 27))


class Recorded:
    """The matrices of one training, its stream and its graph."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        self.first = [torch.randn(shape, device="cuda", generator=generator).bfloat16() for shape in SHAPES]
        self.matrices = [matrix.clone() for matrix in self.first]
        self.stream = torch.cuda.Stream()
        self.graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for first in self.first:
                orthogonalize(first.clone())
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            for matrix, first in zip(self.matrices, self.first, strict=True):
                matrix.copy_(first)
                orthogonalize(matrix)

    def replay(self) -> None:
        with torch.cuda.stream(self.stream):
            self.graph.replay()


def test_steps_replayed_at_once_do_not_change_each_other() -> None:
    recorded = [Recorded(seed) for seed in range(8)]
    wanted = []
    for one in recorded:
        one.replay()
        torch.cuda.synchronize()
        wanted.append([matrix.clone() for matrix in one.matrices])
    for _ in range(20):
        for one in recorded:
            one.replay()
    torch.cuda.synchronize()
    for one, own in zip(recorded, wanted, strict=True):
        for matrix, other in zip(one.matrices, own, strict=True):
            assert torch.equal(matrix, other)
