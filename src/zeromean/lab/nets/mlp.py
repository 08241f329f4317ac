"""Fully connected networks: a plain ``torch.nn.Sequential`` that owes nothing to this library but its activations."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

import zeromean.nn as zmnn
from zeromean.lab.activation import Activation
from zeromean.lab.recipes.recipe import Initialization


def mlp(
    widths: tuple[int, ...], activation: Activation, *, seed: int, initialization: Initialization = "he"
) -> nn.Sequential:
    """Linear layers with the activation between them and a linear output.

    Args:
        widths: features of the input, of each hidden layer and of the output.
        activation: follows every layer but the last; each layer has its own.
        seed: fixes the initial weights, leaving the global generator as it was. Two activations with the same
            gain get the same weights from the same seed.
        initialization: ``he`` draws N(0, 2 / fan_in) for any activation; ``activation`` uses the activation's
            own gain. Biases are zero.
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.utils.skip_init(nn.Linear, fan_in, fan_out), activation.build()]
    network = nn.Sequential(*layers[:-1])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        zmnn.init_(network, "relu" if initialization == "he" else activation.build())
    return network
