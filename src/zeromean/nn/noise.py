r"""Random numbers as a pure function of a seed: Philox-4x32 with 10 rounds, in plain int64 operators.

The key is the seed's low and high 32 bits, the counter is (offset low, offset high, stream, 0), and element i of a
tensor, counted in logical (row-major) order, is word i mod 4 of offset i div 4. So the noise depends on neither memory
layout nor device nor compiler, a forward pass needs to keep only the seed, and a backward pass makes the same noise
again. Words, uniforms and normals at stream 0 are those of Triton's ``randint4x``, ``rand4x`` and ``randn4x``.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, and its library Random123, whose test
vectors the generator reproduces.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 10
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
# The largest float32 whose product with 2**31 - 1 stays below 1.
_UNIFORM_SCALE = 4.6566127342e-10
_SMALLEST_UNIFORM = 1e-7

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def draw_seed(device: torch.device) -> Tensor:
    """Draw a 0-d int64 seed from torch's default generator of a device, so that ``torch.manual_seed`` reproduces it.

    Compiler settings that recompute more than by default (``activation_memory_budget`` below 1,
    ``aggressive_recomputation``) may draw it again in the backward pass, as any random number; pass a seed then.
    """
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def resolve_seed(seed: Tensor | None, x: Tensor) -> Tensor:
    """The seed to use for noise on ``x``: the given one, checked, or a fresh one.

    Raises:
        ValueError: If the seed is not int64, not on x's device, or neither 0-d nor of x's number of dimensions.
    """
    if seed is None:
        return draw_seed(x.device)
    if not isinstance(seed, Tensor):
        raise ValueError(f"seed must be an int64 tensor, got {seed!r}: use torch.tensor({seed!r})")
    if seed.dtype != torch.int64:
        raise ValueError(f"seed must be an int64 tensor, got {seed.dtype}: use torch.tensor(7), or seed.long()")
    if seed.device != x.device:
        raise ValueError(f"seed must lie on x's device {x.device}, got {seed.device}: use seed.to(x.device)")
    if seed.ndim not in (0, x.ndim):
        raise ValueError(
            f"seed must have 0 dimensions, or {x.ndim} as x has, got shape {tuple(seed.shape)}: "
            "give one number, or one a leading slice with ones behind, such as [R, 1, 1]"
        )
    return seed


def complement(seed: Tensor) -> Tensor:
    """The seed to keep for a backward pass, and to turn back there by the same function.

    If both passes made the noise from the very same tensor, a compiler would see one computation and keep its result.
    """
    return ~seed


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox-4x32-10: four random 32-bit words, as int64, for each counter of four words and key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high_0, low_0 = _multiply(c0, _MULTIPLIERS[0])
        high_1, low_1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK, (k1 + _KEY_INCREMENTS[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    # In halves: the whole product would overflow int64, which a C++ compiler may take for impossible.
    upper, lower = word * (multiplier >> 16), word * (multiplier & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & _MASK


def uniform(seed: Tensor, shape: Sequence[int], *, stream: int = 0) -> Tensor:
    """Uniform float32 numbers in [0, 1), one for each element of ``shape``.

    Args:
        seed: int64, 0-d for one stream over the whole shape; or with as many dimensions as ``shape``, such as
            [R, 1, 1]: then each slice along the leading dimensions has the numbers that its own seed alone would give.
        shape: The shape of the result, [R, ...] for seeds [R, 1, ...].
        stream: Which of 2**32 independent sequences of a seed to read.

    Returns:
        Numbers with 31 random bits before the rounding to float32, on the seed's device, contiguous.

    Raises:
        ValueError: If the seed's shape does not fit.
    """
    slices = _leading_slices(seed, shape)
    four = torch.stack([_to_uniform(word) for word in _slice_words(seed, shape, slices, stream)], dim=-1)
    return _lay_out(four, shape, slices)


def normal(seed: Tensor, shape: Sequence[int], *, stream: int = 0) -> Tensor:
    """Standard normal float32 numbers by Box-Muller, two from each pair of words; arguments as for `uniform`.

    The radius comes from a uniform of at least 1e-7, so no number exceeds 5.68 in size.
    """
    slices = _leading_slices(seed, shape)
    u1, u2, u3, u4 = (_to_uniform(word) for word in _slice_words(seed, shape, slices, stream))
    return _lay_out(torch.stack([*_box_muller(u1, u2), *_box_muller(u3, u4)], dim=-1), shape, slices)


def _leading_slices(seed: Tensor, shape: Sequence[int]) -> int:
    """How many leading dimensions of ``shape`` tell one seed from another."""
    if seed.ndim == 0:
        return 0
    leading = max((dim + 1 for dim, size in enumerate(seed.shape) if size != 1), default=0)
    if seed.ndim != len(shape) or tuple(seed.shape[:leading]) != tuple(shape[:leading]):
        raise ValueError(
            f"seed of shape {tuple(seed.shape)} does not fit noise of shape {tuple(shape)}: "
            "it must equal it in the leading dimensions and be 1 in the others"
        )
    return leading


def _slice_words(seed: Tensor, shape: Sequence[int], leading: int, stream: int) -> Words:
    calls = (math.prod(shape[leading:]) + 3) // 4
    seed = seed.reshape(-1, 1)
    offset = torch.arange(calls, dtype=torch.int64, device=seed.device).expand(seed.shape[0], calls)
    zero = torch.zeros_like(offset)
    return philox((offset & _MASK, offset >> 32, zero + stream, zero), (seed & _MASK, (seed >> 32) & _MASK))


def _lay_out(four: Tensor, shape: Sequence[int], leading: int) -> Tensor:
    """From [slices, calls, 4] numbers to the shape, dropping the surplus of each slice's last call."""
    return four.flatten(1)[:, : math.prod(shape[leading:])].reshape(tuple(shape))


def _to_uniform(word: Tensor) -> Tensor:
    folded = torch.where(word > 0x7FFFFFFF, _MASK - word, word)
    return folded.to(torch.float32) * _UNIFORM_SCALE


def _box_muller(u1: Tensor, u2: Tensor) -> tuple[Tensor, Tensor]:
    radius, angle = torch.sqrt(-2.0 * torch.log(u1.clamp(min=_SMALLEST_UNIFORM))), 2.0 * math.pi * u2
    return radius * torch.cos(angle), radius * torch.sin(angle)
