"""Attention of a packed step: every segment's queries over its own tokens and its cached pages, in one launch.

    q, out: [queries, q_heads, head_dim], k, v: [tokens, kv_heads, head_dim], cache: [2, kv_heads, pages, page_tokens,
    head_dim], spans, segments: [segments, 2], cached: [segments], page_table: [segments, width]; any strides

A segment's rows are its queries times the query heads of one KV head. Each program takes a tile of rows and a part of
the keys:
    1. find the segment that the tile belongs to
    2. walk the part: cached slots where the page table says they are, then tokens; online softmax, in base 2
    3. store the rows; where a segment's keys are in several parts, in workspace, with their log-sum-exps
Parts give a GPU enough to do where few requests have many keys. A second kernel adds them, always in the same order.
Sums are float32. Offsets are 64 bits: a step's activations may pass 2^31 elements.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllmc.ops.attention import LEAST_PART, MOST_ROWS, PROCESSORS, most_parts
from dllmc.ops.kernels.configs import configured
from dllmc.ops.kernels.tiles import column, entry, most_tiles, tile_at

LOG2_E = 1.4426950408889634
# Heads of a query whose parts one program adds.
ADDED_HEADS = 8
# What changes from step to step, for whose values no kernel is compiled anew.
VARYING = ("queries", "first", "count", "parts")


@dataclass(frozen=True)
class Tile:
    """A program's rows and the keys it takes at once, its warps, and how many such programs a processor holds.

    `stages`: of the loop over slots and of that over tokens, whose loads run ahead of it. A slot's run behind its
    page's, so the same buffers take two stages more. With heads of 128 columns nothing spills on compute capability 9.
    """

    rows: int
    keys: int
    warps: int
    programs: int
    stages: tuple[int, int]

    @classmethod
    def of(cls, rows: int, segments: int, dtype: torch.dtype) -> "Tile":
        """For that many rows of all segments: it holds those of an average one, within limits."""
        average = max(16, triton.next_power_of_2(triton.cdiv(rows, segments)))
        if dtype == torch.float32:  # without tensor cores
            return cls(min(average, 32), 16, 4, 2, (4, 2))
        if average < MOST_ROWS:
            return cls(average, 32, 4, 2, (5, 3))
        return cls(MOST_ROWS, 64, 8, 1, (5, 3))


def attention(
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
    workspace: Tensor | None = None,
) -> None:
    """Write the attended queries to `out`; operands as above and in `dllmc.ops.attention`.

    workspace: uint8; what is given bounds the parts that keys are in, which are one without it.
    """
    queries, q_heads, head_dim = q.shape
    kv_heads, count = k.shape[1], len(spans)
    if not q.numel() or not count:
        return
    group = q_heads // kv_heads
    tile = Tile.of(queries * group, count, q.dtype)
    sizes = {"rows": triton.cdiv(queries * group, count), "segments": count, "head_dim": head_dim}
    tile = configured(tile, "attention" if cache is None else "attention_cached", q, **sizes)
    tiles = most_tiles(queries * group, count, tile.rows)
    parts, found, sums = 1, None, None
    if cache is not None and page_table is not None and workspace is not None and window is None:
        elements = queries * q_heads * (head_dim + 1)
        most = min(most_parts(k, cache, page_table), workspace.numel() // (4 * elements))
        likely = max(count, triton.cdiv(queries * group, tile.rows)) * kv_heads
        parts = max(1, min(PROCESSORS * tile.programs // likely, most))
        if parts > 1:
            floats = workspace[: 4 * parts * elements].view(torch.float32)
            found, sums = floats.split((parts * queries * q_heads * head_dim, parts * queries * q_heads))
    lanes = triton.next_power_of_2(count)
    tables = (spans, *spans.stride(), segments, *segments.stride(), cached, 0 if cached is None else cached.stride(0))
    of_cache: tuple[object, ...] = (None, 0, 0, None, *(0,) * 5)
    if cache is not None and page_table is not None:
        of_cache = (page_table, *page_table.stride(), cache, *cache.stride())
    _attend[(tiles, kv_heads, parts)](
        q,
        *q.stride(),
        k,
        *k.stride(),
        v,
        *v.stride(),
        *tables,
        *of_cache,
        out,
        *out.stride(),
        found,
        sums,
        queries,
        first,
        count,
        parts,
        scale * LOG2_E,
        window,
        head_dim=head_dim,
        group=group,
        page_tokens=1 if cache is None else cache.shape[3],
        least_part=LEAST_PART,
        lanes=lanes,
        rows_at_once=tile.rows,
        keys_at_once=tile.keys,
        columns=max(16, triton.next_power_of_2(head_dim)),
        slot_stages=tile.stages[0],
        token_stages=tile.stages[1],
        num_warps=tile.warps,
    )
    if parts > 1:
        _add_parts[(queries, triton.cdiv(q_heads, ADDED_HEADS))](
            found,
            sums,
            *tables,
            out,
            *out.stride(),
            queries,
            q_heads,
            first,
            count,
            parts,
            head_dim=head_dim,
            least_part=LEAST_PART,
            lanes=lanes,
            heads_at_once=ADDED_HEADS,
            most_parts=triton.next_power_of_2(parts),
            columns=triton.next_power_of_2(head_dim),
        )


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def _attend(
    q_ptr: tl.tensor,
    q_query: tl.tensor,
    q_head: tl.tensor,
    q_column: tl.tensor,
    k_ptr: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    k_column: tl.tensor,
    v_ptr: tl.tensor,
    v_token: tl.tensor,
    v_head: tl.tensor,
    v_column: tl.tensor,
    spans_ptr: tl.tensor,
    spans_row: tl.tensor,
    spans_column: tl.tensor,
    segments_ptr: tl.tensor,
    segments_row: tl.tensor,
    segments_column: tl.tensor,
    cached_ptr: tl.tensor,
    cached_row: tl.tensor,
    table_ptr: tl.tensor,
    table_row: tl.tensor,
    table_column: tl.tensor,
    cache_ptr: tl.tensor,
    cache_kind: tl.tensor,
    cache_head: tl.tensor,
    cache_page: tl.tensor,
    cache_slot: tl.tensor,
    cache_column: tl.tensor,
    out_ptr: tl.tensor,
    out_query: tl.tensor,
    out_head: tl.tensor,
    out_column: tl.tensor,
    found_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    queries: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    parts: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    head_dim: tl.constexpr,
    group: tl.constexpr,
    page_tokens: tl.constexpr,
    least_part: tl.constexpr,
    lanes: tl.constexpr,
    rows_at_once: tl.constexpr,
    keys_at_once: tl.constexpr,
    columns: tl.constexpr,
    slot_stages: tl.constexpr,
    token_stages: tl.constexpr,
) -> None:
    # 1. the segment, its tile, and the part of its keys
    lane = tl.arange(0, lanes)
    begins = column(spans_ptr, lane, count, spans_row)
    lows = tl.maximum(begins - first, 0)
    highs = tl.minimum(column(spans_ptr + spans_column, lane, count, spans_row) - first, queries)
    starts = column(segments_ptr, lane, count, segments_row)
    ends = column(segments_ptr + segments_column, lane, count, segments_row)
    segment, tile = tile_at(tl.program_id(0), tl.maximum(highs - lows, 0) * group, rows_at_once)
    if segment >= count:
        return
    begin, low, high = entry(begins, lane, segment), entry(lows, lane, segment), entry(highs, lane, segment)
    start = entry(starts, lane, segment)
    own = entry(ends, lane, segment) - start
    slots = 0
    if cached_ptr is not None:
        slots = tl.load(cached_ptr + segment * cached_row).to(tl.int32)
    part = _part(slots + own, parts, least_part)
    left = tl.program_id(2) * part
    right = tl.minimum(left + part, slots + own)
    if left >= tl.maximum(right, 1):
        return

    kv_head = tl.program_id(1).to(tl.int64)
    row = tile * rows_at_once + tl.arange(0, rows_at_once)
    query = low + row // group
    head = kv_head * group + row % group
    at = tl.arange(0, columns).to(tl.int64)
    wide = at[None, :] < head_dim
    held = (query < high)[:, None] & wide
    q = tl.load(q_ptr + (query.to(tl.int64) * q_query + head * q_head)[:, None] + at[None, :] * q_column, held, 0.0)
    best = tl.full((rows_at_once,), -1e30, tl.float32)  # not -inf, whose difference to itself is no number
    total = tl.zeros((rows_at_once,), tl.float32)
    found = tl.zeros((rows_at_once, columns), tl.float32)

    # 2. the part's slots, then its tokens
    if cache_ptr is not None:
        keys_ptr = cache_ptr + kv_head * cache_head + at[None, :] * cache_column
        behind = tl.minimum(right, slots)
        for key in tl.range(left, behind, keys_at_once, num_stages=slot_stages):
            slot = key + tl.arange(0, keys_at_once)
            inside = slot < behind
            page = tl.load(table_ptr + segment * table_row + (slot // page_tokens) * table_column, mask=inside, other=0)
            place = (page * cache_page + (slot % page_tokens) * cache_slot)[:, None]
            there = inside[:, None] & wide
            keys = tl.load(keys_ptr + place, mask=there, other=0.0)
            values = tl.load(keys_ptr + cache_kind + place, mask=there, other=0.0)
            best, total, found = _add_keys(q, keys, values, inside[None, :], scale, best, total, found)
    nearest, behind = tl.maximum(left - slots, 0), right - slots
    number = query + first - begin
    if window is not None:
        last = tl.minimum(tile * rows_at_once + rows_at_once - 1, (high - low) * group - 1)
        nearest = tl.maximum(nearest, low + tile * rows_at_once // group + first - begin - window)
        behind = tl.minimum(behind, low + last // group + first - begin + window + 1)
    keys_ptr = k_ptr + kv_head * k_head + at[None, :] * k_column
    values_ptr = v_ptr + kv_head * v_head + at[None, :] * v_column
    for key in tl.range(nearest, behind, keys_at_once, num_stages=token_stages):
        token = key + tl.arange(0, keys_at_once)
        inside = token < behind
        there = inside[:, None] & wide
        place = (start + token).to(tl.int64)[:, None]
        keys = tl.load(keys_ptr + place * k_token, mask=there, other=0.0)
        values = tl.load(values_ptr + place * v_token, mask=there, other=0.0)
        seen = inside[None, :]
        if window is not None:
            seen = seen & (tl.abs(number[:, None] - token[None, :]) <= window)
        best, total, found = _add_keys(q, keys, values, seen, scale, best, total, found)

    # 3. the rows, or what the part adds to them
    found = found / tl.where(total > 0, total, 1.0)[:, None]
    if sums_ptr is not None:
        divided = part < slots + own
        place = (tl.program_id(2).to(tl.int64) * queries + query) * (tl.num_programs(1) * group) + head
        tl.store(sums_ptr + place, best + tl.log2(total), mask=divided & (query < high))
        tl.store(found_ptr + place[:, None] * head_dim + at[None, :], found, mask=divided & held)
        held = held & (part >= slots + own)
    place = (query.to(tl.int64) * out_query + head * out_head)[:, None] + at[None, :] * out_column
    tl.store(out_ptr + place, found.to(out_ptr.dtype.element_ty), mask=held)


@triton.jit  # type: ignore[untyped-decorator]
def _part(keys: tl.tensor, parts: tl.tensor, least: tl.constexpr) -> tl.tensor:
    """Keys of a part: as few as make no more than `parts`, but a multiple of `least`."""
    return tl.maximum((keys + parts * least - 1) // (parts * least), 1) * least


@triton.jit  # type: ignore[untyped-decorator]
def _add_keys(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    seen: tl.tensor,
    scale: tl.tensor,
    best: tl.tensor,
    total: tl.tensor,
    found: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A softmax's largest score, sum and weighted values, of keys [keys, columns] more."""
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
    scores = tl.where(seen, scores, -float("inf"))
    most = tl.maximum(best, tl.max(scores, axis=1))
    weights = tl.exp2(scores - most[:, None])
    fade = tl.exp2(best - most)
    total = total * fade + tl.sum(weights, axis=1)
    found = tl.dot(weights.to(values.dtype), values, found * fade[:, None], input_precision="ieee")
    return most, total, found


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def _add_parts(
    found_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    spans_ptr: tl.tensor,
    spans_row: tl.tensor,
    spans_column: tl.tensor,
    segments_ptr: tl.tensor,
    segments_row: tl.tensor,
    segments_column: tl.tensor,
    cached_ptr: tl.tensor,
    cached_row: tl.tensor,
    out_ptr: tl.tensor,
    out_query: tl.tensor,
    out_head: tl.tensor,
    out_column: tl.tensor,
    queries: tl.tensor,
    q_heads: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    parts: tl.tensor,
    head_dim: tl.constexpr,
    least_part: tl.constexpr,
    lanes: tl.constexpr,
    heads_at_once: tl.constexpr,
    most_parts: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    # The query's segment, and how many parts its keys are in
    query = tl.program_id(0)
    lane = tl.arange(0, lanes)
    begins = column(spans_ptr, lane, count, spans_row) - first
    stops = column(spans_ptr + spans_column, lane, count, spans_row) - first
    own = column(segments_ptr + segments_column, lane, count, segments_row) - column(
        segments_ptr, lane, count, segments_row
    )
    keys = own + column(cached_ptr, lane, count, cached_row)
    keys = tl.sum(tl.where((begins <= query) & (query < stops), keys, 0), axis=0)
    part = _part(keys, parts, least_part)
    if keys <= part:
        return

    head = tl.program_id(1) * heads_at_once + tl.arange(0, heads_at_once)
    at = tl.arange(0, columns)
    row = query.to(tl.int64) * q_heads + head
    there = head < q_heads
    used = (keys + part - 1) // part
    number = tl.arange(0, most_parts)[None, :]
    whole = queries.to(tl.int64) * q_heads
    sums = tl.load(sums_ptr + number * whole + row[:, None], mask=there[:, None] & (number < used), other=-float("inf"))
    best = tl.where(there, tl.max(sums, axis=1), 0.0)
    total = tl.sum(tl.exp2(sums - best[:, None]), axis=1)
    found = tl.zeros((heads_at_once, columns), tl.float32)
    inside = there[:, None] & (at < head_dim)[None, :]
    for index in range(0, used):
        place = index * whole + row
        share = tl.exp2(tl.load(sums_ptr + place, mask=there, other=-float("inf")) - best)
        found += share[:, None] * tl.load(found_ptr + place[:, None] * head_dim + at[None, :], mask=inside, other=0.0)
    place = (query.to(tl.int64) * out_query + head.to(tl.int64) * out_head)[:, None] + at[None, :] * out_column
    found = found / tl.where(there, total, 1.0)[:, None]
    tl.store(out_ptr + place, found.to(out_ptr.dtype.element_ty), mask=inside)
