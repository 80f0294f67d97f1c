"""What chunk-activations does before it makes loops, so that less has to be kept from one to the next."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import fx

from dllmc.ir.program import Affine
from dllmc.ir.step_graph import StepGraph
from dllmc.ops.facts import argument
from dllmc.passes.row_flow import RowFlow, ancestors, is_product

aten = torch.ops.aten
_ACTIVE = Affine(0, (("active", 1),))
_TO_SHAPE = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def split_projections(step: StepGraph) -> int:
    """Case 1: so that keys and values need not be kept together with queries."""
    flow = RowFlow(step)
    split = 0
    for node in step.calls(aten.linear.default):
        parts = _slices(node)
        if len({_read_whole(part, flow) for part in parts}) < 2:
            continue
        x, weight, bias = (argument(node, i) for i in range(3))
        with step.graph.inserting_before(node):
            for _, group in groupby(sorted(parts, key=parts.__getitem__), key=lambda part: _read_whole(part, flow)):
                together = list(group)
                start, end = parts[together[0]][0], parts[together[-1]][1]
                rows = [p and step.call(aten.slice.Tensor, p, 0, start, end, origin=node) for p in (weight, bias)]
                projected = step.call(aten.linear.default, x, *rows, origin=node)
                for part in together:
                    bounds = (bound - start for bound in parts[part])
                    step.replace(part, step.call(aten.slice.Tensor, projected, -1, *bounds, origin=part))
        split += 1
    if split:
        step.graph.eliminate_dead_code()
        step.propagate()
    return split


def _slices(node: fx.Node) -> dict[fx.Node, tuple[int, int]]:
    """The columns [start, end) of each value that a linear is cut into; nothing where it is read otherwise too."""
    width = node.meta["val"].shape[-1]
    found: dict[fx.Node, tuple[int, int]] = {}
    for user in node.users:
        if user.target is aten.slice.Tensor:
            dim, start, end, step = (argument(user, i) for i in range(1, 5))
            if not isinstance(start, int) or not isinstance(end, int) or step != 1:
                return {}
            found[user] = start, min(end, width)
        elif user.target in (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default):
            dim = argument(user, 2)
            ends = list(accumulate((part.shape[-1] for part in user.meta["val"]), initial=0))
            found |= {part: (ends[i], ends[i + 1]) for part in user.users if isinstance(i := part.args[1], int)}
        else:
            return {}
        if dim not in (-1, node.meta["val"].dim() - 1):
            return {}
    return found


def _read_whole(value: fx.Node, flow: RowFlow) -> bool:
    """Whether something but a gather reads a value whole, or what is computed of it without another product."""
    others = [user for user in value.users if user.target is not aten.index_select.default]
    if any(value in flow.whole(user) for user in others):
        return True
    return any(_read_whole(user, flow) for user in others if value in flow.by_rows(user) and not is_product(user))


def _only_gathered(value: fx.Node, flow: RowFlow) -> bool:
    """Whether nothing but gathers needs a value."""
    return all(
        user.target is aten.index_select.default
        or (value in flow.by_rows(user) and not is_product(user) and _only_gathered(user, flow))
        for user in value.users
    )


def gather_early(step: StepGraph) -> int:
    """Case 2: of the values from which all gathered rows can be computed, those with the fewest bytes.

    So of a residual stream and its norm, the first alone is kept for the rows. For the active spans of a Refresh, which
    are few rows, the product that makes their queries is made again too: then no others need be kept.
    """
    flow = RowFlow(step)
    calls = list(step.calls())
    gathers: dict[Any, list[fx.Node]] = defaultdict(list)
    for gather in step.calls(aten.index_select.default):
        if flow.whole(gather):
            gathers[gather.args[2]].append(gather)
    moved = 0
    gathered: set[fx.Node] = set()
    for index, group in sorted(gathers.items(), key=lambda item: flow.extent(item[0]) == _ACTIVE):
        sinks: list[Any] = [gather.args[0] for gather in group]
        few = flow.extent(index) == _ACTIVE
        again = _last_products(sinks, flow) if few else set()
        stay = {node for node in calls if node not in again and _stays(node, flow)}
        kept = flow.narrowest(sinks, stay, gathered, copied=True, early=few)
        gathered |= kept
        if kept == set(sinks):
            continue
        on_rows: dict[fx.Node, fx.Node] = {}
        for gather, sink in zip(group, sinks, strict=True):
            with step.graph.inserting_before(gather):
                _compute_on_rows(step, flow, sink, kept, index, on_rows)
            gather.replace_all_uses_with(on_rows[sink])
            moved += 1
    if moved:
        step.graph.eliminate_dead_code()
        step.propagate()
    return moved


def _last_products(sinks: Collection[fx.Node], flow: RowFlow) -> set[fx.Node]:
    """The products behind which no other is, on the way to what is gathered."""
    found: set[fx.Node] = set()
    queue = list(sinks)
    while queue:
        node = queue.pop()
        if is_product(node) and not flow.whole(node):
            found.add(node)
        else:
            queue += flow.by_rows(node)
    return found


def _stays(node: fx.Node, flow: RowFlow) -> bool:
    """Whether a call cannot, or should not, be made again on some of its rows."""
    return (
        (_takes_sizes(node) and _shape_on_rows(node) is None)
        or (is_product(node) and not _only_gathered(node, flow))
        or bool(flow.whole(node))
    )


def _compute_on_rows(
    step: StepGraph,
    flow: RowFlow,
    sink: fx.Node,
    kept: Collection[fx.Node],
    index: fx.Node,
    made: dict[fx.Node, fx.Node],
) -> None:
    extent = flow.extent(sink)
    assert extent is not None
    needed = list(ancestors([sink], flow, kept))
    for node in sorted({sink, *needed, *(n for user in needed for n in flow.by_rows(user))}):
        if node in made:
            continue
        if node in kept:
            made[node] = step.call(aten.index_select.default, node, flow.axis(node, extent), index, origin=sink)
        elif _takes_sizes(node):
            made[node] = step.call(node.target, made[node.args[0]], _shape_on_rows(node), origin=node)  # type: ignore[index]
        else:
            made[node] = copy_call(step, node, node.args, node.kwargs, made)


def _takes_sizes(node: fx.Node) -> bool:
    return any(isinstance(n.meta.get("val"), torch.SymInt) for n in node.all_input_nodes)


def _shape_on_rows(node: fx.Node) -> list[int] | None:
    """The shape that a call gives to any number of rows: of a reshape to one size of the step."""
    shape = [size if isinstance(size, int) else -1 for size in getattr(node.meta["val"], "shape", ())]
    return shape if node.target in _TO_SHAPE and shape.count(-1) == 1 else None


def copy_call(step: StepGraph, node: fx.Node, args: Any, kwargs: Any, places: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The call once more, reading what it read from `places`."""
    args, kwargs = fx.map_arg((args, kwargs), lambda n: places.get(n, n))
    copy = step.call(node.target, *args, origin=node)
    copy.kwargs = kwargs
    return copy
