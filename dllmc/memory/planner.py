"""Offsets for buffers with known sizes and lifetimes, in as small an arena as best-fit by size finds.

The lower bound is the largest sum of sizes alive at one time; where the height meets it, the plan is optimal.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Buffer:
    """`size` units, alive in the half-open interval `[lower, upper)`; its offset is a multiple of `alignment`."""

    id: Hashable
    lower: int
    upper: int
    size: int
    alignment: int = 1


@dataclass(frozen=True)
class Plan:
    """An offset for every buffer, the arena's height, the live lower bound, and whether the two are equal."""

    offsets: Mapping[Hashable, int]
    height: int
    lower_bound: int
    optimal: bool


def plan(buffers: Sequence[Buffer]) -> Plan:
    """Place buffers so that no two that are alive together overlap.

    Largest first, each into the smallest gap among those placed and alive with it that holds it, or on top.
    """
    placed: list[tuple[int, Buffer]] = []
    for buffer in sorted(buffers, key=lambda b: (-b.size, b.lower, b.upper)):
        rivals = sorted(
            (offset, offset + other.size)
            for offset, other in placed
            if other.lower < buffer.upper and buffer.lower < other.upper
        )
        placed.append((_best_fit(rivals, buffer), buffer))
    height = max((offset + b.size for offset, b in placed), default=0)
    bound = lower_bound(buffers)
    return Plan({b.id: offset for offset, b in placed}, height, bound, height == bound)


def lower_bound(buffers: Sequence[Buffer]) -> int:
    """The largest sum of sizes alive at one time: no plan is lower."""
    changes = sorted(change for b in buffers for change in ((b.lower, b.size), (b.upper, -b.size)))
    live = peak = 0
    for _, change in changes:  # at equal times the releases come first: lifetimes are half-open
        live += change
        peak = max(peak, live)
    return peak


def _best_fit(rivals: Sequence[tuple[int, int]], buffer: Buffer) -> int:
    best: tuple[int, int] | None = None
    end_of_taken = 0
    for start, end in rivals:
        offset = -(-end_of_taken // buffer.alignment) * buffer.alignment
        room = start - offset
        if room >= buffer.size and (best is None or room < best[0]):
            best = room, offset
        end_of_taken = max(end_of_taken, end)
    return best[1] if best is not None else -(-end_of_taken // buffer.alignment) * buffer.alignment
