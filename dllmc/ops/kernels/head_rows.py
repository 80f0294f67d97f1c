"""What a row of the fused head asks for, read on the device: a GPU checks no index, so none may leave its table."""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def segment_of(row_segment_ptr: tl.tensor, row: tl.tensor, rows: tl.tensor, segments: tl.tensor) -> tl.tensor:
    """The segments of rows, int64 and within the tables, whatever memory holds."""
    segment = tl.load(row_segment_ptr + row, mask=row < rows, other=0)
    return tl.minimum(tl.maximum(segment, 0), segments - 1)


@triton.jit  # type: ignore[untyped-decorator]
def choice_of(
    segment: tl.tensor, temperature_ptr: tl.tensor, top_k_ptr: tl.tensor, top_p_ptr: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Of segments: the temperature, whether they sample from all tokens, and whether from the best alone."""
    temperature = tl.load(temperature_ptr + segment)
    limited = (tl.load(top_k_ptr + segment) > 0) | (tl.load(top_p_ptr + segment) < 1)
    return temperature, (temperature > 0) & (limited == 0), (temperature > 0) & limited


@triton.jit  # type: ignore[untyped-decorator]
def candidates_of(segment: tl.tensor, top_k_ptr: tl.tensor, most: tl.constexpr) -> tl.tensor:
    """How many of its best tokens a segment looks at, int32: top_k, or `most` where that is off or beyond."""
    top_k = tl.load(top_k_ptr + segment)
    return tl.where((top_k > 0) & (top_k < most), top_k, most).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def some(wanted: tl.tensor) -> tl.tensor:
    """Whether any of the rows wants it."""
    return tl.max(wanted.to(tl.int32), axis=0) > 0
