"""Offsets for buffers with known sizes and lifetimes, in the smallest arena that can be found in the time given.

Greedy orders first; where they miss the bound, one period of what repeats, and then a complete search of the whole.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from dllmc.memory import exact, periods
from dllmc.memory.buffers import Buffer, lower_bound

__all__ = ["Buffer", "Plan", "lower_bound", "plan"]


@dataclass(frozen=True)
class Plan:
    """An offset for every buffer, the arena's height, the live lower bound, and whether no plan is lower.

    `optimal` is proven: the height meets the bound, or the search has been through all that is lower. `nodes` counts
    the steps of the search, 0 where a greedy order was good enough.
    """

    offsets: Mapping[Hashable, int]
    height: int
    lower_bound: int
    optimal: bool
    nodes: int = field(default=0, compare=False)


def plan(buffers: Sequence[Buffer], capacity: int | None = None, time_limit: float = 5.0) -> Plan:
    """Place buffers so that no two that are alive together overlap, as low as `time_limit` seconds allow.

    With `capacity` any plan that is no higher will do, and the search stops there; where it finds none, or there is
    none, the height says so. Plans depend on the clock only where the limit ends the search.
    """
    began = perf_counter()
    found = exact.draft(buffers, capacity)
    for times in (1, 2):  # two layers a period: what is carried over may take turns between two places
        if not found.settled(capacity) and (repetition := periods.find(buffers, times)) is not None:
            periods.tile(repetition, found, capacity, began + time_limit * times / 4)
    exact.settle(buffers, found, capacity, began + time_limit)
    return Plan(found.offsets, found.height, lower_bound(buffers), found.height <= found.bound, found.nodes)
