"""`dllmc::keep`: at a Refresh, the keys and values outside the active span that are worth most go into the cache.

    cache [2, kv_heads, pages, page_tokens, head_dim], q [active, q_heads, head_dim],
    k and v [tokens, kv_heads, head_dim], segments [segments, 2], keeping [segments, 5], page_table [segments, width]
    -> the cache, in which each Refresh segment's slots are written; `dllmc::keep_` writes them in place

The tables are int64. `segments` holds each segment's first token and the token behind its last. `keeping` holds, of a
Refresh segment, its active span's first token and the one behind, how many keys each head keeps, 1 if all heads keep
the same ones, and the pool's window; of any other segment zeros. `q` holds the queries of the active spans, one
segment's after the other. Slot j of head h is `cache[:, h, page_table[segment, j // page_tokens], j % page_tokens]`.

Candidates are the segment's tokens outside the active span, in order. A candidate's score is the product of its key
with the span's mean query, the largest of a KV head's query heads, or the mean of all; then the largest within the
window around it (semantics.md, "Selection at a Refresh"). Slots are filled in the order of the tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dllmc.ops.chunks import Call, Part, bytes_of, carved, wide_dtype
from dllmc.ops.library import library, run_bound
from dllmc.ops.segments import slot_runs

KEEPING_FIELDS = 5
# Tokens whose products with all summed queries are held at once.
SCORE_CHUNK = 1024

_TABLES = "Tensor q, Tensor k, Tensor v, Tensor segments, Tensor keeping, Tensor page_table"
library.define(f"keep(Tensor cache, {_TABLES}) -> Tensor")
library.define(f"keep_(Tensor(a!) cache, {_TABLES}) -> ()")


@dataclass(frozen=True)
class Refresh:
    """What one segment keeps: its tokens `[start, end)`, without those of the active span `[low, high)`.

    `queries`: the rows of the span's queries. `count`: keys that each head keeps.
    """

    start: int
    end: int
    low: int
    high: int
    queries: slice
    count: int
    shared: bool
    window: int
    pages: Sequence[int]

    @property
    def candidates(self) -> int:
        return self.end - self.start - (self.high - self.low)

    def outside(self, x: Tensor) -> Tensor:
        """The candidates of a segment's values [..., tokens]."""
        low, high = self.low - self.start, self.high - self.start
        return torch.cat((x[..., :low], x[..., high:]), dim=-1)


def refreshes(segments: Tensor, keeping: Tensor, page_table: Tensor) -> Iterator[Refresh]:
    """Every segment that keeps something, of the operator's tables."""
    row = 0
    for index, ((start, end), (low, high, count, shared, window)) in enumerate(
        zip(segments.tolist(), keeping.tolist(), strict=True)
    ):
        queries = slice(row, row := row + high - low)
        if count:
            yield Refresh(start, end, low, high, queries, count, bool(shared), window, page_table[index].tolist())


def reference(
    cache: Tensor, q: Tensor, k: Tensor, v: Tensor, segments: Tensor, keeping: Tensor, page_table: Tensor
) -> Tensor:
    """The definition, in the inputs' dtype (float64 for tests)."""
    cache = cache.clone()
    group = q.shape[1] // k.shape[1]
    for one in refreshes(segments, keeping, page_table):
        tokens = [t for t in range(one.start, one.end) if not one.low <= t < one.high]
        mean = q[one.queries].mean(dim=0)
        products = torch.einsum("gd,tgd->gt", mean, k[tokens].repeat_interleave(group, dim=1))
        scores = products.unflatten(0, (-1, group)).amax(1)
        if one.shared:
            scores = products.mean(dim=0).expand(k.shape[1], -1)
        for head, row in enumerate((scores * q.shape[2] ** -0.5).tolist()):
            reach = one.window // 2
            pooled = [max(row[max(j - reach, 0) : j + reach + 1]) for j in range(len(row))]
            best = sorted(range(len(pooled)), key=lambda j: (-pooled[j], j))[: one.count]
            for slot, j in enumerate(sorted(best)):
                page, at = one.pages[slot // cache.shape[3]], slot % cache.shape[3]
                cache[0, head, page, at] = k[tokens[j], head]
                cache[1, head, page, at] = v[tokens[j], head]
    return cache


def keep_out(
    cache: Tensor, q: Tensor, k: Tensor, v: Tensor, segments: Tensor, keeping: Tensor, page_table: Tensor
) -> None:
    """CPU: all heads of a Refresh at once; scores in float32 at least. Where all is kept, nothing is scored."""
    slots = cache.flatten(2, 3).unbind()  # each [kv_heads, slots, head_dim]
    sources = [x.transpose(0, 1) for x in (k, v)]  # each [kv_heads, tokens, head_dim]
    for one in refreshes(segments, keeping, page_table):
        kept = None if one.count == one.candidates else _chosen(q[one.queries], k[one.start : one.end], one)
        filled = 0
        for run in slot_runs(one.pages, one.count, cache.shape[3]):
            for source, target in zip(sources, slots, strict=True):
                part = target[:, run.start : run.start + run.length]
                if kept is None:
                    _copy_candidates(part, source, one, filled)
                else:
                    heads = torch.arange(len(source))[:, None]
                    torch.ops.aten.index.Tensor_out(source, [heads, kept[:, filled : filled + run.length]], out=part)
            filled += run.length


def _copy_candidates(target: Tensor, source: Tensor, one: Refresh, first: int) -> None:
    """Candidates from number `first` on, as many as the target has, [kv_heads, count, head_dim]."""
    before = min(max(one.low - one.start - first, 0), target.shape[1])
    target[:, :before].copy_(source[:, one.start + first : one.start + first + before])
    behind = one.start + first + before + one.high - one.low
    target[:, before:].copy_(source[:, behind : behind + target.shape[1] - before])


def _chosen(q: Tensor, k: Tensor, one: Refresh) -> Tensor:
    """Tokens that each head keeps, ascending, [kv_heads, count]: of q [span, q_heads, head_dim] and all its keys k."""
    scores = one.outside(_scores(q, k, one.shared)).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    pooled = F.max_pool1d(scores[None], one.window, stride=1, padding=one.window // 2)[0]
    edge = pooled.kthvalue(one.candidates - one.count + 1, dim=1, keepdim=True).values
    above, level = pooled > edge, pooled == edge
    spare = one.count - above.sum(dim=1, keepdim=True)
    best = above | (level & (level.cumsum(dim=1) <= spare))  # of those at the edge, the first
    index = best.nonzero()[:, 1].view(len(pooled), one.count).expand(k.shape[1], -1)
    return torch.where(index < one.low - one.start, index, index + one.high - one.low) + one.start


def _scores(q: Tensor, k: Tensor, shared: bool) -> Tensor:
    """[kv_heads or 1, tokens], each times a number that changes no order: sums of queries make equal integers equal."""
    dtype = wide_dtype(q)
    kv_heads, head_dim = k.shape[1:]
    total = q.sum(dim=0, dtype=dtype).view(kv_heads, -1, head_dim)
    if shared:
        total = total.sum(dim=1, keepdim=True)
    scores = torch.empty(1 if shared else kv_heads, len(k), dtype=dtype)
    for at in range(0, len(k), SCORE_CHUNK):
        keys = k[at : at + SCORE_CHUNK].to(dtype).permute(1, 2, 0)
        part = scores[:, at : at + SCORE_CHUNK]
        products = torch.bmm(total, keys)  # [kv_heads, query heads of each, tokens]
        if shared:
            torch.sum(products, dim=0, out=part)
        else:
            torch.amax(products, dim=1, out=part)
    return scores


def workspace_of(tensors: Sequence[Tensor], device: str) -> int:
    """Bytes for a call on tensors like these; a CPU needs none."""
    return 0 if device == "cpu" else bytes_of(parts_of(*tensors[1:5]))


def parts_of(q: Tensor, k: Tensor, v: Tensor, segments: Tensor) -> list[Part]:
    """Workspace: sums of each segment's queries, and of each KV head's candidates scores and their order."""
    tokens, kv_heads, head_dim = k.shape
    sums, scores = len(segments) * q.shape[1] * head_dim, kv_heads * tokens
    return [(sums, torch.float32), (scores, torch.float32), (scores, torch.int32)]


def bind(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Call:
    """Resolve a call over fixed memory: the cache is written where it is."""
    if args[0].is_cuda:
        from dllmc.ops.kernels.keep import keep

        return partial(keep, *args, *carved(workspace, parts_of(*args[1:5])))
    return partial(keep_out, *args)


def _keep(
    cache: Tensor, q: Tensor, k: Tensor, v: Tensor, segments: Tensor, keeping: Tensor, page_table: Tensor
) -> Tensor:
    cache = cache.clone(memory_format=torch.contiguous_format)
    _keep_(cache, q, k, v, segments, keeping, page_table)
    return cache


def _keep_(
    cache: Tensor, q: Tensor, k: Tensor, v: Tensor, segments: Tensor, keeping: Tensor, page_table: Tensor
) -> None:
    of_device = partial(workspace_of, device=q.device.type)
    run_bound(bind, (cache, q, k, v, segments, keeping, page_table), (cache,), of_device)


def _fake(
    cache: Tensor, q: Tensor, k: Tensor, v: Tensor, segments: Tensor, keeping: Tensor, page_table: Tensor
) -> Tensor:
    return cache.new_empty(cache.shape)


def _fake_in_place(*_: Tensor) -> None:
    """The cache is as it was, but for what it holds."""


for _device in ("CPU", "CUDA"):
    library.impl("keep", _keep, _device)
    library.impl("keep_", _keep_, _device)
torch.library.register_fake("dllmc::keep", _fake, lib=library)
torch.library.register_fake("dllmc::keep_", _fake_in_place, lib=library)
