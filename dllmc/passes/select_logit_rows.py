"""Only the masked rows of active blocks reach the head, and whatever else serves the head alone."""

import operator
from dataclasses import dataclass

import torch
from torch import fx

from dllmc.ir.step_graph import StepGraph
from dllmc.ops import attention as _registers  # noqa: F401
from dllmc.ops.facts import argument, is_row_wise
from dllmc.passes.base import Pass, PassResult, Values

aten = torch.ops.aten
ATTENTION = torch.ops.dllmc.attention.default


@dataclass(frozen=True)
class SelectLogitRows(Pass):
    """Gather the wanted rows as early as only row-wise calls lie between them and the logits.

    The input `rows` [rows + guided] int64 holds packed token indices, each segment's one after the other, and
    `row_spans` [segments, 2] int64 where in it a segment's begin and end.
    Case 1: a call that is row-wise and used for the logits alone works on the rows, and the gather moves above it:
            in a transformer the head, the final norm, the last layer's feed-forward and output projection.
    Case 2: attention used for the logits alone takes the rows' queries, among all tokens' keys and values; the
            gather moves above what makes the queries. Not with a window, for which queries are to be all tokens'.
    A shifted model predicts position i from the row before it; at position 0, from that row itself.
    """

    name = "select-logit-rows"
    requires = ("packed",)
    ensures = ("rows-selected",)

    def run(self, step: StepGraph) -> PassResult:
        region = _region(step)
        rows = step.add_input("rows", (step.size("rows") + step.size("guided"),), torch.int64)
        if step.spec.shifted:
            rows = _predecessors(step, rows)
        gathered: dict[fx.Node, fx.Node] = {}
        for user in region:
            for source in _on_rows(user):
                if source in region or step.axis_of(source) is None:
                    continue
                if source not in gathered:
                    with step.graph.inserting_after(max(source, rows)):
                        args = source, step.axis_of(source), rows
                        gathered[source] = step.graph.call_function(aten.index_select.default, args)
                if user.target is not ATTENTION:
                    user.replace_input_with(source, gathered[source])
                else:  # the keys and values may be of the same source
                    user.update_arg(0, gathered[source])
        for attention in (node for node in region if node.target is ATTENTION):
            attention.update_arg(3, step.add_input("row_spans", (step.size("segments"), 2), torch.int64))
        return PassResult(True, {"calls_on_rows": len(region) - 1, "gathers": len(gathered)})

    def expected(self, step: StepGraph, before: Values, inputs: Values) -> Values:
        """The logits of the wanted rows."""
        rows = inputs["rows"]
        if step.spec.shifted:
            rows = rows - (inputs["positions"][rows] > 0).long()
        return {"logits": before["logits"][rows]}


def _region(step: StepGraph) -> dict[fx.Node, None]:
    """The output and the calls above it that are to work on rows, last first: all that read them do."""
    region: dict[fx.Node, None] = {step.graph.output_node(): None}
    for node in reversed(list(step.calls())):
        takes_sizes = any(isinstance(n.meta.get("val"), torch.SymInt) for n in node.all_input_nodes)
        has_rows = step.axis_of(node) is not None or isinstance(node.meta.get("val"), list | tuple)
        if (
            node.users
            and all(user in region and node not in _on_all_tokens(user) for user in node.users)
            and has_rows
            and not takes_sizes
            and (is_row_wise(node, step.axis_of) if node.target is not ATTENTION else argument(node, 6) is None)
        ):
            region[node] = None
    # One of several results moves only with the call that makes them all.
    moved = [node for node in region if node.target is not operator.getitem or node.args[0] in region]
    return dict.fromkeys(moved)


def _on_rows(user: fx.Node) -> list[fx.Node]:
    """What a call of the region reads on the rows alone: of attention, the queries."""
    return [user.args[0]] if user.target is ATTENTION else user.all_input_nodes  # type: ignore[list-item]


def _on_all_tokens(user: fx.Node) -> tuple[object, ...]:
    """What a call of the region reads of all tokens: of attention, keys and values."""
    return user.args[1:] if user.target is ATTENTION else ()


def _predecessors(step: StepGraph, rows: fx.Node) -> fx.Node:
    """`rows - min(position of the row, 1)`: the packed token before each, unless it is the first of its sequence."""
    positions = step.add_input("positions", (step.size("tokens"),), torch.int64)
    with step.graph.inserting_after(max(rows, positions)):
        at = step.graph.call_function(aten.index_select.default, (positions, 0, rows))
    with step.graph.inserting_after(at):
        back = step.graph.call_function(aten.clamp_max.default, (at, 1))
    with step.graph.inserting_after(back):
        return step.graph.call_function(aten.sub.Tensor, (rows, back))
