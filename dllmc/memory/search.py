"""A complete search for offsets under a capacity, from the bottom up, one section of time at a time.

Time is cut where the set of live buffers changes. Over these sections stands a skyline: what is placed, and what was
given up as waste. Buffers lie on the skyline only, so whatever is beneath it is settled. At each node one section is
chosen and asked *which buffer comes next here?*: one of those that fit, or none at this level. The section with the
fewest answers is asked first; where there is one answer nothing is tried, and where there is none the node is dead.
Sections that were found dead before count as having fewer: a search that fails far from its mistake comes back to it
(weighted degrees, Boussemart et al., ECAI 2004).

Monotonic floors, canonical placements and independent parts follow MiniMalloc (doi 10.1145/3623278.3624752). The proofs
are with the methods. They share one argument: among all solutions take one that minimises sum(weight * offset), for any
positive weights. It is *canonical*: no buffer can be moved down, so each rests on 0 or on the end of another one,
rounded up to its alignment. A rule that holds for every canonical solution loses no instance that can be solved.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dllmc.memory.buffers import Buffer

Ints = npt.NDArray[np.int64]
FAR = 1 << 60  # above every offset
WASTE = 4  # answers for which waste counts: it settles less than a placement does


class Outcome(NamedTuple):
    """Offsets where a solution was found; else whether none exists. `nodes` is the work that it took."""

    offsets: dict[Hashable, int] | None
    exhausted: bool
    nodes: int


class _Part(NamedTuple):
    """Sections `[start, stop)`, which share no open buffer with others; `rest` is what to solve after it.

    Parts are independent, so one that is solved stays solved: choices beyond the first `choices` are then dropped.
    """

    start: int
    stop: int
    choices: int
    rest: "_Part | None"


class _Move(NamedTuple):
    """Place `buffer` at `level`; where it is None, let nothing in `section` start below `level`."""

    section: int
    buffer: int | None
    level: int


@dataclass
class _Skyline:
    """What a node knows. A buffer is open while its offset is -1."""

    floor: Ints  # [sections]: no open buffer can start lower
    top: Ints  # [sections]: where the highest placed buffer ends
    left: Ints  # [sections]: sum of the sizes of open buffers
    offset: Ints  # [buffers]
    barred: Ints  # [buffers]: an offset that would repeat, in another order, what is tried elsewhere

    def copy(self) -> "_Skyline":
        return _Skyline(self.floor.copy(), self.top.copy(), self.left.copy(), self.offset.copy(), self.barred.copy())


class _Branch(NamedTuple):
    """The moves from a node, the last to be tried first, and the parts into which its part falls."""

    moves: list[_Move]
    part: _Part


def search(
    buffers: Sequence[Buffer],
    capacity: int,
    budget: int,
    deadline: float,
    pins: Mapping[Hashable, int] | None = None,
) -> Outcome:
    """Offsets with `offset + size <= capacity` for all buffers, within `budget` nodes and until `deadline`.

    Where several buffers may come next, those earlier in `buffers` are tried first. Buffers in `pins` have their
    offsets already; none of `buffers` may be idle.
    """
    if not buffers:
        return Outcome({}, False, 0)
    return _Search(buffers, capacity, pins or {}).run(budget, deadline)


class _Search:
    def __init__(self, buffers: Sequence[Buffer], capacity: int, pins: Mapping[Hashable, int]) -> None:
        self.ids = [b.id for b in buffers]
        self.capacity = capacity
        self.size = _ints(b.size for b in buffers)
        self.alignment = _ints(b.alignment for b in buffers)
        self.pinned = sorted((pins[b.id], i) for i, b in enumerate(buffers) if b.id in pins)
        self.first, self.end = _sections(buffers)
        width = self.end - self.first
        member = np.repeat(np.arange(len(buffers)), width)
        section = np.arange(len(member)) - np.repeat(np.cumsum(width) - width - self.first, width)
        self.members = member[np.argsort(section, kind="stable")]  # of section 0, then of section 1, ...
        count = int(self.end.max())
        self.begins = np.searchsorted(np.sort(section), np.arange(count + 1))  # where a section's members begin
        self.earlier_twins = self._earlier_twins()
        left = np.bincount(section, self.size[member]).astype(np.int64)
        self.deaths = np.ones(count)
        none = np.full(len(buffers), -1)
        self.sky = _Skyline(np.zeros(count + 1, np.int64), np.zeros(count + 1, np.int64), left, none, none.copy())

    def run(self, budget: int, deadline: float) -> Outcome:
        """Depth first; `choices` holds the moves that are still to be tried, and from where."""
        choices: list[tuple[_Skyline, list[_Move], _Part]] = []
        part: _Part | None = _Part(0, len(self.sky.left), 0, None)
        for node in range(budget):
            if perf_counter() > deadline:
                return Outcome(None, False, node)
            while part is not None and not (opened := self._open(part)).size:
                del choices[part.choices :]
                part = part.rest
            if part is None:
                return Outcome(dict(zip(self.ids, self.sky.offset.tolist(), strict=True)), False, node)
            lowest = self._raise_floors(part, opened)
            branch = None if lowest is None else self._branch(part, opened, lowest, len(choices))
            if branch is not None:
                moves, part = branch
                if len(moves) > 1:
                    choices.append((self.sky.copy(), moves, part))
            elif choices:
                kept, moves, part = choices[-1]
                if len(moves) == 1:
                    choices.pop()
                self.sky = kept.copy()
            else:
                return Outcome(None, True, node + 1)
            self._apply(moves.pop())
        return Outcome(None, False, budget)

    def _open(self, part: _Part) -> Ints:
        inside = (self.sky.offset < 0) & (self.first >= part.start) & (self.end <= part.stop)
        return np.flatnonzero(inside)

    def _raise_floors(self, part: _Part, opened: Ints) -> Ints | None:
        """The lowest offset of each open buffer; None where some section cannot hold what is left of it.

        A buffer starts above the floors of all its sections, and a floor is no lower than any open buffer of its
        section can start: repeated until nothing rises.
        """
        inside = slice(part.start, part.stop)
        members = self.members[self.begins[part.start] : self.begins[part.stop]]
        begins = self.begins[inside] - self.begins[part.start]
        floor, left = self.sky.floor, self.sky.left[inside]
        reach = np.full(len(self.ids), FAR)
        while True:
            lowest = self._rest_on(floor, opened)
            if self.pinned and not self._keep_clear_of_pins(opened, lowest):
                return None
            reach[opened] = lowest
            risen = np.where(left > 0, np.minimum.reduceat(reach[members], begins), 0)
            if (risen <= floor[inside]).all():
                dead = floor[inside] + left > self.capacity
                self.deaths[inside] += dead
                return None if dead.any() else lowest
            np.maximum(floor[inside], risen, out=floor[inside])

    def _rest_on(self, heights: Ints, which: Ints) -> Ints:
        """The lowest aligned offset that is nowhere below `heights` for each buffer."""
        spans = np.stack((self.first[which], self.end[which]), axis=1).ravel()
        return _aligned(np.maximum.reduceat(heights, spans)[::2], self.alignment[which])

    def _keep_clear_of_pins(self, opened: Ints, lowest: Ints) -> bool:
        """Lift what would run into an open pinned buffer; False where a pinned one's own place is taken."""
        for pin, index in self.pinned:
            at = np.searchsorted(opened, index)
            if at == len(opened) or opened[at] != index:
                continue
            if lowest[at] > pin:
                return False
            meets = (self.first[opened] < self.end[index]) & (self.first[index] < self.end[opened])
            hits = meets & (lowest < pin + self.size[index]) & (lowest + self.size[opened] > pin)
            lowest[hits] = _aligned(pin + self.size[index], self.alignment[opened[hits]])
            lowest[at] = pin
        return True

    def _branch(self, part: _Part, opened: Ints, lowest: Ints, choices: int) -> _Branch | None:
        """The moves at the section with the fewest; None where some section has none.

        Only valleys are asked: runs of sections on one level between higher walls. What starts at a valley's level
        lies within it, for the walls are settled; so every open buffer of a section starts at the valley's level, if
        it fits there, or higher. That makes the answers complete: one that fits starts here, or none does. A buffer
        that fits is no answer where it would rest on waste alone (not canonical), or is barred (see `_apply`).
        """
        start, stop = part.start, part.stop
        first, end, size = self.first[opened] - start, self.end[opened] - start, self.size[opened]
        left = self.sky.left[start:stop]
        level = np.where(left > 0, self.sky.floor[start:stop], FAR)

        bounds = np.flatnonzero(np.concatenate(([True], level[1:] != level[:-1], [True])))
        heights = level[bounds[:-1]]
        walls = np.concatenate(([FAR], heights, [FAR]))
        valley = (heights < FAR) & (heights < walls[:-2]) & (heights < walls[2:])
        run = np.repeat(np.arange(len(heights)), np.diff(bounds))

        mine = run[first]
        fits = (mine == run[end - 1]) & valley[mine] & (lowest == heights[mine])
        rests = self._rest_on(self.sky.top, opened) == lowest
        rests[np.isin(opened, [index for _, index in self.pinned])] = True
        fitting = fits & rests & (self.sky.barred[opened] != lowest)

        # Waste: the next level at which something may start. What fits here but starts higher rests on an open buffer.
        reach = np.full(len(self.ids), FAR)
        reach[opened] = np.where(fits, lowest + size.min(), lowest)
        members = self.members[self.begins[start] : self.begins[stop]]
        higher = np.minimum.reduceat(reach[members], self.begins[start:stop] - self.begins[start])
        waste = higher + left <= self.capacity
        ways = _coverage(first[fitting], end[fitting], stop - start) + waste

        slack = self.capacity - self.sky.floor[start:stop] - left
        asked = np.flatnonzero(valley[run])
        cost = np.where(ways > 1, (ways + waste * (WASTE - 1)) / self.deaths[start:stop], ways / FAR)[asked]
        section = int(asked[np.lexsort((slack[asked], cost))[0]])
        if ways[section] == 0:
            self.deaths[start + section] += 1
            return None

        here = (first <= section) & (section < end)
        moves = [_Move(start + section, int(b), int(level[section])) for b in opened[here & fitting]]
        raised = self._next_level(opened, lowest, here, fits)
        if raised + left[section] <= self.capacity:
            moves.append(_Move(start + section, None, raised))
        return _Branch(moves[::-1], self._split(part, first, end, section, choices)) if moves else None

    def _next_level(self, opened: Ints, lowest: Ints, here: npt.NDArray[np.bool_], fits: npt.NDArray[np.bool_]) -> int:
        """The lowest level above the valley's at which an open buffer may start in a section, `here` being its own.

        The lowest of them rests on a buffer that shares another of its sections and is not of this one.
        """
        level = int(lowest[here & ~fits].min(initial=FAR))
        others = opened[~here]
        ends = lowest[~here] + self.size[others]
        for buffer in opened[here & fits]:
            meets = (self.first[others] < self.end[buffer]) & (self.first[buffer] < self.end[others])
            end = int(ends[meets].min(initial=FAR))
            level = min(level, -(-end // int(self.alignment[buffer])) * int(self.alignment[buffer]))
        return level

    def _split(self, part: _Part, first: Ints, end: Ints, section: int, choices: int) -> _Part:
        """The part cut where no open buffer crosses; the piece with `section` comes first.

        The piece that comes last is done when the whole part is, so it takes the whole part's `choices`.
        """
        crossed = _coverage(first + 1, end, part.stop - part.start + 1)
        cuts = np.flatnonzero(crossed == 0)
        inhabited = _coverage(first, end, part.stop - part.start) > 0
        pieces = [(int(a), int(b)) for a, b in pairwise(cuts) if inhabited[a]]
        pieces.sort(key=lambda piece: piece[0] <= section < piece[1])  # stable: the section's own goes to the end
        rest, depth = part.rest, part.choices
        for a, b in pieces:
            rest, depth = _Part(part.start + a, part.start + b, depth, rest), choices
        assert rest is not None
        return rest

    def _apply(self, move: _Move) -> None:
        """Place a buffer or raise a floor.

        Of two buffers with the same lifetime, one right on top of the other, either may be the lower: both orders end
        at the same height. The earlier one is taken to be the lower, and so barred from the later one's top. (Let the
        weights be size * v, with v falling in the order: swapping two in the wrong order lowers the weighted sum.)
        """
        if move.buffer is None:
            self.sky.floor[move.section] = move.level
            return
        lifetime = slice(self.first[move.buffer], self.end[move.buffer])
        end = move.level + self.size[move.buffer]
        self.sky.offset[move.buffer] = move.level
        self.sky.floor[lifetime] = end
        self.sky.top[lifetime] = end
        self.sky.left[lifetime] -= self.size[move.buffer]
        self.sky.barred[self.earlier_twins[move.buffer]] = end

    def _earlier_twins(self) -> list[list[int]]:
        """For each buffer those before it with the same lifetime and alignment, whose size leaves none to rounding."""
        pinned = {index for _, index in self.pinned}
        seen: dict[tuple[int, int, int], list[int]] = {}
        twins: list[list[int]] = []
        for index, key in enumerate(zip(self.first.tolist(), self.end.tolist(), self.alignment.tolist(), strict=True)):
            twins.append([] if index in pinned else list(seen.get(key, ())))
            if index not in pinned and self.size[index] % key[2] == 0:
                seen.setdefault(key, []).append(index)
        return twins


def _sections(buffers: Sequence[Buffer]) -> tuple[Ints, Ints]:
    """The sections `[first, end)` of each buffer's lifetime; times at which nothing is alive have none."""
    lower, upper = _ints(b.lower for b in buffers), _ints(b.upper for b in buffers)
    times = np.unique(np.concatenate((lower, upper)))
    lower, upper = np.searchsorted(times, lower), np.searchsorted(times, upper)
    number = np.concatenate(([0], np.cumsum(_coverage(lower, upper, len(times) - 1) > 0)))
    return number[lower], number[upper]


def _coverage(first: Ints, end: Ints, count: int) -> Ints:
    """For each of `count` sections, the number of intervals `[first, end)` that hold it."""
    starts, ends = np.bincount(first, minlength=count + 1), np.bincount(end, minlength=count + 1)
    return np.asarray(np.cumsum(starts - ends)[:count])


def _aligned(value: Ints | int, alignment: Ints) -> Ints:
    return -(-value // alignment) * alignment


def _ints(values: Iterable[int]) -> Ints:
    return np.array(list(values), np.int64)
