"""`dllmc::attention`: bidirectional attention over packed tokens, each segment's queries to its own tokens and cache.

    q [queries, q_heads, head_dim], k and v [tokens, kv_heads, head_dim], spans and segments [segments, 2] int64
    -> [queries, q_heads, head_dim]

`segments` holds each segment's first token and the token behind its last, `spans` the same of its queries: they are
one where every token queries. `q` holds the queries from number `first` on, of all that `spans` counts. Query head g
reads KV head g // (q_heads // kv_heads). Queries outside every span are left as they are. With a `window`, a segment's
queries are its tokens from the first on, and the query of token i sees the tokens j with |i - j| <= window.

With a `cache` [2, kv_heads, pages, page_tokens, head_dim] of keys and values, a segment's queries also see `cached`
[segments] int64 of its slots, wherever the window is: of head h, slot j is `cache[:, h, page_table[segment, j //
page_tokens], j % page_tokens]` (page_table [segments, width] int64). Refresh segments bring all of their tokens, Reuse
segments few and a cache; one call takes both (semantics.md, "Terms").

`dllmc::window_attention` is the same of one sequence, [1, heads, tokens, head_dim] like torch's own, before packing.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dllmc.ops.chunks import Call, wide_dtype
from dllmc.ops.library import library, run_bound
from dllmc.ops.segments import Group, Rows, groups

# Queries a call of the fused kernel takes: bounds its transient output, and costs nothing from about 128 on.
QUERY_CHUNK = 256
# With a window: the chunk's keys are as many and two windows more, so fewer queries waste fewer scores.
WINDOW_QUERY_CHUNK = 64
# On a GPU: the most rows (queries times the query heads of a KV head) that a program takes, the fewest keys that are
# worth a part, and the processors that parts keep busy where requests are few.
MOST_ROWS = 128
LEAST_PART = 256
PROCESSORS = 132

# Of window, first, cache, cached and page_table.
_DEFAULTS: tuple[Any, ...] = (None, 0, None, None, None)

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor spans, Tensor segments, float scale, int? window=None,"
    " int first=0, Tensor? cache=None, Tensor? cached=None, Tensor? page_table=None) -> Tensor"
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
    cache: Tensor | None = None,
    cached: Tensor | None = None,
    page_table: Tensor | None = None,
) -> Tensor:
    """The definition, in the inputs' dtype (float64 for tests): softmax(q k^T * scale) v per segment and head."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for index, ((begin, stop), (start, end)) in enumerate(zip(spans.tolist(), segments.tolist(), strict=True)):
        held = slice(max(begin - first, 0), max(stop - first, 0))
        seen = torch.ones(stop - begin, end - start, dtype=torch.bool)
        if window is not None:
            seen = _band(0, stop - begin, 0, end - start, window)
        seen = seen[max(first - begin, 0) :][: len(q[held])]
        keys, values = k[start:end], v[start:end]
        if cache is not None and cached is not None and page_table is not None:
            # [2, kv_heads, pages, page_tokens, head_dim] -> the segment's slots, [2, slots, kv_heads, head_dim]
            slots = cache[:, :, page_table[index]].flatten(2, 3)[:, :, : int(cached[index])].transpose(1, 2)
            keys, values = torch.cat((slots[0], keys)), torch.cat((slots[1], values))
            seen = F.pad(seen, (slots.shape[1], 0), value=True)
        for head in range(q.shape[1]):
            scores = q[held, head] @ keys[:, head // group].T * scale
            scores = scores.masked_fill(~seen, -torch.inf)
            out[held, head] = torch.softmax(scores, dim=-1) @ values[:, head // group]
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
    cache: Tensor | None = None,
    cached: Tensor | None = None,
    page_table: Tensor | None = None,
) -> None:
    """CPU: torch's fused kernel, once for the tokens of alike segments, and once for each run of their pages.

    It gives the logarithm of each query's sum of exponentials too, by which what it found in several places is added.
    The kernel sums in float32, and takes half precision at float32's speed even where the CPU has no instructions
    for it.
    """
    if window is not None:
        _windowed_out(q, k, v, spans, segments, scale, out, window, first, cache, cached, page_table)
        return
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    slots, page_tokens = None, 1
    if cache is not None:
        page_tokens = cache.shape[3]
        slots = cache.flatten(2, 3).transpose(1, 2).unbind()  # each [slots, kv_heads, head_dim]
    for group in groups(spans, segments, first, len(q), QUERY_CHUNK, cached, page_table, page_tokens):
        for at in range(0, group.queries.length, QUERY_CHUNK):
            length = min(QUERY_CHUNK, group.queries.length - at)
            rows = Rows(group.queries.start + at, length, group.queries.step)
            rows.of(out, group.count).copy_(_attended(rows.of(q, group.count), k, v, group, slots, scale))


def _attended(q: Tensor, k: Tensor, v: Tensor, group: Group, slots: Sequence[Tensor] | None, scale: float) -> Tensor:
    """Queries [count, q_heads, queries, head_dim] over a group's tokens, then over what is cached of them."""
    count = group.count
    found, weight = _FUSED(q, group.tokens.of(k, count), group.tokens.of(v, count), scale=scale)
    for run in group.cached:
        assert slots is not None
        more, other = _FUSED(q, *(run.of(x, count) for x in slots), scale=scale)
        dtype = wide_dtype(q)
        share = torch.sigmoid(weight - other)[..., None].to(dtype)
        found = torch.lerp(more.to(dtype), found.to(dtype), share)
        weight = torch.logaddexp(weight, other)
    attended: Tensor = found
    return attended


def _windowed_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    segments: Tensor,
    scale: float,
    out: Tensor,
    window: int,
    first: int,
    cache: Tensor | None,
    cached: Tensor | None,
    page_table: Tensor | None,
) -> None:
    """A chunk of queries reads the keys in reach of them alone; KV heads are the batch, so GQA copies nothing.

    Cached keys are copied together with them: windows and caches seldom meet.
    """
    queries, q_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    group = q_heads // kv_heads
    grouped = q.view(queries, kv_heads, group, head_dim).permute(1, 2, 0, 3)
    result = out.view(queries, kv_heads, group, head_dim).permute(1, 2, 0, 3)
    keys, values = (x.permute(1, 0, 2)[:, None].expand(-1, group, -1, -1) for x in (k, v))
    for index, ((begin, stop), (start, end)) in enumerate(zip(spans.tolist(), segments.tolist(), strict=True)):
        slots = None
        if cache is not None and cached is not None and page_table is not None and cached[index]:
            slots = cache[:, :, None, page_table[index]].flatten(3, 4)[..., : int(cached[index]), :]
            slots = slots.expand(-1, -1, group, -1, -1)
        limited = end - start > window + 1
        chunk = WINDOW_QUERY_CHUNK if limited else QUERY_CHUNK
        last = min(stop - first, queries)
        for at in range(max(begin - first, 0), last, chunk):
            rows = slice(at, min(at + chunk, last))
            seen, band = slice(start, end), None
            if limited:
                token, behind = (start + first - begin + row for row in (at, rows.stop))
                seen = slice(max(start, token - window), min(end, behind + window))
                band = _band(token, behind, seen.start, seen.stop, window)
            near = keys[:, :, seen], values[:, :, seen]
            if slots is not None:
                near = torch.cat((slots[0], near[0]), dim=2), torch.cat((slots[1], near[1]), dim=2)
                band = None if band is None else F.pad(band, (slots.shape[3], 0), value=True)
            result[:, :, rows] = F.scaled_dot_product_attention(grouped[:, :, rows], *near, attn_mask=band, scale=scale)


def _band(token: int, behind: int, key: int, key_behind: int, window: int) -> Tensor:
    """Which keys the queries of these tokens see: bool [behind - token, key_behind - key]."""
    distance = torch.arange(token, behind)[:, None] - torch.arange(key, key_behind)
    return distance.abs_() <= window


def workspace_of(tensors: Sequence[Tensor], device: str) -> int:
    """Bytes for a call on tensors like these: on a GPU, what a cache's keys in several parts add to each query."""
    q, k, _v, _spans, _segments, *of_cache = tensors
    if not of_cache or device == "cpu":
        return 0
    queries, q_heads, head_dim = q.shape
    cache, _cached, page_table = of_cache
    rows = min(most_parts(k, cache, page_table) * queries * q_heads, PROCESSORS * MOST_ROWS)
    return 4 * rows * (head_dim + 1)


def most_parts(k: Tensor, cache: Tensor, page_table: Tensor) -> int:
    """The most parts that the keys of one segment are worth: those in its pages, and all tokens."""
    return -(-(page_table.shape[1] * cache.shape[3] + k.shape[0]) // LEAST_PART)


def bind(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Call:
    """Resolve a call over fixed memory."""
    q, k, v, spans, segments, scale, *rest = args
    window, first, cache, cached, page_table = [*rest, *_DEFAULTS[len(rest) :]]
    operands = q, k, v, spans, segments, scale, outs[0], window, first, cache, cached, page_table
    if q.is_cuda:
        from dllmc.ops.kernels.attention import attention

        return partial(attention, *operands, workspace)
    return partial(attention_out, *operands)


def _attention(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, segments: Tensor, scale: float, *rest: Any) -> Tensor:
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    of_device = partial(workspace_of, device=q.device.type)
    run_bound(bind, (q, k, v, spans, segments, scale, *rest), (out,), of_device)
    return out


def _fake(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, segments: Tensor, scale: float, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)


def _window_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    whole = torch.tensor([[0, q.shape[2]]], device=q.device)
    queries, keys, values = (x[0].transpose(0, 1) for x in (q, k, v))
    return _attention(queries, keys, values, whole, whole, scale, window).transpose(0, 1)[None].contiguous()


def _fake_window_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    return q.new_empty(q.shape)


for device in ("CPU", "CUDA"):
    library.impl("attention", _attention, device)
    library.impl("window_attention", _window_attention, device)
torch.library.register_fake("dllmc::attention", _fake, lib=library)
torch.library.register_fake("dllmc::window_attention", _fake_window_attention, lib=library)
