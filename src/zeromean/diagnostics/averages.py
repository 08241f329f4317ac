"""From values of single units to numbers of layers, where the tensors lie.

What is asked of all layers with as many units is found together, for many passes at once, since an operator takes a
GPU's host longer to start than the device to run. Only the numbers of layers come to the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MOST_OF_THE_BATCH = 0.9

Where = tuple[str, Any, int]
"""Of numbers of a call: what their names begin with, the group that they are found with, and the first pass's row."""


class Averages:
    """Over units, of values ``[passes, units]`` of several calls."""

    def __init__(self) -> None:
        self._groups: dict[Any, tuple[list[Mapping[str, Tensor]], list[int]]] = {}
        self._known: dict[tuple[int, int], tuple[Any, int]] = {}

    def add(self, samples: int, of_units: Mapping[str, Tensor]) -> list[Where]:
        """Ask for those of a call.

        Args:
            samples: of each unit, in each pass.
            of_units: see `zeromean.diagnostics.light.Seen`.
        """
        if "mean" not in of_units:
            return []
        places = []
        if "low" in of_units:
            tails = {name: of_units[name] for name in ("low", "high", "off") if name in of_units}
            places.append(("", *self._place(tails, samples)))
        for prefix in ("", "input_"):
            if f"{prefix}mean" in of_units:
                pair = {name: of_units[f"{prefix}{name}"] for name in ("mean", "variance")}
                places.append((prefix, *self._place(pair, 0)))
        return places

    def found(self) -> dict[Any, dict[str, Tensor]]:
        """A number a call and pass, for each quantity, of each group."""
        found = {}
        for group, (calls, samples) in self._groups.items():
            stacked = {name: torch.cat([one[name] for one in calls]) for name in calls[0]}
            found[group] = _of_moments(**stacked) if "mean" in stacked else _of_tails(stacked, samples)
        return found

    def _place(self, values: Mapping[str, Tensor], samples: int) -> tuple[Any, int]:
        """The same tensors, such as an input that is the output of the layer before, are worked on once."""
        first = next(iter(values.values()))
        if (id(first), samples) not in self._known:
            group = (*values, first.shape[1], first.device)
            calls, of_rows = self._groups.setdefault(group, ([], []))
            self._known[id(first), samples] = group, len(of_rows)
            calls.append(values)
            of_rows += [samples] * first.shape[0]
        return self._known[id(first), samples]


def _of_moments(mean: Tensor, variance: Tensor) -> dict[str, Tensor]:
    spread = variance.mean(1).sqrt()
    return {"mean": mean.mean(1), "shift": mean.square().mean(1).sqrt() / spread, "spread": spread}


def _of_tails(stacked: Mapping[str, Tensor], samples: Sequence[int]) -> dict[str, Tensor]:
    """Which part of an activation's units is saturated, and of a rectifier's is dead or never off."""
    low = stacked["low"]
    # A copy that waits for the device would leave it idle afterwards.
    count = torch.tensor(samples, device="cpu").to(low.device, non_blocking=True)[:, None]
    tail = low + stacked["high"] if "high" in stacked else low
    shares = {"saturated": (tail >= MOST_OF_THE_BATCH * count).float().mean(1)}
    if "off" in stacked:
        shares["dead"] = (low >= count).float().mean(1)
        shares["never_off"] = (stacked["off"] == 0).float().mean(1)
    return shares


def fetched(tensors: Sequence[Tensor]) -> list[Tensor]:
    """On the CPU; those of one type and device come in one transfer."""
    alike: dict[Any, list[int]] = {}
    for which, one in enumerate(tensors):
        alike.setdefault((one.dtype, one.device), []).append(which)
    found: dict[int, Tensor] = {}
    for places in alike.values():
        together = torch.cat([tensors[which].flatten() for which in places]).cpu()
        parts = together.split([tensors[which].numel() for which in places])
        found |= {which: part.view(tensors[which].shape) for which, part in zip(places, parts, strict=True)}
    return [found[which] for which in range(len(tensors))]
