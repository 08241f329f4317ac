"""Which modules of a model a probe reads, and why it leaves the others out.

Three roles: a ``unit`` layer (Linear, Conv, transposed Conv) multiplies its input by weights, an ``activation`` applies
one function to every element, and an ``other`` module is read only because the user named it. A unit is a column of the
output: the last dimension behind a Linear layer, the channel behind a convolution.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from zeromean.diagnostics.generators import generators_put_back
from zeromean.nn.registry import ACTIVATIONS
from zeromean.spelling import nearest

Role = Literal["unit", "activation", "other"]
Patterns = str | type[nn.Module] | Sequence[str | type[nn.Module]]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ELEMENTWISE: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Softplus, nn.Softsign, nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish),
    *(nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold),
    *ACTIVATIONS.values(),
)
_KNOWN = frozenset(_ELEMENTWISE)
NOT_A_LAYER = "neither a Linear or Conv layer nor an elementwise activation"
OWN_WEIGHTS = "; not read: its {}; name the module in layers= to have its output measured"
CALL = "_compiled_call_impl"
"""Where torch keeps what is called instead of a module: what torch.compile made of it, or a probe's own function."""
OF_A_PROBE = "of_a_probe"
"""What marks the latter."""
COMPILED = "runs compiled: a hook would be ignored or compiled in"


@dataclass(frozen=True)
class Layer:
    """A module that is read.

    Attributes:
        name: in the model.
        module: itself.
        role: what it is to the probe.
        copied: whether it lies in a DataParallel module, which may run copies of it.
    """

    name: str
    module: nn.Module
    role: Role
    copied: bool = False

    @property
    def kind(self) -> str:
        """The name of its class."""
        return type(self.module).__name__


@dataclass(frozen=True)
class Skipped:
    """A module that is not read.

    Attributes:
        name: in the model.
        kind: name of its class.
        reason: why.
    """

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """What a probe reads of a model.

    Attributes:
        root: the model without the wrappers of torch.compile and of data parallelism.
        layers: to read, in the order of the model's modules.
        skipped: modules that are not read, and have no children, or have parameters beside them.
    """

    root: nn.Module
    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module within DistributedDataParallel, DataParallel and what torch.compile returned."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def runs_compiled(model: nn.Module) -> bool:
    """Whether torch.compile was applied to this module itself, or to one that it wraps."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return runs_compiled(model.module)
    call = getattr(model, CALL, None)
    return hasattr(model, "_orig_mod") or (call is not None and not hasattr(call, OF_A_PROBE))


def select(model: nn.Module, patterns: Patterns | None = None, *, compiled: bool = False) -> Selection:
    """Choose the modules to read.

    Args:
        model: any module, also within the wrappers of torch.compile and of data parallelism.
        patterns: names (``"encoder.0"``), globs (``"encoder.*"``) or classes, of which a module must match one; every
            module that a pattern matches is read, whatever it is. None reads all unit layers and activations.
        compiled: whether modules that torch.compile was applied to can be read.

    Raises:
        ValueError: If a pattern, or the default, matches no module.
    """
    root = unwrapped(model)
    modules = list(_named(root))
    if patterns is not None:
        modules = _matching(modules, patterns)
    copied = {id(one) for outer in root.modules() if isinstance(outer, nn.DataParallel) for one in outer.modules()}
    layers: list[Layer] = []
    skipped: list[Skipped] = []
    for name, module, inside_compiled in modules:
        role = _role(module) or ("other" if patterns is not None else None)
        if role and not (inside_compiled and not compiled):
            layers.append(Layer(name, module, role, id(module) in copied))
        elif role:
            skipped.append(Skipped(name, type(module).__name__, COMPILED))
        elif any(True for _ in module.parameters(recurse=False)) or not any(True for _ in module.children()):
            weights = _own_weights(module)
            reason = NOT_A_LAYER + (OWN_WEIGHTS.format(" and ".join(weights)) if weights else "")
            skipped.append(Skipped(name, type(module).__name__, reason))
    if not layers:
        kinds = ", ".join(sorted({type(module).__name__ for _, module, _ in modules}))
        raise ValueError(
            f"no layer of {type(root).__name__} can be read, among its modules {kinds}: "
            f"{'probe the model before torch.compile' if skipped and skipped[0].reason == COMPILED else 'name some'} "
            "with layers=, by name, glob or class"
        )
    return Selection(root, tuple(layers), tuple(skipped))


def _named(root: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Every module once, by a name without the wrappers' parts, and whether it lies in a compiled one."""
    compiled: list[str] = []
    for name, module in root.named_modules():
        if module is not root and runs_compiled(module):
            compiled.append(name)
        if not hasattr(module, "_orig_mod"):
            inside = any(name == outer or name.startswith(f"{outer}.") for outer in compiled)
            yield name.replace("_orig_mod.", "") or type(root).__name__, module, inside


def _matching(modules: Sequence[tuple[str, nn.Module, bool]], patterns: Patterns) -> list[tuple[str, nn.Module, bool]]:
    wanted = [patterns] if isinstance(patterns, str | type) else list(patterns)
    kept: set[str] = set()
    for pattern in wanted:
        found = {name for name, module, _ in modules if _matches(pattern, name, module)}
        if not found:
            raise ValueError(_no_match(pattern, modules))
        kept |= found
    return [one for one in modules if one[0] in kept]


def _matches(pattern: str | type[nn.Module], name: str, module: nn.Module) -> bool:
    return fnmatch.fnmatchcase(name, pattern) if isinstance(pattern, str) else isinstance(module, pattern)


def _no_match(pattern: str | type[nn.Module], modules: Sequence[tuple[str, nn.Module, bool]]) -> str:
    if isinstance(pattern, str):
        return f"layers={pattern!r} matches no module: {nearest(pattern, [name for name, _, _ in modules])}"
    kinds = sorted({type(module).__name__ for _, module, _ in modules})
    return f"layers={pattern.__name__} matches no module: {nearest(pattern.__name__, kinds)}"


def _own_weights(module: nn.Module) -> list[str]:
    """Names of a module's parameters that are matrices, at least, and belong to none of its children."""
    return [name for name, one in module._parameters.items() if one is not None and one.ndim > 1]


def _role(module: nn.Module) -> Role | None:
    if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        return "unit"
    if isinstance(module, _ELEMENTWISE) or _behaves_elementwise(module):
        return "activation"
    return None


@torch.no_grad()
def _behaves_elementwise(module: nn.Module) -> bool:
    """Whether a module without children and tensors applies one function to each element, tried on a copy of it."""
    if any(True for _ in module.children()) or module._parameters or module._buffers:
        return False
    x = torch.linspace(-3, 3, 12)[:, None]
    try:  # any module of anybody: what cannot take a matrix is no activation
        with generators_put_back(module):
            twin = copy.deepcopy(module).eval()
            y, turned, part = (twin.forward(form) for form in (x.clone(), x.T.clone(), x[:5].clone()))
    except Exception:
        return False
    if not all(isinstance(one, Tensor) and one.is_floating_point() for one in (y, turned, part)):
        return False
    same = y.shape == x.shape and torch.equal(y, turned.T) and torch.equal(y[:5], part)
    return same and not torch.equal(y, x)


def keeps_input(module: nn.Module) -> bool:
    """Whether an activation is known to leave its input as it was."""
    return type(module) in _KNOWN and not getattr(module, "inplace", False)


def unit_dimension(layer: Layer, output: Tensor, before: tuple[Layer, int] | None) -> int:
    """Which dimension of the output counts the units.

    Args:
        layer: that made the output.
        output: of any shape.
        before: the unit layer that ran last, and the dimensions of its output; an activation shares its units.
    """
    if isinstance(layer.module, nn.Linear) or output.ndim == 1:
        return output.ndim - 1
    if isinstance(layer.module, CONVOLUTIONS):
        return output.ndim - 1 - len(layer.module.kernel_size)
    if layer.role == "activation" and before is not None and before[1] == output.ndim:
        return unit_dimension(before[0], output, None)
    return output.ndim - 1 if output.ndim <= 3 else 1
