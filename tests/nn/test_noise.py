import numpy as np
import pytest
import torch

from tests import oracles
from zeromean.nn import noise

# Random123's known-answer vectors for philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
SEEDS = [0, 1, 2**40 + 7, 2**63 - 1, -5]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    words = noise.philox((c0, c1, c2, c3), (torch.tensor([key[0]]), torch.tensor([key[1]])))
    assert [int(word) for word in words] == expected
    assert list(oracles.philox((counter[0], counter[1], counter[2], counter[3]), (key[0], key[1]))) == expected


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stream", [0, 1, 9])
def test_uniforms_equal_the_oracle(seed: int, stream: int) -> None:
    actual = noise.uniform(torch.tensor(seed), (5, 7), stream=stream)
    assert actual.dtype == torch.float32
    expected = oracles.uniform(seed & (2**64 - 1), 35, stream).reshape(5, 7)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_normals_equal_the_oracle(seed: int) -> None:
    expected = oracles.normal(seed & (2**64 - 1), 35).reshape(5, 7)
    np.testing.assert_allclose(noise.normal(torch.tensor(seed), (5, 7)).numpy(), expected, rtol=1e-4, atol=1e-6)


def test_uniform_moments_and_range() -> None:
    u = noise.uniform(torch.tensor(11), (1_000_000,)).double()
    assert 0 <= u.min() < 1e-5
    assert 1 - 1e-5 < u.max() < 1
    for power in (1, 2, 3, 4):
        error = (1 / (2 * power + 1) - 1 / (power + 1) ** 2) ** 0.5 / 1000
        assert abs((u**power).mean() - 1 / (power + 1)) < 4 * error


def test_the_largest_word_stays_below_one() -> None:
    assert noise._to_uniform(torch.tensor([0x7FFFFFFF, 0x80000000])).max() < 1


def test_normal_moments() -> None:
    z = noise.normal(torch.tensor(11), (1_000_000,)).double()
    assert z.abs().max() < 5.7
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 4 * variance**0.5 / 1000


@pytest.mark.parametrize("other", [(12, 0), (11 + 2**32, 0), (11, 1)], ids=["seed", "high half", "stream"])
def test_seeds_and_streams_are_uncorrelated(other: tuple[int, int]) -> None:
    one = noise.normal(torch.tensor(11), (100_000,))
    two = noise.normal(torch.tensor(other[0]), (100_000,), stream=other[1])
    assert abs((one * two).mean()) < 4 / 100_000**0.5


def test_neighbours_are_uncorrelated() -> None:
    z = noise.normal(torch.tensor(3), (100_000,))
    for lag in (1, 2, 3, 4):
        assert abs((z[lag:] * z[:-lag]).mean()) < 4 / 100_000**0.5


@pytest.mark.parametrize("draw", [noise.uniform, noise.normal])
def test_each_leading_slice_has_the_stream_of_its_seed(draw: type) -> None:
    seeds = torch.tensor([5, 6, 5])
    together = draw(seeds.reshape(3, 1, 1), (3, 2, 5))
    for index, seed in enumerate(seeds):
        torch.testing.assert_close(together[index], draw(seed, (2, 5)), rtol=0, atol=0)
    torch.testing.assert_close(draw(seeds[:1].reshape(1, 1, 1), (1, 2, 5))[0], draw(seeds[0], (2, 5)), rtol=0, atol=0)
    grid = draw(torch.tensor([[1, 2], [3, 4]]).reshape(2, 2, 1), (2, 2, 6))
    torch.testing.assert_close(grid[1, 0], draw(torch.tensor(3), (6,)), rtol=0, atol=0)


def test_a_longer_tensor_begins_with_the_shorter_one() -> None:
    seed = torch.tensor(5)
    torch.testing.assert_close(noise.uniform(seed, (9,))[:6], noise.uniform(seed, (6,)), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (4,), (5,)], ids=str)
def test_any_shape(shape: tuple[int, ...]) -> None:
    assert noise.normal(torch.tensor(5), shape).shape == shape


def test_manual_seed_reproduces_a_drawn_seed() -> None:
    torch.manual_seed(4)
    first, second = noise.draw_seed(torch.device("cpu")), noise.draw_seed(torch.device("cpu"))
    torch.manual_seed(4)
    assert noise.draw_seed(torch.device("cpu")) == first != second
