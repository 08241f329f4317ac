"""The schedule that the ``-fast`` recipes share: that of `zeromean.kernels.muon` in a fraction of the published time.

Each weight matrix moves by the orthogonal matrix nearest to its momentum, as far along every direction. The rate warms
up for a twentieth of the steps and falls to 0 on a straight line; there is one phase of dropout, as each takes a
compilation; and no normalization layer.
"""

from __future__ import annotations

from typing import Any


def fast_schedule(*, steps: int, decay: float, momentum: float) -> dict[str, Any]:
    """Fields of an `ImageRecipe`, but for its phases and its batch size.

    Args:
        steps: updates of the whole training.
        decay: what the weights lose in a step, times the rate.
        momentum: share of it that each step keeps.
    """
    return {
        "optimizer": "muon",
        "curve": "linear",
        # A guess that held: in the 18-layer network half of it and twice are worse.
        "rates": ((0, 0.001), (steps // 20, 0.01), (steps, 0.0)),
        "momentum": momentum,
        "nesterov": True,
        "weight_decay": decay,
        "decay_biases": False,
        # The usual first value for a hundred classes or more.
        "label_smoothing": 0.1,
        # The norm of the CIFAR networks' first gradient: a guard against jumps of the biases.
        "clip": 5.0,
    }
