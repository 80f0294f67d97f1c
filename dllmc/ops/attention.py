"""`dllmc::attention`: bidirectional attention over packed tokens, each segment's queries to its own tokens.

    q [queries, q_heads, head_dim], k and v [tokens, kv_heads, head_dim], spans and segments [segments, 2] int64
    -> [queries, q_heads, head_dim]

`segments` holds each segment's first token and the token behind its last, `spans` the same of its queries: they are
one where every token queries. `q` holds the queries from number `first` on, of all that `spans` counts. Query head g
reads KV head g // (q_heads // kv_heads). Queries outside every span are left as they are. With a `window`, a segment's
queries are its tokens from the first on, and the query of token i sees the tokens j with |i - j| <= window.
`dllmc::window_attention` is the same of one sequence, [1, heads, tokens, head_dim] like torch's own, before packing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dllmc.ops.library import library

# Queries a call of the fused kernel takes: bounds its transient output, and costs nothing from about 128 on.
QUERY_CHUNK = 256
# With a window: the chunk's keys are as many and two windows more, so fewer queries waste fewer scores.
WINDOW_QUERY_CHUNK = 64

library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor spans, Tensor segments, float scale, int? window=None,"
    " int first=0) -> Tensor"
)
library.define("window_attention(Tensor q, Tensor k, Tensor v, float scale, int window) -> Tensor")


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    segments: Tensor,
    scale: float,
    window: int | None = None,
    first: int = 0,
) -> Tensor:
    """The definition, in the inputs' dtype (float64 for tests): softmax(q k^T * scale) v per segment and head."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for (begin, stop), (start, end) in zip(spans.tolist(), segments.tolist(), strict=True):
        held = slice(max(begin - first, 0), max(stop - first, 0))
        seen = torch.ones(stop - begin, end - start, dtype=torch.bool)
        if window is not None:
            seen = _band(0, stop - begin, 0, end - start, window)
        seen = seen[max(first - begin, 0) :][: len(q[held])]
        for head in range(q.shape[1]):
            scores = q[held, head] @ k[start:end, head // group].T * scale
            scores = scores.masked_fill(~seen, -torch.inf)
            out[held, head] = torch.softmax(scores, dim=-1) @ v[start:end, head // group]
    return out


def attention_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    segments: Tensor,
    scale: float,
    out: Tensor,
    window: int | None = None,
    first: int = 0,
) -> None:
    """CPU: torch's fused kernel per segment and chunk of queries, KV heads as its batch, so GQA copies nothing.

    With a window a chunk reads the keys in reach of its queries alone. The kernel sums in float32, and takes half
    precision at float32's speed even where the CPU has no instructions for it.
    """
    queries, q_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    group = q_heads // kv_heads
    grouped = q.view(queries, kv_heads, group, head_dim).permute(1, 2, 0, 3)
    result = out.view(queries, kv_heads, group, head_dim).permute(1, 2, 0, 3)
    keys, values = (x.permute(1, 0, 2)[:, None].expand(-1, group, -1, -1) for x in (k, v))
    for (begin, stop), (start, end) in zip(spans.tolist(), segments.tolist(), strict=True):
        limited = window is not None and end - start > window + 1
        chunk = WINDOW_QUERY_CHUNK if limited else QUERY_CHUNK
        last = min(stop - first, queries)
        for at in range(max(begin - first, 0), last, chunk):
            rows = slice(at, min(at + chunk, last))
            seen, band = slice(start, end), None
            if limited:
                assert window is not None
                token, behind = (start + first - begin + row for row in (at, rows.stop))
                seen = slice(max(start, token - window), min(end, behind + window))
                band = _band(token, behind, seen.start, seen.stop, window)
            result[:, :, rows] = F.scaled_dot_product_attention(
                grouped[:, :, rows], keys[:, :, seen], values[:, :, seen], attn_mask=band, scale=scale
            )


def _band(token: int, behind: int, key: int, key_behind: int, window: int) -> Tensor:
    """Which keys the queries of these tokens see: bool [behind - token, key_behind - key]."""
    distance = torch.arange(token, behind)[:, None] - torch.arange(key, key_behind)
    return distance.abs_() <= window


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    segments: Tensor,
    scale: float,
    window: int | None = None,
    first: int = 0,
) -> Tensor:
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    attention_out(q.contiguous(), k, v, spans, segments, scale, out, window, first)
    return out


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    segments: Tensor,
    scale: float,
    window: int | None = None,
    first: int = 0,
) -> Tensor:
    return q.new_empty(q.shape)


def _window_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    whole = torch.tensor([[0, q.shape[2]]])
    queries, keys, values = (x[0].transpose(0, 1) for x in (q, k, v))
    return _attention(queries, keys, values, whole, whole, scale, window).transpose(0, 1)[None].contiguous()


def _fake_window_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    return q.new_empty(q.shape)


def bind(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Callable[[], object]:
    """Resolve a call over fixed memory."""
    q, k, v, spans, segments, scale, *rest = args
    window = rest[0] if rest else None
    first = rest[1] if len(rest) > 1 else 0
    return lambda: attention_out(q, k, v, spans, segments, scale, outs[0], window, first)


library.impl("attention", _attention, "CPU")
torch.library.register_fake("dllmc::attention", _fake, lib=library)
library.impl("window_attention", _window_attention, "CPU")
torch.library.register_fake("dllmc::window_attention", _fake_window_attention, lib=library)
