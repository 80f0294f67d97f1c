"""`aten.linear`: one GEMM over all leading dimensions, in the dtype that the CPU is fast at.

A CPU without instructions for bfloat16 or float16 multiplies them at a tenth of its float32 speed. There a tile of the
weight at a time is widened to float32, where it stays in cache, and each element of the product is rounded once.
A GPU multiplies every dtype with instructions made for it.
"""

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from dllmc.errors import ProgramError
from dllmc.ops.elementwise import as_rows

Call = Callable[[], object]

HALF = (torch.bfloat16, torch.float16)
# Float32 elements of workspace: 8 MiB for x, since every chunk of it widens the weight anew; 4 MiB for a tile of the
# weight and 2 MiB for the product, so that they stay in the caches of a few cores.
X_BUDGET = 1 << 21
WEIGHT_BUDGET = 1 << 20
PRODUCT_BUDGET = 1 << 19
MOST_ROWS = 1024
# The most rows for which `transposes` may hold, and for which it does where nothing was widened.
FEW_ROWS = 64
FEW_ROWS_FLOAT32 = 32


@cache
def has_native_gemm(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of that dtype with instructions made for it.

    Not what torch's own `_is_mkldnn_bf16_supported` says: on x86 that is true wherever oneDNN can emulate bfloat16.
    """
    if dtype not in HALF:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported()  # so has every CPU with AMX
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def transposes(rows: int, weight_dtype: torch.dtype) -> bool:
    """Whether a float32 GEMM with so few rows of x is faster the other way round: (weight @ x.T).T.

    Measured with AVX-512: up to 1.6 times as fast. A weight of another dtype has just been widened and lies in cache,
    which moves the limits at either end.
    """
    return 0 < rows <= FEW_ROWS_FLOAT32 if weight_dtype == torch.float32 else 8 <= rows <= FEW_ROWS


@dataclass(frozen=True)
class Tiling:
    """How x [rows, width] by weight [columns, width] is cut: rows of x a chunk, rows of the weight a tile."""

    rows: int
    columns: int

    @classmethod
    def of(cls, rows: int, width: int, columns: int) -> "Tiling":
        """Cut into equal chunks, so that each part fits the `workspace_bytes` of as many rows, or of more."""
        chunks = max(1, -(-rows // _most_rows(width)))
        chunk = -(-rows // chunks)
        return cls(chunk, min(_most_columns(width, columns), PRODUCT_BUDGET // max(1, chunk)))


def _most_rows(width: int) -> int:
    return max(1, min(MOST_ROWS, X_BUDGET // width))


def _most_columns(width: int, columns: int) -> int:
    fit = WEIGHT_BUDGET // width
    return min(columns, fit // 16 * 16 or max(1, fit))


def workspace_bytes(rows: int, width: int, columns: int) -> int:
    """Bytes that suffice for `widened` with up to `rows` rows: a chunk of x, a tile of weight and product, the bias."""
    tile = _most_columns(width, columns) * width
    return 4 * (min(rows, _most_rows(width)) * width + tile + min(PRODUCT_BUDGET, rows * columns) + columns)


def workspace_of(tensors: Sequence[Tensor]) -> int:
    """Bytes for a call on tensors like these: in half precision to widen, in float32 for the product of few rows."""
    x, weight = tensors[:2]
    rows, (columns, width) = x.shape[:-1].numel(), weight.shape
    if x.dtype in HALF:
        return workspace_bytes(rows, width, columns)
    return 4 * columns * min(rows, FEW_ROWS_FLOAT32) if x.dtype == torch.float32 else 0


def bind(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Call:
    """`aten.linear(x [..., in], weight [out, in], bias [out] | None)`."""
    x, weight, bias = (*args, None)[:3]
    rows, out = as_rows(x), as_rows(outs[0])
    if x.is_cuda:
        # cuBLAS's own workspace (32 MiB on compute capability 9) is torch's, one a stream, taken at the first product
        # there: before a graph is recorded on the stream, or it becomes the graph's, beside what the program plans.
        return native(rows, weight, bias, out)
    if x.dtype == torch.float32 and workspace is not None and transposes(len(rows), weight.dtype):
        product = workspace[: 4 * out.numel()].view(torch.float32).view(out.shape[1], out.shape[0])
        return partial(transposed, rows, weight, bias, out, product)
    if has_native_gemm(x.dtype):
        return native(rows, weight, bias, out)
    assert workspace is not None, "linear declares a workspace for half precision"
    return partial(widened, rows, weight, bias, out, workspace)


def native(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Call:
    """The dtype's own GEMM: x [rows, in], weight [columns, in], bias [columns] | None, out [rows, columns]."""
    if bias is None:
        return partial(torch.mm, x, weight.T, out=out)
    return partial(torch.addmm, bias, x, weight.T, out=out)


def transposed(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, product: Tensor) -> None:
    """The same by way of the product [columns, rows], which is faster for few rows."""
    torch.mm(weight, x.T, out=product)
    if bias is None:
        out.copy_(product.T)
    else:
        torch.add(product.T, bias, out=out)


def widened(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, workspace: Tensor) -> None:
    """The same in float32, each element of `out` rounded once. workspace: uint8, `workspace_bytes` or more.

    Raises `ProgramError` for a workspace that is too small.
    """
    (rows, width), columns = x.shape, weight.shape[0]
    tiling = Tiling.of(rows, width, columns)
    parts = (tiling.rows * width, tiling.columns * width, tiling.rows * tiling.columns, columns)
    if workspace.numel() < 4 * sum(parts):
        raise ProgramError(
            f"linear: {rows} rows of {width} by {columns} need a workspace of {4 * sum(parts)} bytes, found "
            f"{workspace.numel()}; plan it with `workspace_bytes` for the largest number of rows"
        )
    floats = workspace[: 4 * sum(parts)].view(torch.float32)
    x_part, weight_part, product_part, bias_part = floats.split(parts)
    tiles = weight.split(tiling.columns)
    biases = None if bias is None else bias_part.copy_(bias)[:, None].split(tiling.columns)
    for x_rows, out_rows in zip(x.split(tiling.rows), out.split(tiling.rows), strict=True):
        chunk = x_part[: x_rows.numel()].view(x_rows.shape).copy_(x_rows)
        wide = weight_part.view(tiling.columns, width)
        product = _transposed_product(product_part, tiling.columns, len(chunk), weight.dtype)
        for index, (tile, target) in enumerate(zip(tiles, out_rows.T.split(tiling.columns), strict=True)):
            if len(tile) < tiling.columns:  # the last
                wide, product = wide[: len(tile)], product[: len(tile)]
            torch.mm(wide.copy_(tile), chunk.T, out=product)
            if biases is not None:
                product += biases[index]
            target.copy_(product)


def _transposed_product(memory: Tensor, columns: int, rows: int, dtype: torch.dtype) -> Tensor:
    """[columns, rows] in the layout that is faster to multiply into, which is all that the layout changes."""
    memory = memory[: columns * rows]
    return memory.view(columns, rows) if transposes(rows, dtype) else memory.view(rows, columns).T
