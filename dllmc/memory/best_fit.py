"""Greedy plans: buffers in some order, each into the smallest gap that holds it."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from dllmc.memory.buffers import Buffer, height

ORDERS: tuple[Callable[[Buffer], tuple[int, ...]], ...] = (
    lambda b: (-b.size, b.lower, b.upper),
    lambda b: (-b.size * (b.upper - b.lower), b.lower, b.upper),
    lambda b: (b.lower - b.upper, -b.size, b.lower),
    lambda b: (b.lower, -b.size, b.upper),
    lambda b: (-b.upper, -b.size, b.lower),
)


def lowest(buffers: Sequence[Buffer], goal: int) -> dict[Hashable, int]:
    """The lowest of the plans that the orders give, or the first that is no higher than `goal`."""
    plans = []
    for order in ORDERS:
        plans.append(in_order(sorted(buffers, key=order)))
        if height(buffers, plans[-1]) <= goal:
            return plans[-1]
    return min(plans, key=lambda offsets: height(buffers, offsets))


def in_order(buffers: Sequence[Buffer]) -> dict[Hashable, int]:
    """Place buffers one by one into the smallest gap among those placed before and alive with it, or on top."""
    offsets: dict[Hashable, int] = {b.id: 0 for b in buffers if b.idle}
    busy = [b for b in buffers if not b.idle]
    lower, upper, start, end = np.zeros((4, len(busy)), np.int64)
    for count, buffer in enumerate(busy):
        rivals = np.flatnonzero((lower[:count] < buffer.upper) & (buffer.lower < upper[:count]))
        rivals = rivals[np.argsort(start[rivals])]
        offset = _best_gap(start[rivals].tolist(), end[rivals].tolist(), buffer)
        lower[count], upper[count], start[count], end[count] = buffer.lower, buffer.upper, offset, offset + buffer.size
        offsets[buffer.id] = offset
    return offsets


def _best_gap(starts: list[int], ends: list[int], buffer: Buffer) -> int:
    best: tuple[int, int] | None = None
    taken = 0
    for start, end in zip(starts, ends, strict=True):
        offset = -(-taken // buffer.alignment) * buffer.alignment
        room = start - offset
        if room >= buffer.size and (best is None or room < best[0]):
            best = room, offset
        taken = max(taken, end)
    return best[1] if best is not None else -(-taken // buffer.alignment) * buffer.alignment
