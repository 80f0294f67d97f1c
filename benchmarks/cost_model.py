"""How long a step takes: operations over a processor's speed or bytes over its memory's, whichever is longer.

A step's work is that of the matrix products of all tokens, of attention, of the head, and of what is launched; each of
the first three takes as long as its operations or its bytes need, and they follow each other.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from dllmc.runtime.table import REFRESH, REUSE, IntArray, Table

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """What of a model its steps' cost depends on: widths, layers, bytes of an element."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    dtype_bytes: int

    @property
    def kv_width(self) -> int:
        """Elements of a token's keys in a layer."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def layer_weights(self) -> int:
        """Elements of a layer's matrices."""
        return 2 * self.hidden * (self.hidden + self.kv_width) + 3 * self.hidden * self.ffn

    @property
    def weight_bytes(self) -> int:
        """Of all layers, the embedding and the head."""
        return self.dtype_bytes * (self.layers * self.layer_weights + 2 * self.hidden * self.vocab)

    @property
    def token_kv_bytes(self) -> int:
        """Keys and values of a token in all layers."""
        return 2 * self.layers * self.kv_width * self.dtype_bytes

    @property
    def token_arena_bytes(self) -> int:
        """Of a step in chunks: the residual stream, keys and values (README, "How long a sequence fits")."""
        return (self.hidden + 2 * self.kv_width) * self.dtype_bytes

    @property
    def launches(self) -> int:
        """Kernels of a step: eight a layer, and the embedding, norm and head."""
        return 8 * self.layers + 4


@dataclass(frozen=True)
class Work:
    """Operations and bytes of one step, by part. A step's work may be an array of steps'."""

    matmul_flops: Array | float
    matmul_bytes: Array | float
    attention_flops: Array | float
    attention_bytes: Array | float
    head_flops: Array | float
    head_bytes: Array | float
    launches: Array | float


@dataclass(frozen=True)
class Device:
    """Speeds that steps reach: operations a second of each part, bytes a second, seconds a launch."""

    matmul: float
    attention: float
    head: float
    bandwidth: float
    launch: float

    @classmethod
    def of(cls, flops: float, bandwidth: float, launch: float) -> Self:
        """The same speed for all parts."""
        return cls(flops, flops, flops, bandwidth, launch)

    def seconds(self, work: Work) -> Array:
        """How long a step takes."""
        parts = (
            (work.matmul_flops, self.matmul, work.matmul_bytes),
            (work.attention_flops, self.attention, work.attention_bytes),
            (work.head_flops, self.head, work.head_bytes),
        )
        times = [np.maximum(flops / speed, size / self.bandwidth) for flops, speed, size in parts]
        total: Array = np.add(sum(times), work.launches * self.launch)
        return total


def work_of(shape: Shape, table: Table, rows: IntArray) -> Work:
    """What the next step of these rows costs."""
    phases, sides = table.phases(rows), table.sides(rows)
    span = table.end[rows] - table.span[rows]
    light = phases == REUSE
    queries = np.where(light, span, table.length[rows])
    cached = np.where(light, table.kept[rows], 0)
    stored = np.where(phases == REFRESH, table.kept[rows], 0)
    tokens = float((sides * queries).sum())
    logits = float((sides * table.left[rows]).sum())
    pairs = float((sides * queries * (queries + cached)).sum())
    moved = float((sides * (queries + cached + stored)).sum())
    return Work(
        matmul_flops=2 * tokens * shape.layers * shape.layer_weights,
        matmul_bytes=shape.dtype_bytes * shape.layers * (shape.layer_weights + 8 * tokens * shape.hidden),
        attention_flops=4 * pairs * shape.layers * shape.hidden,
        attention_bytes=moved * shape.token_kv_bytes,
        head_flops=2 * logits * shape.hidden * shape.vocab,
        head_bytes=shape.dtype_bytes * shape.hidden * shape.vocab,
        launches=shape.launches,
    )
