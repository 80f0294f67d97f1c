"""Only the masked rows of active blocks reach the head, and whatever else serves the head alone."""

import operator
from dataclasses import dataclass

import torch
from torch import fx

from dllmc.ir.step_graph import StepGraph
from dllmc.ops.facts import is_row_wise
from dllmc.passes.base import Pass, PassResult

aten = torch.ops.aten


@dataclass(frozen=True)
class SelectLogitRows(Pass):
    """Gather the wanted rows as early as only row-wise calls lie between them and the logits.

    The input `rows` [rows + guided] int64 holds packed token indices. The gather moves up through every call
    that is row-wise and used for the logits alone: in a transformer through the head, the final norm and the
    last layer's feed-forward and output projection, up to its attention and the residual stream.
    A shifted model predicts position i from the row before it; at position 0, from that row itself.
    """

    name = "select-logit-rows"
    requires = ("packed",)
    ensures = ("rows-selected",)

    def run(self, step: StepGraph) -> PassResult:
        region = _row_wise_region(step)
        rows = step.add_input("rows", (step.size("rows") + step.size("guided"),), torch.int64)
        if step.spec.shifted:
            rows = _predecessors(step, rows)
        gathered: dict[fx.Node, fx.Node] = {}
        outside = [
            n for user in region for n in user.all_input_nodes if n not in region and step.axis_of(n) is not None
        ]
        for source in dict.fromkeys(outside):
            with step.graph.inserting_after(max(source, rows)):
                gathered[source] = step.graph.call_function(
                    aten.index_select.default, (source, step.axis_of(source), rows)
                )
        for user in region:
            for source, selected in gathered.items():
                user.replace_input_with(source, selected)
        return PassResult(True, {"calls_on_rows": len(region) - 1, "gathers": len(gathered)})


def _row_wise_region(step: StepGraph) -> list[fx.Node]:
    """The output and the calls above it that are row-wise and used by the region alone, last first."""
    region: dict[fx.Node, None] = {step.graph.output_node(): None}
    for node in reversed(list(step.calls())):
        takes_sizes = any(isinstance(n.meta.get("val"), torch.SymInt) for n in node.all_input_nodes)
        has_rows = step.axis_of(node) is not None or isinstance(node.meta.get("val"), list | tuple)
        if (
            node.users
            and all(user in region for user in node.users)
            and has_rows
            and not takes_sizes
            and is_row_wise(node, step.axis_of)
        ):
            region[node] = None
    # One of several results moves only with the call that makes them all.
    return [node for node in region if node.target is not operator.getitem or node.args[0] in region]


def _predecessors(step: StepGraph, rows: fx.Node) -> fx.Node:
    """`rows - min(position of the row, 1)`: the packed token before each, unless it is the first of its sequence."""
    positions = step.add_input("positions", (step.size("tokens"),), torch.int64)
    with step.graph.inserting_after(max(rows, positions)):
        at = step.graph.call_function(aten.index_select.default, (positions, 0, rows))
    with step.graph.inserting_after(at):
        back = step.graph.call_function(aten.clamp_max.default, (at, 1))
    with step.graph.inserting_after(back):
        return step.graph.call_function(aten.sub.Tensor, (rows, back))
