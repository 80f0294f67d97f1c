"""Who is in line, who has a place, and what becomes of pages: over whole lives of random requests."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmc.ir.program import SYMBOLS
from dllmc.runtime import scheduler
from dllmc.runtime.kv_pool import KVPool
from dllmc.runtime.params import DENSE, CachePolicy, SamplingParams
from dllmc.runtime.request import RequestState
from dllmc.runtime.roster import Entry, Roster
from dllmc.runtime.scheduler import LATENCY, PATIENCE, POLICIES
from dllmc.runtime.table import REFRESH, Table
from dllmc.spec import ModelSpec

SPEC = ModelSpec(vocab_size=50, mask_id=49, end_ids=(48,), max_positions=512)
LIMITS = {"tokens": 100, "rows": 40, "guided": 40, "segments": 4, "active": 88}


def roster(pages: int = 8, policy: str = "multiplexed") -> Roster:
    return Roster(Table(LIMITS["segments"], 100, 16), LIMITS, KVPool(pages, 8), POLICIES[policy])


def entry(prompt: int, gen: int = 4, cache: CachePolicy = DENSE, due: float = 0.0, cfg: float = 0.0) -> Entry:
    params = SamplingParams(gen_length=gen, block_length=4, cfg_scale=cfg)
    return Entry(RequestState([1] * prompt, params, SPEC, cache=cache), due)


def step(of: Roster, now: float = 0.0) -> list[Entry]:
    """Run one, committing each request's first candidate; those who are done leave. Who ran."""
    rows = of.next(now)
    ran = of.at(rows)
    for each in ran:
        if of.table.lost[each.row]:
            of.table.lost[each.row] = False
        else:
            each.state.commit(each.state.candidates()[:1], np.array([7]))
        if each.state.finished:
            of.remove(each)
    return ran


def test_a_request_goes_on_in_the_table_and_leaves_with_its_result() -> None:
    of, one = roster(), entry(3)
    of.add(one)
    assert (of.waiting, of.running, one.row) == (1, 0, None)
    assert step(of) == [one]
    assert (of.waiting, of.running) == (0, 1)
    assert one.state.table is of.table
    while step(of):
        pass
    assert one.state.result().token_ids == [7] * 4
    assert len(of) == 0
    assert one.state.table is not of.table


def test_a_place_has_all_pages_that_its_request_will_need() -> None:
    """Each side its own; in the page table from then on, and free when the request goes."""
    of, one = roster(), entry(20, 6, CachePolicy(), cfg=1.0)  # the last block keeps 24: 3 pages a side
    of.add(one)
    step(of)
    assert of.pool is not None
    assert of.pool.free == 2
    pages = of.table.page_table[one.row, :, :3]
    assert len(set(pages.flatten().tolist())) == 6
    of.remove(one)
    assert of.pool.free == 8


def test_whoever_lacks_pages_waits_and_others_pass() -> None:
    of = roster(pages=4)
    holder, large, small = entry(14, 6, CachePolicy()), entry(20, 6, CachePolicy()), entry(2, 6, CachePolicy())
    for each in (holder, large, small):
        each.due = 10.0
        of.add(each)
    step(of)
    assert [each.row is None for each in (holder, large, small)] == [False, True, False]
    of.remove(holder)
    step(of)
    assert [each.row is None for each in (large, small)] == [False, False]


def test_a_preempted_request_goes_on_where_it_was() -> None:
    """It replays its Refresh, on the tokens of then, and keeps what was committed."""
    of = roster(pages=3)
    one, urgent = entry(18, 4, CachePolicy(), due=2 * LATENCY), entry(18, 4, CachePolicy(), due=0.0)
    of.add(one)
    step(of)
    step(of)
    assert one.state.phase == "reuse"
    of.add(urgent)
    assert step(of) == [urgent]
    assert (one.row, of.preemptions, of.waiting) == (None, 1, 1)
    assert one.state.masked.sum() == 2
    while not urgent.state.finished:
        step(of)
    assert step(of) == [one]  # the replay
    assert one.state.step == 2
    while step(of):
        pass
    assert one.state.result().forward_passes == 4
    assert one.state.table.at_refresh[0, :22].tolist() == [1] * 18 + [SPEC.mask_id] * 4


def test_requests_are_served_as_they_are_due_or_as_they_came() -> None:
    for policy, expected in (("multiplexed", [1, 0]), ("fcfs", [0, 1])):
        of = roster(policy=policy)
        both = [entry(50, due=9.0), entry(50, due=8.0)]
        for each in both:
            of.add(each)
        assert step(of) == [both[expected[0]]]


CACHES = st.builds(
    CachePolicy,
    mode=st.sampled_from(("none", "block", "block")),
    retention=st.sampled_from((0.1, 0.5, 1.0)),
    delay=st.integers(0, 2),
    refresh_interval=st.none() | st.integers(1, 3),
)
ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 12),  # steps before it comes
        st.integers(1, 30),
        st.integers(1, 12),
        CACHES,
        st.sampled_from((0.0, 0.0, 1.0)),
        st.sampled_from((0, 0, 0, 1, 3)),  # priority
        st.sampled_from((None, None, None, 5)),  # steps until it is cancelled
    ),
    min_size=1,
    max_size=10,
)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(ARRIVALS, st.integers(12, 30), st.sampled_from(sorted(POLICIES)))
def test_any_mix_is_served_within_the_limits_and_all_pages_come_back(
    drawn: list[tuple[int, int, int, CachePolicy, float, int, int | None]], pages: int, policy: str
) -> None:
    of = roster(pages, policy)
    assert of.pool is not None
    entries = []
    for _, prompt, gen, cache, cfg, priority, _ in drawn:
        entries.append(entry(prompt, gen, cache, scheduler.due(0.0, priority, None), cfg))
        scheduler.require_admissible(entries[-1].state, LIMITS, of.pool, "")
    comes = {each: at for each, (at, *_) in zip(entries, drawn, strict=True)}
    ends = {each: at + last for each, (at, *_, last) in zip(entries, drawn, strict=True) if last is not None}
    waits = dict.fromkeys(entries, 0)
    for now in range(13 + 3 * PATIENCE * sum(gen for _, _, gen, *_ in drawn)):
        for each in entries:
            if comes[each] == now:
                of.add(each)
            if ends.get(each) == now and not each.state.finished:
                of.remove(each)
                comes[each] = -1
        if now >= 12 and not len(of):
            break
        before = {each: each.row for each in entries}
        rows = of.next(float(now))
        assert rows.size or not len(of)
        taken = scheduler.wanted(of.table, rows)
        assert (taken.sizes.sum(axis=0) <= [LIMITS[symbol] for symbol in SYMBOLS]).all()
        held = [each.claim.pages for each in entries if each.row is not None]
        assert pages - of.pool.free == sum(held)
        phases = of.table.phases(rows)
        for each, phase in zip(of.at(rows), phases, strict=True):
            if phase == REFRESH:  # its pages hold what it keeps
                width = -(-int(of.table.kept[each.row]) // 8) * each.state.sides
                assert width <= each.claim.pages
            if of.table.lost[each.row]:
                of.table.lost[each.row] = False
            else:
                each.state.commit(each.state.candidates()[:1], np.array([7]))
        ran = set(of.at(rows))
        for each in entries:
            running = before[each] is not None and each.row is not None
            waits[each] = waits[each] + 1 if running and each not in ran else 0
            if policy == "multiplexed":
                assert waits[each] < PATIENCE + LIMITS["segments"]
        for each in ran:
            if each.state.finished:
                of.remove(each)
    assert not len(of)
    assert of.pool.free == pages
    assert all(each.state.finished for each in entries if comes[each] >= 0)
