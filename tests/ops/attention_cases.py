"""Steps for `dllmc::attention` that mix Full, Refresh and Reuse segments, and what it makes of them, in numpy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.ops.calls import HALF, UNTOUCHED, laid_out, random

SCALE = 0.3


@dataclass(frozen=True)
class Segment:
    """So many tokens, of which the first `queries` query (all, if None), and so many cached keys."""

    tokens: int
    kept: int = 0
    queries: int | None = None


def step(
    segments: Sequence[Segment],
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    page_tokens: int = 16,
    layout: str = "dense",
    scattered: bool = True,
    window: int | None = None,
) -> list[Any]:
    """The operator's operands. heads: q and kv. Slots that nothing is cached in are no numbers; two queries are spare.

    scattered: pages anywhere in the pool, else a segment's are neighbours.
    """
    q_heads, kv_heads = heads
    counts = [s.tokens if s.queries is None else s.queries for s in segments]
    q = random(sum(counts) + 2, q_heads, head_dim, seed=1, dtype=dtype)
    k, v = (random(sum(s.tokens for s in segments), kv_heads, head_dim, seed=seed, dtype=dtype) for seed in (2, 3))
    needed = [-(-s.kept // page_tokens) for s in segments]
    pages = sum(needed) + 3
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(4)) if scattered else torch.arange(pages)
    table = torch.zeros(len(segments), max([1, *needed]), dtype=torch.int64)
    cache = torch.full((2, kv_heads, pages, page_tokens, head_dim), torch.nan, dtype=dtype)
    numbers = random(*cache.shape, seed=5, dtype=dtype)
    for row, of_segment, segment in zip(table, order.split([*needed, 3]), segments, strict=False):
        row[: len(of_segment)] = of_segment
        for slot in range(segment.kept):
            page, at = row[slot // page_tokens], slot % page_tokens
            cache[:, :, page, at] = numbers[:, :, page, at]
    kept = torch.tensor([s.kept for s in segments], dtype=torch.int64)
    q, k, v = (laid_out(x, layout) for x in (q, k, v))
    return [q, k, v, _ranges(counts), _ranges([s.tokens for s in segments]), SCALE, window, 0, cache, kept, table]


def _ranges(lengths: Sequence[int]) -> Tensor:
    ends = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
    return torch.stack((ends - torch.tensor(lengths), ends), dim=1).view(-1, 2)


def expected(args: Sequence[Any], outside: float = UNTOUCHED) -> NDArray[np.float64]:
    """Attention from its definition, in float64; `outside` where no segment queries."""
    q, k, v, spans, segments, scale, window, first, *of_cache = args
    queries, keys, values = (x.double().numpy() for x in (q, k, v))
    out = np.full(queries.shape, outside)
    group = queries.shape[1] // keys.shape[1]
    for index, ((begin, stop), (start, end)) in enumerate(zip(spans.tolist(), segments.tolist(), strict=True)):
        for head in range(queries.shape[1]):
            held = range(max(begin, first), min(stop, first + len(queries)))
            own = np.arange(end - start)
            seen = np.ones((len(held), end - start), dtype=bool)
            if window is not None:
                seen = np.abs(np.array([row - begin for row in held])[:, None] - own) <= window
            head_keys, head_values = keys[start:end, head // group], values[start:end, head // group]
            if of_cache:
                slots = _slots(*of_cache, index, head // group)
                head_keys, head_values = np.concatenate((slots[0], head_keys)), np.concatenate((slots[1], head_values))
                seen = np.concatenate((np.ones((len(held), slots.shape[1]), dtype=bool), seen), axis=1)
            rows = [row - first for row in held]
            scores = np.where(seen, queries[rows, head] @ head_keys.T * scale, -np.inf)
            if scores.size:
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                out[rows, head] = weights @ head_values / weights.sum(axis=1, keepdims=True)
    return out


def _slots(cache: Tensor, cached: Tensor, table: Tensor, index: int, head: int) -> NDArray[np.float64]:
    """Keys and values that a head of a segment has in its pages, [2, slots, head_dim]."""
    size = cache.shape[3]
    found = [cache[:, head, table[index, slot // size], slot % size] for slot in range(int(cached[index]))]
    return torch.stack(found, dim=1).double().numpy() if found else np.zeros((2, 0, cache.shape[4]))


def launch(args: Sequence[Any], outs: Sequence[Tensor]) -> None:
    """The Triton kernel, with as much workspace as the operator asks for, full of garbage."""
    from dllmc.ops.attention import workspace_of
    from dllmc.ops.kernels.attention import attention

    q, k, v, spans, segments, scale, window, first, *of_cache = (*args, None, 0)[: max(len(args), 8)]
    needed = workspace_of([arg for arg in args if isinstance(arg, Tensor)], "cuda")
    workspace = torch.full((needed,), 255, dtype=torch.uint8, device=q.device)
    attention(q, k, v, spans, segments, scale, outs[0], window, first, *(of_cache or (None,) * 3), workspace)


def tolerance(dtype: torch.dtype) -> float:
    """Of one result: a few roundings of numbers about 1, in weights, values and the sum itself."""
    return {torch.float64: 1e-11, torch.float32: 2e-5}.get(dtype, 4 * torch.finfo(dtype).eps)


def assert_attended(found: Tensor, args: Sequence[Any], way: str) -> None:
    """Every row that a segment queries, and no other: a graph's call leaves zeros there."""
    assert found.dtype == args[0].dtype
    allowed = tolerance(found.dtype)
    np.testing.assert_allclose(
        found.double().numpy(), expected(args, 0.0 if way == "graph" else UNTOUCHED), rtol=allowed, atol=allowed
    )


def dtypes_of(way: str, device: str) -> tuple[torch.dtype, ...]:
    """The interpreter multiplies the bits of bfloat16 matrices, so float16 stands for both there."""
    if device == "cuda":
        return (torch.float32, *HALF)
    return (torch.float32, torch.float16) if way == "kernel" else (torch.float32, torch.float64, *HALF)
