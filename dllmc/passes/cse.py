"""Common subexpressions: equal calls on equal inputs are made once."""

from dataclasses import dataclass
from typing import Any

from torch import fx

from dllmc.ir.step_graph import StepGraph, loop_of
from dllmc.passes.base import Pass, PassResult


@dataclass(frozen=True)
class CommonSubexpressions(Pass):
    """Replace a call by an earlier one with the same operator and arguments; every operator here is pure.

    Of calls in loops, those in one: what several loops compute is not to be kept between them.
    """

    name = "cse"
    requires = ("flat",)

    def run(self, step: StepGraph) -> PassResult:
        seen: dict[Any, fx.Node] = {}
        removed = 0
        for node in step.calls():
            first = seen.setdefault(_key(node), node)
            if first is not node:
                node.replace_all_uses_with(first)
                step.graph.erase_node(node)
                removed += 1
        return PassResult(removed > 0, {"removed": removed})


def _key(node: fx.Node) -> Any:
    return loop_of(node), node.target, _hashable(node.args), _hashable(tuple(sorted(node.kwargs.items())))


def _hashable(value: Any) -> Any:
    """Equal exactly where the arguments mean the same: 1, 1.0 and True are told apart by their type."""
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    return value if isinstance(value, fx.Node) else (type(value), repr(value))
