"""The fused head on a GPU: logits of a tile of the vocabulary, statistics of its parts, candidates, then the rows.

    hidden: [rows, width], weight: [vocab, width], bias: [vocab] or None; any strides
    token, confidence, logprob: [rows]; any strides
    row_segment, row_position, row_target: [rows], tables of segments; dense

Of a chunk of rows, for each tile of the vocabulary (`dllmc.ops.head_tiles`):
    1. few rows: one kernel multiplies and reduces a part of the tile; logits stay in registers
       more: cuBLAS multiplies into workspace, and the same kernel reduces what it finds there
    2. select: of rows that choose among their best tokens, the candidates so far
and at last 3. finish: every row, from the statistics of all its parts.
Logits are float32 either way, so which of them a batch takes changes no token, but for the order of a product's sum.
Nothing here waits for the GPU or allocates on it, but that cuBLAS copies a `hidden` of which neither stride is 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from dllmc.ops.chunks import carved
from dllmc.ops.head_rows import CANDIDATES
from dllmc.ops.head_tiles import CudaTiling
from dllmc.ops.kernels.configs import configured
from dllmc.ops.kernels.head_finish import finish_rows
from dllmc.ops.kernels.head_reduce import reduce_tile
from dllmc.ops.kernels.head_select import SELECTED, select_candidates


@dataclass(frozen=True)
class Tile:
    """Rows of a program that reduces, the columns of hidden rows that it multiplies at once, its warps and stages."""

    rows: int
    width: int
    warps: int
    stages: int

    @classmethod
    def of(cls, rows: int, dtype: torch.dtype, fused: bool) -> "Tile":
        """For a chunk of that many rows."""
        if not fused:
            return cls(1, 16, 4, 1)
        rows = max(16, triton.next_power_of_2(rows))
        if dtype == torch.float32:  # without tensor cores
            return cls(rows, 32, 8, 3)
        return cls(rows, 64, 4 if rows < 32 else 8, 4)


def decode_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    row_segment: Tensor,
    row_position: Tensor,
    row_target: Tensor,
    tables: Sequence[Tensor],
    token: Tensor,
    confidence: Tensor,
    logprob: Tensor,
    workspace: Tensor,
) -> None:
    """Write token, confidence and logprob; operands as in `dllmc.ops.decode_head`, whose tables are the last seven.

    workspace: uint8, of `cuda_workspace_bytes` or more.
    """
    (rows, width), vocab = hidden.shape, weight.shape[0]
    if not rows:
        return
    temperature, top_k, top_p, rule, seed, step, suppressed = tables
    tiling = CudaTiling.of(rows, vocab)
    logits, keys, statistics, target_logit = carved(workspace, tiling.memory())
    default = Tile.of(tiling.rows, hidden.dtype, tiling.fused)
    tile = configured(default, "decode_head", weight, rows=tiling.rows, vocab=vocab, width=width)
    segments, lanes = len(temperature), suppressed.shape[1]
    for begin in range(0, rows, tiling.rows):
        chunk = slice(begin, min(begin + tiling.rows, rows))
        count = chunk.stop - begin
        of_rows = row_segment[chunk], row_position[chunk], row_target[chunk]
        for first in range(0, vocab, tiling.columns):
            behind = min(first + tiling.columns, vocab)
            if not tiling.fused:
                part = logits[: count * (behind - first)].view(count, behind - first)
                multiply(hidden[chunk], weight[first:behind], part)
            reduce_tile[(triton.cdiv(behind - first, tiling.part), triton.cdiv(count, tile.rows))](
                hidden[chunk],
                *hidden.stride(),
                weight,
                *weight.stride(),
                bias,
                0 if bias is None else bias.stride(0),
                scale,
                *of_rows,
                *tables,
                logits,
                statistics,
                target_logit,
                count,
                segments,
                lanes,
                first,
                behind,
                width,
                tiling.parts,
                multiplies=tiling.fused,
                rows_at_once=tile.rows,
                part=tiling.part,
                width_at_once=tile.width,
                suppressed_lanes=triton.next_power_of_2(lanes) if lanes else 0,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
            select_candidates[(count,)](
                logits,
                keys,
                of_rows[0],
                temperature,
                top_k,
                top_p,
                count,
                segments,
                first,
                behind,
                most=CANDIDATES,
                at_once=SELECTED,
                num_warps=16,
            )
        finish_rows[(count,)](
            statistics,
            keys,
            target_logit,
            *of_rows,
            temperature,
            top_k,
            top_p,
            rule,
            seed,
            step,
            token[chunk],
            token.stride(0),
            confidence[chunk],
            confidence.stride(0),
            logprob[chunk],
            logprob.stride(0),
            count,
            segments,
            vocab,
            tiling.parts,
            most=CANDIDATES,
            lanes=triton.next_power_of_2(tiling.parts),
            num_warps=8,
        )


def multiply(hidden: Tensor, weight: Tensor, logits: Tensor) -> None:
    """Hidden @ weight.T into float32 logits, never rounded to the operands' dtype."""
    if hidden.dtype == torch.float32:
        torch.mm(hidden, weight.T, out=logits)
    else:
        torch.ops.aten.mm.dtype_out(hidden, weight.T, torch.float32, out=logits)
