"""The ELU paper's experiment on ImageNet, read from a folder of images, as published and in less than a third of it.

Source: Clevert, Unterthiner, Hochreiter, "Fast and accurate deep network learning by exponential linear units
(ELUs)", ICLR 2016, section 4.4. Stated there: the stacks, a three-level spatial pyramid, L2 of 5e-4, dropout of 50 %
behind the two layers of 4096, images of 256x256 pixels less the mean of every pixel, random crops of 224x224, flips,
and no other augmentation; ELU compared with ReLU, at 20 % top-5 error after 160,000 and 200,000 steps, and below 10 %
at the end, by the central crop of one network.

Not stated, and our choice: batches of 256, momentum of 0.9, 200,000 steps (40 epochs) at rates of 0.01, 0.001 and
0.0001, strides and padding, weights of variance 1 / fan_in, and pixels divided by 64 once their mean is off. He's
weights begin with a loss of 25 and a gradient of norm 580 (CIFAR-100's images, enlarged), and at 0.01 ELU's loss is not
finite after three steps; these begin with 6.9, which guessing has, and 25. ``benchmarks/first_steps.py`` has both.
Float16, as in the 18-layer network bfloat16 makes the loss jump.

Neither recipe has been trained on ImageNet. ``imagenet-elu15-fast`` has the schedule, momentum and decay that suit the
18-layer network on CIFAR, but neither cutout nor mixup: twelve epochs of a million images leave less to regularize.
"""

from __future__ import annotations

from zeromean.lab.recipes.fast import faster
from zeromean.lab.recipes.images import ImageRecipe, Phase

ELU15_DROPOUT = (0.0, 0.0, 0.0, 0.0, 0.5, 0.0)


def imagenet_elu15() -> ImageRecipe:
    """Fifteen layers on ImageNet: ELU and ReLU compared (the paper's section 4.4), one training of each as there."""
    return ImageRecipe(
        name="imagenet-elu15",
        title="15-layer network on ImageNet",
        source="ELU paper, section 4.4; batch size, momentum, rates, steps, strides and initialization are our choice",
        data="imagenet",
        network="elu15",
        activations=("elu", "relu"),
        baseline="relu",
        phases=(Phase(200_000, ELU15_DROPOUT, everywhere=True),),
        batch_size=256,
        rates=((0, 0.01), (100_000, 0.001), (160_000, 1e-4)),
        expected_sd=0.2,
        normalization="pixel-mean",
        pad=0,
        initialization="lecun",
        precision="float16",
        seeds=1,
    )


def imagenet_elu15_fast() -> ImageRecipe:
    """Fifteen layers on ImageNet in 12 epochs instead of 40."""
    phase = Phase(30_000, ELU15_DROPOUT, everywhere=True)
    return faster(imagenet_elu15(), phase, batch_size=512, decay=0.1, momentum=0.9)
