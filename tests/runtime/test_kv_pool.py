"""Pages of the KV pool: exact accounting, whoever comes and goes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmc.runtime.kv_pool import KVPool


def test_pages_for_slots() -> None:
    pool = KVPool(4, 32)
    assert [pool.pages_for(slots) for slots in (0, 1, 32, 33, 64)] == [0, 1, 1, 2, 2]


def test_neighbours_are_preferred_and_the_shortest_run_that_fits() -> None:
    """So that what a request keeps is read at once, and long runs are left for those that need them."""
    pool = KVPool(10, 1)
    for owner, slots in (("a", 2), ("b", 1), ("c", 3), ("d", 1)):
        pool.hold(owner, slots)
    pool.release("a")
    pool.release("c")  # free: 0 1, 3 4 5, 7 8 9
    pool.hold("two", 2)
    assert pool.held("two").tolist() == [0, 1]
    pool.hold("three", 3)
    assert pool.held("three").tolist() == [3, 4, 5]
    pool.release("two")
    pool.hold("four", 4)  # no run is long enough: the longest, then the next
    assert pool.held("four").tolist() == [7, 8, 9, 0]


def test_more_than_is_free_is_refused_and_changes_nothing() -> None:
    pool = KVPool(3, 8)
    pool.hold("a", 16)
    with pytest.raises(ValueError, match="2 pages for 'b': 1 are free"):
        pool.hold("b", 9)
    assert pool.free == 1
    assert not pool.holds("b")
    with pytest.raises(ValueError, match="holds some already"):
        pool.hold("a", 1)


def test_who_holds_no_page_holds_all_the_same() -> None:
    """A request that keeps nothing is not asked again in each step."""
    pool = KVPool(0, 8)
    pool.hold("a", 0)
    assert pool.holds("a")
    assert pool.held("a").size == 0
    pool.release("a")
    pool.release("a")
    assert not pool.holds("a")


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.integers(1, 40), st.integers(1, 9), st.lists(st.tuples(st.integers(0, 7), st.integers(0, 90)), max_size=60))
def test_random_owners(pages: int, page_tokens: int, events: list[tuple[int, int]]) -> None:
    """Each page has one owner or is free; whoever asks for no more than is free gets it, at any time."""
    pool = KVPool(pages, page_tokens)
    held: dict[int, list[int]] = {}
    for owner, slots in events:
        if owner in held:
            pool.release(owner)
            del held[owner]
        else:
            free = pages - sum(map(len, held.values()))
            if -(-slots // page_tokens) > free:
                with pytest.raises(ValueError, match="are free"):
                    pool.hold(owner, slots)
                continue
            pool.hold(owner, slots)
            held[owner] = pool.held(owner).tolist()
            assert len(held[owner]) == -(-slots // page_tokens)
        everywhere = [page for listed in held.values() for page in listed]
        assert len(set(everywhere)) == len(everywhere)
        assert all(0 <= page < pages for page in everywhere)
        assert pool.free == pages - len(everywhere)
        assert all(pool.held(other).tolist() == listed for other, listed in held.items())
    for owner in held:
        pool.release(owner)
    pool.hold("all", pages * page_tokens)
    assert pool.held("all").tolist() == list(range(pages))
