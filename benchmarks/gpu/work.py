"""What one call of an operator must do at least: operations of its products, and bytes of memory read and written.

Each operand counts once, and of tables and caches what is read of them, which the call's own tables tell: so a call is
counted as it is bound, on real inputs. Arithmetic that is no product of matrices is not counted: on a GPU it hides
behind memory.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dllmc.ops.registry  # noqa: F401  (it registers the operators)
from dllmc.ops.keep import refreshes


@dataclass(frozen=True)
class Work:
    """Operations (a multiplication and an addition are two) and bytes."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The roofline: the longer of what the operations and what the bytes take."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)


# The operator's name in programs -> how its call is counted; all others move their operands.
Count = Callable[[Mapping[str, Any], Sequence[Tensor]], Work]


def work_of(op: str, args: Sequence[Any], outs: Sequence[Tensor]) -> Work:
    """What a call must do. args: positional operands as the executor binds them; outs: what is written."""
    given = dict(zip(_parameters(op), args, strict=False))
    return _COUNTS.get(op, _moves)(given, outs)


def _parameters(op: str) -> list[str]:
    if op == "copy":
        return ["source"]
    namespace, packet, overload = op.split(".")
    return [p.name for p in getattr(getattr(getattr(torch.ops, namespace), packet), overload)._schema.arguments]


def held_bytes(x: Tensor) -> int:
    """Bytes of a tensor's elements, those that it repeats counted once."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * x.element_size()


def _moves(given: Mapping[str, Any], outs: Sequence[Tensor]) -> Work:
    flat = [item for value in given.values() for item in (value if isinstance(value, list | tuple) else [value])]
    return Work(bytes=sum(held_bytes(x) for x in (*flat, *outs) if isinstance(x, Tensor)))


def _without(given: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in names}


def _linear(given: Mapping[str, Any], outs: Sequence[Tensor]) -> Work:
    return Work(2 * outs[0].numel() * given["weight"].shape[1]) + _moves(given, outs)


def _matmul(given: Mapping[str, Any], outs: Sequence[Tensor]) -> Work:
    return Work(2 * outs[0].numel() * given["self"].shape[-1]) + _moves(given, outs)


def _head(given: Mapping[str, Any], outs: Sequence[Tensor]) -> Work:
    return Work(2 * given["hidden"].shape[0] * given["weight"].numel()) + _moves(given, outs)


def _embedding(given: Mapping[str, Any], outs: Sequence[Tensor]) -> Work:
    """Of the table, the rows that are looked up."""
    return Work(bytes=held_bytes(outs[0])) + _moves(_without(given, "weight"), outs)


def _index_select(given: Mapping[str, Any], outs: Sequence[Tensor]) -> Work:
    return Work(bytes=held_bytes(outs[0])) + _moves(_without(given, "self"), outs)


def _rope(given: Mapping[str, Any], outs: Sequence[Tensor]) -> Work:
    """Of cos and sin, a row a token."""
    tokens = given["x"].shape[0]
    rows = sum(tokens * table.shape[1] * table.element_size() for table in (given["cos"], given["sin"]))
    return Work(bytes=rows) + _moves(_without(given, "cos", "sin"), outs)


def _attention(given: Mapping[str, Any], outs: Sequence[Tensor]) -> Work:
    """Each query with each key that it sees; of the cache, the slots that segments have."""
    q, k, v = (given[name] for name in ("q", "k", "v"))
    first, window = given.get("first") or 0, given.get("window")
    spans, segments = given["spans"].tolist(), given["segments"].tolist()
    cached = given["cached"].tolist() if given.get("cached") is not None else [0] * len(segments)
    pairs = 0
    for (begin, stop), (start, end), slots in zip(spans, segments, cached, strict=True):
        low, high = (min(max(edge - first, 0), len(q)) for edge in (begin, stop))
        seen = (high - low) * (end - start)
        if window is not None:
            numbers = range(low + first - begin, high + first - begin)
            seen = sum(max(min(end - start, n + window + 1) - max(n - window, 0), 0) for n in numbers)
        pairs += seen + (high - low) * slots
    slot_bytes = 2 * k.shape[1] * k.shape[2] * k.element_size()
    moved = _moves({"q": q, "k": k, "v": v}, outs).bytes + sum(cached) * slot_bytes
    return Work(4 * pairs * q.shape[1] * q.shape[2], moved)


def _keep(given: Mapping[str, Any], outs: Sequence[Tensor]) -> Work:
    """Keys are read to be scored where not all stay; then those that stay, and their values, are read and written."""
    q, k = given["q"], given["k"]
    key_bytes = k.shape[1] * k.shape[2] * k.element_size()
    work = Work()
    for one in refreshes(given["segments"], given["keeping"], given["page_table"]):
        if one.count < one.candidates:
            queries = (one.queries.stop - one.queries.start) * q.shape[1] * q.shape[2] * q.element_size()
            products = 2 * one.candidates * q.shape[1] * q.shape[2]
            work += Work(products, queries + one.candidates * key_bytes)
        work += Work(bytes=4 * one.count * key_bytes)
    return work


_COUNTS: Mapping[str, Count] = {
    "aten.embedding.default": _embedding,
    "aten.index_select.default": _index_select,
    "aten.linear.default": _linear,
    "aten.matmul.default": _matmul,
    "dllmc.attention.default": _attention,
    "dllmc.decode_head.default": _head,
    "dllmc.keep.default": _keep,
    "dllmc.rope.default": _rope,
}
