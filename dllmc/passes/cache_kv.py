"""Attention learns about the cache: it reads what earlier steps kept, and a Refresh keeps what later ones read."""

from dataclasses import dataclass

import torch
from torch import fx

from dllmc.ir.program import PAGES
from dllmc.ir.step_graph import StepGraph
from dllmc.ops.facts import argument
from dllmc.ops.keep import KEEPING_FIELDS
from dllmc.passes.base import Pass, PassResult
from dllmc.passes.facts import depends_on

aten = torch.ops.aten
ATTENTION = torch.ops.dllmc.attention.default
KEEP = torch.ops.dllmc.keep.default


@dataclass(frozen=True)
class CacheKV(Pass):
    """Give each attention a cache of pages of `page_tokens` slots, in which `dllmc::keep` puts what it selects.

    The queries of the active spans, by which keys are scored, are those that attention has, at the tokens `active`
    [active] int64. Case: where select-logit-rows left attention only the queries of the head's rows, those of the
    active spans are computed beside them.
    A step with windowed attention is left alone: which cached keys a window shows, their slots do not tell.
    """

    name = "cache-kv"
    requires = ("rows-selected",)
    page_tokens: int = 32

    def run(self, step: StepGraph) -> PassResult:
        attentions = list(step.calls(ATTENTION))
        if not attentions:
            return PassResult(False)
        if any(argument(node, 6) is not None for node in attentions):
            return PassResult(False, notes=("attention with a window: every step will be dense",))
        segments = step.size("segments")
        most = step.maxima["tokens"]
        width = -(-min(most, step.spec.max_positions) // self.page_tokens)
        active = step.add_input("active", (step.size("active"),), torch.int64)
        keeping = step.add_input("keeping", (segments, KEEPING_FIELDS), torch.int64)
        cached = step.add_input("cached", (segments,), torch.int64)
        page_table = step.add_input("page_table", (segments, width), torch.int64)
        whole = step.add_input("segments", (segments, 2), torch.int64)
        for node in attentions:
            q, k, v = node.args[:3]
            _, heads, head_dim = k.meta["val"].shape  # type: ignore[union-attr]
            cache = step.add_cache(heads, head_dim, self.page_tokens, k.meta["val"].dtype)  # type: ignore[union-attr]
            with step.graph.inserting_before(node):
                queries = _at(step, q, active)  # type: ignore[arg-type]
                kept = step.call(KEEP, cache, queries, k, v, whole, keeping, page_table, origin=node)
            node.args = (*(argument(node, i) for i in range(8)), kept, cached, page_table)
        pages = -(-most // self.page_tokens) + step.maxima["segments"]
        step.maxima = {**step.maxima, PAGES: pages}  # what a full step may cache
        return PassResult(True, {"caches": len(attentions)})


def _at(step: StepGraph, value: fx.Node, index: fx.Node) -> fx.Node:
    """What a value is at the given tokens, be it of all tokens or of the head's rows."""
    if step.axis_of(value) is not None:
        return step.call(aten.index_select.default, value, step.axis_of(value), index, origin=value)
    rows = step.input("rows")
    made: dict[fx.Node, fx.Node] = {}

    def moved(node: fx.Node) -> fx.Node:
        if rows is None or not depends_on(node, rows):
            return node
        if node not in made:
            source = node.args[0]
            if (
                node.target is aten.index_select.default
                and isinstance(source, fx.Node)
                and not depends_on(source, rows)
            ):
                made[node] = step.call(node.target, source, node.args[1], index, origin=node)
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), moved)
                made[node] = step.call(node.target, *args, origin=node)
                made[node].kwargs = kwargs
        return made[node]

    return moved(value)
