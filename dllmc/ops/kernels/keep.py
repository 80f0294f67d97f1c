"""What a Refresh keeps: scores of the candidates, the best of each head, and their keys and values in the pages.

    cache: [2, kv_heads, pages, page_tokens, head_dim], q: [active, q_heads, head_dim], k, v: [tokens, kv_heads,
    head_dim], segments: [segments, 2], keeping: [segments, 5], page_table: [segments, width]; any strides

Four launches, without effect for a segment that keeps nothing, the first three also for one that keeps all:
    1. add: a query head of a segment, whose queries over the active span are summed
    2. score: a tile of a KV head's candidates, by their products with those sums
    3. select: a KV head of a segment. Pooled scores become integers of the same order, four passes over their bytes
       find the last one kept, and prefix sums number what is kept, in the order of the tokens
    4. pack: a tile of a KV head's slots, into which keys and values are copied
A sum stands for the mean, and nothing is divided by sqrt(head_dim): that changes no order, and equal scores of integers
stay equal. Scores are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllmc.ops.kernels.configs import Launch, configured
from dllmc.ops.kernels.tiles import column, entry, most_tiles, tile_at

# Elements of the queries that are summed, of the keys that are scored, and of those that are packed at once.
TILE = 8192
# Scores that a program which selects holds at once: no fewer than its threads, which would count some twice.
LEAST_SELECTED = 512
MOST_SELECTED = 4096
# What changes from step to step, for whose values no kernel is compiled anew.
VARYING = ("count", "tokens")


def keep(
    cache: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    keeping: Tensor,
    page_table: Tensor,
    sums: Tensor,
    scores: Tensor,
    order: Tensor,
) -> None:
    """Write the slots of every Refresh segment; operands as above and in `dllmc.ops.keep`.

    Workspace: sums [segments, q_heads, head_dim] and scores [kv_heads, tokens] float32, order [kv_heads, tokens] int32.
    """
    (tokens, kv_heads, head_dim), q_heads, count = k.shape, q.shape[1], len(segments)
    if not k.numel() or not count:
        return
    tables = (segments, *segments.stride(), keeping, *keeping.stride(), count)
    lanes, columns = triton.next_power_of_2(count), triton.next_power_of_2(head_dim)
    sizes = {"tokens": tokens, "segments": count, "kv_heads": kv_heads}
    launch = configured(Launch(TILE), "keep", k, head_dim=head_dim, **sizes)
    rows = max(1, launch.tile // columns)
    tiles = most_tiles(tokens, count, rows)
    _add[(count, q_heads)](
        q,
        *q.stride(),
        *tables,
        sums,
        head_dim=head_dim,
        at_once=rows,
        lanes=lanes,
        columns=columns,
        num_warps=launch.warps,
    )
    _score[(tiles, kv_heads)](
        k,
        *k.stride(),
        *tables,
        sums,
        scores,
        tokens,
        group=q_heads // kv_heads,
        head_dim=head_dim,
        at_once=rows,
        lanes=lanes,
        columns=columns,
        num_warps=launch.warps,
    )
    at_once = min(MOST_SELECTED, max(LEAST_SELECTED, triton.next_power_of_2(tokens)))
    select = configured(Launch(at_once, max(4, at_once // 256)), "select", k, **sizes)
    kept = scores.view(torch.int32)  # the scores are read before
    _select[(count, kv_heads)](
        scores, order, kept, *tables, tokens, at_once=select.tile, lanes=lanes, num_warps=select.warps
    )
    _pack[(tiles, kv_heads)](
        cache,
        *cache.stride(),
        k,
        *k.stride(),
        v,
        *v.stride(),
        *tables,
        page_table,
        *page_table.stride(),
        kept,
        tokens,
        head_dim=head_dim,
        page_tokens=cache.shape[3],
        at_once=rows,
        lanes=lanes,
        columns=columns,
        num_warps=launch.warps,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _columns(
    segments_ptr: tl.tensor,
    segments_row: tl.tensor,
    segments_column: tl.tensor,
    keeping_ptr: tl.tensor,
    keeping_row: tl.tensor,
    keeping_column: tl.tensor,
    count: tl.tensor,
    lane: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Of every segment: its first token, its active span's first token and length, its candidates, how many stay."""
    start = column(segments_ptr, lane, count, segments_row)
    low = column(keeping_ptr, lane, count, keeping_row)
    span = column(keeping_ptr + keeping_column, lane, count, keeping_row) - low
    candidates = column(segments_ptr + segments_column, lane, count, segments_row) - start - span
    return start, low, span, candidates, column(keeping_ptr + 2 * keeping_column, lane, count, keeping_row)


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def _add(
    q_ptr: tl.tensor,
    q_query: tl.tensor,
    q_head: tl.tensor,
    q_column: tl.tensor,
    segments_ptr: tl.tensor,
    segments_row: tl.tensor,
    segments_column: tl.tensor,
    keeping_ptr: tl.tensor,
    keeping_row: tl.tensor,
    keeping_column: tl.tensor,
    count: tl.tensor,
    sums_ptr: tl.tensor,
    head_dim: tl.constexpr,
    at_once: tl.constexpr,
    lanes: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    segment, head, lane = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, lanes)
    _, _, spans, candidates, kept = _columns(
        segments_ptr, segments_row, segments_column, keeping_ptr, keeping_row, keeping_column, count, lane
    )
    kept = entry(kept, lane, segment)
    if (kept == 0) | (kept == entry(candidates, lane, segment)):
        return
    first, span = tl.sum(tl.where(lane < segment, spans, 0), axis=0), entry(spans, lane, segment)
    at = tl.arange(0, columns)
    total = tl.zeros((columns,), tl.float32)
    for done in range(0, span, at_once):
        query = done + tl.arange(0, at_once)
        place = (first + query).to(tl.int64)[:, None] * q_query + head * q_head + at[None, :].to(tl.int64) * q_column
        inside = (query < span)[:, None] & (at < head_dim)[None, :]
        total += tl.sum(tl.load(q_ptr + place, mask=inside, other=0.0).to(tl.float32), axis=0)
    tl.store(sums_ptr + (segment * tl.num_programs(1) + head) * head_dim + at, total, mask=at < head_dim)


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def _score(
    k_ptr: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    k_column: tl.tensor,
    segments_ptr: tl.tensor,
    segments_row: tl.tensor,
    segments_column: tl.tensor,
    keeping_ptr: tl.tensor,
    keeping_row: tl.tensor,
    keeping_column: tl.tensor,
    count: tl.tensor,
    sums_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    tokens: tl.tensor,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    at_once: tl.constexpr,
    lanes: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    lane = tl.arange(0, lanes)
    start, low, span, candidates, kept = _columns(
        segments_ptr, segments_row, segments_column, keeping_ptr, keeping_row, keeping_column, count, lane
    )
    segment, tile = tile_at(tl.program_id(0), tl.where((kept > 0) & (kept < candidates), candidates, 0), at_once)
    if segment >= count:
        return
    head, kv_heads = tl.program_id(1), tl.num_programs(1)
    shared = tl.load(keeping_ptr + segment * keeping_row + 3 * keeping_column) != 0
    if shared & (head > 0):
        return
    first, last = tl.where(shared, 0, head), tl.where(shared, kv_heads, head + 1)

    start, low, span = entry(start, lane, segment), entry(low, lane, segment), entry(span, lane, segment)
    token = start + tile * at_once + tl.arange(0, at_once)
    inside = token < start + entry(candidates, lane, segment)
    at = tl.arange(0, columns)
    wide = at < head_dim
    sums = sums_ptr + (segment * kv_heads * group).to(tl.int64) * head_dim + at
    place = (token + tl.where(token >= low, span, 0)).to(tl.int64)[:, None] * k_token + at[None, :] * k_column
    total = tl.zeros((at_once,), tl.float32)
    best = tl.full((at_once,), -float("inf"), tl.float32)
    for of_head in range(first, last):
        there = inside[:, None] & wide[None, :]
        keys = tl.load(k_ptr + tl.cast(of_head, tl.int64) * k_head + place, mask=there, other=0.0).to(tl.float32)
        for query_head in range(of_head * group, of_head * group + group):
            product = tl.sum(keys * tl.load(sums + query_head * head_dim, mask=wide, other=0.0)[None, :], axis=1)
            total += product
            best = tl.maximum(best, product, propagate_nan=tl.PropagateNan.ALL)
    score = tl.where(shared, total, best)
    score = tl.where(score == score, score, -float("inf"))
    tl.store(scores_ptr + head.to(tl.int64) * tokens + token, score, mask=inside)


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def _select(
    scores_ptr: tl.tensor,
    order_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    segments_ptr: tl.tensor,
    segments_row: tl.tensor,
    segments_column: tl.tensor,
    keeping_ptr: tl.tensor,
    keeping_row: tl.tensor,
    keeping_column: tl.tensor,
    count: tl.tensor,
    tokens: tl.tensor,
    at_once: tl.constexpr,
    lanes: tl.constexpr,
) -> None:
    segment, head, lane = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, lanes)
    start, _, _, candidates, kept = _columns(
        segments_ptr, segments_row, segments_column, keeping_ptr, keeping_row, keeping_column, count, lane
    )
    start, candidates, kept = entry(start, lane, segment), entry(candidates, lane, segment), entry(kept, lane, segment)
    shared = tl.load(keeping_ptr + segment * keeping_row + 3 * keeping_column) != 0
    if (kept == 0) | (kept == candidates) | (shared & (head > 0)):
        return
    reach = tl.load(keeping_ptr + segment * keeping_row + 4 * keeping_column).to(tl.int32) // 2
    row = head * tokens + start
    scores_ptr += row
    order_ptr += row
    kept_ptr += row

    # The largest score of each window, as an integer that is the larger the larger the score is
    for block in range(0, candidates, at_once):
        candidate = block + tl.arange(0, at_once)
        pooled = tl.full((at_once,), -float("inf"), tl.float32)
        for shift in range(-reach, reach + 1):
            near = candidate + shift
            inside = (near >= 0) & (near < candidates) & (candidate < candidates)
            pooled = tl.maximum(pooled, tl.load(scores_ptr + near, mask=inside, other=-float("inf")))
        bits = tl.where(pooled == 0, 0.0, pooled).to(tl.uint32, bitcast=True)
        ordered = bits ^ tl.where(bits >> 31 == 0, 0x80000000, 0xFFFFFFFF)
        tl.store(order_ptr + candidate, ordered.to(tl.int32, bitcast=True), mask=candidate < candidates)
    tl.debug_barrier()

    # The last one kept, byte by byte from the highest, and how many of its equals are kept
    edge = tl.zeros((), tl.uint32)
    wanted = kept
    byte = tl.arange(0, 256)
    for step in tl.static_range(4):
        lowest = 24 - 8 * step
        found = tl.zeros((256,), tl.int32)
        for block in range(0, candidates, at_once):
            candidate = block + tl.arange(0, at_once)
            ordered = tl.load(order_ptr + candidate, mask=candidate < candidates, other=0).to(tl.uint32, bitcast=True)
            alike = candidate < candidates
            if step > 0:
                alike = alike & (ordered >> (lowest + 8) == edge >> (lowest + 8))
            found += tl.histogram(((ordered >> lowest) & 255).to(tl.int32), 256, mask=alike)
        larger = tl.sum(found, axis=0) - tl.cumsum(found, axis=0)
        here = (larger < wanted) & (larger + found >= wanted)
        edge |= tl.sum(tl.where(here, byte, 0), axis=0).to(tl.uint32) << lowest
        wanted -= tl.sum(tl.where(here, larger, 0), axis=0)

    # All that are larger, and the first of its equals
    equals = 0
    filled = 0
    for block in range(0, candidates, at_once):
        candidate = block + tl.arange(0, at_once)
        inside = candidate < candidates
        ordered = tl.load(order_ptr + candidate, mask=inside, other=0).to(tl.uint32, bitcast=True)
        equal = (inside & (ordered == edge)).to(tl.int32)
        stays = inside & ((ordered > edge) | ((equal > 0) & (equals + tl.cumsum(equal, axis=0) <= wanted)))
        slot = filled + tl.cumsum(stays.to(tl.int32), axis=0) - 1
        tl.store(kept_ptr + slot, candidate, mask=stays)
        equals += tl.sum(equal, axis=0)
        filled += tl.sum(stays.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def _pack(
    cache_ptr: tl.tensor,
    cache_kind: tl.tensor,
    cache_head: tl.tensor,
    cache_page: tl.tensor,
    cache_slot: tl.tensor,
    cache_column: tl.tensor,
    k_ptr: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    k_column: tl.tensor,
    v_ptr: tl.tensor,
    v_token: tl.tensor,
    v_head: tl.tensor,
    v_column: tl.tensor,
    segments_ptr: tl.tensor,
    segments_row: tl.tensor,
    segments_column: tl.tensor,
    keeping_ptr: tl.tensor,
    keeping_row: tl.tensor,
    keeping_column: tl.tensor,
    count: tl.tensor,
    table_ptr: tl.tensor,
    table_row: tl.tensor,
    table_column: tl.tensor,
    kept_ptr: tl.tensor,
    tokens: tl.tensor,
    head_dim: tl.constexpr,
    page_tokens: tl.constexpr,
    at_once: tl.constexpr,
    lanes: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    lane = tl.arange(0, lanes)
    start, low, span, candidates, kept = _columns(
        segments_ptr, segments_row, segments_column, keeping_ptr, keeping_row, keeping_column, count, lane
    )
    segment, tile = tile_at(tl.program_id(0), kept, at_once)
    if segment >= count:
        return
    start, low, span = entry(start, lane, segment), entry(low, lane, segment), entry(span, lane, segment)
    candidates, kept = entry(candidates, lane, segment), entry(kept, lane, segment)
    head = tl.program_id(1).to(tl.int64)
    slot = tile * at_once + tl.arange(0, at_once)
    inside = slot < kept
    candidate = slot
    if kept < candidates:
        shared = tl.load(keeping_ptr + segment * keeping_row + 3 * keeping_column) != 0
        row = tl.where(shared, 0, head) * tokens + start
        candidate = tl.load(kept_ptr + row + slot, mask=inside, other=0)
    token = start + candidate
    token = (token + tl.where(token >= low, span, 0)).to(tl.int64)[:, None]
    page = tl.load(table_ptr + segment * table_row + (slot // page_tokens) * table_column, mask=inside, other=0)
    at = tl.arange(0, columns).to(tl.int64)[None, :]
    there = inside[:, None] & (at < head_dim)
    keys = tl.load(k_ptr + head * k_head + token * k_token + at * k_column, mask=there)
    values = tl.load(v_ptr + head * v_head + token * v_token + at * v_column, mask=there)
    place = cache_ptr + head * cache_head + (page * cache_page + (slot % page_tokens) * cache_slot)[:, None]
    tl.store(place + at * cache_column, keys, mask=there)
    tl.store(place + cache_kind + at * cache_column, values, mask=there)
