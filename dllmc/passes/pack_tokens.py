"""Attention learns about segments: the sequence axis becomes packed tokens of any number of requests."""

import math
from dataclasses import dataclass

import torch
from torch import fx

from dllmc.errors import CaptureError
from dllmc.ir.step_graph import StepGraph, describe
from dllmc.ops import attention  # noqa: F401  (registers the operator)
from dllmc.ops.facts import argument
from dllmc.passes.base import Pass, PassResult
from dllmc.passes.facts import mixing_call

aten = torch.ops.aten


@dataclass(frozen=True)
class PackTokens(Pass):
    """Replace scaled_dot_product_attention by `dllmc::attention` over packed tokens and `segments` [segments, 2].

    Case 1: q, k, v are [1, heads, tokens, head_dim], no mask, not causal, no dropout.
    Case 2: keys and values repeated for grouped queries (repeat_interleave, or unsqueeze-expand-reshape): the
            operator reads the KV heads themselves.
    Refused, with the line in the user's model: masks, causal or cross attention, and any other operator that
    mixes tokens.
    """

    name = "pack-tokens"
    requires = ("flat", "positions-lifted")
    ensures = ("packed",)

    def run(self, step: StepGraph) -> PassResult:
        calls = list(step.calls(aten.scaled_dot_product_attention.default))
        ungrouped = sum(_pack(step, node) for node in calls)
        if calls:
            step.graph.eliminate_dead_code()  # repeated keys that nothing reads any more
            step.propagate()
        if (problem := mixing_call(step)) is not None:
            raise CaptureError(f"requests cannot be packed into one step: {problem}")
        return PassResult(bool(calls), {"attentions": len(calls), "ungrouped": ungrouped})


def _pack(step: StepGraph, node: fx.Node) -> bool:
    q, k, v, mask, dropout, causal, scale = (argument(node, i) for i in range(7))
    for refused, what in ((mask is not None, "a mask"), (causal, "a causal mask"), (dropout, "dropout")):
        if refused:
            raise CaptureError(f"{describe(node)}: attention with {what}; expected bidirectional self-attention")
    for operand in (q, k, v):
        if operand.meta["val"].dim() != 4 or step.axis_of(operand) != 2:
            shape = [str(d) for d in operand.meta["val"].shape]
            raise CaptureError(
                f"{describe(node)}: expected self-attention over [1, heads, tokens, head_dim], found an operand {shape}"
            )
    widths = [x.meta["val"].shape[-1] for x in (q, k, v)]
    if len(set(widths)) > 1:
        raise CaptureError(f"{describe(node)}: expected q, k and v of one head_dim, found {widths}")
    sources = _ungrouped(k), _ungrouped(v)
    heads = {source.meta["val"].shape[1] for source in sources}
    k, v = sources if len(heads) == 1 else (k, v)
    segments = step.add_input("segments", (step.size("segments"), 2), torch.int64)
    scale = float(scale) if scale is not None else 1 / math.sqrt(q.meta["val"].shape[-1])
    with step.graph.inserting_before(node):
        packed = [_call(step, node, aten.transpose.int, _first(step, node, x), 0, 1) for x in (q, k, v)]
        out = _call(step, node, torch.ops.dllmc.attention.default, *packed, segments, segments, scale)
        out = _call(step, node, aten.unsqueeze.default, _call(step, node, aten.transpose.int, out, 0, 1), 0)
    node.replace_all_uses_with(out)
    step.graph.erase_node(node)
    return bool(heads != {q.meta["val"].shape[1]})


def _ungrouped(x: fx.Node) -> fx.Node:
    """The KV heads that an operand repeats for its query groups, or the operand itself."""
    if x.target is aten.repeat_interleave.self_int and argument(x, 2) in (1, -3):
        return x.args[0]  # type: ignore[return-value]
    if x.target in (aten.reshape.default, aten.view.default, aten.flatten.using_ints):
        expanded = x.args[0]
        if isinstance(expanded, fx.Node) and expanded.target is aten.expand.default:
            split = expanded.args[0]
            if isinstance(split, fx.Node) and split.target is aten.unsqueeze.default and split.args[1] == 2:
                return split.args[0]  # type: ignore[return-value]
    return x


def _first(step: StepGraph, origin: fx.Node, x: fx.Node) -> fx.Node:
    return _call(step, origin, aten.select.int, x, 0, 0)


def _call(step: StepGraph, origin: fx.Node, target: object, *args: object) -> fx.Node:
    """A call that is traced back to the line of the call it replaces."""
    node = step.graph.call_function(target, args)  # type: ignore[arg-type]
    if "stack_trace" in origin.meta:
        node.meta["stack_trace"] = origin.meta["stack_trace"]
    return node
