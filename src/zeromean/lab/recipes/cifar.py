"""The ELU paper's convolutional experiments on CIFAR, as published and in a fraction of the time.

Source: Clevert, Unterthiner, Hochreiter, "Fast and accurate deep network learning by exponential linear units
(ELUs)", ICLR 2016, sections 4.2 and 4.3. Stated there: the stacks, the dropout of each, L2 of 5e-4, momentum of 0.9,
the learning rates of the 11-layer network (by iteration), contrast normalization with ZCA, crops out of images padded
by 4, flips; for the 18-layer network batches of 100, a rate of 0.01 divided by 10 after 35,000 steps, and two
fine-tunings, of 50,000 steps with dropout behind all layers and of 40,000 with 1.5 times its rates.

Not stated, and our choice: batches of 100 for the 11-layer network too, padding of even kernels (``alternate``),
weights of variance 1 / fan_in with biases of zero, and dropout behind a stack's pooling. He's weights, which the paper
states for its networks on MNIST, begin here with a loss of 9 to 14 and a gradient of norm 100 to 240, where these begin
with 4.6 and 3 to 5: at the full rate, some runs with He's are lost.

Not stated of the 18-layer network: to which of its eight stacks the seven dropout rates belong (here the largest to
two), how long its base phase is (here 35,000 steps) and at which rates it is fine-tuned (here 0.01, then 0.001, divided
by 10 after 35,000 steps of it as well). So the published division by 10 comes as late as the last fine-tuning. A base
that goes on at 0.001 ends with all images known by heart and gains nothing; fine-tuning at that rate does not change
it. ``benchmarks/schedules.py`` has the readings.

All are trained in float16. It is as fast as bfloat16, in which the 18-layer network's loss jumps after some thousand
steps at the published rate and most runs on CIFAR-10 are lost; in tf32 none is.

The ``-fast`` recipes train the same networks, without normalization layers, on a quarter to a third of the images, by
a schedule of ours (`zeromean.lab.recipes.fast`), as ``benchmarks/tune_fast.py`` found it on held-out images of
CIFAR-100. The decay of the 11-layer network, summed with the rates over the steps, is twice what the published one
comes to, within 10 %.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from zeromean.lab.recipes.fast import faster
from zeromean.lab.recipes.images import ImageRecipe, Phase

ELU11_DROPOUT = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.0)
ELU18_DROPOUT = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.0)
# Where the paper is silent, and half precision where it has float32.
_OPEN: dict[str, Any] = {"padding": "alternate", "initialization": "lecun", "precision": "float16"}
_PAPER_ARMS = ("elu", "shifted_relu", "leaky_relu:0.1", "relu")


def cifar100_elu11() -> ImageRecipe:
    """Eleven layers on CIFAR-100: four activations compared (the paper's section 4.2)."""
    return ImageRecipe(
        name="cifar100-elu11",
        title="11-layer network on CIFAR-100",
        source="ELU paper, section 4.2; batch size, padding and initialization are our choice",
        data="cifar100",
        network="elu11",
        activations=_PAPER_ARMS,
        baseline="relu",
        phases=(Phase(165_000, ELU11_DROPOUT),),
        batch_size=100,
        rates=((0, 0.01), (35_000, 0.005), (85_000, 5e-4), (135_000, 5e-5)),
        **_OPEN,
        expected_sd=0.3,
    )


def cifar100_elu18() -> ImageRecipe:
    """Eighteen layers on CIFAR-100: the paper's best result, 24.28 % (section 4.3)."""
    return _elu18("cifar100", "CIFAR-100")


def cifar10_elu18() -> ImageRecipe:
    """Eighteen layers on CIFAR-10: the paper's 6.55 % (section 4.3)."""
    return _elu18("cifar10", "CIFAR-10")


def cifar100_elu11_fast() -> ImageRecipe:
    """Eleven layers on CIFAR-100 in 100 epochs instead of 330."""
    # The published training ends with a training error of 8 %: a third of it has less to regularize.
    phase = Phase(19_500, tuple(0.5 * rate for rate in ELU11_DROPOUT))
    return faster(cifar100_elu11(), phase, batch_size=256, decay=0.064, momentum=0.95)


def cifar100_elu18_fast() -> ImageRecipe:
    """Eighteen layers on CIFAR-100 in 60 epochs instead of 250."""
    return _elu18_fast(cifar100_elu18())


def cifar10_elu18_fast() -> ImageRecipe:
    """Eighteen layers on CIFAR-10 in 60 epochs instead of 250."""
    return _elu18_fast(cifar10_elu18())


def _elu18_fast(published: ImageRecipe) -> ImageRecipe:
    # 39 million parameters learn 50,000 images by heart in 60 epochs too: dropout as published.
    phase = Phase(5_820, ELU18_DROPOUT)
    # Below 512 images a step, an H200 is not busy.
    return replace(faster(published, phase, batch_size=512, decay=0.1, momentum=0.9), cutout=8, mixup=0.2)


def _elu18(data: str, title: str) -> ImageRecipe:
    finer = tuple(1.5 * rate for rate in ELU18_DROPOUT)
    return ImageRecipe(
        name=f"{data}-elu18",
        title=f"18-layer network on {title}",
        source="ELU paper, section 4.3; padding, initialization and the parts of the schedule that it omits are ours",
        data=data,
        network="elu18",
        activations=("elu",),
        baseline="elu",
        phases=(
            Phase(35_000, ELU18_DROPOUT),
            Phase(50_000, ELU18_DROPOUT, everywhere=True),
            Phase(40_000, finer, everywhere=True),
        ),
        batch_size=100,
        rates=((0, 0.01), (85_000, 0.001), (120_000, 1e-4)),
        **_OPEN,
        expected_sd=0.2,
        seeds=3,
    )
