"""How rows flow through a step: which calls keep the rows of an axis apart, and where the fewest bytes pass.

A call works on rows of an *extent* (a size of the step: `tokens`, `guided + rows`) where its result has an axis that is
as long, and each row of it needs the same row of its operands alone. All else that it reads it reads *whole*.
"""

import math
import operator
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import networkx as nx
import torch
from torch import fx

from dllmc.ir.program import Affine
from dllmc.ir.step_graph import StepGraph
from dllmc.ops import decode_head  # noqa: F401  (registers the operator)
from dllmc.ops.facts import MOVES, RESHAPES, WHOLE_OPERANDS, is_row_wise

aten = torch.ops.aten
_PRODUCTS = (
    aten.linear.default,
    aten.matmul.default,
    torch.ops.dllmc.attention.default,
    torch.ops.dllmc.decode_head.default,
)
"""Operators that cost more than to read what they read: not to be computed twice."""

_VIEWS = (
    *MOVES,
    *RESHAPES,
    aten.chunk.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unbind.int,
)


class RowFlow:
    """The extents of a step's values, and which calls read which of them by rows; of the graph as it was given."""

    def __init__(self, step: StepGraph) -> None:
        self.step = step
        self._affines: dict[object, Affine] = {}
        self._extents: dict[fx.Node, Affine | None] = {}
        self._order = {node: index for index, node in enumerate(step.graph.nodes)}
        for node in step.graph.nodes:
            self._extents[node] = self._extent(node)
        self._by_rows = {node: self._read_by_rows(node) for node in step.graph.nodes}
        self._whole = {node: self._read_whole(node) for node in step.graph.nodes}

    def extent(self, node: fx.Node) -> Affine | None:
        """The size whose rows a value has; None where it has none, or where its call does not keep them apart."""
        return self._extents[node]

    def by_rows(self, user: fx.Node) -> list[fx.Node]:
        """What a call on rows reads row by row."""
        return self._by_rows[user]

    def whole(self, user: fx.Node) -> list[fx.Node]:
        """What any call reads otherwise, and is computed on rows."""
        return self._whole[user]

    def row_bytes(self, node: fx.Node) -> int:
        """Bytes of a row of a value."""
        shape: Sequence[Any] = node.meta["val"].shape
        return math.prod(size for size in shape if isinstance(size, int)) * int(node.meta["val"].element_size())

    def narrowest(
        self,
        sinks: Collection[fx.Node],
        sources: Collection[fx.Node],
        stored: Collection[fx.Node] = (),
        copied: bool = False,
        early: bool = False,
    ) -> set[fx.Node]:
        """Values from which every sink can be computed without `sources`, of the fewest bytes a row together.

        A value may stand for itself, a source too; a view may not, being no smaller than what it is a view of, nor
        several results together; where what is kept is `copied`, views are values like others. Inputs of the step cost
        nothing, nor does what is `stored` already. Of such sets it is the one that leaves least to do, or the `early`
        one, which leaves most.
        """
        flow = nx.DiGraph()
        flow.add_nodes_from("st")
        reached = dict.fromkeys(sinks)
        for node in (queue := list(sinks)):
            free = node.op == "placeholder"
            stays = free or node in sources or self.extent(node) is None
            if not isinstance(node.meta["val"], torch.Tensor) or (_is_view(node, sources) and not (stays or copied)):
                flow.add_edge((node, "in"), (node, "out"))
            else:
                cost = self.row_bytes(node) * len(self._order) + (self._order[node] if early else 0)
                flow.add_edge((node, "in"), (node, "out"), capacity=0 if free or node in stored else cost)
            if stays:
                flow.add_edge("s", (node, "in"))
                continue
            for source in self.by_rows(node):
                flow.add_edge((source, "out"), (node, "in"))
                if source not in reached:
                    reached[source] = None
                    queue.append(source)
        flow.add_edges_from(((node, "out"), "t") for node in sinks)
        _, (_, behind) = nx.minimum_cut(flow, "s", "t")
        return {node for node in reached if (node, "in") not in behind and (node, "out") in behind}

    @cached_property
    def _sizes(self) -> tuple[Affine, ...]:
        """The extents that inputs of the step have, but for the number of segments."""
        found: dict[Affine, None] = {}
        for node, role in self.step.placeholders():
            if role.kind == "input":
                extent = self._affine(node.meta["val"].shape[0])
                if extent.terms and extent != Affine(0, (("segments", 1),)):
                    found[extent] = None
        return tuple(found)

    def axis(self, node: fx.Node, extent: Affine) -> int | None:
        """The one axis of a value that is as long as the extent."""
        value = node.meta.get("val")
        value = value[0] if isinstance(value, list | tuple) and value else value
        if not isinstance(value, torch.Tensor):
            return None
        shape: Sequence[Any] = value.shape
        axes = [i for i, size in enumerate(shape) if not isinstance(size, int) and self._affine(size) == extent]
        return axes[0] if len(axes) == 1 else None

    def _affine(self, size: Any) -> Affine:
        expression = size.node.expr if isinstance(size, torch.SymInt) else size
        if expression not in self._affines:
            self._affines[expression] = self.step.affine(size, "its shape")
        return self._affines[expression]

    def _read_by_rows(self, user: fx.Node) -> list[fx.Node]:
        extent = self.extent(user)
        if extent is None:
            return []
        whole = [user.args[i] for i in WHOLE_OPERANDS.get(user.target, ())]
        return [n for n in user.all_input_nodes if n not in whole and self.axis(n, extent) is not None]

    def _read_whole(self, user: fx.Node) -> list[fx.Node]:
        rows = self._by_rows[user]
        return [n for n in user.all_input_nodes if n not in rows and self.extent(n) is not None]

    def _extent(self, node: fx.Node) -> Affine | None:
        found = [extent for extent in self._sizes if self.axis(node, extent) is not None]
        if len(found) != 1 or node.op != "call_function":
            return found[0] if len(found) == 1 and node.op == "placeholder" else None
        whole = [node.args[i] for i in WHOLE_OPERANDS.get(node.target, ())]
        rows = is_row_wise(node, lambda n: None if n in whole else self.axis(n, found[0]))
        return found[0] if rows else None


def is_product(node: fx.Node) -> bool:
    """Whether a call is one not to be made twice."""
    return node.target in _PRODUCTS


def _is_view(node: fx.Node, sources: Collection[fx.Node]) -> bool:
    """Whether a call may return what it is given, in other words; one of several results may be that."""
    if node.target is operator.getitem:
        source: Any = node.args[0]
        return source not in sources and source.target in _VIEWS
    return node.target in _VIEWS


def ancestors(targets: Iterable[fx.Node], flow: RowFlow, stop: Collection[fx.Node]) -> Iterator[fx.Node]:
    """The targets and all calls on rows that they need, but for those in `stop` and behind them."""
    seen = set(stop)
    queue = list(targets)
    while queue:
        node = queue.pop()
        if node not in seen and node.op == "call_function":
            seen.add(node)
            yield node
            queue += flow.by_rows(node)
