"""The order of samples and the noise of every run, as functions of its seed alone.

Both are counter-based random numbers, so nothing has to be carried from one epoch to the next, a killed training
resumes in the same order, and CPU and GPU shuffle alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zeromean.nn.noise import uniform

_ORDER = 1 << 62  # keeps the streams of orders apart from those of noise


def sample_order(seeds_r: Tensor, epoch: int, samples: int) -> Tensor:
    """A permutation of the samples for each run, ``[R, samples]``, by sorting random keys of 16 bits.

    Equal keys leave samples in their own order. Above 2^16 samples, of which many share a key and which may lie sorted
    by class, second keys decide.

    Args:
        seeds_r: the runs' seeds, int64.
        epoch: every epoch has its own permutation.
        samples: how many there are.
    """
    seeds = (_ORDER + (seeds_r << 32) + epoch).view(-1, 1)
    keys = uniform(seeds, (len(seeds_r), samples))
    if samples > 1 << 16:
        keys = keys.double() + uniform(seeds, keys.shape, stream=1).double() / (1 << 16)
    return torch.argsort(keys, dim=1, stable=True)


def noise_seeds(seeds_r: Tensor, layers: int, step: Tensor) -> Tensor:
    """Seeds ``[layers, R]`` of the noise of every layer and run at a step; no two coincide.

    Args:
        seeds_r: the runs' seeds, int64, below 2^16.
        layers: how many layers draw noise, at most 2^12.
        step: counts the steps from the start of training, int64, below 2^32.
    """
    layer = torch.arange(layers, device=seeds_r.device).view(-1, 1)
    return (((seeds_r << 12) + layer) << 32) + step
