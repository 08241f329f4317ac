"""The programs of gradient descent: what is decided about a step, and the step in one pass over memory."""

import triton
import triton.language as tl


@triton.jit
def places(count, TILE: tl.constexpr):
    """The elements of a program, and which of them there are."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    return at, at < count


@triton.jit
def carried_on(gradient, velocity_ptr, at, there, momentum, NESTEROV: tl.constexpr):
    """Update velocities by a gradient; gives where they lead."""
    velocity = momentum * tl.load(velocity_ptr + at, mask=there, other=0.0) + gradient
    tl.store(velocity_ptr + at, velocity, mask=there)
    step = velocity
    if NESTEROV:
        step = gradient + momentum * velocity
    return step


@triton.jit
def sgd_step(
    weight_ptr, velocity_ptr, copy_ptr, gradient_ptr, rate_ptr, scale_ptr, void_ptr, count, decay, momentum,
    NESTEROV: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Update weights and velocities, and round the weights to their copies."""
    if tl.load(void_ptr) != 0:
        return
    at, there = places(count, TILE)
    weight = tl.load(weight_ptr + at, mask=there, other=0.0)
    gradient = tl.load(gradient_ptr + at, mask=there, other=0.0).to(tl.float32)
    gradient = gradient * tl.load(scale_ptr) + decay * weight
    weight -= tl.load(rate_ptr) * carried_on(gradient, velocity_ptr, at, there, momentum, NESTEROV)
    tl.store(weight_ptr + at, weight, mask=there)
    tl.store(copy_ptr + at, weight.to(copy_ptr.dtype.element_ty), mask=there)


@triton.jit
def settle(
    loss_ptr, norms_ptr, rates_ptr, place_ptr, number_ptr, first_void_ptr, loss_sum_ptr, rate_ptr, scale_ptr, void_ptr,
    loss_scale_ptr, calm_ptr, overflows_ptr, count, clip, largest_scale, calm_steps,
    PADDED: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Decide about a step; one program."""
    at = tl.arange(0, PADDED)
    norms = tl.load(norms_ptr + at, mask=at < count, other=0.0)
    norm = tl.sqrt(tl.sum(norms * norms, axis=0))
    loss, number, first = tl.load(loss_ptr), tl.load(number_ptr), tl.load(first_void_ptr)
    scale = 1.0
    overflow = False
    if SCALES:
        loss_scale, calm = tl.load(loss_scale_ptr), tl.load(calm_ptr) + 1
        norm, scale = norm / loss_scale, 1 / loss_scale
        overflow = (tl.abs(loss) < float("inf")) & ~(norm < float("inf")) & (loss_scale > 1)
        grown = tl.where(calm == calm_steps, tl.minimum(2 * loss_scale, largest_scale), loss_scale)
        tl.store(loss_scale_ptr, tl.where(overflow, loss_scale / 2, grown))
        tl.store(calm_ptr, tl.where(overflow | (calm == calm_steps), 0, calm))
        tl.store(overflows_ptr, tl.load(overflows_ptr) + tl.where(overflow, 1, 0))
    finite = (tl.abs(loss) < float("inf")) & (norm < float("inf")) | overflow
    first = tl.where(finite, first, tl.minimum(first, number))
    tl.store(first_void_ptr, first)
    tl.store(void_ptr, tl.where((first <= number) | overflow, 1.0, 0.0))
    tl.store(rate_ptr, tl.load(rates_ptr + number))
    if clip > 0:
        scale *= clip / tl.maximum(norm, clip)
    tl.store(scale_ptr, scale)
    tl.store(loss_sum_ptr, tl.load(loss_sum_ptr) + loss.to(tl.float64))
    tl.store(place_ptr, tl.load(place_ptr) + 1)
    tl.store(number_ptr, number + 1)
