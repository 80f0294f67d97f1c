"""A step graph as plain data: a `Call` for each input, for each call of an operator and for what the step returns.

Sizes of the step are no calls here: an argument that is one is written as what it is, `tokens` say.
"""

import operator
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor, fx

from dllmc.errors import CaptureError
from dllmc.ir.provenance import layer_of, source_line
from dllmc.ir.step_graph import StepGraph
from dllmc.ir.trace import Call, Graph

# Options of a call that say nothing about the values it computes.
_NO_VALUE = ("device", "layout", "pin_memory", "memory_format")


class Lister:
    """Lists the calls of one step again and again while passes rewrite it: what stayed as it was is not listed anew."""

    def __init__(self, step: StepGraph) -> None:
        self.step = step
        self._dims: dict[sympy.Expr, tuple[str, int]] = {}
        self._known: dict[fx.Node, tuple[tuple[object, ...], Call]] = {}
        self._names: dict[fx.Node, str] = {}

    def graph(self) -> Graph:
        """The graph as it is now."""
        step = self.step
        self._names = {
            node: f"%{role.name}" if role.kind == "input" else role.name for node, role in step.placeholders()
        }
        inputs = [self._call(node) for node, role in step.placeholders() if role.kind == "input"]
        calls = [self._call(n) for n in step.calls() if not isinstance(n.meta.get("val"), SymInt)]
        returned = ", ".join(
            f"{name}={self._text(node)}" for name, node in zip(step.outputs, step.output_nodes(), strict=True)
        )
        return (*inputs, *calls, Call("", "return", returned, "", 0, False, "", ""))

    def _call(self, node: fx.Node) -> Call:
        """The node's call; the same object as before where nothing that it is made of has changed."""
        made_of = node.target, node.args, node.kwargs, node.meta.get("val")
        before, call = self._known.get(node, ((), None))
        if call is None or not all(a is b for a, b in zip(before, made_of, strict=True)):
            call = self._made(node)
            self._known[node] = made_of, call
        return call

    def _made(self, node: fx.Node) -> Call:
        results, is_list = _results(node)
        sources = {_storage(v) for source in node.all_input_nodes for v in _results(source)[0]}
        written = [value for value in results if _storage(value) not in sources]
        types = list(map(self._type, results))
        arguments = [self._text(a) for a in node.args]
        arguments += [f"{key}={self._text(a)}" for key, a in node.kwargs.items() if key not in _NO_VALUE]
        is_input = node.op == "placeholder"
        return Call(
            name=self._names.get(node, node.name).removeprefix("%"),
            operator="input" if is_input else _operator(node.target),
            arguments="" if is_input else ", ".join(arguments),
            type=_of_list(types) if is_list else "".join(types),
            size_bytes=sum(map(self._bytes, written)),
            is_view=bool(results) and not written,
            layer=layer_of(node),
            source=source_line(node),
        )

    def _text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            size = value.meta.get("val")
            if isinstance(size, SymInt):
                return self._dim(size)[0]
            return self._names.get(value) or (str(value.target) if value.op == "get_attr" else f"%{value.name}")
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self._text, value))}]"
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        return repr(value)

    def _type(self, value: Tensor) -> str:
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(self._dim(n)[0] for n in value.shape)}]"

    def _bytes(self, value: Tensor) -> int:
        size = value.itemsize
        for n in value.shape:
            size *= self._dim(n)[1]
        return size

    def _dim(self, size: int | SymInt) -> tuple[str, int]:
        """A size as text, and its value in the largest step: 0 if it depends on more than the step's sizes."""
        if not isinstance(size, SymInt):
            return str(size), size
        expression = size.node.expr
        if expression not in self._dims:
            self._dims[expression] = self._described(size, expression)
        return self._dims[expression]

    def _described(self, size: SymInt, expression: sympy.Expr) -> tuple[str, int]:
        names, maxima = self.step.symbols, self.step.maxima
        if expression.free_symbols - names.keys():
            return str(expression), 0
        try:
            affine = self.step.affine(size, "")
            return str(affine), affine.at(maxima)
        except CaptureError:
            largest = expression.subs({symbol: maxima[name] for symbol, name in names.items()})
            return str(expression.subs(names)), int(largest)


def listing(step: StepGraph) -> Graph:
    """A step graph as it is now."""
    return Lister(step).graph()


def _results(node: fx.Node) -> tuple[Sequence[Tensor], bool]:
    """The tensors that a node stands for, and whether they are a list."""
    value = node.meta.get("val")
    values = list(value) if (is_list := isinstance(value, list | tuple)) else [value]
    return [v for v in values if isinstance(v, Tensor)], is_list


def _of_list(types: Sequence[str]) -> str:
    """`float32[3] x 2` or `(int64[3], float32[3])`."""
    return f"{types[0]} x {len(types)}" if len(set(types)) == 1 else f"({', '.join(types)})"


def _storage(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _operator(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    return str(target).removesuffix(".default") if "." in str(target) else str(getattr(target, "__name__", target))
