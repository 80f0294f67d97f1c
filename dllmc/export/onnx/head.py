"""`dllmc::decode_head` in standard ONNX: a `Loop` over tiles of the vocabulary carries each row's statistics.

As `dllmc.ops.head_partials` has them; no value is [rows, vocab]. What only sampled or filtered rows need is computed in
an `If`, where there are some.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dllmc.export.onnx import philox
from dllmc.export.onnx.elementwise import as_dtype
from dllmc.export.onnx.graph import Graph, Operand, Value
from dllmc.ops.head_rows import ConfidenceRule
from dllmc.spec import MAX_TOP_K

TILE = 4096
"""Columns of a tile; a multiple of 4, for the noise draws four tokens at once."""


@dataclass(frozen=True)
class _Rows:
    """The tables by row: each [R, 1], and bool [] of all rows whether any is sampled freely, or filtered."""

    position: str
    target: str
    temperature: str
    top_k: str
    top_p: str
    rule: str
    seed: str
    step: str
    suppressed: str  # [R, K]
    samples: str
    filters: str
    any_samples: str
    any_filters: str


def decode_head(g: Graph, args: Sequence[Operand]) -> list[str]:
    """Token int64 [R], confidence and logprob float32 [R]."""
    hidden, weight, bias, scale, segment, position, target, *tables = args
    rows = _rows(g, segment, position, target, tables)
    zero = g.cast(g("Mul", rows.position, g.constant(0)), "float32")  # [R, 1]
    lowest = g("Add", zero, g.constant(-np.inf, "float32"))
    none = g.slice(zero, 1, g.constant([0]), g.constant([0]))  # [R, 0]
    start = {
        "maximum": lowest,
        "sum_exp": zero,
        "score": lowest,
        "token": g.cast(zero, "int64"),
        "logit": lowest,
        "runner_up": lowest,
        "sum_exp_times": zero,
        "scaled_sum": zero,
        "target_logit": lowest,
        "candidate_logit": none,
        "candidate": g.cast(none, "int64"),
    }
    vocab = weight.dims[0]
    wide_hidden = as_dtype(g, hidden, "float32")

    def body(inner: Graph, number: str, carried: list[str]) -> Sequence[str]:
        first = inner.unsqueeze(inner("Mul", number, inner.constant(TILE)), 0)
        behind = inner("Min", inner("Add", first, inner.constant([TILE])), inner.constant([vocab]))
        tile = _logits(inner, wide_hidden, weight, bias, scale, first, behind)
        tile = _suppressed(inner, tile, rows, first)
        state = dict(zip(start, carried, strict=True))
        return list(_merged(inner, state, tile, first, behind, rows).values())

    trips = g.constant(-(-vocab // TILE))
    state = dict(zip(start, g.loop(trips, list(start.values()), body), strict=True))
    return [g.squeeze(value, 1) for value in _finished(g, state, rows)]


def all_logits(g: Graph, args: Sequence[Operand]) -> str:
    """Clean logits [R, V], float32."""
    hidden, weight, bias, scale, *_ = args
    ends = g.constant([0]), g.constant([weight.dims[0]])
    return _logits(g, as_dtype(g, hidden, "float32"), weight, bias, scale, *ends)


def _rows(g: Graph, segment: Value, position: Value, target: Value, tables: Sequence[Value]) -> _Rows:
    gathered = [g("Gather", table.name, segment.name, axis=0) for table in tables]
    temperature, top_k, top_p, rule, seed, step = (g.unsqueeze(each, 1) for each in gathered[:6])
    one = g.constant(1.0, "float32")
    samples = g("Greater", temperature, g.constant(0.0, "float32"))
    limits = g("Or", g("Greater", top_k, g.constant(0)), g("Less", top_p, one))
    filters = g("And", samples, limits)
    freely = g("And", samples, g("Not", limits))
    limit = g("Min", top_k, g.constant(MAX_TOP_K))
    return _Rows(
        position=g.unsqueeze(position.name, 1),
        target=g.unsqueeze(target.name, 1),
        temperature=g("Where", samples, temperature, one),
        top_k=g("Where", g("Greater", top_k, g.constant(0)), limit, g.constant(MAX_TOP_K)),
        top_p=g("Where", g("Less", top_p, one), top_p, g.constant(np.inf, "float32")),
        rule=rule,
        seed=seed,
        step=step,
        suppressed=gathered[6],
        samples=freely,
        filters=filters,
        any_samples=_any(g, freely),
        any_filters=_any(g, filters),
    )


def _any(g: Graph, mask: str) -> str:
    return g.cast(g("ReduceMax", g.cast(mask, "int32"), keepdims=0), "bool")


def _logits(g: Graph, hidden: str, weight: Value, bias: Value | None, scale: float, first: str, behind: str) -> str:
    """A tile of logits [R, behind - first], float32."""
    part = g.slice(weight.name, 0, first, behind)
    part = part if weight.dtype == "float32" else g.cast(part, "float32")
    logits = g("Gemm", hidden, part, transB=1)
    if bias is not None:
        logits = g("Add", logits, g.slice(as_dtype(g, bias, "float32"), 0, first, behind))
    return logits if scale == 1 else g("Mul", logits, g.constant(scale, "float32"))


def _suppressed(g: Graph, tile: str, rows: _Rows, first: str) -> str:
    """The tile with -inf for suppressed tokens; those of other tiles are written to a column that is then dropped."""
    width = g.dim(tile, 1)
    column = g("Sub", rows.suppressed, first)
    here = g("And", g("GreaterOrEqual", column, g.constant(0)), g("Less", column, width))
    here = g("And", here, g("GreaterOrEqual", rows.suppressed, g.constant(0)))
    column = g("Where", here, column, width)
    spare = g("Concat", tile, g.cast(g("Mul", rows.position, g.constant(0)), "float32"), axis=1)
    lowest = g("Expand", g.constant(-np.inf, "float32"), g("Shape", column))
    return g.slice(g("ScatterElements", spare, column, lowest, axis=1), 1, g.constant([0]), width)


def _merged(g: Graph, before: dict[str, str], tile: str, first: str, behind: str, rows: _Rows) -> dict[str, str]:
    """The statistics with those of another tile, whose tokens come after all before."""
    maximum = g.reduce("ReduceMax", tile, 1, keepdims=True)
    column = g("ArgMax", tile, axis=1, keepdims=1)
    score, best = _drawn(g, tile, maximum, column, first, behind, rows)
    logit = g("GatherElements", tile, best, axis=1)
    better = g("Greater", score, before["score"])
    highest = g("Max", before["maximum"], maximum)
    shift = g("Where", g("IsInf", highest), g.constant(0.0, "float32"), highest)

    # The runner-up of both is the highest of what is not the maximum of both.
    others = g("ScatterElements", tile, column, g("Expand", g.constant(-np.inf, "float32"), g("Shape", column)), axis=1)
    second = g.reduce("ReduceMax", others, 1, keepdims=True)
    runner_up = g("Max", g("Min", before["maximum"], maximum), before["runner_up"], second)

    away = g("Sub", tile, shift)
    exp = g("Exp", away)
    floor = g.constant(-200.0, "float32")  # exp of less is 0, and 0 * -inf would be no number
    times = g.reduce("ReduceSum", g("Mul", g("Max", away, floor), exp), 1, keepdims=True)
    drop = g("Max", g("Sub", before["maximum"], shift), floor)
    factor = g("Exp", drop)
    kept = g("Mul", before["sum_exp"], factor)
    moved = g("Mul", factor, g("Add", before["sum_exp_times"], g("Mul", drop, before["sum_exp"])))
    scaled = g.reduce("ReduceSum", g("Exp", g("Div", away, rows.temperature)), 1, keepdims=True)
    scaled_factor = g("Exp", g("Div", drop, rows.temperature))

    wanted = g("Sub", rows.target, first)
    here = g("And", g("GreaterOrEqual", wanted, g.constant(0)), g("Less", wanted, g.dim(tile, 1)))
    found = g("GatherElements", tile, g("Where", here, wanted, g.constant(0)), axis=1)
    candidates = _candidates(g, before, tile, first, rows)
    return {
        "maximum": highest,
        "sum_exp": g("Add", kept, g.reduce("ReduceSum", exp, 1, keepdims=True)),
        "score": g("Max", score, before["score"]),
        "token": g("Where", better, g("Add", best, first), before["token"]),
        "logit": g("Where", better, logit, before["logit"]),
        "runner_up": runner_up,
        "sum_exp_times": g("Add", moved, times),
        "scaled_sum": g("Add", g("Mul", before["scaled_sum"], scaled_factor), scaled),
        "target_logit": g("Where", here, found, before["target_logit"]),
        "candidate_logit": candidates[0],
        "candidate": candidates[1],
    }


def _drawn(g: Graph, tile: str, maximum: str, column: str, first: str, behind: str, rows: _Rows) -> list[str]:
    """Score and column of each row's choice in a tile: of sampled rows the best of z / t + noise, of others of z."""

    def draw(inner: Graph) -> Sequence[str]:
        count = inner("Sub", behind, first)
        noise = philox.gumbel_range(inner, rows.seed, first, count, rows.position, rows.step)
        scores = inner("Add", inner("Div", tile, rows.temperature), noise)
        best = inner.reduce("ReduceMax", scores, 1, keepdims=True)
        at = inner("ArgMax", scores, axis=1, keepdims=1)
        return [inner("Where", rows.samples, best, maximum), inner("Where", rows.samples, at, column)]

    return g.choice(rows.any_samples, draw, lambda inner: [maximum, column])


def _candidates(g: Graph, before: dict[str, str], tile: str, first: str, rows: _Rows) -> list[str]:
    """The best tokens so far, by logit and then by number, as many as a filter may look at; none without a filter."""

    def best(inner: Graph) -> Sequence[str]:
        width = inner.dim(tile, 1)
        tokens = inner("Add", inner.range(width), first)
        tokens = inner("Expand", inner.unsqueeze(tokens, 0), inner("Shape", tile))
        logits = inner("Concat", before["candidate_logit"], tile, axis=1)
        numbers = inner("Concat", before["candidate"], tokens, axis=1)
        count = inner("Min", inner.dim(logits, 1), inner.constant([MAX_TOP_K]))
        top, at = inner.several("TopK", 2, logits, count, axis=1, largest=1, sorted=1)
        return [top, inner("GatherElements", numbers, at, axis=1)]

    return g.choice(rows.any_filters, best, lambda inner: [before["candidate_logit"], before["candidate"]])


def _finished(g: Graph, state: dict[str, str], rows: _Rows) -> list[str]:
    """Token, confidence and logprob, each [R, 1]."""
    maximum, total = state["maximum"], state["sum_exp"]
    token, logit = g.choice(
        rows.any_filters,
        lambda inner: _filtered(inner, state, rows),
        lambda inner: [state["token"], state["logit"]],
    )
    log_sum = g("Log", total)
    one = g.constant(1.0, "float32")
    by_rule = {
        ConfidenceRule.TOPK_MARGIN: g("Div", g("Sub", one, g("Exp", g("Sub", state["runner_up"], maximum))), total),
        ConfidenceRule.ENTROPY: g("Sub", g("Div", state["sum_exp_times"], total), log_sum),
        ConfidenceRule.RANDOM: philox.uniform_confidence(g, rows.seed, rows.position, rows.step),
    }
    confidence = g("Div", g("Exp", g("Sub", logit, maximum)), total)
    for rule, value in by_rule.items():
        confidence = g("Where", g("Equal", rows.rule, g.constant(int(rule))), value, confidence)
    wanted = g("Where", g("GreaterOrEqual", rows.target, g.constant(0)), state["target_logit"], logit)
    return [token, confidence, g("Sub", g("Sub", wanted, maximum), log_sum)]


def _filtered(g: Graph, state: dict[str, str], rows: _Rows) -> list[str]:
    """Token and logit, for filtered rows of the candidates that top-k and top-p leave."""
    logits, tokens = state["candidate_logit"], state["candidate"]
    p = g("Exp", g("Div", g("Sub", logits, state["maximum"]), rows.temperature))
    p = g("Div", p, state["scaled_sum"])
    ahead = g("CumSum", p, g.constant(1), exclusive=1)
    rank = g.unsqueeze(g.range(g.dim(logits, 1)), 0)
    kept = g("And", g("Less", rank, rows.top_k), g("LessOrEqual", ahead, rows.top_p))
    noise = philox.gumbel(g, rows.seed, tokens, rows.position, rows.step)
    scores = g("Add", g("Div", logits, rows.temperature), noise)
    scores = g("Where", kept, scores, g.constant(-np.inf, "float32"))
    best = g("Equal", scores, g.reduce("ReduceMax", scores, 1, keepdims=True))
    lowest = g("Where", best, tokens, g.constant(np.iinfo(np.int64).max))
    at = g("ArgMin", lowest, axis=1, keepdims=1)
    return [
        g("Where", rows.filters, g("GatherElements", tokens, at, axis=1), state["token"]),
        g("Where", rows.filters, g("GatherElements", logits, at, axis=1), state["logit"]),
    ]
