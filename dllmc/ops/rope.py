"""`dllmc::rope`: rotary embedding that turns the two halves of each head against each other.

    x [tokens, heads, head_dim], cos and sin [tokens, width], positions None -> [tokens, heads, head_dim]
    or cos and sin [max_positions, width], positions [tokens] int64: each token takes its position's row

width is head_dim, or head_dim // 2 where both halves share the angles. Of x = x1 ++ x2:

    x1 * cos1 - x2 * sin1  ++  x2 * cos2 + x1 * sin2

in float32 whatever the dtypes (float64 for a float64 x), rounded once to x's dtype.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dllmc.errors import ProgramError
from dllmc.ops.chunks import Call, Part, by_chunk, bytes_of, carved, rows_in_chunk, shaped, wide_dtype
from dllmc.ops.library import library, run_bound

library.define("rope(Tensor x, Tensor cos, Tensor sin, Tensor? positions) -> Tensor")


def reference(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> Tensor:
    """The definition, in float32, or in float64 for a float64 x."""
    dtype = wide_dtype(x)
    cos, sin = (t if positions is None else t[positions] for t in (cos, sin))
    repeats = x.shape[-1] // cos.shape[-1]
    cos, sin = (t.to(dtype).repeat(1, repeats)[:, None] for t in (cos, sin))
    first, second = x.to(dtype).chunk(2, dim=-1)
    return (x.to(dtype) * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def workspace_of(tensors: Sequence[Tensor]) -> int:
    """Bytes for a call on tensors like these: x, cos, sin, and positions, if any."""
    x, cos, sin, *positions = tensors
    return bytes_of(_parts(x, cos, sin, gathered=bool(positions)))


def bind(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Call:
    """CPU: a chunk of tokens at a time, in the output, which may be x, and the workspace alone."""
    x, cos, sin, positions = args
    _require_fitting(x, cos, sin)
    if x.is_cuda:
        from dllmc.ops.kernels.rope import rope

        return partial(rope, x, cos, sin, positions, outs[0])
    wide, result, *of_tables = carved(workspace, _parts(x, cos, sin, gathered=positions is not None))
    tokens, heads, head_dim = x.shape
    step = max(1, rows_in_chunk(tokens, heads * head_dim * wide.element_size()))

    def of_chunk(start: int) -> list[Call]:
        chunk = slice(start, min(start + step, tokens))
        calls: list[Call] = []
        tables: list[Tensor] = []
        for table, (rows, widened) in zip((cos, sin), (of_tables[:2], of_tables[2:]), strict=True):
            shape = (chunk.stop - start, table.shape[1])
            if positions is None:
                part = table[chunk]
            else:
                part = shaped(rows, *shape)
                calls.append(partial(torch.index_select, table, 0, positions[chunk], out=part))
            if part.dtype != widened.dtype:
                narrow, part = part, shaped(widened, *shape)
                calls.append(partial(part.copy_, narrow))
            tables.append(part[:, None])
        source, target = x[chunk], outs[0][chunk]
        if x.dtype != wide.dtype or x.data_ptr() == outs[0].data_ptr():
            source = shaped(wide, *source.shape)
            calls.append(partial(source.copy_, x[chunk]))
        if x.dtype != wide.dtype:
            target = shaped(result, *target.shape)
        calls += _rotations(target, source, *tables)
        if x.dtype != wide.dtype:
            calls.append(partial(outs[0][chunk].copy_, target))
        return calls

    return by_chunk(lambda: range(0, tokens, step), of_chunk)


def _rotations(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> list[Call]:
    """All of one dtype; cos and sin [tokens, 1, width]."""
    (first, second), (left, right) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    if cos.shape[-1] == x.shape[-1]:
        products = [(x, cos, out)]
        sin_left, sin_right = sin.chunk(2, dim=-1)
    else:
        products = [(first, cos, left), (second, cos, right)]
        sin_left = sin_right = sin
    return [
        *(partial(torch.mul, a, b, out=product) for a, b, product in products),
        partial(left.addcmul_, second, sin_left, value=-1),
        partial(right.addcmul_, first, sin_right),
    ]


def _parts(x: Tensor, cos: Tensor, sin: Tensor, gathered: bool) -> list[Part]:
    """Workspace of a chunk: x, the result if it is widened, rows of each table, as gathered and as widened."""
    tokens, heads, head_dim = x.shape
    dtype = wide_dtype(x)
    chunk = rows_in_chunk(tokens, heads * head_dim * dtype.itemsize)
    wide = chunk * heads * head_dim
    parts = [(wide, dtype), (0 if x.dtype == dtype else wide, dtype)]
    for table in (cos, sin):
        rows = chunk * table.shape[1]
        parts += [(rows if gathered else 0, table.dtype), (0 if table.dtype == dtype else rows, dtype)]
    return parts


def _require_fitting(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    head_dim = x.shape[-1]
    if head_dim % 2 or cos.shape != sin.shape or cos.shape[-1] not in (head_dim, head_dim // 2):
        raise ProgramError(
            f"rope of heads {head_dim} wide expects an even width, and cos and sin of that width or of half of it; "
            f"found cos {list(cos.shape)} and sin {list(sin.shape)}"
        )


def _rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> Tensor:
    out = x.new_empty(x.shape)
    run_bound(bind, (x, cos, sin, positions), (out,), workspace_of)
    return out


def _fake(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


library.impl("rope", _rope, "CPU")
library.impl("rope", _rope, "CUDA")
torch.library.register_fake("dllmc::rope", _fake, lib=library)
