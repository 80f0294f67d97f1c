"""The vectorised commit against a brute force that looks at one request at a time."""

import math
from typing import NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmc.runtime.sampling import deferred_choices, select_commits


class Row(NamedTuple):
    segment: int
    position: int
    confidence: float
    deferred: bool


CONFIDENCES = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, -0.5, -3.0, math.nan, math.inf, -math.inf])


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Row], list[int], list[float]]:
    """Segments of 0 to 6 rows by ascending position, interleaved; few distinct confidences, so that ties are common."""
    segments = draw(st.integers(1, 5))
    rows = []
    for segment in range(segments):
        for position in draw(st.lists(st.integers(0, 20), max_size=6, unique=True)):
            rows.append(Row(segment, position, draw(CONFIDENCES), draw(st.booleans())))
    counts = draw(st.lists(st.integers(0, 7), min_size=segments, max_size=segments))
    thresholds = st.sampled_from([math.inf, 0.5, 1.0, -0.5])
    mixed = sorted(draw(st.permutations(rows)), key=lambda row: row.position)
    return mixed, counts, draw(st.lists(thresholds, min_size=segments, max_size=segments))


def one_request(rows: list[Row], count: int, threshold: float) -> set[Row]:
    """Commit one request's rows as semantics.md tells it."""
    all_deferred = all(row.deferred for row in rows)

    def confidence(row: Row) -> float:
        return -math.inf if row.deferred and not all_deferred else row.confidence

    def better_first(row: Row) -> tuple[bool, float, int]:
        c = confidence(row)
        return (math.isnan(c), 0.0 if math.isnan(c) else -c, row.position)

    ranked = sorted(rows, key=better_first)
    if threshold == math.inf:
        return set(ranked[:count])
    return set(ranked[:1]) | {row for row in rows if confidence(row) >= threshold}


def select(rows: list[Row], counts: list[int], thresholds: list[float]) -> list[bool]:
    chosen = select_commits(
        np.array([row.segment for row in rows], np.int64),
        np.array([row.confidence for row in rows], np.float32),
        np.array([row.deferred for row in rows], np.bool_),
        np.array(counts, np.int64),
        np.array(thresholds, np.float32),
    )
    assert chosen.dtype == np.bool_
    assert chosen.shape == (len(rows),)
    return list(chosen)


@given(batches())
@settings(deadline=None, derandomize=True, max_examples=500)
def test_a_batch_commits_what_each_request_commits_alone(batch: tuple[list[Row], list[int], list[float]]) -> None:
    rows, counts, thresholds = batch
    expected: set[Row] = set()
    for segment, (count, threshold) in enumerate(zip(counts, thresholds, strict=True)):
        expected |= one_request([row for row in rows if row.segment == segment], count, threshold)
    # Rows are compared by place: NaN is not equal to itself.
    places = {(row.segment, row.position) for row in expected}
    assert select(rows, counts, thresholds) == [(row.segment, row.position) in places for row in rows]


def test_ties_commit_the_lowest_positions() -> None:
    rows = [Row(0, 3, 0.5, False), Row(0, 6, 0.5, False), Row(0, 9, 0.5, False)]
    assert select(rows, [2], [math.inf]) == [True, True, False]


def test_zeros_of_either_sign_tie() -> None:
    for values in ((0.0, -0.0, 0.0), (-0.0, 0.0, -0.0)):
        rows = [Row(0, position, value, False) for position, value in enumerate(values)]
        assert select(rows, [2], [math.inf]) == [True, True, False]


def test_a_threshold_commits_the_best_when_none_reaches_it() -> None:
    rows = [Row(0, 1, 0.2, False), Row(0, 2, 0.3, False), Row(1, 1, 0.9, False), Row(1, 2, 0.95, False)]
    assert select(rows, [1, 1], [0.9, 0.9]) == [False, True, True, True]


def test_a_threshold_is_compared_in_float32() -> None:
    """0.9 as float32 is below 0.9 as float64: a confidence of exactly float32(0.9) reaches it."""
    assert select([Row(0, 0, 1.0, False), Row(0, 1, 0.9, False)], [1], [0.9]) == [True, True]


def test_deferred_choices_wait_until_nothing_else_is_left() -> None:
    rows = [Row(0, 1, 0.99, True), Row(0, 2, 0.1, False), Row(1, 1, 0.2, True), Row(1, 2, 0.7, True)]
    assert select(rows, [1, 1], [math.inf, math.inf]) == [False, True, False, True]
    assert select(rows, [1, 1], [0.15, 0.15]) == [False, True, True, True]


def test_a_timestep_segment_may_commit_nothing() -> None:
    assert select([Row(0, 1, 1.0, False), Row(1, 1, 1.0, False)], [0, 1], [math.inf, math.inf]) == [False, True]


def test_nan_confidences_rank_last_and_still_make_progress() -> None:
    rows = [Row(0, 1, math.nan, False), Row(0, 2, -math.inf, False), Row(1, 5, math.nan, False)]
    assert select(rows, [1, 1], [math.inf, 0.5]) == [False, True, True]


TOKEN_IDS = st.lists(st.integers(0, 9), max_size=4)


@given(st.lists(TOKEN_IDS, min_size=1, max_size=5), st.data())
@settings(deadline=None, derandomize=True, max_examples=200)
def test_a_row_is_deferred_by_its_own_requests_tokens_only(defer: list[list[int]], data: st.DataObject) -> None:
    pairs = st.tuples(st.integers(0, len(defer) - 1), st.integers(0, 12))
    rows = data.draw(st.lists(pairs, max_size=20))
    segment = np.array([s for s, _ in rows], np.int64)
    token = np.array([t for _, t in rows], np.int64)
    lists = np.array([[*ids, *[-1] * (4 - len(ids))] for ids in defer], np.int64)
    assert list(deferred_choices(segment, token, lists)) == [t in defer[s] for s, t in rows]
