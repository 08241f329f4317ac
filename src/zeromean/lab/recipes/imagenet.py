"""The ELU paper's experiment on ImageNet, read from a folder of images.

Source: Clevert, Unterthiner, Hochreiter, "Fast and accurate deep network learning by exponential linear units
(ELUs)", ICLR 2016, section 4.4. Stated there: the stacks, a three-level spatial pyramid, L2 of 5e-4, dropout of 50 %
behind the two layers of 4096, images of 256x256 pixels less the mean of every pixel, random crops of 224x224, flips,
and no other augmentation; ELU compared with ReLU, at 20 % top-5 error after 160,000 and 200,000 steps, and below 10 %
at the end, by the central crop of one network.

Not stated, and our choice: batches of 256, momentum of 0.9, 200,000 steps (40 epochs) at rates of 0.01, 0.001 and
0.0001, strides and padding, He initialization, and pixels divided by 64 once their mean is off.
"""

from __future__ import annotations

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
        seeds=1,
    )
