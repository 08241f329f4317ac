"""Kernels that store what the functions of `zeromean.kernels.noise` make.

Run in a process of its own with TRITON_INTERPRET=1, it saves their results for the inputs of `test_noise`.
"""

# mypy: disable-error-code="import-untyped,untyped-decorator,no-untyped-def"

import sys

import torch
import triton
import triton.language as tl

from tests.kernels.test_noise import EPSILON, FIRST_GROUPS, GROUPS, SEEDS, Drawn
from zeromean.kernels import noise


@triton.jit
def store_words(words_ptr, seed_ptr, first, G: tl.constexpr, WIDE: tl.constexpr):
    """The words [G, 4] of the groups from the first on."""
    row = tl.arange(0, G)
    w0, w1, w2, w3 = noise.words(tl.load(seed_ptr), first + row.to(tl.int64) if WIDE else row, 0)
    tl.store(words_ptr + row * 4, w0.to(tl.int64))
    tl.store(words_ptr + row * 4 + 1, w1.to(tl.int64))
    tl.store(words_ptr + row * 4 + 2, w2.to(tl.int64))
    tl.store(words_ptr + row * 4 + 3, w3.to(tl.int64))


@triton.jit
def store_groups(uniforms_ptr, normals_ptr, halves_ptr, sigma_ptr, seed_ptr, epsilon, G: tl.constexpr):
    """Numbers [G, 8] of each kind, in whole groups."""
    row = tl.arange(0, G)
    at = row[:, None] * 8 + tl.arange(0, 8)[None, :]
    seed = tl.load(seed_ptr)
    sigma = noise.deviation(seed, epsilon)
    w0, w1, w2, w3 = noise.words(seed, row, 0)
    a0, a1, a2, a3, a4, a5, a6, a7 = noise.uniform8(w0, w1, w2, w3)
    tl.store(uniforms_ptr + at, noise.interleave8(a0, a1, a2, a3, a4, a5, a6, a7).to(uniforms_ptr.dtype.element_ty))
    a0, a1, a2, a3, a4, a5, a6, a7 = noise.normal8(w0, w1, w2, w3)
    tl.store(normals_ptr + at, noise.interleave8(a0, a1, a2, a3, a4, a5, a6, a7).to(normals_ptr.dtype.element_ty))
    a0, a1, a2, a3, a4, a5, a6, a7 = noise.half_slope8(w0, w1, w2, w3, noise.spread(sigma))
    tl.store(halves_ptr + at, noise.interleave8(a0, a1, a2, a3, a4, a5, a6, a7).to(halves_ptr.dtype.element_ty))
    tl.store(sigma_ptr, sigma)


@triton.jit
def store_singly(uniforms_ptr, halves_ptr, seed_ptr, epsilon, N: tl.constexpr):
    """Numbers [N], one element at a time."""
    at = tl.arange(0, N)
    seed = tl.load(seed_ptr)
    w0, w1, w2, w3 = noise.words(seed, at // 8, 0)
    tl.store(uniforms_ptr + at, noise.uniform1(w0, w1, w2, w3, at % 8))
    spread = noise.spread(noise.deviation(seed, epsilon))
    tl.store(halves_ptr + at, noise.half_slope1(w0, w1, w2, w3, at % 8, spread))


def draw(seed: int) -> Drawn:
    seeds = torch.tensor([seed])
    words = torch.zeros(len(FIRST_GROUPS), GROUPS, 4, dtype=torch.int64)
    for first, out in zip(FIRST_GROUPS, words, strict=True):
        store_words[(1,)](out, seeds, first, G=GROUPS, WIDE=first > 0)
    uniforms, normals, halves, uniforms1, halves1 = torch.full((5, GROUPS * 8), torch.nan)
    sigma = torch.zeros(1)
    store_groups[(1,)](uniforms, normals, halves, sigma, seeds, EPSILON, G=GROUPS)
    store_singly[(1,)](uniforms1, halves1, seeds, EPSILON, N=GROUPS * 8)
    return Drawn(words, uniforms, normals, halves, uniforms1, halves1, sigma)


if __name__ == "__main__":
    torch.save({seed: tuple(draw(seed)) for seed in SEEDS}, sys.argv[1])
