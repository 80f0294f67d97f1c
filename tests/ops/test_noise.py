"""Keyed noise: Philox against its published vectors and integer arithmetic, then the distributions it makes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmc.ops import noise
from tests import brute_force

words = st.integers(0, 2**32 - 1)
ZEROS, ONES = (0,) * 4, (2**32 - 1,) * 4


def tensors(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([v]) for v in values)


def at(seed: int = 0, token: int = 0, position: int = 0, step: int = 0) -> tuple[torch.Tensor, ...]:
    return tensors(seed, token, position, step)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (ZEROS, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (ONES, ONES[:2], "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(counter, key, expected):
    """The known-answer vectors of Random123, the reference implementation of Philox4x32-10."""
    out = noise.philox4x32(tensors(*counter), tensors(*key))
    assert " ".join(f"{int(word):08x}" for word in out) == expected


@given(st.lists(st.tuples(words, words, words, words, words, words), min_size=1, max_size=8))
@settings(deadline=None, derandomize=True)
def test_vectorised_philox_equals_integer_arithmetic(rows):
    """Int64 tensors that wrap around give the words that unbounded integers give, element by element."""
    columns = torch.tensor(rows).unbind(1)
    out = torch.stack(noise.philox4x32(columns[:4], columns[4:]), dim=1)
    assert out.tolist() == [list(brute_force.philox(row[4:], row[:4])) for row in rows]


@given(
    st.integers(0, 2**63 - 1), st.integers(0, 2**20), st.integers(0, 2**20), st.integers(0, 2**16), st.integers(0, 1)
)
@settings(deadline=None, derandomize=True)
def test_uniform_follows_its_key(seed, token, position, step, stream):
    """A uniform is lane token % 4 of counter (token // 4, position, step, stream), exact in float32."""
    u = noise.uniform(*at(seed, token, position, step), stream)
    assert u.dtype == torch.float32
    assert u.item() == brute_force.uniform(seed, token, position, step, stream)


def test_negative_seed_is_its_64_bit_pattern():
    """A negative seed keys as the two words of its two's complement."""
    lane = brute_force.philox((2**32 - 3, 2**32 - 1), (2, 5, 1, 0))[1]
    assert noise.uniform(*at(-3, 9, 5, 1), 0).item() == ((lane >> 9) + 0.5) * 2.0**-23


@pytest.mark.parametrize("lane", [0, 2**32 - 1])
def test_uniform_excludes_both_ends(lane, monkeypatch):
    """The extreme words give uniforms above 0 and below 1, so the noise of every token is finite."""
    monkeypatch.setattr(noise, "philox4x32", lambda counter, key: tensors(lane, lane, lane, lane))
    assert 0 < noise.uniform(*at(), 0).item() < 1
    assert math.isfinite(noise.gumbel(*at()).item())


@pytest.mark.parametrize(
    ("first", "count", "rows"), [(0, 1, 1), (3, 2, 4), (5, 4098, 3), (2**17 - 1, 70001, 5), (8, 8, 0)]
)
def test_range_equals_single_draws(first, count, rows):
    """However a range starts, ends and is cut into counters, its tokens have the noise they have alone."""
    generator = torch.Generator().manual_seed(first)
    seed, position, step = torch.randint(0, 2**31, (3, rows), generator=generator)
    out = noise.gumbel_range(seed, first, count, position, step)
    tokens = torch.arange(first, first + count)
    alone = noise.gumbel(seed[:, None], tokens[None], position[:, None], step[:, None])
    assert out.shape == (rows, count)
    torch.testing.assert_close(out, alone, rtol=0, atol=2e-6)


def test_gumbel_is_minus_log_minus_log_of_its_uniform():
    """float32 noise stays within 2e-6 of -log(-log(u)) in float64."""
    tokens = torch.arange(200)
    out = noise.gumbel(torch.tensor(7), tokens, torch.tensor(11), torch.tensor(3))
    expected = torch.tensor([brute_force.gumbel(7, token, 11, 3) for token in tokens.tolist()])
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


def test_gumbel_moments():
    """Mean is Euler's constant and variance pi^2 / 6, within five standard errors at 2^20 draws."""
    rows, count = 16, 1 << 16
    index = torch.arange(rows)
    noise_ = noise.gumbel_range(index, 0, count, index * 7, index * 3).double()
    variance = math.pi**2 / 6
    fourth_moment = 5.4 * variance**2  # kurtosis of the Gumbel distribution
    assert abs(noise_.mean() - 0.5772156649) < 5 * math.sqrt(variance / noise_.numel())
    assert abs(noise_.var() - variance) < 5 * math.sqrt((fourth_moment - variance**2) / noise_.numel())


def test_keys_that_differ_in_one_part_are_uncorrelated():
    """Another seed (either word), position, step or stream: no correlation beyond chance at 2^16 tokens."""
    token = torch.arange(1 << 16)
    keys = [(1, 1, 1, 0), (2, 1, 1, 0), (1 + 2**32, 1, 1, 0), (1, 2, 1, 0), (1, 1, 2, 0), (1, 1, 1, 1)]
    draws = [
        noise.uniform(torch.tensor(seed), token, torch.tensor(position), torch.tensor(step), stream)
        for seed, position, step, stream in keys
    ]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(keys))
    assert correlation.abs().max() < 5 / 2**8


def test_argmax_frequencies_follow_softmax():
    """Gumbel-max draws token v with probability softmax(z)[v]: chi-square below its 99.9 % point (7 degrees)."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 2.0, -2.0, 1.5])
    draws = 40_000
    position = torch.arange(draws)
    key = torch.full_like(position, 5)
    choice = (logits + noise.gumbel_range(key, 1000, 8, position, key)).argmax(1)
    expected = draws * logits.double().softmax(0)
    chi_square = ((choice.bincount(minlength=8) - expected) ** 2 / expected).sum()
    assert chi_square < 24.32
