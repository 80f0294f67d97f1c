"""Calls of operators at the shapes that serving has, beside what torch has for the same, and what they must compute.

Operands lie as a program's do: queries, keys and values are columns of one projection, caches are pages in no order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.device import Call
from benchmarks.gpu.models import Model
from dllmc.models.layers import rotate
from dllmc.ops import attention
from dllmc.ops.keep import KEEPING_FIELDS

PAGE_TOKENS = 32
EPS = 1e-6
Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Sample:
    """One call's operands. `rivals`: by name, the same work in torch, on the same operands, without what it discards.

    `check()`, behind the call: what was found and what was expected, of as much as is worth the time.
    """

    args: Sequence[Any]
    outs: Sequence[Tensor]
    check: Callable[[], Pairs]
    rivals: Mapping[str, Call] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """An operator at a shape. `make` draws operands anew at each call. `inside`: what its error may be at most."""

    op: str
    facts: Mapping[str, Any]
    make: Callable[[], Sample]
    inside: float = 1e-2


@dataclass(frozen=True)
class Maker:
    """Makes the cases of a model on a device."""

    model: Model
    device: torch.device
    dtype: torch.dtype

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, device=self.device, dtype=dtype or self.dtype)

    def table(self, rows: object) -> Tensor:
        return torch.tensor(rows, device=self.device, dtype=torch.int64)

    def qkv(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [tokens, heads, head_dim], columns of one projection."""
        m = self.model
        heads = m.heads, m.kv_heads, m.kv_heads
        parts = self.randn(tokens, sum(heads), m.head_dim).split(heads, dim=1)
        return parts[0], parts[1], parts[2]

    def bounds(self, count: int, length: int) -> Tensor:
        """Segments of one length, end to end."""
        return self.table([[i * length, (i + 1) * length] for i in range(count)])

    def head(self, rows: int, kind: str) -> Iterator[Case]:
        """The fused head. kind: "greedy", "sampled" (temperature 1), "filtered" (and top-k and top-p)."""
        m = self.model
        weight = 0.02 * self.randn(m.spec.vocab_size, m.width)  # larger than any cache: all samples share it

        def make() -> Sample:
            hidden = self.randn(rows, m.width)
            zeros, ones = self.table([0] * rows), self.table([-1] * rows)
            temperature = self.empty(1, dtype=torch.float32).fill_(0.0 if kind == "greedy" else 1.0)
            top_p = self.empty(1, dtype=torch.float32).fill_(0.9 if kind == "filtered" else 1.0)
            one = self.table([0])
            top_k = self.table([50 if kind == "filtered" else 0])
            suppressed = self.table([[-1] * 64])
            tables = temperature, top_k, top_p, one, self.table([7]), one, suppressed
            position = torch.arange(rows, device=self.device)
            args = (hidden, weight, None, 1.0, zeros, position, ones, *tables)
            outs = self.empty(rows, dtype=torch.int64), *(self.empty(rows, dtype=torch.float32) for _ in range(2))

            def check() -> Pairs:
                token, _, logprob = outs
                logits = product(hidden, weight)
                expected = logits.log_softmax(-1)
                own = expected.gather(1, token.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
                return [(logprob, own), *([(own, expected.amax(-1))] if kind == "greedy" else [])]

            def decoded() -> object:
                logits = product(hidden, weight)
                return logits.softmax(-1).max(-1)

            return Sample(args, outs, check, {"gemm": lambda: product(hidden, weight), "gemm, softmax, max": decoded})

        yield Case("dllmc.decode_head.default", {"rows": rows, "kind": kind}, make, inside=1e-3)

    def refresh(self, count: int, length: int) -> Iterator[Case]:
        """Attention of `count` segments over all of their own tokens."""
        m, scale = self.model, self.model.head_dim**-0.5

        def make() -> Sample:
            q, k, v = self.qkv(count * length)
            bounds = self.bounds(count, length)
            out = self.empty(*q.shape)
            batched = [x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v)]

            def check() -> Pairs:
                whole = self.bounds(1, length)
                parts = [slice(0, length), slice((count - 1) * length, None)]
                return [(out[p], _attended(q[p], k[p], v[p], whole, scale)) for p in parts]

            rival = _sdpa(*batched, scale)
            return Sample((q, k, v, bounds, bounds, scale), [out], check, {"sdpa": rival})

        facts = {"phase": "refresh", "requests": count, "tokens": length, "heads": [m.heads, m.kv_heads]}
        yield Case("dllmc.attention.default", facts, make)

    def reuse(self, count: int, cached: int, block: int) -> Iterator[Case]:
        """Attention of `count` blocks over their own tokens, and each over that many cached ones, in pages."""
        m, scale = self.model, self.model.head_dim**-0.5
        width = -(-cached // PAGE_TOKENS)

        def make() -> Sample:
            q, k, v = self.qkv(count * block)
            cache = self.randn(2, m.kv_heads, count * width, PAGE_TOKENS, m.head_dim)
            pages = torch.randperm(count * width, device=self.device).view(count, width)
            slots, bounds, out = self.table([cached] * count), self.bounds(count, block), self.empty(*q.shape)
            args = (q, k, v, bounds, bounds, scale, None, 0, cache, slots, pages)

            def contiguous(which: int, fresh: Tensor) -> Tensor:
                """Cached and fresh keys or values of all requests, [requests, kv_heads, slots, head_dim]."""
                held = cache[which][:, pages].flatten(2, 3)[:, :, :cached].transpose(0, 1)
                return torch.cat((held, fresh.unflatten(0, (count, block)).transpose(1, 2)), dim=2)

            batched = q.unflatten(0, (count, block)).transpose(1, 2), contiguous(0, k), contiguous(1, v)

            def check() -> Pairs:
                part = slice((count - 1) * block, None)
                rest = cache.float(), slots[-1:], pages[-1:]
                return [(out[part], _attended(q[part], k[part], v[part], self.bounds(1, block), scale, *rest))]

            return Sample(args, [out], check, {"sdpa over contiguous K/V": _sdpa(*batched, scale)})

        facts = {"phase": "reuse", "requests": count, "cached": cached, "tokens": block, "heads": [m.heads, m.kv_heads]}
        yield Case("dllmc.attention.default", facts, make)

    def keep(self, count: int, length: int, block: int, retention: float) -> Iterator[Case]:
        """What a Refresh of `count` requests keeps. With retention 1 nothing is scored, all is packed."""
        m, kept = self.model, int((length - block) * retention)
        width = -(-kept // PAGE_TOKENS)

        def make() -> Sample:
            q, k, v = self.qkv(count * length)
            low = length - 2 * block
            starts = torch.arange(count, device=self.device) * length
            active = (starts[:, None] + low + torch.arange(block, device=self.device)).flatten()
            keeping = torch.zeros(count, KEEPING_FIELDS, device=self.device, dtype=torch.int64)
            keeping[:, 0], keeping[:, 1], keeping[:, 2], keeping[:, 4] = starts + low, starts + low + block, kept, 3
            pages = torch.randperm(count * width, device=self.device).view(count, width)
            cache, q_active = self.randn(2, m.kv_heads, count * width, PAGE_TOKENS, m.head_dim), q[active]
            args = (cache, q_active, k, v, self.bounds(count, length), keeping, pages)

            def check() -> Pairs:
                """The last request's slots, by the CPU's implementation in float32: what is copied is the same bits."""
                own = [x[(count - 1) * length :].float().cpu() for x in (k, v)]
                table = torch.arange(width)[None]
                empty = torch.zeros(2, m.kv_heads, width, PAGE_TOKENS, m.head_dim)
                last = keeping[-1:].cpu() - (count - 1) * length * torch.tensor([1, 1, 0, 0, 0])
                queries = q_active[-block:].float().cpu()
                expected = torch.ops.dllmc.keep(empty, queries, *own, self.bounds(1, length).cpu(), last, table)
                slots = cache[:, :, pages[-1]].flatten(2, 3)[:, :, :kept].float().cpu()
                return [(slots, expected.flatten(2, 3)[:, :, :kept])]

            rivals = {} if kept == length - block else {"scores, top-k, gather": _selects(q_active, k, v, count, kept)}
            return Sample(args, [cache], check, rivals)

        facts = {"requests": count, "tokens": length, "retention": retention, "heads": [m.heads, m.kv_heads]}
        # Scores that differ in their last bits keep another of two keys that are worth the same.
        yield Case("dllmc.keep.default", facts, make, inside=0.1 if retention < 1 else 1e-6)

    def rows_of(self, tokens: int) -> Iterator[Case]:
        """The operators on rows: norm of a residual sum, rotary embedding, gated product, projections."""
        m = self.model

        def norm() -> Sample:
            x, residual, weight = self.randn(tokens, m.width), self.randn(tokens, m.width), self.randn(m.width)
            outs = torch.empty_like(x), torch.empty_like(x)

            def check() -> Pairs:
                total = x + residual
                return [(outs[0], F.rms_norm(total.double(), [m.width], weight.double(), EPS)), (outs[1], total)]

            rival = {"add, rms_norm": lambda: F.rms_norm(x + residual, [m.width], weight, EPS)}
            return Sample((x, residual, weight, None, EPS), outs, check, rival)

        def rope() -> Sample:
            x = self.qkv(tokens)[0]
            angles = self.randn(tokens, m.head_dim // 2, dtype=torch.float32).repeat(1, 2)
            cos, sin, out = angles.cos(), angles.sin(), self.empty(*x.shape)
            tables = cos[:, None], sin[:, None]

            def check() -> Pairs:
                return [(out, rotate(x, *tables))]

            return Sample((x, cos, sin, None), [out], check, {"spelled out": lambda: rotate(x, *tables)})

        def glu() -> Sample:
            gate, up = self.randn(tokens, 2 * m.mlp).chunk(2, dim=-1)
            out = self.empty(tokens, m.mlp)

            def check() -> Pairs:
                return [(out, F.silu(gate.double()) * up.double())]

            return Sample((gate, up, "silu"), [out], check, {"silu, mul": lambda: F.silu(gate) * up})

        def linear(columns: int, width: int) -> Callable[[], Sample]:
            def make() -> Sample:
                x, weight, out = self.randn(tokens, width), self.randn(columns, width), self.empty(tokens, columns)

                def check() -> Pairs:
                    some = slice(0, 64)
                    return [(out[some], x[some].float() @ weight.float().T)]

                return Sample((x, weight, None), [out], check)

            return make

        facts = {"tokens": tokens}
        yield Case("dllmc.add_rms_norm.default", {**facts, "width": m.width}, norm)
        yield Case("dllmc.rope.default", {**facts, "heads": m.heads}, rope)
        yield Case("dllmc.glu.default", {**facts, "width": m.mlp}, glu)
        for columns, width in (
            ((m.heads + 2 * m.kv_heads) * m.head_dim, m.width),
            (2 * m.mlp, m.width),
            (m.width, m.mlp),
        ):
            shape = {**facts, "columns": columns, "width": width}
            yield Case("aten.linear.default", shape, linear(columns, width))


def product(hidden: Tensor, weight: Tensor) -> Tensor:
    """The logits, hidden @ weight.T, as the head wants them: float32, of operands as they are."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


def _attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    scale: float,
    cache: Tensor | None = None,
    cached: Tensor | None = None,
    page_table: Tensor | None = None,
) -> Tensor:
    return attention.reference(
        q.float(), k.float(), v.float(), bounds, bounds, scale, None, 0, cache, cached, page_table
    )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Call:
    """Torch's own, [requests, heads, tokens, head_dim]."""
    return lambda: F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _selects(q: Tensor, k: Tensor, v: Tensor, count: int, kept: int) -> Call:
    """What a Refresh keeps, spelled out in torch for requests of one length: a key too many a block, and no pages."""
    group = q.shape[1] // k.shape[1]
    queries, keys, values = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))

    def run() -> object:
        mean = queries.float().mean(2).unflatten(1, (-1, group)).to(keys.dtype)
        scores = torch.einsum("nhgd,nhtd->nhgt", mean, keys).amax(2)
        pooled = F.max_pool1d(scores, 3, stride=1, padding=1)
        index = pooled.topk(kept, dim=-1).indices[..., None].expand(-1, -1, -1, keys.shape[-1])
        return keys.gather(2, index), values.gather(2, index)

    return run
