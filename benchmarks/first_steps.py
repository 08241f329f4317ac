"""The first steps of the 15-layer network from each initialization, by plain stochastic gradient descent.

    PYTHONPATH=src python -m benchmarks.first_steps --batch 16 --steps 12 --rate 0.01 --out DIR

Images are CIFAR-100's, enlarged to 224 pixels, less the mean of every pixel and divided by 64 as the recipe's are;
every step has others. Momentum is 0.9, L2 5e-4, dropout as published, arithmetic float32, on a GPU tf32 within
convolutions. DIR gets ``results.jsonl``, a row an activation and initialization: the loss and the norm of the gradient
in each step, null where they are not finite, which ends the row.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zeromean.lab import data
from zeromean.lab.activation import parse
from zeromean.lab.nets import elu15
from zeromean.lab.streaming import SCALE

PIXELS = 224


def batches(dataset: data.Dataset, size: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images ``[size, 3, 32, 32]``, float32, and their labels ``[size]``.

    Raises:
        ValueError: there are not that many images.
    """
    count = size * steps
    if count > len(dataset.train_labels):
        raise ValueError(f"batch x steps must be at most {len(dataset.train_labels)} images, got {count}: lower either")
    images, labels = dataset.train_images[:count].float(), dataset.train_labels[:count]
    centred = (images - images.mean(0)) / SCALE
    yield from zip(centred.split(size), labels.split(size), strict=True)


def first_steps(model: nn.Module, seen: Iterable[tuple[Tensor, Tensor]], rate: float) -> dict[str, list[float | None]]:
    """The loss and the norm of the gradient before each update, until one is not finite."""
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    losses, norms = list[float | None](), list[float | None]()
    for images, labels in seen:
        enlarged = F.interpolate(images.to(device), size=PIXELS, mode="bilinear")
        loss = F.cross_entropy(model(enlarged), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.get_total_norm([weight.grad for weight in model.parameters() if weight.grad is not None])
        finite = math.isfinite(loss.item()) and math.isfinite(norm.item())
        losses.append(round(loss.item(), 3) if finite else None)
        norms.append(round(norm.item(), 3) if finite else None)
        if not finite:
            break
        optimizer.step()
    return {"losses": losses, "gradient_norms": norms}


def main(words: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--activations", nargs="+", default=["elu", "relu"])
    made.add_argument("--initializations", nargs="+", choices=("he", "activation", "lecun"), default=["he", "lecun"])
    made.add_argument("--batch", type=int, default=16)
    made.add_argument("--steps", type=int, default=12)
    made.add_argument("--rate", type=float, default=0.01)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    made.add_argument("--out", type=Path, required=True)
    options = made.parse_args(words)
    seen = list(batches(data.load("cifar100"), options.batch, options.steps))
    options.out.mkdir(parents=True, exist_ok=True)
    for activation in options.activations:
        for initialization in options.initializations:
            torch.manual_seed(options.seed)
            model = elu15(1000, parse(activation), seed=options.seed, initialization=initialization).to(options.device)
            row: dict[str, Any] = {"activation": activation, "initialization": initialization, "seed": options.seed}
            row |= {"batch": options.batch, "rate": options.rate, "device": options.device.type}
            row |= first_steps(model, seen, options.rate)
            print(json.dumps(row), flush=True)
            with (options.out / "results.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
