"""Cached decoding that follows semantics.md word for word: the schedule, the selection, and the passes themselves.

The cache is a plain array of keys and values a layer; nothing here is shared with dllmc. One object serves one side
of a request (with guidance there are two), one block after the other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.layered import Array, LayeredModel, attention


@dataclass(frozen=True)
class Policy:
    """CachePolicy's arguments."""

    mode: str = "block"
    retention: float = 1.0
    selection: str = "per_head"
    pool: int = 3
    delay: int = 0
    refresh_interval: int | None = None


def phase(policy: Policy, i: int) -> str:
    """What the i-th step of a block is: "full", "refresh" or "reuse"."""
    if policy.mode == "none" or i < policy.delay:
        return "full"
    if i == policy.delay:
        return "refresh"
    again = policy.refresh_interval is not None and (i - policy.delay) % policy.refresh_interval == 0
    return "refresh" if again else "reuse"


def active_span(block: range, shifted: bool) -> range:
    """The positions a Reuse pass computes: a shifted model's block needs the row before it."""
    return range(block.start - 1, block.stop) if shifted and block.start > 0 else block


class CachedSide:
    """The forward passes of one side of a request: (ids, block, step in the block) -> logits [len(ids), V], margin.

    Rows that a Reuse pass does not compute are NaN. The margin is that of the selection, in scores.
    """

    def __init__(self, model: LayeredModel, policy: Policy, shifted: bool) -> None:
        self.model, self.policy, self.shifted = model, policy, shifted
        self.cache: dict[int, tuple[Array, Array]] = {}  # layer -> K, V [kv_heads, kept, head_dim]

    def __call__(self, ids: Sequence[int], block: range, i: int) -> tuple[Array, float]:
        span, now = active_span(block, self.shifted), phase(self.policy, i)
        if now == "reuse":
            return self.reuse(ids, span), math.inf
        self.cache = {}
        return self.refresh(ids, span) if now == "refresh" else (self.full(ids), math.inf)

    def full(self, ids: Sequence[int]) -> Array:
        """Every token attends to every token, nothing is cached."""
        return self.model(ids, range(len(ids)), lambda layer, q, k, v: attention(q, k, v))

    def refresh(self, ids: Sequence[int], span: range) -> tuple[Array, float]:
        """As `full`; on the way each layer caches what it selects outside the active span."""
        outside = [p for p in range(len(ids)) if p not in span]
        margins = []

        def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
            kept, margin = select(q[:, span], k[:, outside], self.policy)
            margins.append(margin)
            at = [[outside[j] for j in kept_of_head] for kept_of_head in kept]
            self.cache[layer] = (
                np.stack([k[h, positions] for h, positions in enumerate(at)]),
                np.stack([v[h, positions] for h, positions in enumerate(at)]),
            )
            return attention(q, k, v)

        return self.model(ids, range(len(ids)), attend), min(margins)

    def reuse(self, ids: Sequence[int], span: range) -> Array:
        """Only the active span, at its own positions; it attends to the cache and to itself."""

        def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
            keys, values = self.cache[layer]
            return attention(q, np.concatenate((keys, k), axis=1), np.concatenate((values, v), axis=1))

        computed = self.model([ids[p] for p in span], span, attend)
        logits = np.full((len(ids), computed.shape[1]), math.nan)
        logits[list(span)] = computed
        return logits


def select(q: Array, k: Array, policy: Policy) -> tuple[list[list[int]], float]:
    """The candidates each KV head keeps, best first, from q [q_heads, span, head_dim] and k [kv_heads, n, head_dim].

    Also how far the scores are from keeping others (`selection_margin`).
    """
    n = k.shape[1]
    count = min(max(1, int(n * policy.retention)), n)
    kept, margin = [], math.inf
    for scores in candidate_scores(q, k, policy.selection):
        pooled = max_pool(scores, policy.pool)
        ranked = [j for _, j in sorted((-score, j) for j, score in enumerate(pooled))]
        kept.append(ranked[:count])
        margin = min(margin, selection_margin(scores, policy.pool, ranked[:count], ranked[count:]))
    return kept, margin


def candidate_scores(q: Array, k: Array, selection: str) -> list[list[float]]:
    """Scores [kv_heads][n]: how much the active span's mean query looks at each candidate."""
    q_heads, kv_heads, n = len(q), len(k), k.shape[1]
    group, q_mean = q_heads // kv_heads, q.mean(axis=1)
    products = [
        [float(q_mean[g] @ k[g // group, j]) / math.sqrt(q.shape[-1]) for j in range(n)] for g in range(q_heads)
    ]
    if selection == "per_head":
        return [
            [max(products[g][j] for g in range(h * group, (h + 1) * group)) for j in range(n)] for h in range(kv_heads)
        ]
    if selection == "shared":
        return [[sum(products[g][j] for g in range(q_heads)) / q_heads for j in range(n)]] * kv_heads
    raise ValueError(f"unknown selection {selection!r}")


def window(j: int, n: int, pool: int) -> range:
    """The candidates that the j-th pooled score is the maximum of: `pool` of them, fewer at the ends."""
    return range(max(0, j - pool // 2), min(n, j + pool // 2 + 1))


def max_pool(scores: Sequence[float], pool: int) -> list[float]:
    """Stride 1, same length."""
    return [max(scores[w] for w in window(j, len(scores), pool)) for j in range(len(scores))]


def selection_margin(scores: Sequence[float], pool: int, kept: Sequence[int], dropped: Sequence[int]) -> float:
    """The least by which a dropped candidate is behind a kept one: smaller changes of the scores keep the same ones.

    Two that share their maximum stay equal whatever it becomes, and the lower position is kept. So a higher one
    overtakes only by a score that is its own; a lower one, which has to draw level only, by any.
    """
    n, pooled, margin = len(scores), max_pool(scores, pool), math.inf
    for j in dropped:
        for i in kept:
            own = [scores[w] for w in window(j, n, pool) if j < i or w not in window(i, n, pool)]
            margin = min(margin, pooled[i] - max(own, default=-math.inf))
    return margin
