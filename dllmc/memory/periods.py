"""Plans of programs whose layers repeat: one period is planned exactly and tiled, whatever the depth.

The buffers of a repeated layer are those of the layer before, later by one period; a few are carried over from one
period to the next, and some stay alive all along. If these lie at the same offsets at both ends of a period, its plan
can be repeated any number of times: at each cut the periods agree on what lies where, and between two cuts nothing is
alive that one plan does not know. (MEMO, arXiv 2407.12117, plans a layer first and the network of layers then.)
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, permutations
from time import perf_counter

import numpy as np

from dllmc.memory.buffers import Buffer
from dllmc.memory.exact import ORDERS, Bracket, draft, settle, solve
from dllmc.memory.search import Ints

FEWEST_PERIODS = 3  # with fewer there is nothing to gain
STATES = 24  # offsets of the carried buffers to try
FOREVER = 1 << 60

Offsets = Mapping[Hashable, int]


@dataclass(frozen=True)
class Repetition:
    """Buffers that repeat `count` times from time `start`, each `length` later; times are ranks of the endpoints.

    `carried[k]` are those alive across the cut at `start + k * length` and no other cut, each like the one in the same
    place of `carried[k + 1]`; `staying` are alive across all cuts. Only buffers that are not idle are in.
    """

    buffers: Sequence[Buffer]
    start: int
    length: int
    count: int
    carried: Sequence[Sequence[Buffer]]
    staying: Sequence[Buffer]

    def cut(self, index: int) -> int:
        """The time where period `index` begins."""
        return self.start + index * self.length

    def window(self, lower: int, upper: int) -> list[Buffer]:
        """What is alive in `[lower, upper)`, for as long as it is within."""
        clipped = (replace(b, lower=max(b.lower, lower), upper=min(b.upper, upper)) for b in self.buffers)
        return [b for b in clipped if not b.idle]

    def pins(self, state: Sequence[int], *cuts: int) -> dict[Hashable, int]:
        """Offsets of what is alive across `cuts`; `state` gives those of the carried and then of the staying."""
        return {
            b.id: offset for cut in cuts for b, offset in zip([*self.carried[cut], *self.staying], state, strict=True)
        }


def find(buffers: Sequence[Buffer], times: int = 1) -> Repetition | None:
    """The longest repetition, `times` of them a period, cut where few buffers are carried over.

    None where it covers less than half the time, or has too few periods.
    """
    busy = [b for b in buffers if not b.idle]
    rank = {time: index for index, time in enumerate(sorted({t for b in busy for t in (b.lower, b.upper)}))}
    ranked = [replace(b, lower=rank[b.lower], upper=rank[b.upper]) for b in busy]
    begin, length, stop = _longest_run(_signatures(ranked, len(rank)))
    if stop - begin < len(rank) // 2:
        return None
    # Nothing may be alive across two cuts and yet not across all: periods as long as the longest lifetime see to that.
    longest = max((b.upper - b.lower for b in ranked if begin <= b.lower < begin + length), default=0)
    length *= times * max(1, -(-longest // length))
    starts = range(begin, min(begin + 2 * length, stop - FEWEST_PERIODS * length + 1))
    fewest_first = sorted(starts, key=lambda start: sum(b.lower < start < b.upper for b in ranked))
    cuts = (_repetition(ranked, start, length, stop) for start in fewest_first)
    return next((cut for cut in cuts if cut is not None), None)


def tile(repetition: Repetition, bracket: Bracket, capacity: int | None, deadline: float) -> None:
    """Improve `bracket`, of all the buffers, with plans of windows that do not grow with the number of periods.

    A window holds a part of the buffers for a part of their lives, so no plan of all is lower than the window's own:
    its bound is one for all, and its height is what tiling can hope for.
    """
    first, last = repetition.cut(0), repetition.cut(repetition.count)
    middle = repetition.window(first, repetition.cut(2))
    half_way = (perf_counter() + deadline) / 2
    target = 0
    for window in (
        middle,
        repetition.window(0, repetition.cut(1)),
        repetition.window(last - repetition.length, FOREVER),
    ):
        own = draft(window, capacity)
        settle(window, own, capacity, half_way)
        bracket.nodes += own.nodes
        bracket.bound = max(bracket.bound, own.bound)
        target = max(target, own.height)
        if window is middle:
            planned = own.offsets
    if capacity is not None:
        target = capacity
    if target >= bracket.height:
        return
    seen = [planned[b.id] for b in (*repetition.carried[1], *repetition.staying)]
    for state in islice(_states(repetition, target, seen), STATES):
        offsets = _tiled(repetition, state, target, deadline, bracket)
        if offsets is not None:
            bracket.better(repetition.buffers, {**bracket.offsets, **offsets})
            return


def _signatures(buffers: Sequence[Buffer], times: int) -> Ints:
    """For each time a number that says what begins there: how long it lives, its size and its alignment."""
    beginning: list[list[tuple[int, int, int]]] = [[] for _ in range(times)]
    for b in buffers:
        beginning[b.lower].append((b.upper - b.lower, b.size, b.alignment))
    numbers: dict[tuple[tuple[int, int, int], ...], int] = {}
    return np.array([numbers.setdefault(tuple(sorted(b)), len(numbers)) for b in beginning], np.int64)


def _longest_run(signatures: Ints) -> tuple[int, int, int]:
    """The longest `[begin, stop)` in which each signature is that of `length` before; `length` 0 without one."""
    best = (0, 0, 0)
    for length in range(1, len(signatures) // FEWEST_PERIODS + 1):
        differ = np.flatnonzero(signatures[length:] != signatures[:-length])
        ends = np.concatenate(([-1], differ, [len(signatures) - length]))
        runs = np.diff(ends) - 1
        at = int(np.argmax(runs))
        run = int(runs[at])
        if run >= (FEWEST_PERIODS - 1) * length and run + length > best[2] - best[0]:
            begin = int(ends[at]) + 1
            best = (begin, length, begin + run + length)
    return best


def _repetition(buffers: Sequence[Buffer], start: int, length: int, stop: int) -> Repetition | None:
    """The repetition cut at `start`, or None where the first cut is not like the second."""
    count = (stop - start) // length
    cuts = [start + index * length for index in range(count + 1)]
    staying = [b for b in buffers if b.lower < cuts[0] and cuts[-1] < b.upper]
    carried: list[list[Buffer]] = [[] for _ in cuts]
    for b in buffers:
        for index in range(max(0, (b.lower - start) // length), min(count, (b.upper - start) // length) + 1):
            if b.lower < cuts[index] < b.upper and not (b.lower < cuts[0] and cuts[-1] < b.upper):
                carried[index].append(b)
    for cut, across in zip(cuts, carried, strict=True):
        across.sort(key=lambda b: _place(b, cut))
    first, second = ([_place(b, cut) for b in across] for cut, across in zip(cuts[:2], carried[:2], strict=True))
    if first != second or {b.id for b in carried[0]} & {b.id for b in carried[1]}:
        return None
    return Repetition(buffers, start, length, count, carried, staying)


def _place(buffer: Buffer, origin: int) -> tuple[int, int, int, int]:
    return buffer.lower - origin, buffer.upper - origin, buffer.size, buffer.alignment


def _states(repetition: Repetition, capacity: int, seen: Sequence[int]) -> Iterator[Sequence[int]]:
    """Offsets for the carried and the staying: as `seen` in a plan, then in stacks from the bottom and from the top."""
    yield seen
    carried = repetition.carried[0]
    for order in permutations(range(len(carried))):
        for below in range(len(order), -1, -1):
            offsets: dict[int, int] = {}
            bottom, top = 0, capacity
            low = [(len(carried) + i, b) for i, b in enumerate(repetition.staying)] + [
                (i, carried[i]) for i in order[:below]
            ]
            for index, b in low:
                offsets[index] = -(-bottom // b.alignment) * b.alignment
                bottom = offsets[index] + b.size
            for index in order[below:]:
                top = offsets[index] = (
                    (top - carried[index].size) // carried[index].alignment * carried[index].alignment
                )
            if bottom <= top:
                yield [offsets[index] for index in range(len(offsets))]


def _tiled(
    repetition: Repetition, state: Sequence[int], capacity: int, deadline: float, bracket: Bracket
) -> dict[Hashable, int] | None:
    """Offsets of all buffers with `state` at every cut, or None where a window has none in a few attempts."""
    first, second, last = repetition.cut(0), repetition.cut(1), repetition.cut(repetition.count)
    offsets: dict[Hashable, int] = {}
    for lower, upper, cuts in (
        (first, second, (0, 1)),
        (0, first, (0,)),
        (last, FOREVER, (repetition.count,)),
    ):
        pins = repetition.pins(state, *cuts)
        window = repetition.window(lower, upper)
        outcome = solve(window, capacity, deadline, range(len(ORDERS)), pins)
        bracket.nodes += outcome.nodes
        if outcome.offsets is None:
            return None
        offsets.update(outcome.offsets)
    periods = [
        sorted(
            (b for b in repetition.buffers if lower <= b.lower < lower + repetition.length),
            key=lambda b: _place(b, lower),
        )
        for lower in (repetition.cut(index) for index in range(repetition.count))
    ]
    for period in periods[1:]:
        offsets |= {b.id: offsets[like.id] for like, b in zip(periods[0], period, strict=True)}
    return offsets
