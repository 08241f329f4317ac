"""The noise of the Triton programs against that of `zeromean.nn.noise`: interpreted, and compiled without a GPU."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests import oracles
from zeromean.nn import noise

GROUPS = 64
SEEDS = [0, 1, 2**40 + 7, 2**63 - 1, -5]
FIRST_GROUPS = [0, 2**31 - 7, 2**32 - 7]
EPSILON = 0.8
GPU = ("cuda", 90, 32)
MASK = 2**32 - 1

each_seed = pytest.mark.parametrize("seed", SEEDS)


class Drawn(NamedTuple):
    """Made of one seed."""

    words: Tensor
    uniforms: Tensor
    normals: Tensor
    halves: Tensor
    uniforms_singly: Tensor
    halves_singly: Tensor
    sigma: Tensor


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Drawn]:
    pytest.importorskip("triton")
    file = tmp_path_factory.mktemp("noise") / "drawn.pt"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{root}:{root / 'src'}"}
    command = [sys.executable, "-W", "error", "-m", "tests.kernels.noise_program", str(file)]
    subprocess.run(command, check=True, env=environment, cwd=root)
    return {seed: Drawn(*tensors) for seed, tensors in torch.load(file, weights_only=True).items()}


@each_seed
def test_words_equal_the_oracle(interpreted: dict[int, Drawn], seed: int) -> None:
    key = (seed & MASK, (seed >> 32) & MASK)
    for first, words in zip(FIRST_GROUPS, interpreted[seed].words, strict=True):
        for group, four in enumerate(words.tolist(), start=first):
            assert tuple(four) == oracles.philox((group & MASK, group >> 32, 0, 0), key), group


@each_seed
def test_numbers_equal_the_reference(interpreted: dict[int, Drawn], seed: int) -> None:
    drawn, shape = interpreted[seed], (GROUPS * 8,)
    assert torch.equal(drawn.uniforms, noise.uniform(torch.tensor(seed), shape))
    normals = noise.normal(torch.tensor(seed), shape)
    torch.testing.assert_close(drawn.normals, normals, rtol=0, atol=2e-6)
    sigma = EPSILON * noise.uniform(torch.tensor(seed), (1,), stream=1)
    assert torch.equal(drawn.sigma, sigma)
    torch.testing.assert_close(2 * drawn.halves, (1 + sigma * normals).clamp(0, 2), rtol=0, atol=2e-6)


@each_seed
def test_one_number_at_a_time_is_the_same(interpreted: dict[int, Drawn], seed: int) -> None:
    drawn = interpreted[seed]
    assert torch.equal(drawn.uniforms_singly, drawn.uniforms)
    assert torch.equal(drawn.halves_singly, drawn.halves)


def test_slopes_reach_both_bounds_and_keep_within(interpreted: dict[int, Drawn]) -> None:
    halves = torch.stack([drawn.halves for drawn in interpreted.values()])
    assert halves.min() == 0
    assert halves.max() == 1


def test_a_thread_makes_the_numbers_of_its_own_elements() -> None:
    """Compiled for a GPU, groups need neither shared memory nor shuffles, and a product is one instruction."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tests.kernels import noise_program

    pointers = {f"{name}_ptr": "*bf16" for name in ("uniforms", "normals", "halves")}
    signature = {**pointers, "sigma_ptr": "*fp32", "seed_ptr": "*i64", "epsilon": "fp32", "G": "constexpr"}
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(len(pointers))}
    source = ASTSource(noise_program.store_groups, signature, {(len(signature) - 1,): 128}, aligned)
    kernel = triton.compile(source, target=GPUTarget(*GPU), options={"num_warps": 4})
    assert kernel.metadata.shared == 0
    assert "shfl" not in kernel.asm["ptx"]
    assert kernel.asm["ptx"].count("mul.wide.u32") >= 13
