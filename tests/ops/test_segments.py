"""Segments that are alike are taken together: which, and that none is lost."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmc.ops.segments import Group, Rows, groups, slot_runs


def table(*pairs: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)


def test_alike_neighbours_are_one_group() -> None:
    """As many queries and tokens, at equal distances; not more queries together than may be."""
    together = table((0, 4), (4, 8), (8, 12), (12, 15), (15, 18))
    assert groups(together, together, 0, 18, most=256) == (
        Group(Rows(0, 4, 4), Rows(0, 4, 4), (), 3),
        Group(Rows(12, 3, 3), Rows(12, 3, 3), (), 2),
    )
    assert [group.count for group in groups(together, together, 0, 18, most=8)] == [2, 1, 2]
    spaced = table((0, 4), (5, 9), (11, 15))
    assert [group.count for group in groups(spaced, spaced, 0, 15, most=256)] == [2, 1]


def test_cached_keys_must_be_alike_too() -> None:
    """As many, and their runs of pages at equal distances, ahead and not back."""
    spans = table((0, 2), (2, 4), (4, 6), (6, 8))
    cached = torch.tensor([5, 5, 5, 5])
    pages = torch.tensor([[0, 1], [2, 3], [6, 7], [4, 5]])
    found = groups(spans, spans, 0, 8, 256, cached, pages, page_tokens=4)
    assert [(group.count, group.cached) for group in found] == [
        (2, (Rows(0, 5, 8),)),
        (1, (Rows(24, 5, 0),)),
        (1, (Rows(16, 5, 0),)),
    ]
    other = groups(spans, spans, 0, 8, 256, torch.tensor([5, 5, 4, 0]), pages, page_tokens=4)
    assert [group.count for group in other] == [2, 1, 1]


def test_neighbouring_pages_are_one_run() -> None:
    assert list(slot_runs([3, 4, 9, 5, 6], 18, page_tokens=4)) == [Rows(12, 8), Rows(36, 4), Rows(20, 6)]
    assert list(slot_runs([3], 0, page_tokens=4)) == []


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), max_size=8), st.integers(0, 20), st.integers(0, 20))
def test_no_query_is_lost_or_taken_twice(sizes: list[tuple[int, int]], first: int, queries: int) -> None:
    """Of the queries held, each of a span is in one group, where its view says."""
    spans, end = [], 0
    for gap, length in sizes:
        spans.append((end + gap, end + gap + length))
        end += gap + length
    numbers = torch.arange(queries, dtype=torch.float32).view(-1, 1, 1)
    found: list[float] = []
    for group in groups(table(*spans), table(*spans), first, queries, most=6):
        found += group.queries.of(numbers, group.count).flatten().tolist()
    assert found == [n - first for begin, stop in spans for n in range(begin, stop) if 0 <= n - first < queries]
