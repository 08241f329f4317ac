"""Muon's matrices on a GPU: several streams, recorded as graphs, of trainings that are replayed at once."""

import pytest
import torch

from zeromean.kernels.muon import _orthogonalize_all

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHAPES = ((384, 1536), (640, 2560), (1024, 1024), (384, 27))


class Recorded:
    """The matrices of one training, its streams and its graph."""

    def __init__(self, seed: int, beside: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        self.first = [torch.randn(shape, device="cuda", generator=generator).bfloat16() for shape in SHAPES]
        self.matrices = [matrix.clone() for matrix in self.first]
        self.stream = torch.cuda.Stream()
        streams = [torch.cuda.Stream() for _ in range(beside)]
        self.graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            _orthogonalize_all([matrix.clone() for matrix in self.first], streams)
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            for matrix, first in zip(self.matrices, self.first, strict=True):
                matrix.copy_(first)
            _orthogonalize_all(self.matrices, streams)

    def replay(self) -> None:
        with torch.cuda.stream(self.stream):
            self.graph.replay()


def test_steps_replayed_at_once_do_not_change_each_other() -> None:
    recorded = [Recorded(seed, beside=3) for seed in range(8)]
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


def test_streams_beside_change_nothing() -> None:
    alone, several = (Recorded(0, beside) for beside in (0, 3))
    for one in (alone, several):
        one.replay()
    torch.cuda.synchronize()
    for matrix, other in zip(alone.matrices, several.matrices, strict=True):
        torch.testing.assert_close(matrix, other, rtol=0.02, atol=0.01)
