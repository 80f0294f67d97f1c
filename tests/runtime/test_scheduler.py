"""Who runs together in a step, and who is given a place: limits, order, and that nobody starves."""

import itertools
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmc.errors import RequestError
from dllmc.ir.program import SYMBOLS
from dllmc.runtime.kv_pool import KVPool
from dllmc.runtime.params import DENSE, CachePolicy, SamplingParams
from dllmc.runtime.request import RequestState
from dllmc.runtime.scheduler import (
    HEAVY_SHARE,
    LATENCY,
    PATIENCE,
    POLICIES,
    Claim,
    Wanted,
    admitted,
    choose,
    due,
    most,
    require_admissible,
    wanted,
)
from dllmc.spec import ModelSpec

SPEC = ModelSpec(vocab_size=50, mask_id=49, end_ids=(48,), max_positions=512)
SHIFTED = replace(SPEC, shifted=True)
LIMITS = {"tokens": 100, "rows": 40, "guided": 40, "segments": 8, "active": 88}
MOST = list(LIMITS.values())


def request(
    prompt: int, gen: int, block: int, cache: CachePolicy = DENSE, spec: ModelSpec = SPEC, cfg: float = 0.0
) -> RequestState:
    params = SamplingParams(gen_length=gen, block_length=block, cfg_scale=cfg)
    return RequestState([1] * prompt, params, spec, cache=cache)


def commit(one: RequestState) -> None:
    """The first candidate, as a token that ends nothing."""
    one.commit(one.candidates()[:1], one.candidates()[:1] * 0)


def sizes(one: RequestState) -> list[int]:
    found: list[int] = wanted(one.table, np.array([one.row])).sizes[0].tolist()
    return found


def steps(*tokens: int, heavy: str = "", waited: tuple[int, ...] = (), due: tuple[float, ...] = ()) -> Wanted:
    """What requests want, a row each; `heavy` has an h for each that is."""
    count = len(tokens)
    return Wanted(
        np.array([[each, 1, 0, 1, 0] for each in tokens]),
        np.array([kind == "h" for kind in heavy.ljust(count, "h")]),
        np.array(due or (0.0,) * count),
        np.array(waited or (0,) * count),
    )


def test_sizes_by_phase() -> None:
    """Full and Refresh take all tokens, Reuse the active span; rows are what is masked in the block."""
    one = request(10, 8, 4, CachePolicy(delay=1))
    assert [one.phase, sizes(one)] == ["full", [18, 4, 0, 1, 0]]
    commit(one)
    assert [one.phase, sizes(one)] == ["refresh", [18, 3, 0, 1, 4]]
    commit(one)
    assert [one.phase, sizes(one)] == ["reuse", [4, 2, 0, 1, 0]]
    assert list(most(one).values()) == [18, 4, 0, 1, 4]


def test_sizes_of_a_guided_request_of_a_shifted_model() -> None:
    """Both sides take tokens; the active span begins with the block's predecessor."""
    one = request(10, 8, 4, CachePolicy(), SHIFTED, cfg=1.5)
    assert [one.phase, sizes(one)] == ["refresh", [36, 4, 4, 2, 10]]
    commit(one)
    assert [one.phase, sizes(one)] == ["reuse", [10, 3, 3, 2, 0]]
    assert list(most(one).values()) == [36, 4, 4, 2, 10]


def test_a_replay_takes_the_tokens_of_a_refresh_and_no_rows() -> None:
    one = request(10, 8, 4, CachePolicy())
    commit(one)
    one.lose_cache()
    assert [one.phase, sizes(one)] == ["refresh", [18, 0, 0, 1, 4]]


def test_what_does_not_fit_lets_those_behind_it_go_on() -> None:
    asked = steps(60, 80, 10, 30)
    assert choose(asked, MOST, POLICIES["multiplexed"]) == [0, 2, 3]
    assert choose(steps(60, 80, 10, 30, heavy="hhll"), MOST, POLICIES["multiplexed"]) == [0, 2, 3]
    assert choose(asked, MOST, POLICIES["fcfs"]) == [0]


def test_light_steps_go_first() -> None:
    assert choose(steps(95, 4, 4, heavy="hll"), MOST, POLICIES["multiplexed"]) == [1, 2]
    assert choose(steps(95, 4, 4, heavy="hll"), MOST, POLICIES["fcfs"]) == [0, 1]


def test_heavy_steps_are_spread_where_others_would_wait_for_them() -> None:
    """Together they take a share of a step, or one of them all that it needs; so each step has some of them."""
    few = MOST[0] // HEAVY_SHARE
    assert choose(steps(few - 2, 2, 3, 1, heavy="hhhl"), MOST, POLICIES["multiplexed"]) == [0, 1, 3]
    assert choose(steps(90, 2, 4, heavy="hhl"), MOST, POLICIES["multiplexed"]) == [0, 2]
    assert choose(steps(60, 30, 4), MOST, POLICIES["multiplexed"]) == [0, 1, 2]
    assert choose(steps(60, 30, 4, heavy="hhl"), MOST, POLICIES["fcfs"]) == [0, 1, 2]


def test_who_is_due_first_goes_first_among_alike() -> None:
    assert choose(steps(60, 60, due=(9, 8)), MOST, POLICIES["multiplexed"]) == [1]
    assert choose(steps(60, 60, due=(9, 8)), MOST, POLICIES["fcfs"]) == [0]


def test_who_has_waited_long_goes_before_all() -> None:
    asked = steps(95, 4, 4, heavy="hll", waited=(PATIENCE, 0, 0))
    assert choose(asked, MOST, POLICIES["multiplexed"]) == [0, 1]
    asked = steps(60, 60, 60, waited=(PATIENCE, PATIENCE + 1, 0), due=(1, 2, 0))
    assert choose(asked, MOST, POLICIES["multiplexed"]) == [1]


WANTED = st.lists(
    st.tuples(st.integers(1, 100), st.integers(0, 40), st.booleans(), st.integers(0, 30), st.integers(0, 5)),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(WANTED, st.sampled_from(sorted(POLICIES)))
def test_a_step_is_within_the_limits_and_leaves_out_nothing_that_it_might_take(
    drawn: list[tuple[int, int, bool, int, int]], name: str
) -> None:
    asked = Wanted(
        np.array([[tokens, rows, 0, 1, 0] for tokens, rows, *_ in drawn]),
        np.array([heavy for _, _, heavy, _, _ in drawn]),
        np.array([float(due) for *_, due in drawn]),
        np.array([waited for *_, waited, _ in drawn]),
    )
    run = choose(asked, MOST, POLICIES[name])
    taken = asked.sizes[run].sum(axis=0)
    assert run
    assert run == sorted(set(run))
    assert (taken <= MOST).all()
    heavy_tokens = asked.sizes[run][asked.heavy[run], 0].sum()
    for index in set(range(len(drawn))) - set(run):
        too_large = (taken + asked.sizes[index] > MOST).any()
        if POLICIES[name].skips:
            spread = asked.heavy[index] and heavy_tokens + drawn[index][0] > MOST[0] // HEAVY_SHARE
            assert too_large or (spread and heavy_tokens and not asked.heavy.all())
        else:  # who is first of those left out does not fit, and who came before it runs
            assert too_large or min(set(range(len(drawn))) - set(run)) < index


@settings(deadline=None, derandomize=True, max_examples=60)
@given(WANTED, st.randoms(use_true_random=False))
def test_nobody_with_a_place_starves(drawn: list[tuple[int, int, bool, int, int]], random: Random) -> None:
    """Whatever the others want, step after step, each runs at least once in `PATIENCE + n` steps."""
    count = len(drawn)
    waited = np.zeros(count, np.int64)
    for _ in range(4 * (PATIENCE + count)):
        asked = Wanted(
            np.array([[random.choice((tokens, 4)), rows, 0, 1, 0] for tokens, rows, *_ in drawn]),
            np.array([random.random() < 0.5 for _ in drawn]),
            np.array([float(due) for *_, due in drawn]),
            waited,
        )
        run = choose(asked, MOST, POLICIES["multiplexed"])
        waited += 1
        waited[run] = 0
        assert waited.max() < PATIENCE + count


def claims(*given: tuple[int, float]) -> list[Claim]:
    """Of pages and a due time each; every step of theirs takes up to 30 tokens."""
    return [Claim(pages, (30, 4, 0, 1, 0), due) for pages, due in given]


def give(line: list[Claim], seated: list[Claim], pages: int, name: str, now: float = 0) -> tuple[list[int], list[int]]:
    return admitted(line, seated, 8 - len(seated), pages, MOST, now, POLICIES[name])


def test_places_are_given_as_long_as_there_are_pages() -> None:
    line = claims((3, 10), (9, 11), (3, 12), (3, 13))
    assert give(line, [], 8, "multiplexed") == ([0, 2], [])
    assert give(line, [], 8, "fcfs") == ([0], [])
    assert give(line[2:], claims(*[(1, 0)] * 7), 8, "multiplexed") == ([0], [])


def test_who_is_due_is_not_passed_over() -> None:
    """Else small requests might keep a large one out for ever."""
    line = claims((9, 11), (3, 12))
    assert give(line, [], 8, "multiplexed", now=10.9) == ([1], [])
    assert give(line, [], 8, "multiplexed", now=11) == ([], [])


def test_static_batches_fit_one_step_together() -> None:
    line = claims((1, 0), (1, 0), (1, 0), (1, 0))
    assert give(line, [], 8, "static") == ([0, 1, 2], [])
    assert give(line, line[:1], 8, "static") == ([], [])


def test_the_most_urgent_takes_places_of_those_due_much_later() -> None:
    """Of as few as will do, the latest due first; of none if that does not help."""
    urgent = claims((4, 0))
    later = claims((2, LATENCY + 1), (2, LATENCY + 3), (2, LATENCY + 2), (2, LATENCY))
    assert give(urgent, later, 4, "multiplexed") == ([0], [])
    assert give(urgent, later, 2, "multiplexed") == ([0], [1])
    assert give(urgent, later, 0, "multiplexed") == ([0], [1, 2])
    assert give(claims((9, 0)), later, 0, "multiplexed") == ([], [])
    assert give(urgent, later, 0, "fcfs") == ([], [])
    full = claims(*[(1, LATENCY + 1)] * 8)
    assert give(urgent, full, 9, "multiplexed") == ([0], [0])


def test_when_a_request_is_due() -> None:
    assert due(100, 0, None) == 100 + LATENCY
    assert due(100, 0, 5.0) == 105
    assert due(100, 0, 2 * LATENCY) == 100 + LATENCY
    assert due(100, 2, 5.0) == 105 - 2 * LATENCY


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (request(95, 8, 4), r"needs 103 tokens a step.* 100; .*max_tokens_per_step >= 103"),
        (request(10, 50, 50), r"needs 50 rows a step.* 40; .*max_logit_rows >= 50"),
        (request(40, 12, 4, cfg=1.0), r"needs 104 tokens"),
        (request(30, 9, 8, CachePolicy()), r"keeps 38 keys a head, which take 5 pages of 8, but the KV pool has 4"),
        (request(10, 9, 8, CachePolicy(), cfg=1.0), r"keeps 18 keys a head, which take 6 pages of 8"),
    ],
)
def test_what_can_never_run_is_refused_with_the_numbers(one: RequestState, message: str) -> None:
    """The last block is the shortest, and keeps most."""
    with pytest.raises(RequestError, match=f"^prompt 3: {message}"):
        require_admissible(one, LIMITS, KVPool(4, 8), "prompt 3")


def test_a_program_without_caches_refuses_to_cache() -> None:
    require_admissible(request(10, 8, 4), LIMITS, None, "prompt 0")
    with pytest.raises(RequestError, match=r"prompt 0: .* the artifact has no cache; decode it with .*mode='none'"):
        require_admissible(request(10, 8, 4, CachePolicy()), LIMITS, None, "prompt 0")


def test_symbols_are_in_the_order_of_the_limits() -> None:
    assert tuple(LIMITS) == SYMBOLS
    assert list(itertools.chain(most(request(10, 8, 4)))) == list(SYMBOLS)
