"""RMS norm and layer norm of rows, or of a residual sum of rows, in one pass over memory.

    x, residual, out, total: [outer, inner, width], any strides; weight, bias: [width], dense
    all but x and out may be None

Each program takes as many rows as fill a tile of TILE elements, or one wider row, whole:
    1. load the rows; add the residual, round the sum to x's dtype, store it
    2. subtract the mean where the norm is centred
    3. scale by 1 / sqrt(mean(x^2) + eps), then weight and bias; round once, store
in float32, or float64 for float64. Offsets are 64 bits: a step's activations may pass 2^31 elements.
"""

import triton
import triton.language as tl
from torch import Tensor

from dllmc.ops.chunks import planes
from dllmc.ops.kernels.configs import Launch, configured

TILE = 1024


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
    total: Tensor | None,
    centred: bool,
) -> None:
    """Write the norm of x [..., width] to `out`; with a residual, that of their sum, which is written to `total`."""
    added = [] if residual is None or total is None else [residual, total]
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    default = Launch(TILE, min(16, max(4, block // 512)))
    launch = configured(default, "norm", x, rows=x.numel() // max(width, 1), width=width)
    rows = max(1, launch.tile // block)
    for x_plane, out_plane, *sums in planes(x, out, *added):
        residual_plane, total_plane = sums or (x_plane, out_plane)
        outer, inner, _ = x_plane.shape
        _norm[(triton.cdiv(outer * inner, rows),)](
            x_plane,
            residual_plane if sums else None,
            weight,
            bias,
            out_plane,
            total_plane if sums else None,
            outer * inner,
            inner,
            width,
            eps,
            *x_plane.stride(),
            *residual_plane.stride(),
            *out_plane.stride(),
            *total_plane.stride(),
            centred=centred,
            rows_at_once=rows,
            block=block,
            num_warps=launch.warps,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _norm(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    total_ptr: tl.tensor,
    rows: tl.tensor,
    inner: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    x_outer: tl.tensor,
    x_inner: tl.tensor,
    x_column: tl.tensor,
    residual_outer: tl.tensor,
    residual_inner: tl.tensor,
    residual_column: tl.tensor,
    out_outer: tl.tensor,
    out_inner: tl.tensor,
    out_column: tl.tensor,
    total_outer: tl.tensor,
    total_inner: tl.tensor,
    total_column: tl.tensor,
    centred: tl.constexpr,
    rows_at_once: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * rows_at_once + tl.arange(0, rows_at_once)[:, None]
    i, j = row // inner, row % inner
    column = tl.arange(0, block)[None, :].to(tl.int64)
    inside = (row < rows) & (column < width)
    x = tl.load(x_ptr + i * x_outer + j * x_inner + column * x_column, mask=inside, other=0.0)
    dtype = x.dtype
    wide = tl.float64 if dtype == tl.float64 else tl.float32
    x = x.to(wide)
    if residual_ptr is not None:
        place = i * residual_outer + j * residual_inner + column * residual_column
        total = (x + tl.load(residual_ptr + place, mask=inside, other=0.0).to(wide)).to(dtype)
        tl.store(total_ptr + i * total_outer + j * total_inner + column * total_column, total, mask=inside)
        x = total.to(wide)
    if centred:
        x = tl.where(inside, x - tl.sum(x, axis=1, keep_dims=True) / width, 0.0)
    y = x / tl.sqrt(tl.sum(x * x, axis=1, keep_dims=True) / width + eps)
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + column, mask=column < width, other=0.0).to(wide)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column < width, other=0.0).to(wide)
    tl.store(out_ptr + i * out_outer + j * out_inner + column * out_column, y.to(dtype), mask=inside)
