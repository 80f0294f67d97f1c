"""Classifier-free guidance of rows in one launch.

    hidden: [rows + twins, width], guided: [twins], guidance: [twins], out: [rows, width]; any strides

Each program takes block columns of one row of the result:
    1. find the first twin that guides the row, if any
    2. move the row away from it, and round once; or copy it
in float32, or float64 for float64. Rows look for their twins, so no index leads out of a tensor, and rows that several
twins name are always guided by the same one.
"""

import triton
import triton.language as tl
from torch import Tensor

MOST_COLUMNS = 1024


def guide_rows(hidden: Tensor, guided: Tensor, guidance: Tensor, out: Tensor) -> None:
    """Write the guided rows to `out`; operands as above and in `dllmc.ops.guide_rows`."""
    rows, width = out.shape
    if not out.numel():
        return
    block = min(MOST_COLUMNS, triton.next_power_of_2(width))
    _guide_rows[(rows, triton.cdiv(width, block))](
        hidden,
        *hidden.stride(),
        guided,
        guided.stride(0),
        guidance,
        guidance.stride(0),
        out,
        *out.stride(),
        rows,
        width,
        len(guided),
        lanes=triton.next_power_of_2(max(1, len(guided))),
        block=block,
    )


@triton.jit(do_not_specialize=("rows", "twins"))  # type: ignore[untyped-decorator]
def _guide_rows(
    hidden_ptr: tl.tensor,
    hidden_row: tl.tensor,
    hidden_column: tl.tensor,
    guided_ptr: tl.tensor,
    guided_stride: tl.tensor,
    guidance_ptr: tl.tensor,
    guidance_stride: tl.tensor,
    out_ptr: tl.tensor,
    out_row: tl.tensor,
    out_column: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    twins: tl.tensor,
    lanes: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, lanes)
    guided = tl.load(guided_ptr + lane * guided_stride, mask=lane < twins, other=-1)
    twin = tl.min(tl.where(guided == row, lane, lanes), axis=0)
    column = (tl.program_id(1) * block + tl.arange(0, block)).to(tl.int64)
    inside = column < width
    hidden_ptr += column * hidden_column
    x = tl.load(hidden_ptr + row * hidden_row, mask=inside, other=0.0)
    if twin < lanes:
        wide = tl.float64 if x.dtype == tl.float64 else tl.float32
        scale = tl.load(guidance_ptr + twin * guidance_stride).to(wide) + 1.0
        other = tl.load(hidden_ptr + (rows + twin).to(tl.int64) * hidden_row, mask=inside, other=0.0).to(wide)
        x = (other + scale * (x.to(wide) - other)).to(x.dtype)
    tl.store(out_ptr + row * out_row + column * out_column, x, mask=inside)
