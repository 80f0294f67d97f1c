"""The caching rules on cases small enough to work out by hand, where the golden files do not reach.

`Toy` shows in what it attends to which positions a pass computed, cached and saw. Token 9 is the mask.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dllmc.spec import ModelSpec
from tests.brute_force import Decoded, decode
from tests.brute_force_cache import Policy, active_span, candidate_scores, max_pool, phase, select, selection_margin
from tests.layered import Array, Attend
from tests.strategies import TinyModel, build, models, requests

SPEC = ModelSpec(vocab_size=10, mask_id=9, end_ids=())
SHIFTED = ModelSpec(vocab_size=10, mask_id=9, end_ids=(), shifted=True)
LETTERS = {"full": "F", "refresh": "R", "reuse": "u"}


class Toy:
    """A `LayeredModel` of one layer: `scores[h][p]` is how much a query of head h looks at position p.

    `queries[p]`, 1 unless given, multiplies what position p thinks of others; a mask token is looked at as its
    position is, less `mask_penalty`. It predicts token 3, the surer the lower the position. `passes` are the
    positions that each pass computed, and what its queries saw, head by head.
    """

    def __init__(
        self, *scores: Sequence[float], queries: Sequence[float] | None = None, mask_penalty: float = 0.0
    ) -> None:
        self.scores, self.mask_penalty = np.array(scores), mask_penalty
        self.queries = np.ones(len(scores[0])) if queries is None else np.array(queries)
        self.passes: list[tuple[list[int], list[list[int]]]] = []

    def __call__(self, ids: Sequence[int], positions: Sequence[int], attend: Attend) -> Array:
        heads, size = self.scores.shape
        q, k = np.zeros((heads, len(ids), size)), np.zeros((heads, len(ids), size))
        q[:, :, 0] = self.queries[positions]
        penalty = self.mask_penalty * (np.array(ids) == SPEC.mask_id)
        k[:, :, 0] = (self.scores[:, positions] - penalty) * math.sqrt(size)
        v = np.broadcast_to(np.eye(size)[positions], q.shape)
        weights = attend(0, q, k, v)
        assert ((weights > 0) == (weights[:, :1] > 0)).all()
        self.passes.append((list(positions), [np.flatnonzero(head[0]).tolist() for head in weights]))
        logits = np.zeros((len(ids), SPEC.vocab_size))
        logits[:, 3] = 5 - 0.1 * np.array(positions)
        return logits


def run(toy: Toy, prompt: int, gen: int, *, spec: ModelSpec = SPEC, **kwargs: Any) -> Decoded:
    """Decode after a prompt of so many zeros, one token a step, in one block unless told otherwise."""
    return decode(toy, spec, [0] * prompt, **{"gen_length": gen, "block_length": gen} | kwargs)


@pytest.mark.parametrize(
    ("delay", "refresh_interval", "phases"),
    [
        (0, None, "Ruuuuuu"),
        (1, None, "FRuuuuu"),
        (3, None, "FFFRuuu"),
        (0, 1, "RRRRRRR"),
        (2, 1, "FFRRRRR"),
        (0, 2, "RuRuRuR"),
        (1, 3, "FRuuRuu"),
        (2, 4, "FFRuuuR"),
        (7, 2, "FFFFFFF"),
    ],
)
def test_schedule_of_a_block(delay: int, refresh_interval: int | None, phases: str) -> None:
    """Full before the delay, then Refresh, then Reuse but for every interval-th step."""
    policy = Policy(delay=delay, refresh_interval=refresh_interval)
    assert "".join(LETTERS[phase(policy, i)] for i in range(7)) == phases


def test_mode_none_is_always_full() -> None:
    """Whatever else the policy says."""
    assert {phase(Policy(mode="none", delay=0, refresh_interval=1), i) for i in range(5)} == {"full"}


def test_each_block_starts_the_schedule_anew() -> None:
    """Blocks of 4, 4 and 2; the Full step that opens a block sees everything, for the cache is dropped."""
    toy = Toy([0.0] * 12)
    decoded = run(toy, 2, 10, block_length=4, cache={"delay": 1, "retention": 0.1})
    assert "".join(LETTERS[p] for p in decoded.phases) == "FRuuFRuuFR"
    assert decoded.forward_passes == 10
    everything = (list(range(12)), [list(range(12))])
    assert [p == everything for p in toy.passes] == [letter != "u" for letter in "FRuuFRuuFR"]


def test_steps_that_commit_nothing_count_in_the_schedule() -> None:
    """The timestep schedule gives 2 masks in 4 steps 0, 0, 0 and 2 commits."""
    decoded = run(Toy([0.0] * 3), 1, 2, steps=4, schedule="timestep", cache={"delay": 1})
    assert decoded.phases == ["full", "refresh", "reuse", "reuse"]


@pytest.mark.parametrize(
    ("block", "shifted", "span"),
    [(range(4, 8), False, range(4, 8)), (range(4, 8), True, range(3, 8)), (range(2), True, range(2))],
)
def test_active_span(block: range, shifted: bool, span: range) -> None:
    """A shifted model's has the row before the block, if there is one."""
    assert active_span(block, shifted) == span


@pytest.mark.parametrize(("spec", "span"), [(SPEC, [3, 4]), (SHIFTED, [2, 3, 4])])
def test_reuse_computes_the_span_and_sees_it_and_what_was_kept(spec: ModelSpec, span: list[int]) -> None:
    """At true positions: of the prompt's 0 to 2 and the next block's 5 and 6, the best candidate of each head."""
    toy = Toy([5, 1, 0, 9, 9, 0, 0], [0, 1, 0, 9, 9, 0, 5])
    decoded = run(toy, 3, 4, spec=spec, block_length=2, cache={"retention": 0.2, "pool": 1})
    assert decoded.token_ids == [3] * 4
    assert toy.passes[0] == (list(range(7)), [list(range(7))] * 2)
    assert toy.passes[1] == (span, [[0, *span], [*span, 6]])


def test_shared_selection_keeps_the_same_positions_in_every_head() -> None:
    """The mean of the heads is 2.5, 3, 0 and 2.5, so both keep 1, which neither likes best, then 0, the lower one."""
    toy = Toy([5, 3, 0, 0, 0, 0], [0, 3, 0, 5, 0, 0])
    run(toy, 4, 2, cache={"selection": "shared", "retention": 0.5, "pool": 1})
    assert toy.passes[1] == ([4, 5], [[0, 1, 4, 5]] * 2)


def test_a_shifted_model_decodes_from_its_first_position() -> None:
    """Without a prompt the span starts at 0, and row 0 predicts position 0."""
    toy = Toy([0.0] * 4)
    decoded = run(toy, 0, 4, spec=SHIFTED, block_length=2, cache={})
    assert decoded.token_ids == [3] * 4
    assert [positions for positions, _ in toy.passes] == [[0, 1, 2, 3], [0, 1], [0, 1, 2, 3], [1, 2, 3]]


def test_without_candidates_nothing_is_cached() -> None:
    """A shifted model's block right after a prompt of one token: the span is all there is."""
    toy = Toy([0.0] * 4)
    decoded = run(toy, 1, 3, spec=SHIFTED, cache={"retention": 0.5})
    assert decoded.phases == ["refresh", "reuse", "reuse"]
    assert toy.passes == [([0, 1, 2, 3], [[0, 1, 2, 3]])] * 3


def test_pooling_joins_prefix_and_suffix() -> None:
    """Position 5 follows position 2 among the candidates, so 2 has the pooled score of 5, and is the lower one."""
    toy = Toy([0, 0, 0, 0, 0, 7, 0])
    run(toy, 3, 4, block_length=2, cache={"retention": 0.2, "pool": 3})
    assert toy.passes[1] == ([3, 4], [[2, 3, 4]])


def test_a_refresh_selects_anew_from_the_tokens_of_its_moment() -> None:
    """Blocks of 2; in the second block, the first is no longer masked, hence preferred to the last."""
    toy = Toy([0, 2, 2, 0, 0, 3, 3], mask_penalty=2.0)
    run(toy, 1, 6, block_length=2, cache={"retention": 0.4, "pool": 1})
    assert toy.passes[1] == ([1, 2], [[1, 2, 5, 6]])
    assert toy.passes[3] == ([3, 4], [[1, 2, 3, 4]])


def test_guided_sides_select_and_cache_each_for_itself() -> None:
    """With the prompt 0 and 1 are the best; masked they fall behind the suffix."""
    toy = Toy([2, 2, 0, 0, 3, 3], mask_penalty=2.0)
    decoded = run(toy, 2, 4, block_length=2, cfg_scale=1.0, cache={"retention": 0.5, "pool": 1})
    assert decoded.phases[:2] == ["refresh", "reuse"]
    assert toy.passes[2] == ([2, 3], [[0, 1, 2, 3]])
    assert toy.passes[3] == ([2, 3], [[2, 3, 4, 5]])


def test_only_the_active_span_asks() -> None:
    """Queries outside it, here of the opposite sign, have no say; the shifted model's span has one more."""
    for spec, best in (SPEC, 0), (SHIFTED, 1):
        toy = Toy([3, 0, 1, 1, 1, 1], queries=[-9, -9, -9, 1, 1, 1])
        run(toy, 3, 3, spec=spec, cache={"retention": 0.4, "pool": 1})
        assert toy.passes[1][1] == [sorted({best, *toy.passes[1][0]})]


@pytest.mark.parametrize(
    ("selection", "scores"),
    [("per_head", [[3, 2, 5], [4, 2, 0]]), ("shared", [[2.5, 1.5, 1.5]] * 2)],
)
def test_scores_are_products_with_the_mean_query(selection: str, scores: list[list[float]]) -> None:
    """Mean queries (2, 4), (6, 0), (4, 4), (0, -4); products over sqrt 4 = 2 by head: 1 2 5, 3 0 3, 4 2 0, 2 2 -2."""
    q = np.zeros((4, 2, 4))
    q[:, :, :2] = [[[1, 5], [3, 3]], [[6, 1], [6, -1]], [[8, 0], [0, 8]], [[0, -4], [0, -4]]]
    k = np.zeros((2, 3, 4))
    k[:, :, :2] = [[[1, 0], [0, 1], [1, 2]], [[3, -1], [2, -1], [-1, 1]]]
    assert candidate_scores(q, k, selection) == scores


@pytest.mark.parametrize(
    ("pool", "pooled"),
    [(1, [4, 0, 1, 0, 2, 3]), (3, [4, 4, 1, 2, 3, 3]), (5, [4, 4, 4, 3, 3, 3]), (7, [4, 4, 4, 4, 3, 3])],
)
def test_pooled_scores(pool: int, pooled: list[int]) -> None:
    """Windows are centred, and shorter at the ends."""
    assert max_pool([4, 0, 1, 0, 2, 3], pool) == pooled


def kept(scores: Sequence[float], **policy: Any) -> list[int]:
    """What one head keeps of candidates with these scores, best first."""
    [positions], _ = select(np.ones((1, 1, 1)), np.array(scores).reshape(1, -1, 1), Policy(**policy))
    return positions


def test_equal_scores_keep_the_lower_position() -> None:
    """Pooled: 0 5 5 5 0 5 5."""
    scores = [0, 0, 5, 0, 0, 0, 5]
    assert kept(scores, retention=0.6) == [1, 2, 3, 5]
    assert kept(scores, retention=0.3) == [1, 2]
    assert kept([1.0] * 50, retention=0.5, pool=1) == list(range(25))


@pytest.mark.parametrize(
    ("n", "retention", "count"),
    [(5, 0.5, 2), (6, 0.5, 3), (9, 1.0, 9), (7, 1e-6, 1), (1, 0.1, 1), (0, 0.5, 0), (0, 1.0, 0), (100, 0.29, 28)],
)
def test_how_many_are_kept(n: int, retention: float, count: int) -> None:
    """int(n * retention) in double precision, in which 100 * 0.29 is just below 29; at least one if there is one."""
    assert len(kept([float(j % 7) for j in range(n)], retention=retention)) == count


@pytest.mark.parametrize(
    ("scores", "pool", "count", "margin"),
    [
        ([4, 1, 3, 2.5], 1, 2, 0.5),  # 2.5 behind 3
        ([4, 1, 3, 3], 1, 2, 0),  # equal, though not the same score
        ([4, 1, 3, 2.5], 1, 4, math.inf),  # none is dropped
        ([0, 5, 0, 1, 0], 3, 2, 4),  # 0 and 1 are kept; 2 shares the 5 with them, and 1 would have to pass it
        ([0, 5, 0, 4.5, 0], 3, 3, 0.5),  # 0 to 2 are kept; 3 has 4.5
        ([0, 0, 6, 7, 0], 3, 2, 1),  # 2 and 3 are kept; 1 would draw level at 7; 4 shares the 7
    ],
)
def test_selection_margin_is_the_smallest_change_that_matters(
    scores: list[float], pool: int, count: int, margin: float
) -> None:
    """Equal pooled scores are no close call where they are one and the same score."""
    ranked = sorted(range(len(scores)), key=lambda j: (-max_pool(scores, pool)[j], j))
    assert selection_margin(scores, pool, ranked[:count], ranked[count:]) == margin


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.sampled_from((1, 3, 5)), st.data())
def test_changes_below_the_selection_margin_keep_the_same(scores: list[int], pool: int, data: st.DataObject) -> None:
    """Any scores that differ by less than half the margin each."""
    retention = data.draw(st.sampled_from((0.2, 0.5, 0.8)))
    q, k = np.ones((1, 1, 1)), np.array(scores, dtype=float).reshape(1, -1, 1)
    before, margin = select(q, k, Policy(retention=retention, pool=pool))
    assume(margin > 0)
    change = st.floats(-0.499, 0.499).map(lambda x: x * min(margin, 10.0))
    changes = data.draw(st.lists(change, min_size=len(scores), max_size=len(scores)))
    after, _ = select(q, k + np.array(changes).reshape(1, -1, 1), Policy(retention=retention, pool=pool))
    assert set(after[0]) == set(before[0])


def test_the_margin_of_a_completion_includes_its_selections() -> None:
    """Candidates 1e-7 apart, of which one is kept, while tokens are 4 apart and confidences more than 1e-3."""
    decoded = run(Toy([1 + 1e-7, 1.0, 0, 0, 0, 0]), 4, 2, cache={"retention": 0.25, "pool": 1})
    assert decoded.margin == pytest.approx(1e-7, rel=1e-3)
    assert not decoded.decisive
    guided = Toy([4, 3, 0, 0, 4 + 1e-7, 0], mask_penalty=2.0)  # close where the prompt is masked as well
    decoded = run(guided, 2, 4, block_length=2, cfg_scale=1.0, cache={"retention": 0.25, "pool": 1})
    assert decoded.margin == pytest.approx(1e-7, rel=1e-3)
    assert run(Toy([2.0, 1.0, 0, 0, 0, 0]), 4, 2, cache={"retention": 0.25, "pool": 1}).margin > 1e-3


@pytest.mark.parametrize("cache", [{"refresh_interval": 1, "retention": 0.3}, {"delay": 100, "retention": 0.3}])
def test_without_reuse_decoding_is_dense(cache: dict[str, Any]) -> None:
    """Every step a Refresh, whose logits are those of a full pass; or none, because the delay outlasts the block."""

    @settings(deadline=None, derandomize=True, max_examples=20)
    @given(models(), st.data())
    def check(tiny: TinyModel, data: st.DataObject) -> None:
        compare_with_dense(tiny, data, cache)

    check()


@settings(deadline=None, derandomize=True, max_examples=40)
@given(models(), st.sampled_from(("per_head", "shared")), st.data())
def test_one_layer_that_keeps_everything_is_dense(tiny: TinyModel, selection: str, data: st.DataObject) -> None:
    """Keys and values of a first layer depend on their token alone, so those cached are those of a full pass."""
    assume(getattr(tiny.config, "n_layers", 0) == 1 or getattr(tiny.config, "num_hidden_layers", 0) == 1)
    compare_with_dense(tiny, data, {"retention": 1.0, "selection": selection})


def compare_with_dense(tiny: TinyModel, data: st.DataObject, cache: dict[str, Any]) -> None:
    """Decode a drawn request with a cache and without."""
    request, model = data.draw(requests(tiny.spec)), build(tiny)
    rest: dict[str, Any] = {"infill": request.infill, "reference": request.reference}
    dense = decode(model, tiny.spec, request.prompt_ids, **request.params, **rest)
    cached = decode(model, tiny.spec, request.prompt_ids, **request.params, **rest, cache=cache)
    assume(dense.decisive)
    assert (cached.token_ids, cached.finish_reason) == (dense.token_ids, dense.finish_reason)
    assert cached.forward_passes == dense.forward_passes
    assert cached.logprobs == [None if p is None else pytest.approx(p, abs=1e-4) for p in dense.logprobs]
