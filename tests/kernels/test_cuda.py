"""What only a GPU can show: very large tensors, CUDA graphs, Inductor's code, process groups."""

import os
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as torch_functional
from torch import Tensor, nn

import zeromean as zm
from tests.nn.test_memory import kept_bytes
from zeromean.kernels.operator import SMALL

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
F = zm.functional
NOISY = ["rrelu", "erelu", "eprelu", "eelu"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("name", ["elu", "rrelu"])
def test_more_than_two_to_the_31_elements(name: str) -> None:
    count = 2**31 + 4096 + 5
    x = torch.randn(count, device="cuda", dtype=torch.bfloat16).requires_grad_()
    seed = torch.tensor(3, device="cuda")
    y = F.elu(x) if name == "elu" else F.rrelu(x, training=True, seed=seed)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(x))
    for part in (slice(0, 1000), slice(2**31 - 500, 2**31 + 500), slice(count - 1000, count)):
        v = x.detach()[part].float()
        if name == "elu":
            torch.testing.assert_close(y.detach()[part].float(), torch_functional.elu(v), rtol=1e-2, atol=0)
            continue
        k = torch.where(v > 0, 1.0, dx[part].float())
        assert (k[v < 0] >= 0.124).all()
        assert (k[v < 0] <= 0.335).all()
        assert k[v < 0].unique().numel() > 50
        torch.testing.assert_close(y.detach()[part].float(), v * k, rtol=2e-2, atol=0)


@pytest.mark.parametrize("name", NOISY)
def test_a_cuda_graph_draws_new_noise_at_every_replay(name: str) -> None:
    module = zm.nn.by_name(name).cuda()
    x = torch.full((4096, 512), -1.0 if name == "rrelu" else 1.0, device="cuda", requires_grad=True)

    def step() -> tuple[Tensor, Tensor]:
        if hasattr(module, "noisy_next"):
            module.get_buffer("noisy_next").fill_(True)
        y = module(x)
        return y, torch.autograd.grad(y, x, torch.ones_like(y))[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx = step()
    seen = []
    for _ in range(3):
        graph.replay()
        torch.testing.assert_close(dx, (y / x).detach(), rtol=1e-4, atol=1e-5)
        seen.append(y.detach().clone())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize(
    "name", ["elu", "selu", "celu", "leaky_relu", "prelu", "pelu", "mpelu", "eelu", "rrelu", "eprelu"]
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_bytes_kept_between_layers(name: str, compiled: bool, conv: bool) -> None:
    rows, units = (8192, 256) if not conv else (64, 64)
    learnable = {"num_parameters": units} if name in ("prelu", "pelu", "mpelu", "eelu", "eprelu") else {}
    act = zm.nn.by_name(name, **learnable)
    first = nn.Conv2d(4, units, 1) if conv else nn.Linear(8, units)
    second = nn.Conv2d(units, 4, 1) if conv else nn.Linear(units, 8)
    model = nn.Sequential(first, act, second).cuda().bfloat16()
    x = torch.randn(*((rows, 4, 32, 32) if conv else (rows, 8)), device="cuda", dtype=torch.bfloat16)
    call = torch.compile(model, fullgraph=True) if compiled else model
    call(x)
    elements = x.numel() // (4 if conv else 8) * units
    assert elements > SMALL
    expected = 2.125 if name in ("prelu", "eprelu") else 2.0
    assert kept_bytes(call, model, x) / elements == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("name", ["elu", "gelu", "mish", "prelu", "pelu", "mpelu", "eelu", "rrelu"])
def test_inductor_equals_eager(name: str) -> None:
    module, twin = zm.nn.by_name(name).cuda(), zm.nn.by_name(name).cuda()
    if hasattr(module, "seed"):
        module.seed = twin.seed = torch.tensor(5, device="cuda")
    x = torch.randn(64, 32, 32, 32, device="cuda", requires_grad=True)
    compiled = torch.compile(module, fullgraph=True)
    for _ in range(2):
        results = []
        for call, owner in ((compiled, module), (twin, twin)):
            y = call(x)
            results.append([y.detach(), *torch.autograd.grad((y**2).sum(), [x, *owner.parameters()])])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_data_parallel_training_on_one_process() -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29731")
    torch.distributed.init_process_group("nccl", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(64, 2048), zm.nn.PELU(2048), nn.Linear(2048, 8), zm.nn.EELU(8)).cuda()
        wrapped = nn.parallel.DistributedDataParallel(model, device_ids=[0])
        wrapped(torch.randn(2048, 64, device="cuda")).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        from torch.distributed.fsdp import fully_shard

        sharded = nn.Sequential(nn.Linear(64, 2048), zm.nn.PELU(2048), nn.Linear(2048, 8), zm.nn.PReLU(8)).cuda()
        fully_shard(sharded)
        sharded(torch.randn(2048, 64, device="cuda")).square().mean().backward()
        assert all(p.grad is not None for p in sharded.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_small_tensors_are_left_to_torch() -> None:
    x = torch.randn(64, 64, device="cuda", requires_grad=True)
    assert "Activation" not in type(F.elu(x).grad_fn).__name__
    assert "Activation" in type(F.elu(x, save="output").grad_fn).__name__
    large = torch.randn(SMALL + 1, device="cuda", requires_grad=True)
    assert "Activation" in type(F.elu(large).grad_fn).__name__


def test_parameter_gradients_repeat_bit_by_bit() -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(32, 48, 56, 56, device="cuda").bfloat16().to(memory_format=layout).requires_grad_()
        a, b = (torch.rand(48, device="cuda") + 0.5 for _ in range(2))
        g = torch.randn_like(x)
        runs = [
            torch.autograd.grad(F.pelu(x, p.requires_grad_(), q.requires_grad_()), [p, q], g) for p, q in [(a, b)] * 3
        ]
        for run in runs[1:]:
            for one, other in zip(run, runs[0], strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)
