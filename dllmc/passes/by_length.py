"""Values that depend on the length of the sequence alone, such as masks and positions, computed for any length."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from dllmc.ir.provenance import describe, source_line
from dllmc.ir.step_graph import StepGraph

aten = torch.ops.aten

# Operators to which their first argument is a shape and a dtype, no values.
_OF_SHAPE = (
    aten.full_like.default,
    aten.ones_like.default,
    aten.zeros_like.default,
    aten.new_full.default,
    aten.new_ones.default,
    aten.new_zeros.default,
)
# Elements of a constant up to which each of them may be what positions are compared with.
_FEW = 8


@dataclass(frozen=True)
class ByLength:
    """How a value is computed: its constants and calls, in order. Make one with `by_length`."""

    step: StepGraph
    nodes: tuple[fx.Node, ...]

    def at(self, length: int) -> Tensor:
        """The value for a sequence of that many tokens."""
        needed = Counter(chain.from_iterable(_inputs(node) for node in self.nodes))
        env: dict[fx.Node, Tensor] = {}
        for node in self.nodes:
            if node.op == "placeholder":
                env[node] = self.step.tensors[self.step.roles[node.name].name]
                continue
            target: Any = node.target
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n] if n in env else self._like(n, length))
            env[node] = target(*args, **kwargs)
            for used in _inputs(node):
                needed[used] -= 1
                if not needed[used]:
                    del env[used]
        return env[self.nodes[-1]]

    def largest_bytes(self, length: int) -> int:
        """Bytes of the largest value that is made on the way."""
        values = [node.meta["val"] for node in self.nodes]
        return max(prod(self._sizes(v, length)) * v.element_size() for v in values if isinstance(v, Tensor))

    def numbers(self) -> set[int]:
        """Those that the calls name or that a small constant holds: where the value may change its form."""
        return {abs(int(x)) for node in self.nodes for x in self._numbers(node) if abs(x) < 2**31}

    def large_constants(self) -> Iterator[str]:
        """The names of constants that `numbers` leaves out."""
        names = (self.step.roles[node.name].name for node in self.nodes if node.op == "placeholder")
        return (name for name in names if self.step.tensors[name].numel() > _FEW)

    def _numbers(self, node: fx.Node) -> list[float]:
        numbers: list[Any] = []
        if node.op == "placeholder":
            constant = self.step.tensors[self.step.roles[node.name].name]
            return constant.double().flatten().tolist() if constant.numel() <= _FEW else []
        fx.node.map_aggregate((node.args, node.kwargs), lambda x: numbers.append(x) if _is_number(x) else None)
        return numbers

    def _like(self, node: fx.Node, length: int) -> Any:
        """A size as a number; of a value that gives its shape alone, as much."""
        value = node.meta["val"]
        if isinstance(value, Tensor):
            return torch.empty((), dtype=value.dtype).expand(self._sizes(value, length))
        return self._number(value, length)

    def _sizes(self, value: Tensor, length: int) -> list[int]:
        return [self._number(size, length) for size in value.shape]

    def _number(self, size: Any, length: int) -> Any:
        if not isinstance(size, SymInt):
            return size
        return int(size.node.expr.subs({s: length for s, name in self.step.symbols.items() if name == "tokens"}))


def by_length(step: StepGraph, value: fx.Node) -> ByLength | str:
    """How to compute a value that depends on the length alone; else what other it depends on, as text."""
    nodes: set[fx.Node] = set()
    pending = [value]
    while pending:
        node = pending.pop()
        if node not in nodes:
            nodes.add(node)
            pending += _inputs(node)
    ordered = sorted(nodes)
    for node in ordered:
        if node.op == "placeholder":
            role = step.roles[node.name]
            if role.kind == "input":
                return f"the values of {role.name}, through {_first_use(node, nodes)}"
            if step.tensors[role.name].is_meta:
                return f"{role.name!r}, which is on the meta device and has no value"
    return ByLength(step, tuple(ordered))


def _inputs(node: fx.Node) -> list[fx.Node]:
    """What of a call's inputs it reads the values of; sizes are known by the length."""
    sources = [] if node.target in _OF_SHAPE else node.all_input_nodes
    return [n for n in sources if isinstance(n.meta.get("val"), Tensor | list | tuple)]


def _first_use(source: fx.Node, nodes: set[fx.Node]) -> str:
    """The first call in the user's model that reads a value, directly or not."""
    reached = {source}
    for node in sorted(nodes - {source}):
        if reached.intersection(_inputs(node)):
            reached.add(node)
            if source_line(node):
                return describe(node)
    return describe(max(reached))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
