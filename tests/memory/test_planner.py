"""Plans are sound and aligned, and optimal where there is time, judged by brute force and by published instances."""

import csv
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmc.memory import best_fit
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


def optimum(buffers: Sequence[Buffer]) -> int:
    """The lowest height of any plan: some order in which each buffer is put as low as it fits.

    In the order of their offsets in a lowest plan, none can be put higher than there.
    """
    best = sum(b.size + b.alignment for b in buffers)
    idle = max((b.size for b in buffers), default=0)  # one that is never alive has its bytes too
    busy = [b for b in buffers if b.size and b.lower < b.upper]
    for order in permutations(busy):
        offsets: dict[object, int] = {}
        for buffer in order:
            below = [other for other in order[: len(offsets)] if alive_together(buffer, other)]
            offset = 0
            while any(overlap(buffer, other, {**offsets, buffer.id: offset}) for other in below):
                offset += buffer.alignment
            offsets[buffer.id] = offset
        best = min(best, max((offsets[b.id] + b.size for b in order), default=0))
    return max(best, idle)


def require_sound(buffers: Sequence[Buffer], found: Plan) -> None:
    """Every buffer has an offset that is aligned, and shares no unit with another that is alive with it."""
    offsets = dict(found.offsets)
    assert set(offsets) == {b.id for b in buffers}
    for buffer in buffers:
        assert offsets[buffer.id] >= 0
        assert offsets[buffer.id] % buffer.alignment == 0
    for a, b in combinations([b for b in buffers if b.size], 2):
        if a.lower < b.upper and b.lower < a.upper and min(a.upper - a.lower, b.upper - b.lower) > 0:
            above = offsets[a.id] >= offsets[b.id] + b.size
            assert above or offsets[b.id] >= offsets[a.id] + a.size, (a, b)
    assert found.height == max((offsets[b.id] + b.size for b in buffers), default=0)
    assert found.height >= found.lower_bound


@settings(deadline=None, derandomize=True, max_examples=200)
@given(instances())
def test_plans_are_sound_however_little_time_there_is(buffers: list[Buffer]) -> None:
    found = plan(buffers, time_limit=0.05)
    require_sound(buffers, found)
    for a, b in combinations(buffers, 2):  # as above, unit by unit
        assert not (alive_together(a, b) and overlap(a, b, dict(found.offsets))), (a, b)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(instances())
def test_the_lower_bound_is_the_live_peak_and_a_plan_that_meets_it_is_optimal(buffers: list[Buffer]) -> None:
    found = plan(buffers, time_limit=0.05)
    assert found.lower_bound == lower_bound(buffers) == live_peak(buffers)
    assert found.optimal or found.height > found.lower_bound


def brute_force(most: int, examples: int) -> Callable[[], None]:
    @settings(deadline=None, derandomize=True, max_examples=examples)
    @given(instances(most=most) | instances(most=most, aligned=True))
    def compare(buffers: list[Buffer]) -> None:
        found, best = plan(buffers, time_limit=600), optimum(buffers)
        require_sound(buffers, found)
        assert (found.height, found.optimal) == (best, True)
        for capacity in {0, best - 1, best, best + 1} - {-1}:
            within = plan(buffers, capacity, time_limit=600)
            require_sound(buffers, within)
            assert (within.height <= capacity) == (best <= capacity)
            assert not within.optimal or within.height == best

    return compare


def test_plans_are_as_low_as_any() -> None:
    """Proven optimal, with alignment too; and a capacity is met exactly where it can be."""
    brute_force(5, 150)()


@pytest.mark.slow
def test_plans_of_more_buffers_are_as_low_as_any() -> None:
    brute_force(7, 1500)()


@st.composite
def layered(draw: st.DrawFn, buffers: int, layers: int | None = None) -> list[Buffer]:
    """A prologue, a period of random buffers that is repeated, an epilogue; some reach into the next period."""
    length = draw(st.integers(2, 6))
    count = layers or draw(st.integers(3, 12))
    shape = st.tuples(st.integers(0, length - 1), st.integers(1, length), st.integers(1, 9))
    period = draw(st.lists(shape, min_size=1, max_size=buffers))
    made = [
        Buffer((layer, i), layer * length + lower, layer * length + lower + life, size)
        for layer in range(count)
        for i, (lower, life, size) in enumerate(period)
    ]
    ends = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 9)), max_size=2)
    for name, start in (("before", -3), ("behind", count * length)):
        made += [
            Buffer((name, i), start + at, start + at + life, size) for i, (at, life, size) in enumerate(draw(ends))
        ]
    if draw(st.booleans()):
        made.append(Buffer("always", -5, count * length + 9, draw(st.integers(1, 5))))
    return made


@settings(deadline=None, derandomize=True, max_examples=150)
@given(layered(6))
def test_repeated_layers_are_planned_soundly(buffers: list[Buffer]) -> None:
    require_sound(buffers, plan(buffers, time_limit=0.2))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(layered(1, 3))
def test_repeated_layers_are_planned_as_low_as_any(buffers: list[Buffer]) -> None:
    """Few enough buffers for brute force."""
    moved = [replace(b, lower=b.lower + 5, upper=b.upper + 5) for b in buffers[:6]]
    times = {t: i for i, t in enumerate(sorted({t for b in moved for t in (b.lower, b.upper)}))}
    ranked = [replace(b, lower=times[b.lower], upper=times[b.upper]) for b in moved]
    found = plan(ranked, time_limit=600)
    require_sound(ranked, found)
    assert (found.height, found.optimal) == (optimum(ranked), True)


def deep(layers: int) -> list[Buffer]:
    """Layers of twelve buffers that no greedy order plans as low as can be."""
    sizes = random.Random(3)
    shapes = []
    for index in range(12):
        life = sizes.choice((2, 3, 4, 7))
        shapes.append((index, life, 64 * sizes.choice((3, 5, 7, 11, 16))))
    return [
        Buffer((layer, lower), 12 * layer + lower, 12 * layer + lower + life, size, 64)
        for layer in range(layers)
        for lower, life, size in shapes
    ]


def test_the_work_does_not_grow_with_depth() -> None:
    """Ten layers or eighty: the same period is searched once; the plan is proven optimal."""
    found = {layers: plan(deep(layers), time_limit=600) for layers in (10, 80)}
    for layers, each in found.items():
        require_sound(deep(layers), each)
        assert each.optimal
        greedy = best_fit.lowest(deep(layers), each.lower_bound)
        assert max(greedy[b.id] + b.size for b in deep(layers)) > each.height
    assert found[80].height == found[10].height
    assert found[80].nodes == found[10].nodes


def minimalloc(name: str) -> list[Buffer]:
    """One of the published instances."""
    with (Path(__file__).parent / "minimalloc" / name).open() as file:
        return [Buffer(r["id"], int(r["lower"]), int(r["upper"]), int(r["size"])) for r in csv.DictReader(file)]


@pytest.mark.parametrize("letter", "CGHJK")
def test_published_instances_are_solved(letter: str) -> None:
    """Within the capacity that their authors give; no greedy order is."""
    buffers = minimalloc(f"{letter}.1048576.csv")
    found = plan(buffers, 1 << 20, time_limit=600)
    require_sound(buffers, found)
    assert found.height <= 1 << 20
    greedy = best_fit.lowest(buffers, 0)
    assert max(greedy[b.id] + b.size for b in buffers) > 1 << 20


def test_a_published_instance_of_five_buffers() -> None:
    buffers = minimalloc("input.12.csv")
    found = plan(buffers)
    require_sound(buffers, found)
    assert (found.height, found.optimal) == (12, True)


@settings(deadline=None, derandomize=True)
@given(st.data())
def test_the_order_in_which_buffers_are_listed_does_not_matter(data: st.DataObject) -> None:
    buffers = data.draw(instances(most=8, aligned=True))
    shuffled = data.draw(st.permutations(buffers))
    assert plan(shuffled, time_limit=600).height == plan(buffers, time_limit=600).height


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
        # Alignment leaves a gap below the larger one, so it goes on top: above the bound, and yet no plan is lower.
        ([Buffer("a", 0, 1, 65, 64), Buffer("b", 0, 1, 3, 64)], {"a": 64, "b": 0}, 68, True),
    ],
)
def test_small_plans(buffers: list[Buffer], offsets: dict[str, int], lower_bound: int, optimal: bool) -> None:
    height = max((offsets[str(b.id)] + b.size for b in buffers), default=0)
    assert plan(buffers) == Plan(offsets, height, lower_bound, optimal)


def test_what_best_fit_misses_is_found_by_search() -> None:
    """c, the largest, comes first and a on top of it, which splits the room that b and d need together."""
    buffers = [Buffer("a", 1, 5, 2), Buffer("b", 3, 4, 2), Buffer("c", 4, 5, 3), Buffer("d", 2, 4, 2)]
    greedy = best_fit.in_order(sorted(buffers, key=best_fit.ORDERS[0]))
    assert max(greedy[b.id] + b.size for b in buffers) == 7
    found = plan(buffers)
    require_sound(buffers, found)
    assert (found.height, found.optimal) == (6, True)
