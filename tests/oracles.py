"""Slow, plain float64 twins of what the package computes, written from the formulas alone with numpy."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

SELU_LAMBDA, SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717


def _sides(x: Array, negative: Callable[[Array], Any], positive: Callable[[Array], Any], at_zero: str) -> Array:
    """Two formulas, one for each side of 0, each evaluated on its own side only; NaN stays NaN."""
    left = x <= 0 if at_zero == "left" else x < 0
    result = np.full_like(x, math.nan)
    with np.errstate(invalid="ignore"):
        result[left] = np.broadcast_to(negative(x[left]), x[left].shape)
        right = ~left & ~np.isnan(x)
        result[right] = np.broadcast_to(positive(x[right]), x[right].shape)
    return result


def elu(x: Array, alpha: float) -> Array:
    return _sides(x, lambda v: alpha * np.expm1(v), lambda v: v, "left")


def elu_slope(x: Array, alpha: float) -> Array:
    return _sides(x, lambda v: alpha * np.exp(v), np.ones_like, "left")


def selu(x: Array) -> Array:
    return SELU_LAMBDA * elu(x, SELU_ALPHA)


def selu_slope(x: Array) -> Array:
    return SELU_LAMBDA * elu_slope(x, SELU_ALPHA)


def celu(x: Array, alpha: float) -> Array:
    return _sides(x, lambda v: alpha * np.expm1(v / alpha), lambda v: v, "left")


def celu_slope(x: Array, alpha: float) -> Array:
    return _sides(x, lambda v: np.exp(v / alpha), np.ones_like, "left")


def shifted_relu(x: Array) -> Array:
    return np.maximum(x, -1.0)


def shifted_relu_slope(x: Array) -> Array:
    return np.where(x > -1, 1.0, 0.0)


def linear_sides(x: Array, negative: Any, positive: Any) -> Array:
    """Slope times x, with slopes that are numbers or arrays of x's shape."""
    with np.errstate(invalid="ignore"):
        return x * linear_sides_slope(x, negative, positive)


def linear_sides_slope(x: Array, negative: Any, positive: Any, at_zero: str = "left") -> Array:
    slope: Array = np.where(x <= 0 if at_zero == "left" else x < 0, negative, positive).astype(np.float64)
    return slope


def mpelu(x: Array, alpha: float, beta: float) -> Array:
    return _sides(x, lambda v: alpha * np.expm1(beta * v), lambda v: v, "right")


def mpelu_slope(x: Array, alpha: float, beta: float) -> Array:
    return _sides(x, lambda v: alpha * beta * np.exp(beta * v), np.ones_like, "right")


def eelu(x: Array, alpha: float, beta: float, k: Array) -> Array:
    return np.where(x < 0, mpelu(x, alpha, beta), k * x)


def eelu_slope(x: Array, alpha: float, beta: float, k: Array) -> Array:
    return np.where(x < 0, mpelu_slope(x, alpha, beta), k)


def pelu(x: Array, a: float, b: float) -> Array:
    return _sides(x, lambda v: a * np.expm1(v / b), lambda v: a / b * v, "right")


def pelu_slope(x: Array, a: float, b: float) -> Array:
    return _sides(x, lambda v: a / b * np.exp(v / b), lambda v: np.full_like(v, a / b), "right")


def sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -x))


def swish(x: Array, beta: float) -> Array:
    return x * sigmoid(beta * x)


def swish_slope(x: Array, beta: float) -> Array:
    return sigmoid(beta * x) + beta * x * sigmoid(beta * x) * sigmoid(-beta * x)


def _normal_distribution(x: Array) -> Array:
    return np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x.ravel()]).reshape(x.shape)


def gelu(x: Array) -> Array:
    return x * _normal_distribution(x)


def gelu_slope(x: Array) -> Array:
    return _normal_distribution(x) + x * np.exp(-np.minimum(x**2, 1e3) / 2) / math.sqrt(2 * math.pi)


def mish(x: Array) -> Array:
    return x * np.tanh(np.logaddexp(0.0, x))


def mish_slope(x: Array) -> Array:
    t = np.tanh(np.logaddexp(0.0, x))
    slope: Array = t + x * (1 - t**2) * sigmoid(x)
    return slope


def philox(counter: tuple[int, int, int, int], key: tuple[int, int], rounds: int = 7) -> tuple[int, int, int, int]:
    """Philox-4x32 in Python's unbounded integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & 0xFFFFFFFF, (first >> 32) ^ c3 ^ k1, first & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def random_words(seed: int, count: int, stream: int = 0) -> list[int]:
    """The words of one seed, each of which serves two elements."""
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    return [word for group in range((count + 7) // 8) for word in philox((group, 0, stream, 0), key)]


def uniform(seed: int, count: int, stream: int = 0) -> Array:
    """The uniforms of one seed, in element order."""
    halves = [half for word in random_words(seed, count, stream) for half in (word % 2**16, word // 2**16)]
    return (np.array(halves[:count], dtype=np.float64) + 0.5) / 2**16


def normal(seed: int, count: int) -> Array:
    """The normals of one seed, in element order."""
    words = np.array(random_words(seed, count), dtype=np.int64)
    radius, angle = np.sqrt(-2 * np.log((words // 2**14 + 0.5) / 2**18)), 2 * math.pi * (words % 2**14) / 2**14
    both: Array = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return both.ravel()[:count]
