"""Positions become an input, so that packed tokens of several requests can each have their own."""

from dataclasses import dataclass

import torch
from torch import fx

from dllmc.ir.step_graph import StepGraph
from dllmc.ops.facts import argument
from dllmc.passes.base import Pass, PassResult
from dllmc.passes.facts import token_size

aten = torch.ops.aten

# arange overload -> positions of (start, end, step) in its schema; None where it has no such argument.
_ARANGES = {
    aten.arange.default: (None, 0, None),
    aten.arange.start: (0, 1, None),
    aten.arange.start_step: (0, 1, 2),
}


@dataclass(frozen=True)
class LiftPositions(Pass):
    """Replace what counts along the sequence by the input `positions` [tokens] int64.

    Case 1: `arange(T)` is `positions`, converted to the range's dtype.
    Case 2: a table sliced `[0:T]` along an axis is a gather of its rows at `positions`.
    """

    name = "lift-positions"
    requires = ("flat",)
    ensures = ("positions-lifted",)

    def run(self, step: StepGraph) -> PassResult:
        ranges = [node for node in step.calls(*_ARANGES) if _is_full_range(step, node)]
        tables = [node for node in step.calls(aten.slice.Tensor) if _is_table_slice(step, node)]
        if not ranges and not tables:
            return PassResult(False)
        positions = step.add_input("positions", (step.size("tokens"),), torch.int64)
        for node in ranges:
            with step.graph.inserting_before(node):
                dtype = node.meta["val"].dtype
                same = dtype == torch.int64
                lifted = positions if same else step.graph.call_function(aten.to.dtype, (positions, dtype))
            node.replace_all_uses_with(lifted)
            step.graph.erase_node(node)
        for node in tables:
            with step.graph.inserting_before(node):
                axis = argument(node, 1) % node.meta["val"].dim()
                gathered = step.graph.call_function(aten.index_select.default, (node.args[0], axis, positions))
                gathered.meta = dict(node.meta)
            node.replace_all_uses_with(gathered)
            step.graph.erase_node(node)
        return PassResult(True, {"ranges": len(ranges), "tables": len(tables)})


def _is_full_range(step: StepGraph, node: fx.Node) -> bool:
    start, end, stride = (
        None if position is None else argument(node, position)
        for position in _ARANGES[node.target]  # type: ignore[index]
    )
    return start in (None, 0) and stride in (None, 1) and token_size(step, end)


def _is_table_slice(step: StepGraph, node: fx.Node) -> bool:
    start, end, stride = (argument(node, position) for position in (2, 3, 4))
    table = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    fixed = all(isinstance(size, int) for size in table)
    return fixed and start in (None, 0) and stride == 1 and token_size(step, end)
