"""`dllmc::attention`: bidirectional attention over packed tokens, each segment's queries to its own tokens.

    q [queries, q_heads, head_dim], k and v [tokens, kv_heads, head_dim], spans and segments [segments, 2] int64
    -> [queries, q_heads, head_dim]

`segments` holds each segment's first token and the token behind its last, `spans` the same of its queries: they are
one where every token queries. Query head g reads KV head g // (q_heads // kv_heads). Queries outside every span are
left as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dllmc.ops.library import library

# Queries a call of the fused kernel takes: bounds its transient output, and costs nothing from about 128 on.
QUERY_CHUNK = 256

library.define("attention(Tensor q, Tensor k, Tensor v, Tensor spans, Tensor segments, float scale) -> Tensor")


def reference(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, segments: Tensor, scale: float) -> Tensor:
    """The definition, in the inputs' dtype (float64 for tests): softmax(q k^T * scale) v per segment and head."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for (first, last), (start, end) in zip(spans.tolist(), segments.tolist(), strict=True):
        for head in range(q.shape[1]):
            scores = q[first:last, head] @ k[start:end, head // group].T * scale
            out[first:last, head] = torch.softmax(scores, dim=-1) @ v[start:end, head // group]
    return out


def attention_out(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, segments: Tensor, scale: float, out: Tensor) -> None:
    """CPU: torch's fused kernel per segment and chunk of queries, KV heads as its batch, so GQA copies nothing.

    It sums in float32, and takes half precision at float32's speed even where the CPU has no instructions for it.
    """
    queries, q_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    group = q_heads // kv_heads
    grouped = q.view(queries, kv_heads, group, head_dim).permute(1, 2, 0, 3)
    result = out.view(queries, kv_heads, group, head_dim).permute(1, 2, 0, 3)
    keys, values = (x.permute(1, 0, 2)[:, None].expand(-1, group, -1, -1) for x in (k, v))
    for (first, last), (start, end) in zip(spans.tolist(), segments.tolist(), strict=True):
        k_of, v_of = keys[:, :, start:end], values[:, :, start:end]
        for at in range(first, last, QUERY_CHUNK):
            rows = slice(at, min(at + QUERY_CHUNK, last))
            result[:, :, rows] = F.scaled_dot_product_attention(grouped[:, :, rows], k_of, v_of, scale=scale)


def _attention(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, segments: Tensor, scale: float) -> Tensor:
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    attention_out(q.contiguous(), k, v, spans, segments, scale, out)
    return out


def _fake(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, segments: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)


def bind(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Callable[[], object]:
    """Resolve a call over fixed memory."""
    q, k, v, spans, segments, scale = args
    return lambda: attention_out(q, k, v, spans, segments, scale, outs[0])


library.impl("attention", _attention, "CPU")
torch.library.register_fake("dllmc::attention", _fake, lib=library)
