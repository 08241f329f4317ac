"""The operators of a linear layer fused with its activation: `linear_act` and `linear_act_backward` in torch.library.

    y = zeromean::linear_act(x, weight, bias, activation, scalars, round_preact)
    dx, dweight, dbias = zeromean::linear_act_backward(gradient, y, x, weight, activation, scalars, wanted)

with y = f(x Wᵀ + b) for x of any leading dimensions. ``activation`` is elu (scalars alpha, scale, input_scale: SELU and
CELU too), leaky_relu (slope; 0 for ReLU) or shifted_relu, all of which have a slope that follows from the output.
``wanted`` says which of the three gradients to make; the others come out empty.

float16 and bfloat16 on a Hopper GPU run the Triton programs, all else plain operators.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

HALF_TYPES = (torch.float16, torch.bfloat16)
# Multiplications of a product behind which the host has done its part.
_HIDES_THE_HOST = 2**35

Gradients = tuple[Tensor, Tensor, Tensor]


def value(z: Tensor, activation: str, scalars: Sequence[float]) -> Tensor:
    """The activation, in plain differentiable operators."""
    if activation == "elu":
        return torch.ops.aten.elu(z, *scalars)  # type: ignore[no-any-return]
    return F.leaky_relu(z, scalars[0]) if activation == "leaky_relu" else F.threshold(z, -1.0, -1.0)


def slope_times(gradient: Tensor, y: Tensor, activation: str, scalars: Sequence[float]) -> Tensor:
    """The gradient times the activation's slope where its output is y, in plain differentiable operators."""
    aten = torch.ops.aten
    if activation == "elu":
        return aten.elu_backward(gradient, *scalars, True, y)  # type: ignore[no-any-return]
    if activation == "leaky_relu":
        return aten.leaky_relu_backward(gradient, y, scalars[0], True)  # type: ignore[no-any-return]
    return aten.threshold_backward(gradient, y, -1.0)  # type: ignore[no-any-return]


def plain_forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, scalars: Sequence[float]) -> Tensor:
    """The output by plain operators."""
    return value(F.linear(x, weight, bias), activation, scalars)


def plain_backward(
    gradient: Tensor, y: Tensor, x: Tensor, weight: Tensor, activation: str, scalars: Sequence[float],
    wanted: Sequence[bool],
) -> Gradients:  # fmt: skip
    """The gradients by plain differentiable operators."""
    dz = slope_times(gradient, y, activation, scalars)
    rows = dz.reshape(-1, weight.shape[0])
    dx = dz @ weight if wanted[0] else x.new_empty(0)
    dweight = rows.t() @ x.reshape(-1, weight.shape[1]) if wanted[1] else x.new_empty(0)
    return dx, dweight, rows.sum(0) if wanted[2] else x.new_empty(0)


def supported(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the programs can take these: half precision, widths in steps of 16 bytes, and something to do."""
    if x.dtype not in HALF_TYPES or x.dtype != weight.dtype or weight.ndim != 2 or x.numel() == 0:
        return False
    units, inner = weight.shape
    fits = bias is None or (bias.dtype == x.dtype and bias.shape == weight.shape[:1])
    return x.shape[-1] == inner and inner % 8 == units % 8 == 0 < units and fits


def pays(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the programs are expected to beat cuBLAS and an activation of its own.

    Launched one by one they need a product of some size to hide what the host does; compiled or in a CUDA graph, hardly
    any (docs/kernels.md has the measurement).
    """
    if not (x.is_cuda and weight.shape[-1] <= 2048 and supported(x, weight, bias)):
        return False
    unhidden = not (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())
    return x.numel() >= 8192 * weight.shape[-1] and x.numel() * weight.shape[0] >= (_HIDES_THE_HOST if unhidden else 0)


@cache
def _has_programs(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9 and find_spec("triton") is not None


def _runs_programs(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return x.is_cuda and supported(x, weight, bias) and _has_programs(x.device)


def _matrix(tensor: Tensor) -> Tensor:
    """Rows of contiguous numbers that start at a multiple of 16 bytes, as the copy engine needs them."""
    return _aligned(tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1]))


def _aligned(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, scalars: Sequence[float], round_preact: bool
) -> Tensor:
    if not _runs_programs(x, weight, bias):
        return plain_forward(x, weight, bias, activation, scalars)
    from zeromean.kernels import linear_launch

    bias = bias if bias is None else _aligned(bias)
    y = linear_launch.run_forward(_matrix(x), _matrix(weight), bias, activation, scalars, round_preact)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], -1)


def _backward(
    gradient: Tensor, y: Tensor, x: Tensor, weight: Tensor, activation: str, scalars: Sequence[float],
    wanted: Sequence[bool],
) -> Gradients:  # fmt: skip
    if not _runs_programs(x, weight):
        return plain_backward(gradient, y, x, weight, activation, scalars, wanted)
    from zeromean.kernels import linear_launch

    gradient, y, rows = _matrix(gradient), _matrix(y), _matrix(x)
    dz, dbias = linear_launch.run_slopes(gradient, y, wanted[2], activation, scalars)
    dx = torch.mm(dz, weight).view(x.shape) if wanted[0] else x.new_empty(0)
    return dx, torch.mm(dz.t(), rows) if wanted[1] else x.new_empty(0), dbias


def _forward_shape(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, scalars: Sequence[float], round_preact: bool
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _backward_shape(
    gradient: Tensor, y: Tensor, x: Tensor, weight: Tensor, activation: str, scalars: Sequence[float],
    wanted: Sequence[bool],
) -> Gradients:  # fmt: skip
    shapes = (x.shape, weight.shape, weight.shape[:1])
    dx, dweight, dbias = (x.new_empty(s if want else (0,)) for s, want in zip(shapes, wanted, strict=True))
    return dx, dweight, dbias


_LIBRARY = torch.library.Library("zeromean", "FRAGMENT")
_LIBRARY.define(
    "linear_act(Tensor x, Tensor weight, Tensor? bias, str activation, float[] scalars, bool round_preact) -> Tensor"
)
_LIBRARY.define(
    "linear_act_backward(Tensor gradient, Tensor y, Tensor x, Tensor weight, str activation, float[] scalars, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("linear_act", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_act_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("zeromean::linear_act", _forward_shape, lib=_LIBRARY)
torch.library.register_fake("zeromean::linear_act_backward", _backward_shape, lib=_LIBRARY)
