"""Who runs together in a step: limits of the program, pages of the pool, and the order of arrival."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmc.errors import RequestError
from dllmc.ir.program import SYMBOLS
from dllmc.runtime.kv_pool import KVPool
from dllmc.runtime.params import DENSE, CachePolicy, SamplingParams
from dllmc.runtime.request import Request
from dllmc.runtime.scheduler import Demand, demand, most, next_step, require_admissible
from dllmc.spec import ModelSpec

SPEC = ModelSpec(vocab_size=50, mask_id=49, end_ids=(48,), max_positions=512)
SHIFTED = ModelSpec(vocab_size=50, mask_id=49, end_ids=(48,), shifted=True, max_positions=512)
LIMITS = {"tokens": 100, "rows": 40, "guided": 40, "segments": 8, "active": 88}


def request(
    prompt: int, gen: int, block: int, cache: CachePolicy = DENSE, spec: ModelSpec = SPEC, cfg: float = 0.0
) -> Request:
    params = SamplingParams(gen_length=gen, block_length=block, cfg_scale=cfg)
    return Request([1] * prompt, params, spec, cache=cache)


def commit(one: Request) -> None:
    """The first candidate, as a token that ends nothing."""
    one.commit(one.candidates()[:1], one.candidates()[:1] * 0)


def sizes(*values: int) -> Demand:
    return dict(zip(SYMBOLS, values, strict=True))


def test_demand_by_phase() -> None:
    """Full and Refresh take all tokens, Reuse the active span; rows are what is masked in the block."""
    one = request(10, 8, 4, CachePolicy(delay=1))
    assert [one.phase, demand(one)] == ["full", sizes(18, 4, 0, 1, 0)]
    commit(one)
    assert [one.phase, demand(one)] == ["refresh", sizes(18, 3, 0, 1, 4)]
    commit(one)
    assert [one.phase, demand(one)] == ["reuse", sizes(4, 2, 0, 1, 0)]
    assert most(one) == sizes(18, 4, 0, 1, 4)


def test_demand_of_a_guided_request_of_a_shifted_model() -> None:
    """Both sides take tokens; the active span begins with the block's predecessor."""
    one = request(10, 8, 4, CachePolicy(), SHIFTED, cfg=1.5)
    assert [one.phase, demand(one)] == ["refresh", sizes(36, 4, 4, 2, 10)]
    commit(one)
    assert [one.phase, demand(one)] == ["reuse", sizes(10, 3, 3, 2, 0)]
    assert most(one) == sizes(36, 4, 4, 2, 10)


def test_what_does_not_fit_lets_those_behind_it_go_on() -> None:
    large, larger, small = request(60, 8, 4), request(80, 8, 4), request(10, 8, 4)
    assert next_step([large, larger, small], LIMITS, None) == [large, small]


def test_a_refresh_without_pages_waits_and_nobody_behind_it_takes_them() -> None:
    """Else a small request after the other would keep a large one waiting for ever."""
    pool = KVPool(4, 8)
    holder = request(10, 8, 4, CachePolicy())  # keeps 14 keys: 2 pages
    large = request(20, 8, 4, CachePolicy())  # 24: 3 pages
    small = request(2, 4, 4, CachePolicy())  # 2: 1 page
    assert next_step([holder], LIMITS, pool) == [holder]
    commit(holder)
    assert next_step([holder, large, small], LIMITS, pool) == [holder]
    assert pool.free == 2
    pool.release((holder, 0))
    assert next_step([large, small], LIMITS, pool) == [large, small]
    assert pool.free == 0


def test_a_refresh_within_a_block_keeps_its_pages() -> None:
    pool = KVPool(2, 8)
    one = request(10, 8, 4, CachePolicy(refresh_interval=1))
    for _ in range(3):
        assert next_step([one], LIMITS, pool) == [one]
        commit(one)
        assert pool.free == 0


def test_dense_requests_need_no_pages() -> None:
    pool = KVPool(1, 8)
    waiting = request(20, 8, 4, CachePolicy())
    assert next_step([waiting, one := request(20, 8, 4)], LIMITS, pool) == [one]


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
def test_what_can_never_run_is_refused_with_the_numbers(one: Request, message: str) -> None:
    """The last block is the shortest, and keeps most."""
    with pytest.raises(RequestError, match=f"^prompt 3: {message}"):
        require_admissible(one, LIMITS, KVPool(4, 8), "prompt 3")


def test_a_program_without_caches_refuses_to_cache() -> None:
    require_admissible(request(10, 8, 4), LIMITS, None, "prompt 0")
    with pytest.raises(RequestError, match=r"prompt 0: .* the artifact has no cache; decode it with .*mode='none'"):
        require_admissible(request(10, 8, 4, CachePolicy()), LIMITS, None, "prompt 0")


POLICIES = st.builds(
    CachePolicy,
    mode=st.sampled_from(("none", "block", "block")),
    retention=st.sampled_from((0.1, 0.5, 1.0)),
    delay=st.integers(0, 2),
    refresh_interval=st.none() | st.integers(1, 3),
)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(1, 12), POLICIES, st.sampled_from((0.0, 1.0))),
        min_size=1,
        max_size=7,
    ),
    st.sampled_from((SPEC, SHIFTED)),
    st.integers(12, 30),
)
def test_any_mix_finishes_within_the_limits(
    drawn: list[tuple[int, int, int, CachePolicy, float]], spec: ModelSpec, pages: int
) -> None:
    """No step takes more than it may, the oldest always runs unless it waits for pages, and all pages come back."""
    pool = KVPool(pages, 8)
    requests = [request(prompt, gen, block, policy, spec, cfg) for prompt, gen, block, policy, cfg in drawn]
    for one in requests:
        require_admissible(one, LIMITS, pool, "")
    unfinished = list(requests)
    for _ in range(sum(gen for _, gen, *_ in drawn)):
        if not unfinished:
            break
        chosen = next_step(unfinished, LIMITS, pool)
        assert chosen
        assert chosen == [one for one in unfinished if one in chosen]
        for symbol in SYMBOLS:
            assert sum(demand(one)[symbol] for one in chosen) <= LIMITS[symbol]
        for one in chosen:
            owners = [(one, side) for side in range(one.sides)]
            if one.phase != "full":
                assert all(len(pool.held(owner)) == -(-one.kept // 8) for owner in owners)
            commit(one)
            if one.finished or not one.step_in_block:
                for owner in owners:
                    pool.release(owner)
        unfinished = [one for one in unfinished if not one.finished]
    assert not unfinished
    assert pool.free == pages
