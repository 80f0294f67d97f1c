"""How the CPU takes the segments of a packed step: alike ones together, in one call of a batched kernel.

Segments are alike where they have as many queries, tokens and cached keys, and lie at equal distances in all of the
tensors: then one strided view holds them. The same tables serve every layer, so what they come to is kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows `[start, start + length)` of a tensor; of each further segment of a group, `step` behind those."""

    start: int
    length: int
    step: int = 0

    def of(self, tensor: Tensor, count: int) -> Tensor:
        """A view of `count` segments, [count, heads, length, head_dim], of a tensor [rows, heads, head_dim]."""
        rows, heads, columns = tensor.stride()
        shape = (count, tensor.shape[1], self.length, tensor.shape[2])
        strides = (self.step * rows, heads, rows, columns)
        return tensor.as_strided(shape, strides, tensor.storage_offset() + self.start * rows)


@dataclass(frozen=True)
class Group:
    """`count` segments that are alike: their queries, their own tokens, and runs of slots that hold cached keys."""

    queries: Rows
    tokens: Rows
    cached: tuple[Rows, ...]
    count: int = 1

    def joined(self, other: "Group") -> "Group | None":
        """The group with one segment more, if that is alike, and as far behind the last as the last behind its own."""
        mine, others = (self.queries, self.tokens, *self.cached), (other.queries, other.tokens, *other.cached)
        if [rows.length for rows in mine] != [rows.length for rows in others]:
            return None
        far = [b.start - a.start for a, b in zip(mine, others, strict=True)]
        if min(far) < 0 or any(
            d != rows.step * self.count for d, rows in zip(far, mine, strict=True) if self.count > 1
        ):
            return None
        queries, tokens, *cached = (replace(rows, step=d // self.count) for d, rows in zip(far, mine, strict=True))
        return Group(queries, tokens, tuple(cached), self.count + 1)


def groups(
    spans: Tensor,
    segments: Tensor,
    first: int,
    queries: int,
    most: int,
    cached: Tensor | None = None,
    page_table: Tensor | None = None,
    page_tokens: int = 1,
) -> tuple[Group, ...]:
    """What to compute of the queries `[first, first + queries)`: groups of at most `most` queries, or one segment.

    spans, segments: [segments, 2] int64; cached: [segments] int64; page_table: [segments, width] int64, as
    `dllmc::attention` takes them.
    """
    slots = pages = b""
    if cached is not None and page_table is not None:
        used = -(-int(cached.max()) // page_tokens) if cached.numel() else 0
        slots, pages = _bytes(cached), _bytes(page_table[:, :used])
    return _groups(_bytes(spans), _bytes(segments), first, queries, most, slots, pages, page_tokens)


@lru_cache(maxsize=64)
def _groups(
    spans: bytes, segments: bytes, first: int, queries: int, most: int, slots: bytes, pages: bytes, page_tokens: int
) -> tuple[Group, ...]:
    cached, table = _numbers(slots), _numbers(pages)
    found: list[Group] = []
    for index, ((begin, stop), (start, end)) in enumerate(zip(_pairs(spans), _pairs(segments), strict=True)):
        low, high = max(begin - first, 0), min(stop - first, queries)
        if low >= high:
            continue
        runs: tuple[Rows, ...] = ()
        if cached:
            width = len(table) // len(cached)
            runs = tuple(slot_runs(table[index * width : (index + 1) * width], cached[index], page_tokens))
        one = Group(Rows(low, high - low), Rows(start, end - start), runs)
        joined = found[-1].joined(one) if found and (found[-1].count + 1) * (high - low) <= most else None
        if joined is None:
            found.append(one)
        else:
            found[-1] = joined
    return tuple(found)


def slot_runs(pages: Sequence[int], count: int, page_tokens: int) -> Iterator[Rows]:
    """The first `count` slots of pages as runs of neighbours: in a head, the slots of neighbouring pages are."""
    start = length = 0
    for index in range(-(-count // page_tokens)):
        slot, held = pages[index] * page_tokens, min(page_tokens, count - index * page_tokens)
        if length and slot == start + length:
            length += held
        else:
            if length:
                yield Rows(start, length)
            start, length = slot, held
    if length:
        yield Rows(start, length)


def _bytes(table: Tensor) -> bytes:
    return table.numpy().tobytes()


def _numbers(data: bytes) -> list[int]:
    return torch.frombuffer(bytearray(data), dtype=torch.int64).tolist() if data else []


def _pairs(data: bytes) -> Iterator[tuple[int, int]]:
    numbers = iter(_numbers(data))
    return zip(numbers, numbers, strict=True)
