import numpy as np
import pytest
import torch
from torch import Tensor

from tests import oracles
from zeromean.kernels import draw_seed
from zeromean.nn import noise

PI_DIGITS = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
# Random123's known-answer vectors for philox4x32: rounds, counter, key, result.
KNOWN = [
    (7, [0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
    (7, [0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
    (7, *PI_DIGITS, [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]),
    (10, [0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (10, [0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (10, *PI_DIGITS, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
]
SEEDS = [0, 1, 2**40 + 7, 2**63 - 1, -5]
MANY = 10_000_000


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), KNOWN)
def test_known_answers(rounds: int, counter: list[int], key: list[int], expected: list[int]) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    words = noise.philox((c0, c1, c2, c3), (torch.tensor([key[0]]), torch.tensor([key[1]])), rounds)
    assert [int(word) for word in words] == expected
    assert list(oracles.philox((counter[0], counter[1], counter[2], counter[3]), (key[0], key[1]), rounds)) == expected


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stream", [0, 1, 9])
def test_uniforms_equal_the_oracle(seed: int, stream: int) -> None:
    actual = noise.uniform(torch.tensor(seed), (5, 7), stream=stream)
    assert actual.dtype == torch.float32
    expected = oracles.uniform(seed & (2**64 - 1), 35, stream).reshape(5, 7)
    np.testing.assert_array_equal(actual.double().numpy(), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_normals_equal_the_oracle(seed: int) -> None:
    expected = oracles.normal(seed & (2**64 - 1), 35).reshape(5, 7)
    np.testing.assert_allclose(noise.normal(torch.tensor(seed), (5, 7)).numpy(), expected, rtol=0, atol=3e-6)


def test_uniforms_fill_their_cells_evenly() -> None:
    u = noise.uniform(torch.tensor(11), (MANY,)).double()
    cells = u * 2**16 - 0.5
    assert torch.equal(cells, cells.round())
    counts = torch.bincount(cells.long(), minlength=2**16)
    assert len(counts) == 2**16
    chi_square = float((counts - MANY / 2**16).square().sum() / (MANY / 2**16))
    assert abs(chi_square - (2**16 - 1)) < 4 * (2 * 2**16) ** 0.5


def test_normals_have_the_moments_and_tails_of_a_normal_distribution() -> None:
    z = noise.normal(torch.tensor(11), (MANY,)).double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 4 * (variance / MANY) ** 0.5
    for limit in (2, 3, 4, 4.5):
        expected = MANY * outside(limit)
        assert abs(int((z.abs() > limit).sum()) - expected) < 4 * expected**0.5 + 0.013 * expected
    z, cumulated = z.sort().values, torch.arange(MANY + 1, dtype=torch.float64) / MANY
    below = torch.special.ndtr(z)
    assert max((below - cumulated[:-1]).max(), (cumulated[1:] - below).max()) < 2 / MANY**0.5


def outside(limit: float) -> float:
    return 2 * float(torch.special.ndtr(torch.tensor(-limit, dtype=torch.float64)))


def test_the_distribution_of_normals_over_all_words() -> None:
    """Every radius with every angle: what no sample is large enough to show."""
    radius, _ = noise._box_muller(torch.arange(2**18) << 14)
    one, other = noise._box_muller(torch.arange(2**14))
    radius, circle = radius.double(), torch.stack([one, other]).double() / noise._box_muller(torch.tensor(0))[0]
    assert 5.13 < radius.max() < 5.14
    for direction in circle:
        direction = direction.sort().values
        for limit, error in ((2, 1e-4), (3, 1e-4), (4, 1e-3), (4.5, 0.013)):
            share = cumulated(direction, -limit / radius) + cumulated((-direction).flip(0), -limit / radius)
            assert abs(share / outside(limit) - 1) < error
        for point in torch.linspace(-3, 3, 61).tolist():
            normal = torch.special.ndtr(torch.tensor(point, dtype=torch.float64))
            assert abs(cumulated(direction, point / radius) - normal) < 1e-4


def cumulated(direction: Tensor, at: Tensor) -> float:
    """The mean over all radii of the share of directions up to a number."""
    return float(torch.searchsorted(direction, at, right=True).double().mean() / len(direction))


@pytest.mark.parametrize("other", [(12, 0), (11 + 2**32, 0), (11, 1)], ids=["seed", "high half", "stream"])
def test_seeds_and_streams_are_uncorrelated(other: tuple[int, int]) -> None:
    one = noise.normal(torch.tensor(11), (1_000_000,))
    two = noise.normal(torch.tensor(other[0]), (1_000_000,), stream=other[1])
    assert abs((one * two).mean()) < 4 / 1_000_000**0.5


def test_neighbours_are_uncorrelated() -> None:
    z = noise.normal(torch.tensor(3), (1_000_000,))
    for lag in range(1, 17):
        assert abs((z[lag:] * z[:-lag]).mean()) < 4 / 1_000_000**0.5
        assert abs((z[lag:].square() * z[:-lag].square()).mean() - 1) < 4 * (8 / 1_000_000) ** 0.5


@pytest.mark.parametrize("draw", [noise.uniform, noise.normal])
def test_each_leading_slice_has_the_stream_of_its_seed(draw: type) -> None:
    seeds = torch.tensor([5, 6, 5])
    together = draw(seeds.reshape(3, 1, 1), (3, 2, 5))
    for index, seed in enumerate(seeds):
        torch.testing.assert_close(together[index], draw(seed, (2, 5)), rtol=0, atol=0)
    torch.testing.assert_close(draw(seeds[:1].reshape(1, 1, 1), (1, 2, 5))[0], draw(seeds[0], (2, 5)), rtol=0, atol=0)
    grid = draw(torch.tensor([[1, 2], [3, 4]]).reshape(2, 2, 1), (2, 2, 6))
    torch.testing.assert_close(grid[1, 0], draw(torch.tensor(3), (6,)), rtol=0, atol=0)


@pytest.mark.parametrize("draw", [noise.uniform, noise.normal])
def test_a_longer_tensor_begins_with_the_shorter_one(draw: type) -> None:
    seed = torch.tensor(5)
    torch.testing.assert_close(draw(seed, (19,))[:11], draw(seed, (11,)), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (8,), (9,)], ids=str)
def test_any_shape(shape: tuple[int, ...]) -> None:
    assert noise.normal(torch.tensor(5), shape).shape == shape


def test_manual_seed_reproduces_a_drawn_seed() -> None:
    torch.manual_seed(4)
    first, second = draw_seed(torch.ones(2)), draw_seed(torch.ones(2))
    torch.manual_seed(4)
    assert draw_seed(torch.ones(2)) == first != second
