"""How programs of one launch share out the segments of a packed step, whose sizes only the device knows.

Every segment's rows are cut into tiles of equal size, and a program takes the tile of its own number. There are as many
programs as there could be tiles; those left over have nothing to do.
"""

import triton
import triton.language as tl


def most_tiles(rows: int, segments: int, size: int) -> int:
    """The most tiles that so many rows come to, however the segments have them, each segment's last one short."""
    return (rows + segments * (size - 1)) // size


@triton.jit  # type: ignore[untyped-decorator]
def tile_at(number: tl.tensor, rows: tl.tensor, size: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The segment that tile `number` belongs to, and which of its tiles it is.

    rows: those of each segment, zeros behind the last one. Behind the last tile, the segment is `len(rows)`.
    """
    ends = tl.cumsum((rows + size - 1) // size, axis=0)
    passed = ends <= number
    return tl.sum(passed.to(tl.int32), axis=0), number - tl.max(tl.where(passed, ends, 0), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def column(table_ptr: tl.tensor, index: tl.tensor, rows: tl.tensor, stride: tl.tensor) -> tl.tensor:
    """Entries of an int64 table's column, zeros behind its rows, as int32."""
    return tl.load(table_ptr + index.to(tl.int64) * stride, mask=index < rows, other=0).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def entry(values: tl.tensor, index: tl.tensor, number: tl.tensor) -> tl.tensor:
    """The value at `number`, of values that are in registers, one an index."""
    return tl.sum(tl.where(index == number, values, 0), axis=0)
