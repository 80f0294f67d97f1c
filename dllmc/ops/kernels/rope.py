"""Half-split rotary embedding of heads, with the rows of cos and sin gathered by position.

    x, out: [tokens, heads, head_dim], any strides; cos, sin: [rows, width], dense; positions: [tokens] int64 or None

Each program takes one token and as many heads as fill a tile of TILE elements:
    1. load the token's position, and that row of cos and sin (without positions, the token's own row); a position
       beyond the tables takes their nearest row
    2. load both halves of the heads, x1 and x2
    3. store x1 * cos1 - x2 * sin1 and x2 * cos2 + x1 * sin2, rounded once
in float32, or float64 for a float64 x. Where width is head_dim // 2, both halves take the same cos and sin.
"""

import triton
import triton.language as tl
from torch import Tensor

from dllmc.ops.kernels.configs import Launch, configured

TILE = 1024


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, out: Tensor) -> None:
    """Write the rotated heads to `out`; shapes as above."""
    tokens, heads, head_dim = x.shape
    if not x.numel():
        return
    half = head_dim // 2
    block = triton.next_power_of_2(half)
    launch = configured(Launch(TILE), "rope", x, tokens=tokens, heads=heads, head_dim=head_dim)
    at_once = min(triton.next_power_of_2(heads), max(1, launch.tile // block))
    _rope[(tokens, triton.cdiv(heads, at_once))](
        x,
        cos,
        sin,
        positions,
        out,
        heads,
        half,
        len(cos),
        *cos.stride(),
        *sin.stride(),
        *x.stride(),
        *out.stride(),
        shared=cos.shape[1] == half,
        heads_at_once=at_once,
        block=block,
        num_warps=launch.warps,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _rope(
    x_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    out_ptr: tl.tensor,
    heads: tl.tensor,
    half: tl.tensor,
    rows: tl.tensor,
    cos_row: tl.tensor,
    cos_column: tl.tensor,
    sin_row: tl.tensor,
    sin_column: tl.tensor,
    x_token: tl.tensor,
    x_head: tl.tensor,
    x_column: tl.tensor,
    out_token: tl.tensor,
    out_head: tl.tensor,
    out_column: tl.tensor,
    shared: tl.constexpr,
    heads_at_once: tl.constexpr,
    block: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    row = token
    if positions_ptr is not None:
        row = tl.minimum(tl.maximum(tl.load(positions_ptr + token), 0), rows - 1)
    head = tl.program_id(1).to(tl.int64) * heads_at_once + tl.arange(0, heads_at_once)[:, None]
    column = tl.arange(0, block)[None, :].to(tl.int64)
    of_half = column < half
    inside = (head < heads) & of_half
    first = x_ptr + token * x_token + head * x_head + column * x_column
    x1 = tl.load(first, mask=inside, other=0.0)
    x2 = tl.load(first + half * x_column, mask=inside, other=0.0)
    dtype = x1.dtype
    wide = tl.float64 if dtype == tl.float64 else tl.float32
    x1, x2 = x1.to(wide), x2.to(wide)
    cos = cos_ptr + row * cos_row + column * cos_column
    sin = sin_ptr + row * sin_row + column * sin_column
    cos1 = tl.load(cos, mask=of_half, other=0.0).to(wide)
    sin1 = tl.load(sin, mask=of_half, other=0.0).to(wide)
    cos2, sin2 = cos1, sin1
    if not shared:
        cos2 = tl.load(cos + half * cos_column, mask=of_half, other=0.0).to(wide)
        sin2 = tl.load(sin + half * sin_column, mask=of_half, other=0.0).to(wide)
    left = out_ptr + token * out_token + head * out_head + column * out_column
    tl.store(left, (x1 * cos1 - x2 * sin1).to(dtype), mask=inside)
    tl.store(left + half * out_column, (x2 * cos2 + x1 * sin2).to(dtype), mask=inside)
