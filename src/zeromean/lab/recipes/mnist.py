"""The ELU paper's two experiments on MNIST, and the first of them on the embedded digits.

Source: Clevert, Unterthiner, Hochreiter, "Fast and accurate deep network learning by exponential linear units
(ELUs)", ICLR 2016, section 4.1. Stated there: the layers, the activations, plain SGD with batches of 64, the
learning rates, the numbers of epochs, He initialization (first experiment), the median over units of the mean
activation on a fixed training subset. Not stated, and our choice: pixels scaled to [0, 1] and nothing else; biases
start at zero; a last incomplete batch is left out; the subset is 1,000 training images; for the autoencoder also
the initialization (He), a linear output layer and the mean squared error of a pixel, which trains at all four
learning rates (summed over the pixels it diverges at the two larger ones).
"""

from __future__ import annotations

from dataclasses import replace

from zeromean.lab.recipes.recipe import Recipe

_PAPER_ARMS = ("elu", "relu", "leaky_relu:0.1", "shifted_relu")


def mnist_mlp8() -> Recipe:
    """Eight hidden layers of 128 units on MNIST: mean activations and training loss (the paper's Figure 2)."""
    return Recipe(
        name="mnist-mlp8",
        title="8 x 128 network on MNIST",
        source="ELU paper, section 4.1.1 (its arms are ELU, ReLU, LeakyReLU(0.1); ShiftedReLU is our addition)",
        data="mnist",
        task="classification",
        hidden=(128,) * 8,
        activations=_PAPER_ARMS,
        baseline="relu",
        epochs=300,
        batch_size=64,
        learning_rates=(0.01,),
        tuning_grid=(0.001, 0.003, 0.01, 0.03, 0.1),
        tuning_seeds=3,
        tuning_validation=10_000,
        expected_sd=0.1,
    )


def mnist_autoencoder() -> Recipe:
    """Autoencoder 1000-500-250-30 with a symmetric decoder, at four fixed learning rates (the paper's Figure 3)."""
    return Recipe(
        name="mnist-autoencoder",
        title="1000-500-250-30 autoencoder on MNIST",
        source="ELU paper, section 4.1.2 (output layer, loss and initialization are not stated there: our choice)",
        data="mnist",
        task="reconstruction",
        hidden=(1000, 500, 250, 30, 250, 500, 1000),
        activations=("elu", "relu", "leaky_relu:0.1"),
        baseline="relu",
        epochs=500,
        batch_size=64,
        learning_rates=(1e-2, 1e-3, 1e-4, 1e-5),
        tuning_grid=(1e-5, 1e-4, 1e-3, 1e-2),
        tuning_seeds=2,
        tuning_validation=10_000,
        expected_sd=2.9,
        seeds=5,
    )


def digits_mlp8() -> Recipe:
    """The 8 x 128 network on scikit-learn's digits: nothing to download, minutes on a laptop; the default."""
    return replace(
        mnist_mlp8(),
        name="digits-mlp8",
        title="8 x 128 network on the embedded digits",
        source="the network, optimizer and batch size of mnist-mlp8; data and epochs are our choice",
        data="digits",
        epochs=100,
        tuning_validation=287,
        validation=0,
        expected_sd=0.43,
        probe_samples=500,
    )
