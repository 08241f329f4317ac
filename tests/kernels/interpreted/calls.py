"""The calls that the programs serve, and the comparison with the same call in float64, which they never serve."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import zeromean as zm
from tests.cases import ACTIVATION_CASES, seed
from tests.kernels.interpreted.device import DEVICE, INTERPRETED
from zeromean.kernels.memory import is_dense

F = zm.functional


@dataclass(frozen=True)
class Call:
    """One activation with one setting.

    Attributes:
        name: As in `tests.cases`.
        function: Of x and the learnable parameters.
        parameters: Values about which those lie.
    """

    name: str
    function: Callable[..., Tensor]
    parameters: tuple[float, ...] = ()

    def tensors(self, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Parameters of a shape, none like the other."""
        around = torch.linspace(0.8, 1.2, math.prod(shape), device=DEVICE).reshape(shape)
        return [(value * around).to(dtype) for value in self.parameters]

    @property
    def atol(self) -> float:
        """A GPU makes normal numbers within 1e-4 by approximate instructions."""
        return 2e-3 if self.name.startswith("eelu:noisy") and not INTERPRETED else 4e-6


# Of torch alone: relu, and celu with a negative alpha.
_SERVED = [case for case in ACTIVATION_CASES if case.name != "relu" and not case.explodes]
CALLS = {case.name: Call(case.name, case.call, case.parameters) for case in _SERVED} | {
    call.name: call
    for call in (
        Call("elu:-2.0,input", lambda x: F.elu(x, -2.0, save="input")),
        Call("leaky_relu:2.0", lambda x: F.leaky_relu(x, 2.0)),
        Call("rrelu:0.0,0.5", lambda x: F.rrelu(x, 0.0, 0.5, training=True, seed=seed(x))),
        Call("gelu:tanh", lambda x: F.gelu(x, "tanh")),
        Call("bias_elu:1.5", lambda x, bias: F.bias_elu(x, bias, 1.5), (0.3,)),
        Call("elu_add:0.5", lambda x: F.elu_add(x, x.detach() * 0.5, 0.5)),
    )
}


def normal(*shape: int, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
    """Random numbers on both sides of the activations' bends; with the channels in dimension 1 fastest if ``last``."""
    x = (torch.randn(shape) * 2).to(DEVICE, dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


def results(call: Call, x: Tensor, parameters: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    """Value, and gradients of x and of each parameter."""
    leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
    y = call.function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]


def assert_exact(call: Call, x: Tensor, parameters: Sequence[Tensor] = (), gradient: Tensor | None = None) -> None:
    """Assert value and gradients of float32 to be those of float64; sums over many elements may differ more."""
    gradient = torch.randn_like(x) if gradient is None else gradient
    actual = results(call, x, parameters, gradient)
    exact = results(call, x.double(), [p.double() for p in parameters], gradient.double())
    for index, (one, other, leaf) in enumerate(zip(actual, exact, (x, x, *parameters), strict=True)):
        assert one.dtype == leaf.dtype
        assert index > 1 or one.stride() == x.stride() or not is_dense(x)
        rtol = 4e-6 if leaf.dtype == torch.float32 else 2.0**-7
        atol = call.atol if index < 2 else call.atol * max(1.0, x.numel() ** 0.5)
        torch.testing.assert_close(one.double(), other, rtol=rtol, atol=atol)
