"""How row-wise operators cut their operands: every row once, few at a time, and in the order of memory."""

import tracemalloc
from collections.abc import Sequence
from functools import partial
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmc.ops import chunks
from dllmc.ops.chunks import bytes_of, carved, planes, rows_in_chunk

LEADING = st.lists(st.integers(0, 6), max_size=4)
WIDTH = 7


def numbered(leading: Sequence[int], order: Sequence[int]) -> torch.Tensor:
    """[*leading, WIDTH], its leading axes in that order in memory; element = number of its row in row-major order."""
    x = torch.empty(*(leading[axis] for axis in order), WIDTH).permute(*(order.index(a) for a in range(len(order))), -1)
    rows = torch.arange(x.shape[:-1].numel(), dtype=torch.float32)
    return x.copy_(rows.view(*leading, 1).expand(x.shape))


@settings(deadline=None, derandomize=True)
@given(LEADING, st.integers(1, 400), st.data())
def test_every_row_is_in_one_chunk(leading: list[int], budget: int, data: st.DataObject) -> None:
    """Tensors of different layouts are cut alike, into views of at most `rows_in_chunk` rows."""
    first, second = (numbered(leading, data.draw(st.permutations(range(len(leading))))) for _ in range(2))
    seen: list[float] = []
    with patch.object(chunks, "CHUNK_BYTES", budget):
        most = rows_in_chunk(first.shape[:-1].numel(), 4 * WIDTH)
        for a, b in chunks.chunks(first, second):
            assert torch.equal(a, b)
            assert a.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            rows = a[..., 0].flatten().tolist()
            assert 0 < len(rows) <= most
            seen += rows
    assert sorted(seen) == list(range(first.shape[:-1].numel()))


def test_chunks_follow_memory() -> None:
    """Of heads [1, heads, tokens, width] that lie in memory token by token, a chunk is all heads of a few tokens."""
    heads = torch.empty(1, 20, 4, WIDTH).transpose(1, 2)
    with patch.object(chunks, "CHUNK_BYTES", 4 * 5 * 4 * WIDTH):
        cut = [chunk for (chunk,) in chunks.chunks(heads)]
    assert [list(chunk.shape) for chunk in cut] == [[5, 4, WIDTH]] * 4
    assert all(chunk.is_contiguous() for chunk in cut)


@settings(deadline=None, derandomize=True)
@given(LEADING, st.data())
def test_every_row_is_in_one_plane(leading: list[int], data: st.DataObject) -> None:
    """A kernel's grid sees [outer, inner, width]; axes of one row make no planes of their own."""
    x = numbered(leading, data.draw(st.permutations(range(len(leading)))))
    cut = list(planes(x, x + 0.5))
    assert all(a.dim() == 3 and torch.equal(a + 0.5, b) for a, b in cut)
    assert sorted(row for a, _ in cut for row in a[..., 0].flatten().tolist()) == list(range(x.shape[:-1].numel()))
    assert len(cut) <= 1 or sum(size > 1 for size in leading) > 2


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))))
def test_parts_of_a_workspace_are_apart(parts: list[tuple[int, torch.dtype]]) -> None:
    """Each of its size and dtype, none on another, all inside; without parts no workspace is needed."""
    workspace = torch.zeros(bytes_of(parts), dtype=torch.uint8)
    found = carved(workspace, parts)
    assert [(len(part), part.dtype) for part in found] == parts
    for number, part in enumerate(found):
        part.fill_(number + 1)
    assert all(part.eq(number + 1).all() for number, part in enumerate(found))
    assert not sum(count for count, _ in parts) or workspace.any()


def test_a_workspace_may_be_absent_where_nothing_is_carved() -> None:
    """A call that needs none is given none; one that needs some is not bound without."""
    assert carved(None, [(0, torch.float32)])[0].numel() == 0
    with pytest.raises(AssertionError, match="declares a workspace"):
        carved(None, [(1, torch.float32)])


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_calls_of_chunks_are_made_in_order_each_time(number: int) -> None:
    """Whether there is one chunk, bound once, or more, bound when their turn comes: every call, every time."""
    made: list[str] = []
    call = chunks.by_chunk(
        lambda: range(number), lambda i: [partial(made.append, f"{i}a"), partial(made.append, f"{i}b")]
    )
    assert made == []
    call()
    call()
    assert made == 2 * [f"{i}{letter}" for i in range(number) for letter in "ab"]


def test_calls_of_many_chunks_are_not_kept() -> None:
    """A call over 1 chunk or 10,000 holds as much memory: bindings of large steps are many."""

    def size(rows: int) -> int:
        x = torch.zeros(rows, WIDTH)
        tracemalloc.start()
        held = chunks.by_chunk(lambda: chunks.chunks(x), lambda parts: [partial(torch.neg, parts[0], out=parts[0])])
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        del held
        return size

    with patch.object(chunks, "CHUNK_BYTES", 4 * WIDTH):
        assert size(10_000) <= size(1) + 2048
