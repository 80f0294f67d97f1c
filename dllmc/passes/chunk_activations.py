"""Work on tokens and rows goes a chunk at a time, so that wide activations exist for a chunk only."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import fx

from dllmc.ir.program import CHUNK, Affine
from dllmc.ir.step_graph import Loop, StepGraph
from dllmc.passes.base import Pass, PassResult
from dllmc.passes.row_flow import RowFlow, ancestors, is_product

aten = torch.ops.aten


@dataclass(frozen=True)
class ChunkActivations(Pass):
    """Put the calls on rows into loops over `chunk` rows at a time; with 0 the graph stays as it is.

    What is read whole, every token's keys and values say, cuts the step into levels. From one level to the next goes
    what has the fewest bytes a row: in a transformer the residual stream. A loop makes keys and values of it, and
    another all the rest up to the residual stream behind the layer. Both compute the norm; no product is made twice.
    So what lives all through a layer is the residual stream, its keys and its values.
    """

    name = "chunk-activations"
    requires = ("head-fused",)
    chunk: int = 0

    def run(self, step: StepGraph) -> PassResult:
        if not self.chunk:
            return PassResult(False)
        moved = _gather_early(step)
        loops = _Schedule(step).run()
        step.maxima[CHUNK] = self.chunk
        return PassResult(True, {"loops": loops, "gathers_moved": moved})


def _gather_early(step: StepGraph) -> int:
    """Gather rows where the fewest bytes pass; what lies between there and the gathers is computed on the rows.

    So of a residual stream and its norm, the first alone is kept for the rows.
    """
    flow = RowFlow(step)
    gathers: dict[Any, list[fx.Node]] = defaultdict(list)
    for gather in step.calls(aten.index_select.default):
        if flow.whole(gather):
            gathers[gather.args[2]].append(gather)
    moved = 0
    for index, group in gathers.items():
        sinks: list[Any] = [gather.args[0] for gather in group]
        kept = flow.narrowest(sinks, {node for node in step.calls() if _stays(node, flow)})
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


def _stays(node: fx.Node, flow: RowFlow) -> bool:
    """Whether a call cannot, or should not, be made again on some of its rows."""
    sizes = any(isinstance(n.meta.get("val"), torch.SymInt) for n in node.all_input_nodes)
    return sizes or is_product(node) or bool(flow.whole(node))


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
        else:
            made[node] = _copy(step, node, node.args, node.kwargs, made)


def _copy(step: StepGraph, node: fx.Node, args: Any, kwargs: Any, places: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The call once more, reading what it read from `places`."""
    args, kwargs = fx.map_arg((args, kwargs), lambda n: places.get(n, n))
    copy = step.call(node.target, *args, origin=node)
    copy.kwargs = kwargs
    return copy


class _Schedule:
    """Levels, one after the other: what the one before left to do, the calls that are not on rows, then the loops.

    A call on rows is one level behind what it reads whole. `stored` says where a value of the original graph is kept.
    """

    def __init__(self, step: StepGraph) -> None:
        self.step = step
        self.flow = RowFlow(step)
        self.calls = {node: (node.args, node.kwargs) for node in step.calls()}
        self.order = {node: index for index, node in enumerate(self.calls)}
        self.users: dict[fx.Node, list[fx.Node]] = {node: list(node.users) for node in self.calls}
        self.level: dict[fx.Node, int] = {}
        for node in self.calls:
            self.level[node] = max((self._behind(source, node) for source in node.all_input_nodes), default=0)
        self.stored: dict[fx.Node, fx.Node] = {}
        self.placed: set[fx.Node] = set()
        self.loops = 0

    def run(self) -> int:
        """Rebuild the graph in the new order; return the number of loops."""
        left: list[fx.Node] = []
        for level in count():
            self._loops(left)
            here = [node for node in self.calls if self.level[node] == level]
            for node in here:
                if self.flow.extent(node) is None:
                    self.stored[node] = self._place(node, self.stored, None)
            now, left = self._divide(level, [node for node in here if self.flow.extent(node) is not None])
            self._loops(now)
            if not left and level >= max(self.level.values()):
                break
        output = self.step.graph.output_node()
        output.args = fx.map_arg(output.args, lambda n: self.stored.get(n, n))
        return self.loops

    def _behind(self, source: fx.Node, user: fx.Node) -> int:
        if source not in self.level:
            return 0
        on_rows = self.flow.extent(source) is not None and source not in self.flow.by_rows(user)
        return self.level[source] + on_rows

    def _divide(self, level: int, members: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        """Of a level's calls, those to be stored now, and those read whole that the next level makes of them.

        What only calls of later levels read row by row goes to the next level with all that is between.
        """
        flow, inside = self.flow, set(members)
        whole = [n for n in members if any(n not in flow.by_rows(user) for user in self.users[n])]
        by_rows = [
            n for n in members if any(self.level.get(u, 0) > level and n in flow.by_rows(u) for u in self.users[n])
        ]
        earlier = {n for user in members for n in flow.by_rows(user)} - inside
        shared = set(ancestors(whole, flow, earlier)) & set(ancestors(by_rows, flow, earlier | set(whole)))
        sources = {n for n in inside if any(source in self.level for source in flow.whole(n))}
        sources |= earlier | {n for n in shared if is_product(n)}
        kept = flow.narrowest(dict.fromkeys([*whole, *by_rows]), sources) if members else set()
        for node in ancestors(by_rows, flow, earlier | kept | set(whole)):
            self.level[node] = level + 1
        return [n for n in members if n in kept], [n for n in whole if n not in kept]

    def _loops(self, targets: Sequence[fx.Node]) -> None:
        """One loop for each extent, that computes the targets of what is stored."""
        by_extent: dict[Affine, list[fx.Node]] = defaultdict(list)
        for node in targets:
            extent = self.flow.extent(node)
            assert extent is not None
            by_extent[extent].append(node)
        for extent, group in by_extent.items():
            loop = Loop(self.loops, extent)
            self.loops += 1
            places = dict(self.stored)
            for node in sorted(ancestors(group, self.flow, self.stored), key=self.order.__getitem__):
                places[node] = self._place(node, places, loop)
            self.stored |= {node: places[node] for node in group}

    def _place(self, node: fx.Node, places: Mapping[fx.Node, fx.Node], loop: Loop | None) -> fx.Node:
        """The call at the end of the graph: itself, or a copy where it has its place already."""
        output = self.step.graph.output_node()
        args, kwargs = self.calls[node]
        if node in self.placed:
            with self.step.graph.inserting_before(output):
                node = _copy(self.step, node, args, kwargs, places)
        else:
            self.placed.add(node)
            output.prepend(node)
            node.args, node.kwargs = fx.map_arg((args, kwargs), lambda n: places.get(n, n))
        node.meta["loop"] = loop
        return node
