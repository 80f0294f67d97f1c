"""Work on tokens and rows goes a chunk at a time, so that wide activations exist for a chunk only."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from torch import fx

from dllmc.ir.program import CHUNK, Affine
from dllmc.ir.step_graph import Loop, StepGraph
from dllmc.passes.base import Pass, PassResult
from dllmc.passes.narrowing import copy_call, gather_early, split_projections
from dllmc.passes.row_flow import RowFlow, ancestors, is_product


@dataclass(frozen=True)
class ChunkActivations(Pass):
    """Put the calls on rows into loops over `chunk` rows at a time; with 0 the graph stays as it is.

    What is read whole, every token's keys and values say, cuts the step into levels. From one level to the next goes
    what has the fewest bytes a row: in a transformer the residual stream. A loop makes keys and values of it, and
    another all the rest up to the residual stream behind the layer. Both compute the norm; no product is made twice.
    So what lives all through a layer is the residual stream, its keys and its values.
    Case 1: slices of one projection of which some are read whole become projections by slices of its weight.
    Case 2: rows are gathered of what is kept anyway, and what lies between is computed on them.
    """

    name = "chunk-activations"
    requires = ("head-fused",)
    chunk: int = 0

    def run(self, step: StepGraph) -> PassResult:
        if not self.chunk:
            return PassResult(False)
        split = split_projections(step)
        moved = gather_early(step)
        loops = _Schedule(step).run()
        step.maxima = {**step.maxima, CHUNK: self.chunk}
        return PassResult(True, {"loops": loops, "gathers_moved": moved, "projections_split": split})


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
        made_now = ancestors([n for n in shared if is_product(n)], flow, earlier)
        sources |= earlier | {n for n in made_now if is_product(n)}
        kept = flow.narrowest(dict.fromkeys([*whole, *by_rows]), sources, earlier) if members else set()
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
                node = copy_call(self.step, node, args, kwargs, places)
        else:
            self.placed.add(node)
            output.prepend(node)
            node.args, node.kwargs = fx.map_arg((args, kwargs), lambda n: places.get(n, n))
        node.meta["loop"] = loop
        return node
