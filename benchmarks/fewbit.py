"""The error of few-bit gradients, as a table: of the derivative, and of a weight's gradient in a small network.

    python benchmarks/fewbit.py

The network has two hidden layers of 256 units, pre-activations of unit size, 10 classes and random labels. The
error of the first layer's weight gradient, which passes through both activations, is relative to its norm.
"""

import statistics

import torch
from torch import Tensor, nn

import zeromean as zm
from zeromean.kernels.fewbit_tables import FUNCTIONS, table
from zeromean.nn.fewbit import fewbit

WIDTH, CLASSES, BATCH, SEEDS = 256, 10, 128, 10


class Activation(nn.Module):
    """The function of a name, with or without the few-bit backward pass."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.bits = name, 0

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function to each element."""
        return fewbit(x, self.name, self.bits) if self.bits else FUNCTIONS[self.name](x)


def weight_error(name: str, bits: int, seed: int) -> float:
    torch.manual_seed(seed)
    activations = Activation(name), Activation(name)
    first, second, last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
    family = name.removesuffix("_tanh")
    model = zm.init_(nn.Sequential(first, activations[0], second, activations[1], last), family)
    x, labels = torch.randn(BATCH, WIDTH) / zm.gain(family), torch.randint(CLASSES, (BATCH,))
    gradients = []
    for setting in (0, bits):
        for activation in activations:
            activation.bits = setting
        loss = nn.functional.cross_entropy(model(x), labels)
        gradients.append(torch.autograd.grad(loss, first.weight)[0])
    exact, approximate = gradients
    return float((approximate - exact).norm() / exact.norm())


def main() -> None:
    print(
        "| function | bits | bytes kept, bf16 | RMS error of f' | largest error of f' | error of a weight's gradient |"
    )
    print("|---|---|---|---|---|---|")
    for name in FUNCTIONS:
        for bits in (1, 2, 3, 4):
            error = statistics.mean(weight_error(name, bits, seed) for seed in range(SEEDS))
            entry = table(name, bits)
            print(f"| {name} | {bits} | {2 + bits / 8} | {entry.rms:.4f} | {entry.largest:.3f} | {error:.1%} |")


if __name__ == "__main__":
    main()
