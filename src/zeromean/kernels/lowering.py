"""What torch.compile makes of the element-wise operators: formulas that fuse with their neighbours.

To the part of the compiler that decides what a backward pass keeps, an operator of ours is a closed box: it keeps the
tensor that the backward operator names, the output alone where that suffices, and computes nothing twice. Inductor, the
part that writes kernels, would then call it as a pass over memory of its own. The formulas here open the box for
Inductor, so that a bias, a cast or a pooling beside the activation becomes one kernel with it. Arithmetic is in
float32; the result has the input's type. Calls that the formulas do not cover stay closed: float64, noise, sign bits.

Inductor's interface is private. It is used only once a program has loaded Inductor itself (`teach_inductor`), and a
version without it leaves every operator closed, which is slower and no less right.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload

from zeromean.kernels.bias_gradient import sum_in_one_pass

Value = Any
"""An element in a kernel that is being written; float32, with Python's operators."""

_LOG = logging.getLogger(__name__)
_INDUCTOR = "torch._inductor.lowering"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LOG2E = 1.4426950408889634
_INVERSE_SQRT_2PI = 0.3989422804014327
_SQRT_2_OVER_PI_TIMES_2 = 1.5957691216057308
# Of Phi(-|x|) e^(x^2 / 2) as a polynomial in t = 1 / (1 + 0.3 |x|), from t^8 down to t.
_NORMAL_TAIL = (
    0.0356747592,
    -0.1572030192,
    0.206353395,
    -0.0536835403,
    0.128561571,
    0.0999135091,
    0.1207539533,
    0.119629299,
)
_PELU_BOUND = 0.1
_MPELU_BOUND = 2.0**-10


class Arithmetic:
    """Elementary functions for one kernel.

    A bfloat16 tensor leaves an NVIDIA GPU about 30 instructions an element before arithmetic sets the pace, and CUDA's
    expm1 alone takes them all, so there the functions are built on the approximate instructions for 2^x and 1 / x. The
    compiler's own expm1 is not used on a CPU either: its vector form is the difference, wrong near 0.

    Args:
        ops: Inductor's element-wise operators.
        approximate: Whether the kernel is for an NVIDIA GPU.
    """

    def __init__(self, ops: Any, approximate: bool) -> None:
        self.ops, self.approximate = ops, approximate

    def number(self, value: float) -> Value:
        """A constant; a bare Python number could widen the kernel to float64."""
        return self.ops.constant(float(value), torch.float32)

    def where(self, condition: Value, true: Value, false: Value) -> Value:
        """Choose by a condition; the side not chosen may hold anything."""
        return self.ops.where(condition, true, false)

    def at_least(self, x: Value, bound: float) -> Value:
        """Max(x, bound), NaN for NaN."""
        return self.ops.maximum(x, self.number(bound))

    def at_most(self, x: Value, bound: float) -> Value:
        """Min(x, bound), NaN for NaN."""
        return self.ops.minimum(x, self.number(bound))

    def exp(self, x: Value) -> Value:
        """e^x, on a GPU within 2 units in the last place of the power."""
        if not self.approximate:
            return self.ops.exp(x)
        return self._instruction("ex2", x * self.number(_LOG2E))

    def reciprocal(self, x: Value) -> Value:
        """1 / x, on a GPU within 1 unit in the last place; 0 for infinity."""
        return self._instruction("rcp", x) if self.approximate else self.number(1) / x

    def expm1(self, x: Value) -> Value:
        """e^x - 1, relative error below 1e-6 for x < 1: a polynomial near 0, where the difference would cancel."""
        near = self.number(0.008336982689797878)
        for coefficient in (0.04182121530175209, 0.16666758060455322, 0.4999966323375702):
            near = near * x + self.number(coefficient)
        near = near * (x * x) + x
        return self.where(self.ops.abs(x) < self.number(0.3), near, self.exp(x) - self.number(1))

    def sigmoid(self, x: Value) -> Value:
        """1 / (1 + e^-x)."""
        return self.reciprocal(self.number(1) + self.exp(-x))

    def normal(self, x: Value) -> tuple[Value, Value]:
        """The normal distribution's Phi(x), relative error 1e-6 in the left tail too, and its density."""
        bell = self.exp(x * x * self.number(-0.5))
        t = self.reciprocal(self.ops.abs(x) * self.number(0.3) + self.number(1))
        tail = self.number(_NORMAL_TAIL[0])
        for coefficient in _NORMAL_TAIL[1:]:
            tail = tail * t + self.number(coefficient)
        tail = tail * t * bell
        return self.where(x > self.number(0), self.number(1) - tail, tail), bell * self.number(_INVERSE_SQRT_2PI)

    def _instruction(self, name: str, x: Value) -> Value:
        text = f"{name}.approx.ftz.f32 $0, $1;"
        return self.ops.inline_asm_elementwise(
            x, asm=text, constraints="=f,f", dtype=torch.float32, is_pure=True, pack=1
        )


class Given(NamedTuple):
    """What a formula is given besides the element itself.

    Attributes:
        p0: The first learnable parameter, or None.
        p1: The second, or None.
        scalars: The numbers that make the activation.
        output_kept: Whether the backward pass starts from the output, not from the input.
    """

    p0: Value
    p1: Value
    scalars: Sequence[float]
    output_kept: bool


class Formula(NamedTuple):
    """An activation in one element.

    Attributes:
        forward: y from the arithmetic, x and what else is given.
        backward: dx from the arithmetic, the gradient, the kept value and what else is given.
    """

    forward: Callable[[Arithmetic, Value, Given], Value]
    backward: Callable[[Arithmetic, Value, Value, Given], Value]


def _elu(m: Arithmetic, x: Value, given: Given) -> Value:
    alpha, scale, input_scale = given.scalars
    negative = m.expm1(x * m.number(input_scale)) * m.number(alpha * scale)
    return m.where(x > m.number(0), x * m.number(scale), negative)


def _elu_backward(m: Arithmetic, g: Value, v: Value, given: Given) -> Value:
    alpha, scale, input_scale = given.scalars
    depth = m.number(alpha * scale)
    above = v + depth if given.output_kept else m.exp(v * m.number(input_scale)) * depth
    return g * m.where(v > m.number(0), m.number(scale), above * m.number(input_scale))


def _shifted_relu(m: Arithmetic, x: Value, given: Given) -> Value:
    return m.where(x <= m.number(-1), m.number(-1), x)


def _shifted_relu_backward(m: Arithmetic, g: Value, v: Value, given: Given) -> Value:
    return m.where(v <= m.number(-1), m.number(0), g)


def _leaky_relu(m: Arithmetic, x: Value, given: Given) -> Value:
    return m.where(x > m.number(0), x, x * m.number(given.scalars[0]))


def _leaky_relu_backward(m: Arithmetic, g: Value, v: Value, given: Given) -> Value:
    return m.where(v > m.number(0), g, g * m.number(given.scalars[0]))


def _slope(m: Arithmetic, given: Given) -> Value:
    """PReLU's slope, but at least the scalar in size: times zero, an output would forget its input."""
    smallest = m.number(given.scalars[0])
    return m.where(m.ops.abs(given.p0) < smallest, smallest, given.p0)


def _prelu(m: Arithmetic, x: Value, given: Given) -> Value:
    return m.where(x > m.number(0), x, x * _slope(m, given))


def _prelu_backward(m: Arithmetic, g: Value, v: Value, given: Given) -> Value:
    return m.where(v > m.number(0), g, g * _slope(m, given))


def _pelu(m: Arithmetic, x: Value, given: Given) -> Value:
    scaled = x * m.reciprocal(m.at_least(given.p1, _PELU_BOUND))
    return m.at_least(given.p0, _PELU_BOUND) * m.where(scaled < m.number(0), m.expm1(scaled), scaled)


def _pelu_backward(m: Arithmetic, g: Value, v: Value, given: Given) -> Value:
    a, inverse_b = m.at_least(given.p0, _PELU_BOUND), m.reciprocal(m.at_least(given.p1, _PELU_BOUND))
    decay = m.at_least(v * m.reciprocal(a) + m.number(1), 0) if given.output_kept else m.exp(v * inverse_b)
    return g * (a * inverse_b) * m.where(v < m.number(0), decay, m.number(1))


def _mpelu(m: Arithmetic, x: Value, given: Given) -> Value:
    negative = m.at_least(given.p0, _MPELU_BOUND) * m.expm1(x * m.at_least(given.p1, _MPELU_BOUND))
    return m.where(x < m.number(0), negative, x)


def _mpelu_backward(m: Arithmetic, g: Value, v: Value, given: Given) -> Value:
    alpha, beta = m.at_least(given.p0, _MPELU_BOUND), m.at_least(given.p1, _MPELU_BOUND)
    above = m.at_least(v + alpha, 0) if given.output_kept else alpha * m.exp(v * beta)
    return m.where(v < m.number(0), g * (beta * above), g)


def _silu(m: Arithmetic, x: Value, given: Given) -> Value:
    return x * m.sigmoid(x)


def _silu_backward(m: Arithmetic, g: Value, v: Value, given: Given) -> Value:
    s = m.sigmoid(v)
    return g * (s + v * s * (m.number(1) - s))


def _swish(m: Arithmetic, x: Value, given: Given) -> Value:
    return x * m.sigmoid(x * given.p0)


def _swish_backward(m: Arithmetic, g: Value, v: Value, given: Given) -> Value:
    s = m.sigmoid(v * given.p0)
    return g * (s + given.p0 * (v * s * (m.number(1) - s)))


def _gelu(m: Arithmetic, x: Value, given: Given) -> Value:
    return x * m.normal(x)[0]


def _gelu_backward(m: Arithmetic, g: Value, v: Value, given: Given) -> Value:
    cumulative, density = m.normal(v)
    return g * (cumulative + v * density)


def _gelu_tanh(m: Arithmetic, x: Value, given: Given) -> Value:
    inner = x * (m.number(_SQRT_2_OVER_PI_TIMES_2) * (m.number(1) + m.number(0.044715) * (x * x)))
    return x * m.sigmoid(inner)


def _gelu_tanh_backward(m: Arithmetic, g: Value, v: Value, given: Given) -> Value:
    # Where the square would overflow the sigmoid has long been flat, and 0 times infinity is no number.
    factor, square = m.number(_SQRT_2_OVER_PI_TIMES_2), m.at_most(v * v, 1e4)
    s = m.sigmoid(v * (factor * (m.number(1) + m.number(0.044715) * square)))
    inner_slope = factor * (m.number(1) + m.number(3 * 0.044715) * square)
    return g * (s + v * s * (m.number(1) - s) * inner_slope)


def _mish_parts(m: Arithmetic, x: Value) -> tuple[Value, Value, Value]:
    """With e = e^x: e, n = e (e + 2) and 1 / (n + 2), so that tanh(ln(1 + e)) = n / (n + 2)."""
    e = m.exp(x)
    n = e * (e + m.number(2))
    return e, n, m.reciprocal(n + m.number(2))


def _mish(m: Arithmetic, x: Value, given: Given) -> Value:
    _, n, r = _mish_parts(m, m.at_most(x, 20))
    return x * (n * r)


def _mish_backward(m: Arithmetic, g: Value, v: Value, given: Given) -> Value:
    v = m.at_most(v, 20)
    e, n, r = _mish_parts(m, v)
    return g * (r * (n + m.number(4) * (v * e) * (e + m.number(1)) * r))


FORMULAS = {
    "elu": Formula(_elu, _elu_backward),
    "shifted_relu": Formula(_shifted_relu, _shifted_relu_backward),
    "leaky_relu": Formula(_leaky_relu, _leaky_relu_backward),
    "prelu": Formula(_prelu, _prelu_backward),
    "pelu": Formula(_pelu, _pelu_backward),
    "mpelu": Formula(_mpelu, _mpelu_backward),
    "silu": Formula(_silu, _silu_backward),
    "swish": Formula(_swish, _swish_backward),
    "gelu": Formula(_gelu, _gelu_backward),
    "gelu_tanh": Formula(_gelu_tanh, _gelu_tanh_backward),
    "mish": Formula(_mish, _mish_backward),
}


def teach_inductor() -> None:
    """Register every formula once Inductor is loaded; until then, and after the first time, cost next to nothing.

    To be called by the operators' fake kernels: a compiler runs them while it traces, which it does (again) after
    loading Inductor and before asking it for kernels. So importing this library never loads Inductor.
    """
    if _INDUCTOR in sys.modules:
        _register_all()


@functools.cache
def _register_all() -> None:
    operators = torch.ops.zeromean
    try:
        for name, formula in FORMULAS.items():
            register(formula, getattr(operators, name).default, getattr(operators, f"{name}_backward").default)
        sum_in_one_pass(operators.elu_backward.default, operators.bias_elu_backward_parameters.default)
    except (ImportError, AttributeError, TypeError) as error:
        _LOG.debug("in torch %s some activations compile to kernels of their own: %s", torch.__version__, error)


def register(formula: Formula, forward: OpOverload, backward: OpOverload) -> None:
    """Tell Inductor the formula of an operator and of its backward operator.

    Args:
        formula: One of `FORMULAS`.
        forward: (x, p0, p1, seed, noisy, scalars) to y, p0 and p1 of x's number of dimensions.
        backward: (gradient, kept, signs, p0, p1, seed, noisy, scalars, output_kept) to dx.

    Raises:
        ImportError, AttributeError, TypeError: If this torch has another Inductor; nothing is broken then.
    """
    from torch._inductor.lowering import register_lowering

    @register_lowering(forward, type_promotion_kind=None)
    def lower(x: Any, p0: Any, p1: Any, seed: Any, noisy: Any, scalars: Sequence[float]) -> Any:
        if not _covered(x, scalars, seed, noisy):
            return _closed(forward, x, p0, p1, seed, noisy, scalars)
        return _pointwise(lambda m, x, p0, p1: formula.forward(m, x, Given(p0, p1, scalars, False)), x, p0, p1)

    @register_lowering(backward, type_promotion_kind=None)
    def lower_backward(
        gradient: Any,
        kept: Any,
        signs: Any,
        p0: Any,
        p1: Any,
        seed: Any,
        noisy: Any,
        scalars: Sequence[float],
        output_kept: bool,
    ) -> Any:
        if not _covered(kept, scalars, signs, seed, noisy):
            return _closed(backward, gradient, kept, signs, p0, p1, seed, noisy, scalars, output_kept)

        def element(m: Arithmetic, g: Value, v: Value, p0: Value, p1: Value) -> Value:
            return formula.backward(m, g, v, Given(p0, p1, scalars, output_kept))

        return _pointwise(element, gradient, kept, p0, p1)


def _covered(x: Any, scalars: Sequence[float], *absent: Any) -> bool:
    """Whether a formula says all there is to a call."""
    plain = all(isinstance(scalar, int | float) for scalar in scalars)
    return x.get_dtype() in _DTYPES and plain and all(tensor is None for tensor in absent)


def _pointwise(function: Callable[..., Value], *tensors: Any) -> Any:
    """One element-wise kernel over the tensors that are there, of the first one's type."""
    from torch._inductor.lowering import broadcast_tensors, make_pointwise
    from torch._inductor.virtualized import ops

    there = [tensor is not None for tensor in tensors]
    present = broadcast_tensors(*(tensor for tensor in tensors if tensor is not None))
    dtype, device = present[0].get_dtype(), present[0].get_device()
    arithmetic = Arithmetic(ops, device.type == "cuda" and torch.version.hip is None)

    def element(*loaded: Value) -> Value:
        wide = iter([ops.to_dtype(value, torch.float32) for value in loaded])
        result = function(arithmetic, *(next(wide) if given else None for given in there))
        return ops.to_dtype(result, dtype)

    return make_pointwise(element, override_return_dtype=dtype)(*present)


def _closed(operator: OpOverload, *arguments: Any) -> Any:
    """A call of the operator itself, on memory laid out as it was traced."""
    from torch._inductor.lowering import constrain_to_fx_strides, fallback_handler
    from torch._inductor.virtualized import V

    arguments, _ = constrain_to_fx_strides(V.graph.current_node, *arguments)
    return fallback_handler(operator, add_to_fallback_set=False)(*arguments)
