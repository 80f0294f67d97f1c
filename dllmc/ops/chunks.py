"""How row-wise operators walk operands [..., width]: a chunk of rows at a time, so that what is computed of it stays in
a second-level cache from one torch call to the next.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

Chunk = TypeVar("Chunk")
Call = Callable[[], object]
Part = tuple[int, torch.dtype]

# Bytes of a tensor's chunk: it and what is computed of it fit the second-level caches of two cores; half was slower.
CHUNK_BYTES = 1 << 20


def rows_in_chunk(rows: int, row_bytes: int) -> int:
    """The most rows that a chunk has; none fewer when there are more rows, so memory planned for more suffices."""
    return min(rows, max(1, CHUNK_BYTES // row_bytes))


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of every tensor, in chunks of `rows_in_chunk` or fewer; in the order of the first one's memory.

    tensors: [..., width], of one shape and dtype, with any strides.
    """
    leading = range(tensors[0].dim() - 1)
    order = sorted(leading, key=tensors[0].stride, reverse=True)
    yield from _cut([x.permute(*order, -1) for x in tensors])


def _cut(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    *leading, width = tensors[0].shape
    rows = math.prod(leading)
    most = rows_in_chunk(rows, width * tensors[0].element_size())
    if 0 < rows <= most:
        yield tuple(tensors)
    elif rows:
        below = rows // leading[0]
        parts = (x.split(most // below) if below <= most else x.unbind() for x in tensors)
        for part in zip(*parts, strict=True):
            yield from _cut(part)


def planes(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of every tensor as views [outer, inner, width]: what a kernel's grid and two strides can walk.

    tensors: [..., width], of one shape, with any strides. One plane, unless more than two axes have several rows.
    """
    sizes = tensors[0].shape[:-1]
    if 0 in sizes:
        return
    ones = [axis for axis, size in enumerate(sizes) if size == 1]
    narrow = [x.squeeze(ones) for x in tensors]
    missing = 3 - narrow[0].dim()
    if missing >= 0:
        yield tuple(x[(None,) * missing] for x in narrow)
        return
    for part in zip(*(x.unbind() for x in narrow), strict=True):
        yield from planes(*part)


def shaped(memory: Tensor, *shape: int) -> Tensor:
    """The beginning of flat memory, as a dense tensor of that shape."""
    return memory[: math.prod(shape)].view(shape)


def bytes_of(parts: Sequence[Part]) -> int:
    """Bytes of workspace that hold parts, each given by its elements and their dtype."""
    return sum(_aligned(count * dtype.itemsize) for count, dtype in parts)


def carved(workspace: Tensor | None, parts: Sequence[Part]) -> list[Tensor]:
    """The parts as flat tensors in a workspace (uint8) of `bytes_of(parts)` or more."""
    tensors, offset = [], 0
    for count, dtype in parts:
        assert workspace is not None or not count, "what has parts declares a workspace"
        memory = torch.empty(0, dtype=dtype)
        if workspace is not None:
            memory = workspace[offset : offset + count * dtype.itemsize].view(dtype)
        tensors.append(memory)
        offset += _aligned(count * dtype.itemsize)
    return tensors


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // 8) * 8


def wide_dtype(x: Tensor) -> torch.dtype:
    """What row-wise operators compute in: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def by_chunk(walk: Callable[[], Iterable[Chunk]], bind: Callable[[Chunk], Sequence[Call]]) -> Call:
    """One call that makes those of every chunk, in order.

    They are bound now where there is one chunk. Where there are more, each is when its turn comes, which is little
    beside its work: to keep the views of all would take memory for every shape of a step.
    """
    first = list(islice(walk(), 2))
    if len(first) < 2:
        return in_order([call for chunk in first for call in bind(chunk)])

    def run() -> None:
        for chunk in walk():
            for call in bind(chunk):
                call()

    return run


def in_order(calls: Sequence[Call]) -> Call:
    """One call that makes them all."""

    def run() -> None:
        for call in calls:
            call()

    return run
