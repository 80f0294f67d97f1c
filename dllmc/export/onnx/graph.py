"""Building ONNX graphs: nodes by call, constants by value, and what is known of a value besides its name."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

OPSET = 23
DOMAIN = "dllmc"

TYPES = {
    "float64": TensorProto.DOUBLE,
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "uint8": TensorProto.UINT8,
    "uint64": TensorProto.UINT64,
    "bool": TensorProto.BOOL,
}
WIDER = ("bool", "uint8", "int32", "int64", "float16", "bfloat16", "float32", "float64")
"""Dtypes, each after those that are converted to it where they meet; but for the two halves, which meet in float32."""


@dataclass(frozen=True)
class Value:
    """A value of a graph. `dims`: its sizes, None where one is known only when it runs."""

    name: str
    dtype: str
    dims: tuple[int | None, ...]


Operand = Any  # a Value, a number, a bool, a text, None, the name of a dtype, or a list of these


@dataclass
class Graph:
    """Nodes in the making. Calling it adds one: `g("Add", a, b)` is the name of the sum.

    Names are unique in a model: graphs within others (`body`) draw from the same numbers, and see the others' values.
    """

    nodes: list[NodeProto] = field(default_factory=list)
    functions: dict[str, Any] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=count)
    _constants: dict[tuple[str, tuple[int, ...], bytes], str] = field(default_factory=dict)

    def __call__(self, op: str, *inputs: str | None, domain: str = "", **attributes: Any) -> str:
        """Add a node, and return the name of its result."""
        return self.several(op, 1, *inputs, domain=domain, **attributes)[0]

    def several(self, op: str, outputs: int, *inputs: str | None, domain: str = "", **attributes: Any) -> list[str]:
        """Add a node with several results."""
        names = [self.name(op.lower()) for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, [name or "" for name in inputs], names, domain=domain, **attributes))
        return names

    def name(self, hint: str) -> str:
        """A name that nothing in the model has."""
        return f"{hint}_{next(self.numbers)}"

    def constant(self, value: Any, dtype: str = "int64") -> str:
        """The name of a constant; equal ones are one node."""
        array = np.asarray(value, "float32" if dtype == "bfloat16" else dtype)  # numpy has no bfloat16
        key = dtype, array.shape, array.tobytes()
        if key not in self._constants:
            tensor = numpy_helper.from_array(array)
            if dtype == "bfloat16":
                tensor = helper.make_tensor("", TYPES[dtype], array.shape, array.flatten().tolist())
            name = self.name("constant")
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
            self._constants[key] = name
        return self._constants[key]

    def cast(self, value: str, dtype: str) -> str:
        """The value in another dtype."""
        return self("Cast", value, to=TYPES[dtype])

    def dim(self, value: Value | str, axis: int) -> str:
        """The size of an axis, int64 [1]."""
        if isinstance(value, str):
            return self("Shape", value, start=axis, end=axis + 1)
        if (known := value.dims[axis]) is not None:
            return self.constant([known])
        return self.dim(value.name, axis % len(value.dims))

    def shape(self, *dims: int | str | None) -> str:
        """A shape, int64 [n], of numbers and of sizes as `dim` gives them."""
        assert None not in dims, "an axis of unknown size"
        if all(isinstance(dim, int) for dim in dims):
            return self.constant(np.array(dims, np.int64))
        return self("Concat", *(self.constant([dim]) if isinstance(dim, int) else dim for dim in dims), axis=0)

    def reshape(self, value: str, *dims: int | str | None) -> str:
        """The value in another shape; at most one of the dims is -1."""
        return self("Reshape", value, self.shape(*dims))

    def slice(self, value: str, axis: int, start: str, end: str) -> str:
        """Elements `[start, end)` of an axis; both int64 [1]."""
        return self("Slice", value, start, end, self.constant([axis]))

    def unsqueeze(self, value: str, *axes: int) -> str:
        """Axes of one element, where they will stand."""
        return self("Unsqueeze", value, self.constant(np.array(axes, np.int64)))

    def squeeze(self, value: str, *axes: int) -> str:
        """Without these axes, of one element each."""
        return self("Squeeze", value, self.constant(np.array(axes, np.int64)))

    def range(self, stop: str) -> str:
        """0, 1, ... below a size, int64."""
        return self("Range", self.constant(0), self.squeeze(stop, 0), self.constant(1))

    def reduce(self, op: str, value: str, axis: int, keepdims: bool = False) -> str:
        """`ReduceMax`, `ReduceSum` and so on along one axis."""
        return self(op, value, self.constant([axis]), keepdims=int(keepdims))

    def loop(
        self, trips: str, carried: Sequence[str], body: Callable[["Graph", str, list[str]], Sequence[str]]
    ) -> list[str]:
        """`Loop`: `body(graph, number of the iteration, carried values)` gives those carried on. trips: int64 []."""
        with self.within() as inner:
            number, condition = inner.name("i"), inner.name("on")
            names = [inner.name("carried") for _ in carried]
            results = body(inner, number, names)
            on = inner("Identity", condition)
            inputs = [_info(number, TensorProto.INT64, ()), _info(condition, TensorProto.BOOL, ())]
            inputs += [helper.make_empty_tensor_value_info(name) for name in names]
            outputs = [_info(on, TensorProto.BOOL, ())] + [helper.make_empty_tensor_value_info(n) for n in results]
            graph = helper.make_graph(inner.nodes, self.name("body"), inputs, outputs)
        return self.several("Loop", len(carried), trips, self.constant(True, "bool"), *carried, body=graph)

    def choice(
        self, condition: str, then: Callable[["Graph"], Sequence[str]], otherwise: Callable[["Graph"], Sequence[str]]
    ) -> list[str]:
        """`If`: what one of two graphs gives. condition: bool []."""
        branches = {}
        for key, make in (("then_branch", then), ("else_branch", otherwise)):
            with self.within() as inner:
                results = [inner("Identity", name) for name in make(inner)]
                outputs = [helper.make_empty_tensor_value_info(name) for name in results]
                branches[key] = helper.make_graph(inner.nodes, self.name("branch"), [], outputs)
        return self.several("If", len(results), condition, **branches)

    @contextmanager
    def within(self) -> Iterator["Graph"]:
        """A graph whose names are none of this one's, and that knows its values."""
        yield Graph([], self.functions, self.numbers, dict(self._constants))


def _info(name: str, kind: int, shape: tuple[int, ...]) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)
