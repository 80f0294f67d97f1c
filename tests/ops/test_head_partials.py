"""Partials of the fused head: any split of the vocabulary, merged in any order, is the whole."""

from dataclasses import replace
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmc.ops.head_partials import Partials, finish, head_partials, merge
from tests.ops.head_cases import GREEDY, MIXED, Case, Segment, from_logits

VOCAB = 40


@st.composite
def splits(draw) -> list[tuple[int, int]]:
    """The vocabulary's parts (start, stop), in a random order."""
    inner = draw(st.lists(st.integers(1, VOCAB - 1), unique=True, max_size=8).map(sorted))
    bounds = [0, *inner, VOCAB]
    return draw(st.permutations(list(pairwise(bounds))))


def small_logits(seed: int, distinct: int) -> torch.Tensor:
    """Logits [24, 40] in halves, so exact in float32, of `distinct` values: mostly ties, zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, distinct, (24, VOCAB), generator=generator) / 2 - distinct // 4
    return torch.where(logits == 0, -0.0 * torch.randint(0, 2, logits.shape, generator=generator), logits)


def parts_of(case: Case, parts: list[tuple[int, int]]) -> list[Partials]:
    """Each part's partials; `case` is from `from_logits`, so its hidden rows are its logits."""
    return [head_partials(case.hidden[:, start:stop].clone(), start, case.rows()) for start, stop in parts]


def reduced(partials: list[Partials], case: Case, data: st.DataObject) -> Partials:
    """All parts merged, neighbours first, in a random tree."""
    while len(partials) > 1:
        i = data.draw(st.integers(0, len(partials) - 2))
        partials = [*partials[:i], merge(partials[i], partials[i + 1], case.rows()), *partials[i + 2 :]]
    return partials[0]


@given(st.data(), splits(), st.integers(0, 999), st.sampled_from([3, 12, 60]))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_any_split_merged_in_any_order_is_the_definition(data, parts, seed, distinct):
    """Shards as narrow as a token, in any tree of merges: the definition's tokens, sums to within rounding."""
    segments = [replace(s, suppressed=tuple(v for v in s.suppressed if v < VOCAB)) for s in MIXED]
    case = from_logits(small_logits(seed, distinct), segments)
    token, confidence, logprob = finish(reduced(parts_of(case, parts), case, data), case.rows())
    wanted, *statistics = case.reference(torch.float32)
    assert token.tolist() == wanted.tolist()
    torch.testing.assert_close((confidence, logprob), tuple(statistics), rtol=1e-5, atol=1e-6)


@given(st.integers(1, VOCAB - 1), st.integers(0, 999))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_merging_is_commutative(cut, seed):
    """Which of two parts comes first changes nothing, not even a rounding."""
    case = from_logits(small_logits(seed, 5), [replace(s, suppressed=()) for s in MIXED])
    a, b = parts_of(case, [(0, cut), (cut, VOCAB)])
    for one, other in zip(*(finish(merge(*ab, case.rows()), case.rows()) for ab in ((a, b), (b, a))), strict=True):
        assert torch.equal(one, other)


def test_zeros_of_both_signs_are_equal():
    """-0.0 ranks by token id among zeros: top_k = 5 keeps the first five tokens."""
    logits = torch.tensor([-0.0, 0.0, 0.0, -0.0]).repeat(200, VOCAB // 4)
    case = from_logits(logits, [Segment(temperature=1.0, top_k=5, seed=2)])
    token, _, _ = finish(parts_of(case, [(0, VOCAB)])[0], case.rows())
    assert set(token.tolist()) == {0, 1, 2, 3, 4}


def test_a_filter_that_is_off_limits_nothing():
    """Beside a top_k, top_p = 1 keeps even what rounding puts beyond the whole probability; and top_k = 0 its 1024."""
    filters = [{"top_k": 7}, {"top_k": 7, "top_p": 0.5}, {"top_p": 0.5}]
    rows = from_logits(torch.zeros(3, VOCAB), [Segment(temperature=1.0, **f) for f in filters]).rows()
    assert rows.top_k.tolist() == [7, 7, 1024]
    assert rows.top_p.tolist() == [torch.inf, 0.5, 0.5]


def test_huge_and_suppressed_parts_do_not_overflow():
    """Logits of +-1e4 and a part whose tokens are all suppressed leave sums finite and the best token chosen."""
    logits = torch.full((len(GREEDY), VOCAB), -1e4)
    logits[:, 7] = 1e4
    case = from_logits(logits, [replace(s, suppressed=tuple(range(20, VOCAB))) for s in GREEDY])
    case = replace(case, row_target=torch.tensor([-1, 7, 3, 20, -1]))
    rows = case.rows()
    suppressed, ordinary, best = parts_of(case, [(20, 40), (10, 20), (0, 10)])
    token, confidence, logprob = finish(merge(merge(suppressed, ordinary, rows), best, rows), rows)
    assert token.tolist() == [7] * len(GREEDY)
    assert logprob.tolist() == [0.0, 0.0, -2e4, -torch.inf, 0.0]  # of token 7 where no other is asked for
    assert confidence.tolist()[:3] == [1.0, 1.0, 0.0]  # low_confidence, topk_margin, entropy


def test_logits_that_are_not_numbers_give_tokens_of_the_vocabulary():
    """A model that overflows yields NaN confidences, never a token out of range."""
    logits = small_logits(1, 9)
    logits[::2, ::3] = torch.nan
    logits[1::2] = torch.inf
    token, _, _ = from_logits(logits, [Segment(), Segment(temperature=1.0), Segment(temperature=1.0, top_k=4)]).run()
    assert ((token >= 0) & (token < VOCAB)).all()
