"""How the fused head is cut on a GPU, and the workspace that it takes there.

R rows by V tokens are decoded a chunk of rows at a time, and of those a tile of the vocabulary's columns at a time,
whose float32 logits are in workspace. Every `part` columns of a row leave one set of statistics.
"""

from dataclasses import dataclass

import torch

from dllmc.ops.chunks import Part
from dllmc.ops.head_rows import CANDIDATES

# Up to so many rows one kernel multiplies and reduces. Measured on an H200: 1.24 times as fast as cuBLAS and a second
# pass at 64 rows, 0.94 times at 128.
FUSED_ROWS = 64
# The most rows of a chunk: their candidates are 16 MiB.
CHUNK_ROWS = 2048
# Float32 logits of a tile: 40 MiB, which holds 64 rows of 150 thousand tokens, and 4096 columns of a chunk.
TILE_LOGITS = 10 << 20
# Columns of a part: what a program multiplies, and what it only reduces.
FUSED_PART = 128
PART = 2048
# Statistics of a part, 4 bytes each; see `dllmc.ops.kernels.head_reduce`.
STATISTICS = 7


@dataclass(frozen=True)
class CudaTiling:
    """Rows of a chunk, columns of a tile and of a part, and the parts of a whole row."""

    rows: int
    columns: int
    part: int
    parts: int
    fused: bool

    @classmethod
    def of(cls, rows: int, vocab: int) -> "CudaTiling":
        """Cut at least one row so that it fits the `most_parts` of as many rows, or of more."""
        fused = rows <= FUSED_ROWS
        part = FUSED_PART if fused else PART
        chunk = -(-rows // -(-rows // CHUNK_ROWS))
        columns = min(vocab, TILE_LOGITS // chunk // part * part)
        return cls(chunk, columns, part, -(-vocab // part), fused)

    def memory(self) -> list[Part]:
        """Workspace of a chunk: logits [rows, columns], candidates [rows, 1024], statistics [7, rows, parts], targets'
        logits [rows].
        """
        statistics = STATISTICS * self.rows * self.parts
        return _memory(self.rows * self.columns, self.rows, statistics)


def most_memory(rows: int, vocab: int) -> list[Part]:
    """Of every part of `CudaTiling.memory`, the most that up to `rows` rows take."""
    few, chunk = min(rows, FUSED_ROWS), min(rows, CHUNK_ROWS)
    sets = max(few * -(-vocab // FUSED_PART), chunk * -(-vocab // PART) if rows > FUSED_ROWS else 0)
    return _memory(min(rows * vocab, TILE_LOGITS), chunk, STATISTICS * sets)


def _memory(logits: int, rows: int, statistics: int) -> list[Part]:
    return [
        (logits, torch.float32),
        (rows * CANDIDATES, torch.int64),
        (statistics, torch.float32),
        (rows, torch.float32),
    ]
