"""Positions become an input, so that packed tokens of several requests can each have their own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dllmc.errors import CaptureError
from dllmc.ir.provenance import describe
from dllmc.ir.step_graph import StepGraph
from dllmc.ops.facts import argument
from dllmc.passes.base import Pass, PassResult
from dllmc.passes.by_length import by_length
from dllmc.passes.facts import token_size

aten = torch.ops.aten

# arange overload -> positions of (start, end, step) in its schema; None where it has no such argument.
_ARANGES = {
    aten.arange.default: (None, 0, None),
    aten.arange.start: (0, 1, None),
    aten.arange.start_step: (0, 1, 2),
}

# Operators that look up rows of a table, and how: the table, its axis, the indices.
_LOOK_UPS: Mapping[Any, Callable[[fx.Node], tuple[Any, int, Any]]] = {
    aten.embedding.default: lambda node: (node.args[0], 0, node.args[1]),
    aten.gather.default: lambda node: (node.args[0], argument(node, 1), node.args[2]),
    aten.index_select.default: lambda node: (node.args[0], argument(node, 1), node.args[2]),
}


@dataclass(frozen=True)
class LiftPositions(Pass):
    """Replace what counts along the sequence by the input `positions` [tokens] int64.

    Case 1: `arange(T)` is `positions`, converted to the range's dtype.
    Case 2: a table sliced `[0:T]` along an axis is a gather of its rows at `positions`.
    Case 3: `gather` from a table of one row, which is how a list is looked up at positions, is an index_select.
    Refused: a look-up at positions in a table that is too short for the longest sequence.
    """

    name = "lift-positions"
    requires = ("flat",)
    ensures = ("positions-lifted",)

    def run(self, step: StepGraph) -> PassResult:
        for node in step.calls(*_LOOK_UPS):
            _require_rows(step, node)
        ranges = [node for node in step.calls(*_ARANGES) if _is_full_range(step, node)]
        tables = [node for node in step.calls(aten.slice.Tensor) if _is_table_slice(step, node)]
        lists = [node for node in step.calls(aten.gather.default) if _is_list(step, node)]
        stats = {"ranges": len(ranges), "tables": len(tables), "lists": len(lists)}
        if not any(stats.values()):
            return PassResult(False, stats)
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
        for node in lists:
            table, axis, index = node.args[:3]
            with step.graph.inserting_before(node):
                flat = step.call(aten.flatten.using_ints, index, origin=node)
                gathered = step.call(aten.index_select.default, table, axis, flat, origin=node)
            step.replace(node, gathered)
        return PassResult(True, stats)


def _require_rows(step: StepGraph, node: fx.Node) -> None:
    """Raise `CaptureError` where positions look up more rows than a table has; export checks slices alone."""
    table, axis, index = _LOOK_UPS[node.target](node)
    indices = by_length(step, index)
    if isinstance(indices, str):
        return
    rows, most = table.meta["val"].shape[axis], step.spec.max_positions
    if (last := int(indices.at(most).max())) >= rows:
        raise CaptureError(
            f"{describe(node)}: it looks up row {last} of a table of {rows} for a sequence of {most} tokens; lower the "
            f"spec's max_positions to {most - (last + 1 - rows)} or less, or give the model a longer table"
        )


def _is_list(step: StepGraph, node: fx.Node) -> bool:
    table, axis = node.args[0].meta["val"].shape, argument(node, 1)  # type: ignore[union-attr]
    others = [size for dim, size in enumerate(table) if dim != axis % len(table)]
    return step.axis_of(node.args[0]) is None and all(size == 1 for size in others)  # type: ignore[arg-type]


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
