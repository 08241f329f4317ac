"""A layer's inputs and deltas as rows: one row for every place where its units see an input.

A linear layer sees the last dimension of its input; all the others are rows. A convolution sees patches: a row is what
the kernel covers at one place of one image, in the order of its weight, `weight[unit].flatten()`. Its units come in
`groups`, and the units of a group see the patches of their own channels only, so rows are [groups, rows, inputs] and
[groups, rows, units]; a linear layer is one group. Rows run over the batch first, then over the places.
"""

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zeromean.nn.linear import LinearAct

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def yields_net_inputs(module: nn.Module) -> TypeGuard[Layer]:
    """Whether a module's output is the net input of linear or convolution units, with no activation of its own."""
    return isinstance(module, Layer) and not isinstance(module, LinearAct)


def check_layer(name: str, module: nn.Module) -> None:
    """Refuse a module whose output is not the net input of linear or convolution units.

    Raises:
        ValueError: If it is anything but a `Linear`, `Conv1d`, `Conv2d` or `Conv3d`, or applies its own activation.
    """
    if not yields_net_inputs(module):
        raise ValueError(
            f"layer {name!r} must be a Linear, Conv1d, Conv2d or Conv3d that yields net inputs, got "
            f"{type(module).__name__}: leave it out, or replace it by such a layer and a separate activation"
        )


def groups(layer: Layer) -> int:
    """How many groups of units see different inputs: 1 but for a grouped convolution."""
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def row_count(layer: Layer, output: Tensor) -> int:
    """How many rows an output of the layer stands for: samples x places."""
    return output.numel() // (layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def input_rows(layer: Layer, inputs: Tensor, index: Tensor | None = None) -> Tensor:
    """The rows [groups, rows, inputs of a unit] that the layer's input holds, or only those of `index` [rows].

    Only the chosen patches are copied, so a few rows of a large image batch cost little.
    """
    if isinstance(layer, nn.Linear):
        flat = inputs.reshape(-1, layer.in_features)
        return (flat if index is None else flat[index])[None]
    windows = _windows(layer, _padded(layer, _batched(layer, inputs)))
    places = windows.shape[: len(layer.kernel_size) + 1]
    if index is None:
        index = torch.arange(places.numel(), device=inputs.device)
    patches = windows[torch.unravel_index(index, places)]
    rows: Tensor = patches.reshape(len(index), layer.groups, -1).transpose(0, 1)
    return rows


def output_rows(layer: Layer, outputs: Tensor, index: Tensor | None = None) -> Tensor:
    """The rows [groups, rows, units of a group] of a tensor shaped as the layer's output, or only those of `index`."""
    if isinstance(layer, nn.Linear):
        flat = outputs.reshape(-1, layer.out_features)
    else:
        flat = _batched(layer, outputs).movedim(1, -1).reshape(-1, layer.out_channels)
    chosen = flat if index is None else flat[index]
    rows: Tensor = chosen.unflatten(1, (groups(layer), -1)).transpose(0, 1)
    return rows


def _batched(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    return x if x.dim() == len(layer.kernel_size) + 2 else x[None]


def _padded(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """The input with the border that the convolution sees."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    border = [side for axis in reversed(range(len(layer.kernel_size))) for side in _border(layer, axis)]
    return F.pad(x, border, mode) if any(border) else x


def _border(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, axis: int) -> tuple[int, int]:
    if not isinstance(layer.padding, str):
        return layer.padding[axis], layer.padding[axis]
    total = layer.dilation[axis] * (layer.kernel_size[axis] - 1) if layer.padding == "same" else 0
    return total // 2, total - total // 2


def _windows(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """A view [batch, *places, channels, *kernel] of the padded input: nothing is copied."""
    for axis, (kernel, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    ):
        x = x.unfold(axis + 2, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    return x.movedim(1, len(layer.kernel_size) + 1)
