"""Random numbers as a pure function of a seed: Philox-4x32 with 7 rounds, in plain int64 operators.

The key is the seed's low and high 32 bits, the counter is (group low, group high, stream, 0). Element i of a tensor,
counted in logical (row-major) order, is number i mod 8 of group i div 8; two numbers come from each of the four words.
So the noise depends on neither memory layout nor device nor compiler, a forward pass needs to keep only the seed, and
a backward pass makes the same noise again.

Seven rounds are the fewest that pass all of TestU01's BigCrush (10 are the usual margin), and 16 bits a number are
what a few instructions an element on a GPU can pay for.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, and its library Random123, whose test
vectors the generator reproduces.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zeromean.kernels import draw_seed

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_NUMBERS = 8

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def resolve_seed(seed: Tensor | None, x: Tensor) -> Tensor:
    """The seed to use for noise on ``x``: the given one, checked, or a fresh one.

    Raises:
        ValueError: If the seed is not int64, not on x's device, or neither 0-d nor of x's number of dimensions.
    """
    if seed is None:
        return draw_seed(x)
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


def philox(counter: Words, key: tuple[Tensor, Tensor], rounds: int = 7) -> Words:
    """Philox-4x32: four random 32-bit words, as int64, for each counter of four words and key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high_0, low_0 = _multiply(c0, _MULTIPLIERS[0])
        high_1, low_1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK, (k1 + _KEY_INCREMENTS[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    # By the multiplier less 2**32: the product itself would overflow int64, which a C++ compiler may take for
    # impossible, and this one stays within 62 bits.
    product = word * (multiplier - 2**32)
    return (product >> 32) + word, product & _MASK


def uniform(seed: Tensor, shape: Sequence[int], *, stream: int = 0) -> Tensor:
    """Uniform float32 numbers (b + 1/2) / 2^16, b of 16 random bits, one for each element of ``shape``.

    Args:
        seed: int64, 0-d for one stream over the whole shape; or with as many dimensions as ``shape``, such as
            [R, 1, 1]: then each slice along the leading dimensions has the numbers that its own seed alone would give.
        shape: The shape of the result, [R, ...] for seeds [R, 1, ...].
        stream: Which of 2**32 independent sequences of a seed to read.

    Returns:
        Numbers between 0 and 1, both excluded, on the seed's device, contiguous.

    Raises:
        ValueError: If the seed's shape does not fit.
    """
    slices = _leading_slices(seed, shape)
    words = _slice_words(seed, shape, slices, stream)
    return _lay_out(_fraction(words & 0xFFFF, 16), _fraction(words >> 16, 16), shape, slices)


def normal(seed: Tensor, shape: Sequence[int], *, stream: int = 0) -> Tensor:
    """Standard normal float32 numbers by Box-Muller, a pair r cos(a), r sin(a) from each word; arguments as `uniform`.

    The radius r takes a word's upper 18 bits, the angle a = 2 pi b / 2^14 the lower 14. Fewer for the radius would cut
    the tail (now no number exceeds 5.14, P(|z| > 4) is right within 0.1 %, P(|z| > 4.5) within 1.3 %), fewer for the
    angle would make lumps near 0 (now the distribution function is right within 1e-4).
    """
    slices = _leading_slices(seed, shape)
    return _lay_out(*_box_muller(_slice_words(seed, shape, slices, stream)), shape, slices)


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


def _slice_words(seed: Tensor, shape: Sequence[int], leading: int, stream: int) -> Tensor:
    """Words [slices, groups, 4]."""
    groups = -(-math.prod(shape[leading:]) // _NUMBERS)
    seed = seed.reshape(-1, 1)
    group = torch.arange(groups, dtype=torch.int64, device=seed.device).expand(seed.shape[0], groups)
    zero = torch.zeros_like(group)
    words = philox((group & _MASK, group >> 32, zero + stream, zero), (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(words, dim=-1)


def _lay_out(even: Tensor, odd: Tensor, shape: Sequence[int], leading: int) -> Tensor:
    """From two numbers for each of [slices, groups, 4] words to the shape, dropping the surplus of the last groups."""
    numbers = torch.stack([even, odd], dim=-1)
    return numbers.flatten(1)[:, : math.prod(shape[leading:])].reshape(tuple(shape))


def _box_muller(words: Tensor) -> tuple[Tensor, Tensor]:
    radius = torch.sqrt(-2.0 * torch.log(_fraction(words >> 14, 18)))
    angle = (words & 0x3FFF).to(torch.float32) * (2.0 * math.pi / 2**14)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _fraction(bits: Tensor, count: int) -> Tensor:
    return (bits.to(torch.float32) + 0.5) * 2.0**-count
