"""What the planner plans: buffers with sizes and lifetimes, and what needs no search to be said of them."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd


@dataclass(frozen=True)
class Buffer:
    """`size` units, alive in the half-open interval `[lower, upper)`; its offset is a multiple of `alignment`."""

    id: Hashable
    lower: int
    upper: int
    size: int
    alignment: int = 1

    @property
    def idle(self) -> bool:
        """Whether it is never alive, or empty: such a buffer is in no other's way and lies at 0."""
        return self.size == 0 or self.upper <= self.lower


def lower_bound(buffers: Sequence[Buffer]) -> int:
    """The largest sum of sizes alive at one time: no plan is lower."""
    busy = [b for b in buffers if not b.idle]
    changes = sorted(change for b in busy for change in ((b.lower, b.size), (b.upper, -b.size)))
    live = peak = 0
    for _, change in changes:  # at equal times the releases come first: lifetimes are half-open
        live += change
        peak = max(peak, live)
    return peak


def height(buffers: Sequence[Buffer], offsets: Mapping[Hashable, int]) -> int:
    """The end of the highest buffer."""
    return max((offsets[b.id] + b.size for b in buffers), default=0)


def grain(buffers: Sequence[Buffer]) -> int:
    """What divides every offset and height of a plan whose buffers all rest on 0 or on one another."""
    return gcd(*(b.size for b in buffers), *(b.alignment for b in buffers))
