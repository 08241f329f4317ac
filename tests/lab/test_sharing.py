"""Several processes training one network: the same result as one, and who writes."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.lab.processes import free_port, two_processes
from tests.lab.small_images import (
    CLASSES,
    CPU,
    HALVES,
    SHARED,
    halved,
    material,
    recipe,
    run,
    small,
    small_network,
    trained,
    untimed,
)

from zeromean.lab.activation import Activation
from zeromean.lab.nets import elu11, elu15, elu18
from zeromean.lab.order import sample_order
from zeromean.lab.sharing import ALONE, Share, cut, launched
from zeromean.lab.store import Study
from zeromean.lab.train import Training, train

ELU = Activation("elu")


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with small():
        yield


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder that two processes trained in, and the sums over its weights that each of them ended with."""
    folder = tmp_path_factory.mktemp("two")
    return folder, two_processes("tests.lab.small_images", "shared", str(folder))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    for name in ("plain", "rich", "muon", "batch"):
        recipe, run, _ = SHARED[name]
        train(recipe, [run], material(), Study(folder / name), device=CPU)
    return folder


@pytest.mark.parametrize("name", ["plain", "rich", "muon"])
def test_two_processes_end_with_the_weights_of_one(name: str, one: Path, two: tuple[Path, list[str]]) -> None:
    run = SHARED[name][1]
    alone, shared = (load_file(root / name / run.folder / "model.safetensors") for root in (one, two[0]))
    for key, tensor in alone.items():
        torch.testing.assert_close(shared[key], tensor, rtol=1e-4, atol=1e-6)
    rows = [Study(root / name).metrics(run) for root in (one, two[0])]
    for own, other in zip(*rows, strict=True):
        for key, value in untimed(own).items():
            assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    results = [Study(root / name).result(run) or {} for root in (one, two[0])]
    assert results[1]["test_error"] == pytest.approx(results[0]["test_error"])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.005)])
def test_two_processes_share_copies_in_half_precision(
    two: tuple[Path, list[str]], dtype: torch.dtype, tolerance: float
) -> None:
    alone = dict(trained(halved(Training(recipe(), run(), material(), CPU), dtype)).network.named_parameters())
    for name, tensor in load_file(two[0] / str(dtype)).items():
        distance = (tensor - alone[name]).norm() / alone[name].detach().norm()
        assert distance < tolerance, name


def test_batch_normalization_takes_each_process_s_part_for_the_batch(one: Path, two: tuple[Path, list[str]]) -> None:
    run = SHARED["batch"][1]
    losses = [(Study(root / "batch").result(run) or {})["train_loss"] for root in (one, two[0])]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=0.3)


def test_all_processes_have_the_same_weights(two: tuple[Path, list[str]]) -> None:
    first, second = two[1]
    assert first == second
    assert len(set(first.split())) == len(SHARED) + len(HALVES)


@pytest.mark.parametrize(("name", "rank"), [("poisoned", 0), ("poisoned-too", 1)])
def test_bad_images_of_any_process_are_named(name: str, rank: int, two: tuple[Path, list[str]]) -> None:
    run = SHARED[name][1]
    (place,) = (sample_order(torch.tensor([run.seed]), 0, 88)[0] == 5).nonzero()[0].tolist()
    assert place % 16 // 8 == rank
    result = Study(two[0] / name).result(run) or {}
    assert result["diverged"] == {"epoch": 1, "step": place // 16 + 1, "layer": "the images"}


@pytest.mark.parametrize(("build", "classes", "front"), [(elu11, 100, 1), (elu18, 100, 2), (elu15, 1000, 2)])
def test_the_front_of_a_cut_network_has_few_of_the_parameters(build: type, classes: int, front: int) -> None:
    with torch.device("meta"):
        network = build(classes, ELU, seed=0)
    first, last = cut(network)
    assert [name for name, _ in first.named_children()] == [f"stack{number}" for number in range(1, front + 1)]
    assert [*first, *last] == list(network)
    size, whole = (sum(parameter.numel() for parameter in part.parameters()) for part in (first, network))
    assert size <= 0.1 * whole


def test_a_cut_network_has_a_front_even_if_it_is_large() -> None:
    first, last = cut(small_network(CLASSES, ELU, seed=0))
    assert (len(first), len(last)) == (1, 4)


def test_one_process_has_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with launched(CPU) as (share, device):
        assert (share, device) == (Share(), CPU)
    assert (ALONE.writes, Share(1, 2).writes) == (True, False)
    assert (ALONE.first("output of stack1.conv1"), ALONE.first(None)) == ("output of stack1.conv1", None)


def test_a_process_group_of_one_sums_in_any_memory_format() -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        tensors = [torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last), torch.tensor(math.pi)]
        sums = Share(0, 1).begin_sum([*tensors, torch.randn(5, 1, 1, 1)])()
        for tensor, total in zip(tensors, sums[:2], strict=True):
            assert torch.equal(total, tensor)
            assert total.stride() == tensor.stride()
        halves = torch.randn(6, dtype=torch.bfloat16)
        for among in ([halves], [tensors[0], halves]):
            sums = Share(0, 1).begin_sum(among)()
            assert sums[-1] is halves  # in its place
            assert torch.equal(sums[0], among[0])
    finally:
        torch.distributed.destroy_process_group()
