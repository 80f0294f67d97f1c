"""Exact plans: the search restarted in several orders, under the capacities that are still open."""

import math
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from time import perf_counter

from dllmc.memory import best_fit
from dllmc.memory.buffers import Buffer, grain, height, lower_bound
from dllmc.memory.search import Outcome, search

# Which of several buffers to try first. No order is good everywhere, and few are bad for the same instances.
ORDERS: tuple[Callable[[Buffer], tuple[int, ...]], ...] = (
    lambda b: (-b.size, b.lower, b.upper),
    lambda b: (-b.size * (b.upper - b.lower), b.lower, b.upper),
    lambda b: (-b.upper, b.lower, b.size),
    lambda b: (b.lower, b.upper, b.size),
)
NODES_A_BUFFER = 1.5  # of the first attempts; one a buffer is the least that a search can do
BOUND_FIRST = 8  # attempts at the bound for each one above it: most instances can meet it
DISPLACEMENT = 0.4  # how far a shuffle carries a buffer, as a part of the list


@dataclass
class Bracket:
    """The best offsets so far, the proven bound of all heights, and the nodes that both took."""

    offsets: Mapping[Hashable, int]
    height: int
    bound: int
    nodes: int = 0

    def settled(self, capacity: int | None) -> bool:
        """Whether the height is within `capacity`, no plan can be, or the plan is optimal."""
        return self.height <= self.bound or (
            capacity is not None and (self.height <= capacity or capacity < self.bound)
        )

    def better(self, buffers: Sequence[Buffer], offsets: Mapping[Hashable, int]) -> None:
        """Keep `offsets` where they are lower."""
        if (reached := height(buffers, offsets)) < self.height:
            self.offsets, self.height = offsets, reached


def draft(buffers: Sequence[Buffer], capacity: int | None) -> Bracket:
    """What greedy orders find, and the bound that needs no search."""
    bound = max(lower_bound(buffers), max((b.size for b in buffers), default=0))
    offsets = best_fit.lowest(buffers, bound if capacity is None else capacity)
    return Bracket(offsets, height(buffers, offsets), bound)


def settle(buffers: Sequence[Buffer], bracket: Bracket, capacity: int | None, deadline: float) -> None:
    """Improve `bracket` until `deadline`, or it is settled: within `capacity`, or without one optimal."""
    if bracket.settled(capacity):
        return
    if capacity is None:
        _narrow(buffers, bracket, deadline)
        return
    outcome = solve(buffers, capacity, deadline)
    bracket.nodes += outcome.nodes
    if outcome.offsets is not None:
        bracket.better(buffers, outcome.offsets)
    elif outcome.exhausted:
        bracket.bound = max(bracket.bound, capacity + 1)


def solve(
    buffers: Sequence[Buffer],
    capacity: int,
    deadline: float,
    attempts: range | None = None,
    pins: Mapping[Hashable, int] | None = None,
) -> Outcome:
    """Search in one order after another; without `attempts` until it is solved, exhausted, or `deadline`.

    How long a search takes varies widely with the order, and most of those that succeed hardly go back at all. So each
    is given up early and others are tried: first `ORDERS`, then shuffles of them, with as many nodes as Luby's
    sequence says (Information Processing Letters 47, 1993). It grows, so in the end one of them is complete. The
    shuffles are seeded: only a deadline makes two runs differ.
    """
    nodes = 0
    busy = [b for b in buffers if not b.idle]
    for attempt in attempts if attempts is not None else count():
        turn, order = divmod(attempt, len(ORDERS))
        budget = math.ceil(NODES_A_BUFFER * len(busy)) * _luby(attempt + 1)
        outcome = search(_shuffled(sorted(busy, key=ORDERS[order]), attempt, turn), capacity, budget, deadline, pins)
        nodes += outcome.nodes
        if outcome.offsets is not None:
            idle = {b.id: 0 for b in buffers if b.idle}
            return Outcome({**idle, **outcome.offsets}, False, nodes)
        if outcome.exhausted or perf_counter() > deadline:
            return Outcome(None, outcome.exhausted, nodes)
    return Outcome(None, False, nodes)


def _narrow(buffers: Sequence[Buffer], bracket: Bracket, deadline: float) -> None:
    """Lower the height and raise the bound of `bracket` until they meet, or until `deadline`.

    Heights of canonical plans are multiples of the grain. Each turn tries the bound, then bisects between the highest
    capacity that it gave up and the best height; what is exhausted raises the bound. The capacity just below the best
    height is tried in every turn that finds nothing, so the last turn exhausts it.
    """
    step = grain(buffers)
    for turn in count():
        open_from = capacity = bracket.bound = -(-bracket.bound // step) * step
        while open_from < bracket.height:
            each = len(ORDERS) * (BOUND_FIRST if capacity == bracket.bound else 1)
            outcome = solve(buffers, capacity, deadline, range(turn * each, (turn + 1) * each))
            bracket.nodes += outcome.nodes
            if outcome.offsets is not None:
                bracket.better(buffers, outcome.offsets)
            else:
                open_from = capacity + step
                if outcome.exhausted:
                    bracket.bound = open_from
            capacity = (open_from + bracket.height - step) // 2 // step * step
        if bracket.bound >= bracket.height or perf_counter() > deadline:
            return


def _luby(index: int) -> int:
    """1, 1, 2, 1, 1, 2, 4, 1, 1, 2, ...: costs a logarithm more than the best fixed budget, unknown as that is."""
    power = index.bit_length()
    return 1 << (power - 1) if index == (1 << power) - 1 else _luby(index - (1 << (power - 1)) + 1)


def _shuffled(buffers: list[Buffer], seed: int, turn: int) -> list[Buffer]:
    if turn == 0:
        return buffers
    reach = DISPLACEMENT * len(buffers)
    randomness = random.Random(seed)
    places = sorted((place + reach * randomness.random(), place) for place in range(len(buffers)))
    return [buffers[place] for _, place in places]
