"""dllmc's operators on packed tokens in standard ONNX, but for the head; each as its file in `dllmc/ops` defines it."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dllmc.export.onnx.elementwise import as_dtype, layer_norm, rms_norm, wide
from dllmc.export.onnx.graph import Graph, Operand, Value

Emit = Callable[[Graph, Sequence[Operand]], list[str]]
"""(graph, operands) -> the results' names."""


def _rms_norm(g: Graph, args: Sequence[Operand]) -> list[str]:
    x, weight, bias, eps = args
    return [rms_norm(g, x.name, weight, bias, eps, x.dtype)]


def _of_sum(norm: Callable[[Graph, str, Value | None, Value | None, float, str], str]) -> Emit:
    def emit(g: Graph, args: Sequence[Operand]) -> list[str]:
        x, residual, weight, bias, eps = args
        total = g("Add", x.name, residual.name)
        return [norm(g, total, weight, bias, eps, x.dtype), total]

    return emit


def _glu(g: Graph, args: Sequence[Operand]) -> list[str]:
    gate, up, activation = args
    dtype = wide(gate.dtype)
    x = as_dtype(g, gate, dtype)
    active = {
        "silu": lambda: g("Mul", x, g("Sigmoid", x)),
        "gelu": lambda: g("Gelu", x),
        "gelu_tanh": lambda: g("Gelu", x, approximate="tanh"),
        "relu": lambda: g("Relu", x),
    }[activation]()
    return [g.cast(g("Mul", active, as_dtype(g, up, dtype)), gate.dtype)]


def _rope(g: Graph, args: Sequence[Operand]) -> list[str]:
    """X * cos + (-second half, first half) * sin, the angles of each token the same for all heads."""
    x, cos, sin, positions = (*args, None)[:4]
    dtype, width = wide(x.dtype), x.dims[2]
    turned = []
    for table in (cos, sin):
        rows = as_dtype(g, table, dtype)
        if positions is not None:
            rows = g("Gather", rows, positions.name, axis=0)
        if table.dims[1] < width:
            rows = g("Concat", rows, rows, axis=1)
        turned.append(g.unsqueeze(rows, 1))
    whole = as_dtype(g, x, dtype)
    first, second = g.several("Split", 2, whole, axis=2, num_outputs=2)
    other = g("Concat", g("Neg", second), first, axis=2)
    return [g.cast(g("Add", g("Mul", whole, turned[0]), g("Mul", other, turned[1])), x.dtype)]


def _guide_rows(g: Graph, args: Sequence[Operand]) -> list[str]:
    hidden, guided, guidance = args
    count = g("Sub", g.dim(hidden, 0), g.dim(guided, 0))
    own, twins = (
        g.slice(hidden.name, 0, start, end) for start, end in ((g.constant([0]), count), (count, g.dim(hidden, 0)))
    )
    weight = g.unsqueeze(as_dtype(g, guidance, hidden.dtype), 1)
    weight = g("Add", weight, g.constant(1, hidden.dtype))
    moved = g("Add", twins, g("Mul", weight, g("Sub", g("Gather", own, guided.name, axis=0), twins)))
    return [g("ScatterND", own, g.unsqueeze(guided.name, 1), moved)]


def _members(g: Graph, count: str, spans: str) -> str:
    """Which of 0, 1, ... below a size lie in which span: bool [count, segments], of spans [segments, 2]."""
    item = g.unsqueeze(g.range(count), 1)
    begin, behind = (g("Gather", spans, g.constant(column), axis=1) for column in (0, 1))
    return g("And", g("GreaterOrEqual", item, begin), g("Less", item, behind))


def _attention(g: Graph, args: Sequence[Operand]) -> list[str]:
    """One `Attention` over the keys of all segments, those in the cache first, with a mask of what each query sees.

    A query that sees nothing, as those of padding, sees everything: its result is of no account, but a number.
    """
    q, k, v, spans, segments, scale, window, _first, cache, cached, page_table = (*args, *(None,) * 5)[:11]
    queries, tokens = (_members(g, g.dim(x, 0), table.name) for x, table in ((q, spans), (k, segments)))
    seen = _together(g, queries, tokens)
    if window is not None:
        begins = [g("Gather", table.name, g.constant(0), axis=1) for table in (segments, spans)]
        ahead = g("Where", queries, g("Sub", *begins), g.constant(0))
        token = g("Add", g.range(g.dim(q, 0)), g.reduce("ReduceSum", ahead, 1))
        distance = g("Abs", g("Sub", g.unsqueeze(token, 1), g.unsqueeze(g.range(g.dim(k, 0)), 0)))
        seen = g("And", seen, g("LessOrEqual", distance, g.constant(window)))
    keys, values = (g("Transpose", x.name, perm=[1, 0, 2]) for x in (k, v))
    if cache is not None:
        slots, (old_keys, old_values) = _cached(g, cache, cached, page_table)
        held = g("And", g.unsqueeze(queries, 2), g.unsqueeze(slots, 0))
        seen = g("Concat", g("Flatten", g.cast(held, "float32"), axis=1), g.cast(seen, "float32"), axis=1)
        seen = g.cast(seen, "bool")
        keys, values = g("Concat", old_keys, keys, axis=1), g("Concat", old_values, values, axis=1)
    blind = g("Not", g.cast(g.reduce("ReduceMax", g.cast(seen, "int32"), 1, keepdims=True), "bool"))
    rows = g("Transpose", q.name, perm=[1, 0, 2])
    operands = [g.unsqueeze(x, 0) for x in (rows, keys, values)]
    out = g("Attention", *operands, g("Or", seen, blind), scale=float(scale))
    return [g("Transpose", g.squeeze(out, 0), perm=[1, 0, 2])]


def _together(g: Graph, a: str, b: str) -> str:
    """Whether a member of a row of `a` is one of a row of `b`: bool [n, m] of [n, segments] and [m, segments]."""
    shared = g("MatMul", g.cast(a, "float32"), g("Transpose", g.cast(b, "float32"), perm=[1, 0]))
    return g("Greater", shared, g.constant(0, "float32"))


def _cached(g: Graph, cache: Value, cached: Value, page_table: Value) -> tuple[str, list[str]]:
    """Of as many slots a segment as the fullest has pages for: which are filled, bool [segments, slots], and their
    keys and values, each [kv_heads, segments * slots, head_dim].
    """
    _, heads, _, page_tokens, head_dim = cache.dims
    size = g.constant([page_tokens])
    most = g.reduce("ReduceMax", cached.name, 0, keepdims=True)
    pages = g("Div", g("Add", most, g("Sub", size, g.constant([1]))), size)
    table = g.slice(page_table.name, 1, g.constant([0]), pages)
    filled = g("Less", g.unsqueeze(g.range(g("Mul", pages, size)), 0), g.unsqueeze(cached.name, 1))
    slots = g("Gather", cache.name, g.reshape(table, -1), axis=2)
    both = g.reshape(slots, 2, heads, g("Mul", g.dim(page_table, 0), g("Mul", pages, size)), head_dim)
    both = g("Where", g.reshape(filled, -1, 1), both, g.constant(0, cache.dtype))  # others may hold no numbers
    return filled, [g.squeeze(part, 0) for part in g.several("Split", 2, both, axis=0, num_outputs=2)]


def _keep(g: Graph, args: Sequence[Operand]) -> list[str]:
    """For all segments at once: candidates by rank, scores, pooling, the best of each head in the order of tokens.

    A segment that is no Refresh keeps 0 keys; ranks behind a segment's candidates score -inf.
    """
    cache, q, k, v, segments, keeping, page_table = args
    _, heads, _, page_tokens, head_dim = cache.dims
    low, high, count, shared, window = (g("Gather", keeping.name, g.constant(i), axis=1) for i in range(5))
    start, end = (g("Gather", segments.name, g.constant(i), axis=1) for i in range(2))
    length = g("Sub", high, low)
    candidates = g("Sub", g("Sub", end, start), length)

    # Summed queries of each active span [S, heads, group, D], which rank keys as mean ones do, and their products with
    # all keys [S, heads, group, T].
    ends = g.unsqueeze(g("CumSum", length, g.constant(0)), 1)
    begins = g("Sub", ends, g.unsqueeze(length, 1))
    members = _members(g, g.dim(q, 0), g("Concat", begins, ends, axis=1))
    dtype = wide(cache.dtype)
    rows = g.reshape(as_dtype(g, q, dtype), -1, q.dims[1] * head_dim)
    summed = g("MatMul", g("Transpose", g.cast(members, dtype), perm=[1, 0]), rows)
    summed = g.reshape(summed, -1, heads, q.dims[1] // heads, head_dim)
    products = g("MatMul", summed, g("Transpose", as_dtype(g, k, dtype), perm=[1, 2, 0]))
    alone = g.reduce("ReduceMax", products, 2)
    of_all = g("ReduceMean", products, g.constant([1, 2]), keepdims=0)
    scores = g("Where", g.reshape(g.cast(shared, "bool"), -1, 1, 1), g.unsqueeze(of_all, 1), alone)

    # By rank: candidate p of a segment is its token p, or that many behind the active span.
    most = g.reduce("ReduceMax", candidates, 0, keepdims=True)
    rank = g.unsqueeze(g.range(most), 0)
    columns = [g.unsqueeze(x, 1) for x in (start, low, length, candidates)]
    behind = g("GreaterOrEqual", rank, g("Sub", columns[1], columns[0]))
    token = g("Add", g("Add", rank, columns[0]), g("Where", behind, columns[2], g.constant(0)))
    inside = g("Less", rank, columns[3])
    token = g("Where", inside, token, g.constant(0))
    wanted = g("Expand", g.unsqueeze(token, 1), g("Concat", g.dim(segments, 0), g.constant([heads]), most, axis=0))
    ranked = g("GatherElements", scores, wanted, axis=2)
    lowest = g.constant(-np.inf, dtype)
    ranked = g("Where", g.unsqueeze(inside, 1), ranked, lowest)
    pooled = _pooled(g, ranked, g("Div", window, g.constant(2)), lowest)
    pooled = g("Where", g.unsqueeze(inside, 1), pooled, lowest)

    # The best, then in the order of tokens; slots behind a segment's count are dropped.
    slots = g.reduce("ReduceMax", count, 0, keepdims=True)
    _, best = g.several("TopK", 2, pooled, slots, axis=2, largest=1, sorted=1)
    slot = g.unsqueeze(g.range(slots), 0)
    real = g("Less", slot, g.unsqueeze(count, 1))
    best = g("Where", g.unsqueeze(real, 1), best, g.unsqueeze(g.unsqueeze(most, 0), 0))
    best, _ = g.several("TopK", 2, best, slots, axis=2, largest=0, sorted=1)
    best = g("Where", g.unsqueeze(real, 1), best, g.constant(0))
    chosen = g("GatherElements", wanted, best, axis=2)

    size = g.constant(page_tokens)
    page = g("GatherElements", page_table.name, g("Where", real, g("Div", slot, size), g.constant(0)), axis=1)
    place = g("Add", g("Mul", page, size), g("Mod", slot, size))
    real = g.reshape(real, -1)
    places = g("Compress", g.reshape(place, -1), real, axis=0)
    chosen = g.reshape(g("Transpose", chosen, perm=[1, 0, 2]), heads, -1)
    chosen = g("Compress", chosen, real, axis=1)
    shape = g("Concat", g.constant([heads]), g.dim(places, 0), g.constant([head_dim]), axis=0)
    index = g("Expand", g.unsqueeze(chosen, 2), shape)
    kept = [g("GatherElements", g("Transpose", x.name, perm=[1, 0, 2]), index, axis=1) for x in (k, v)]
    both = g("Concat", *(g.unsqueeze(x, 0) for x in kept), axis=0)
    places = g("Expand", g.reshape(places, 1, 1, -1, 1), g("Shape", both))
    flat = g.reshape(cache.name, 2, heads, -1, head_dim)
    return [g("Reshape", g("ScatterElements", flat, places, both, axis=2), g("Shape", cache.name))]


def _pooled(g: Graph, scores: str, reach: str, lowest: str) -> str:
    """The largest within `reach` [S] ranks to either side, of scores [S, heads, ranks]."""
    furthest = g.reduce("ReduceMax", reach, 0)
    ranks = g.dim(scores, 2)

    def body(inner: Graph, number: str, carried: list[str]) -> Sequence[str]:
        away = inner("Add", number, inner.constant(1))
        near = inner.reshape(inner("LessOrEqual", away, reach), -1, 1, 1)
        found = carried[0]
        rank = inner.range(ranks)
        for op in ("Add", "Sub"):
            other = inner(op, rank, away)
            last = inner.squeeze(inner("Sub", ranks, inner.constant([1])), 0)
            within = inner("And", inner("GreaterOrEqual", other, inner.constant(0)), inner("LessOrEqual", other, last))
            held = inner("Max", inner("Min", other, last), inner.constant(0))
            moved = inner("Gather", scores, held, axis=2)
            moved = inner("Where", inner("And", near, within), moved, lowest)
            found = inner("Max", found, moved)
        return [found]

    return g.loop(furthest, [scores], body)[0]


EMIT: Mapping[str, Emit] = {
    "dllmc.add_layer_norm.default": _of_sum(layer_norm),
    "dllmc.add_rms_norm.default": _of_sum(rms_norm),
    "dllmc.attention.default": _attention,
    "dllmc.glu.default": _glu,
    "dllmc.guide_rows.default": _guide_rows,
    "dllmc.keep.default": _keep,
    "dllmc.rms_norm.default": _rms_norm,
    "dllmc.rope.default": _rope,
}
