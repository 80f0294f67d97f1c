"""Plans are sound, aligned and honest about being optimal, judged by brute force."""

from itertools import combinations, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmc.memory.planner import Buffer, Plan, lower_bound, plan


@st.composite
def instances(draw: st.DrawFn, most: int = 14, aligned: bool = False) -> list[Buffer]:
    """Buffers with lifetimes within [0, 12]; empty lifetimes and empty buffers are among them."""
    buffers = []
    for index in range(draw(st.integers(0, most))):
        lower = draw(st.integers(0, 12))
        upper = draw(st.integers(lower, 12))
        alignment = draw(st.sampled_from((1, 2, 3, 4, 64))) if not aligned else 1
        buffers.append(Buffer(f"b{index}", lower, upper, draw(st.integers(0, 9)), alignment))
    return buffers


def alive_together(a: Buffer, b: Buffer) -> bool:
    return any(a.lower <= time < a.upper and b.lower <= time < b.upper for time in range(13))


def overlap(a: Buffer, b: Buffer, offsets: dict[object, int]) -> bool:
    """Whether two buffers share a unit of memory, unit by unit."""
    units = [set(range(offsets[buffer.id], offsets[buffer.id] + buffer.size)) for buffer in (a, b)]
    return bool(units[0] & units[1])


def live_peak(buffers: list[Buffer]) -> int:
    """The largest sum of sizes at any time, time by time."""
    return max(sum(b.size for b in buffers if b.lower <= time < b.upper) for time in range(13))


def optimum(buffers: list[Buffer]) -> int:
    """The lowest height of any plan, alignment being 1: some order in which each buffer is put as low as it fits."""
    heights = [0]
    for order in permutations(buffers):
        offsets: dict[object, int] = {}
        for buffer in order:
            offsets[buffer.id] = next(
                offset
                for offset in range(sum(b.size for b in buffers) + 1)
                if not any(
                    alive_together(buffer, other) and overlap(buffer, other, {**offsets, buffer.id: offset})
                    for other in order[: len(offsets)]
                )
            )
        heights.append(max((offsets[b.id] + b.size for b in buffers), default=0))
    return min(heights[1:], default=0)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(instances())
def test_no_two_buffers_alive_together_overlap(buffers: list[Buffer]) -> None:
    found = plan(buffers)
    offsets = dict(found.offsets)
    assert set(offsets) == {b.id for b in buffers}
    for a, b in combinations(buffers, 2):
        assert not (alive_together(a, b) and overlap(a, b, offsets)), (a, b)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(instances())
def test_offsets_are_aligned_and_the_height_holds_every_buffer(buffers: list[Buffer]) -> None:
    found = plan(buffers)
    for buffer in buffers:
        assert found.offsets[buffer.id] >= 0
        assert found.offsets[buffer.id] % buffer.alignment == 0
    assert found.height == max((found.offsets[b.id] + b.size for b in buffers), default=0)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(instances())
def test_the_lower_bound_is_the_live_peak_and_optimal_says_whether_it_is_met(buffers: list[Buffer]) -> None:
    found = plan(buffers)
    assert found.lower_bound == lower_bound(buffers) == live_peak(buffers)
    assert found.height >= found.lower_bound
    assert found.optimal == (found.height == found.lower_bound)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(instances(most=5, aligned=True))
def test_a_plan_that_claims_to_be_optimal_is_as_low_as_any(buffers: list[Buffer]) -> None:
    """And one that does not is no lower than the best of all plans."""
    found = plan(buffers)
    best = optimum(buffers)
    assert found.height >= best
    assert not found.optimal or found.height == best


@settings(deadline=None, derandomize=True)
@given(st.data())
def test_the_order_in_which_buffers_are_listed_does_not_matter(data: st.DataObject) -> None:
    buffers = data.draw(instances(aligned=True))
    shuffled = data.draw(st.permutations(buffers))
    assert plan(shuffled).height == plan(buffers).height


@pytest.mark.parametrize(
    ("buffers", "offsets", "lower_bound", "optimal"),
    [
        ([], {}, 0, True),
        ([Buffer("a", 0, 1, 7)], {"a": 0}, 7, True),
        # One after the other: the same bytes. Half-open: a ends where b begins.
        ([Buffer("a", 0, 2, 4), Buffer("b", 2, 3, 4)], {"a": 0, "b": 0}, 4, True),
        # Together: the larger first, the other on top.
        ([Buffer("a", 0, 2, 4), Buffer("b", 1, 3, 6)], {"b": 0, "a": 6}, 10, True),
        # a chain of three, where the last goes below the second, into the first's place
        (
            [Buffer("a", 0, 2, 5), Buffer("b", 1, 4, 4), Buffer("c", 2, 4, 3)],
            {"a": 0, "b": 5, "c": 0},
            9,
            True,
        ),
        # c fits both below a (room 6) and between a and b (room 4): the smaller room is taken.
        (
            [
                Buffer("hole", 0, 1, 12),
                Buffer("a", 0, 4, 11),
                Buffer("gap", 0, 1, 4),
                Buffer("b", 0, 4, 3),
                Buffer("c", 2, 4, 2),
            ],
            {"hole": 0, "a": 12, "gap": 23, "b": 27, "c": 23},
            30,
            True,
        ),
        # e fits exactly where x and y were, between d and b.
        (
            [
                Buffer("x", 0, 1, 3),
                Buffer("y", 0, 1, 2),
                Buffer("b", 0, 4, 2),
                Buffer("c", 2, 4, 2),
                Buffer("d", 2, 4, 2),
                Buffer("e", 2, 4, 1),
            ],
            {"x": 0, "y": 3, "b": 5, "c": 0, "d": 2, "e": 4},
            7,
            True,
        ),
        # Alignment leaves a gap, so the bound is not met.
        ([Buffer("a", 0, 1, 65, 64), Buffer("b", 0, 1, 3, 64)], {"a": 0, "b": 128}, 68, False),
    ],
)
def test_small_plans(buffers: list[Buffer], offsets: dict[str, int], lower_bound: int, optimal: bool) -> None:
    height = max((offsets[str(b.id)] + b.size for b in buffers), default=0)
    assert plan(buffers) == Plan(offsets, height, lower_bound, optimal)


def test_best_fit_is_not_always_optimal_and_then_says_so() -> None:
    """Here c, the largest, comes first and a on top of it, which splits the room that b and d need together."""
    buffers = [Buffer("a", 1, 5, 2), Buffer("b", 3, 4, 2), Buffer("c", 4, 5, 3), Buffer("d", 2, 4, 2)]
    assert optimum(buffers) == live_peak(buffers) == 6
    assert plan(buffers) == Plan({"c": 0, "a": 3, "d": 0, "b": 5}, 7, 6, False)
