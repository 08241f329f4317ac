"""The programs of Muon: its momentum and its step, each in one pass over memory."""

import triton
import triton.language as tl

from zeromean.kernels.sgd_programs import carried_on, places


@triton.jit
def gather(
    velocity_ptr, gradient_ptr, direction_ptr, scale_ptr, void_ptr, count, momentum,
    NESTEROV: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Update velocities and write the direction, which may lie where the gradient does: each element is read before."""
    if tl.load(void_ptr) != 0:
        return
    at, there = places(count, TILE)
    gradient = tl.load(gradient_ptr + at, mask=there, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    direction = carried_on(gradient, velocity_ptr, at, there, momentum, NESTEROV)
    tl.store(direction_ptr + at, direction.to(direction_ptr.dtype.element_ty), mask=there)


@triton.jit
def apply(weight_ptr, copy_ptr, direction_ptr, rate_ptr, void_ptr, count, decay, TILE: tl.constexpr):
    """Update weights, and round them to their copies."""
    if tl.load(void_ptr) != 0:
        return
    at, there = places(count, TILE)
    rate = tl.load(rate_ptr)
    weight = tl.load(weight_ptr + at, mask=there, other=0.0)
    weight = weight * (1 - rate * decay) - rate * tl.load(direction_ptr + at, mask=there, other=0.0).to(tl.float32)
    tl.store(weight_ptr + at, weight, mask=there)
    tl.store(copy_ptr + at, weight.to(copy_ptr.dtype.element_ty), mask=there)
