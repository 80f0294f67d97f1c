"""A program as an ONNX model, operator by operator: a buffer's contents at each time are a value of the graph."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onnx import ModelProto, TensorProto, helper

from dllmc.errors import ExportError
from dllmc.export.onnx import elementwise, packed
from dllmc.export.onnx.graph import DOMAIN, OPSET, TYPES, Graph, Operand, Value
from dllmc.export.onnx.head import all_logits, decode_head
from dllmc.export.views import in_memory, is_whole, slices
from dllmc.export.whole import without_loops
from dllmc.ir.program import PAGES, SYMBOLS, Affine, DType, Instruction, Program, Shape, View
from dllmc.ir.program import Operand as ProgramOperand
from dllmc.ir.views import apart, coincide

ONE = Affine(1)
IR_VERSION = 11  # the first that knows the operators of OPSET
EMIT: Mapping[str, Callable[[Graph, Sequence[Operand]], list[str]]] = {
    **packed.EMIT,
    "dllmc.decode_head.default": decode_head,
}
"""dllmc's operators; torch's are in `elementwise.EMIT`."""


def model_of(program: Program, weights: str, *, logits: bool, keep_custom_ops: bool) -> ModelProto:
    """The model of a program's step; its weights are external data, to be placed in the file of that name."""
    step = _Step(without_loops(program), keep_custom_ops, logits)
    for instruction, _ in step.program.calls():
        step.call(instruction)
    return step.model(weights)


@dataclass
class _Held:
    """What a buffer holds: a dense value of its shape, and on it values of views that were written since."""

    whole: str | None
    written: list[tuple[View, str]]


class _Step:
    """The state of one emission."""

    def __init__(self, program: Program, keep_custom_ops: bool, logits: bool) -> None:
        self.program = program
        self.graph = Graph()
        self.keep_custom_ops = keep_custom_ops
        self.with_logits = logits
        self.logits: str | None = None
        self.held = {
            name: _Held(name, []) for group in (program.inputs, program.weights, program.caches) for name in group
        }
        self._sizes = self._symbols()

    def call(self, instruction: Instruction) -> None:
        """Emit one instruction."""
        args = [self._operand(operand) for operand in instruction.inputs]
        if instruction.op == "dllmc.decode_head.default" and self.with_logits:
            self.logits = all_logits(self.graph, args)
        dtypes = [self.program.tensor(view.base).dtype for view in instruction.outputs]
        if instruction.op in elementwise.EMIT:
            results = [elementwise.EMIT[instruction.op](self.graph, args, dtypes[0])]
        elif self.keep_custom_ops:
            results = self._custom(instruction.op, args, len(dtypes))
        else:
            results = EMIT[instruction.op](self.graph, args)
        for view, result in zip(instruction.outputs, results, strict=True):
            self._write(view, result)

    def model(self, weights: str) -> ModelProto:
        """The whole model, checked in no way yet."""
        outputs = {
            name: (self._read(view), self.program.tensor(view.base).dtype, view.shape)
            for name, view in self.program.outputs.items()
        }
        updated = {name: held for name, held in self.held.items() if name in self.program.caches and held.whole != name}
        for name, held in updated.items():
            tensor = self.program.caches[name]
            outputs[f"{name}.updated"] = (str(held.whole), tensor.dtype, tensor.shape)
        if self.logits is not None:
            vocab = next(
                self.program.tensor(call.inputs[1].base).shape[0]
                for call, _ in self.program.calls()
                if call.op == "dllmc.decode_head.default" and isinstance(call.inputs[1], View)
            )
            rows = next(iter(self.program.outputs.values())).shape[0]
            outputs["logits"] = (self.logits, "float32", (rows, vocab))
        for name, (value, _, _) in outputs.items():
            self.graph.nodes.append(helper.make_node("Identity", [value], [name]))
        given = {**self.program.inputs, **self.program.caches}
        graph = helper.make_graph(
            self.graph.nodes,
            self.program.name,
            [_info(name, tensor.dtype, tensor.shape) for name, tensor in given.items()],
            [_info(name, dtype, shape) for name, (_, dtype, shape) in outputs.items()],
            [_external(name, tensor.dtype, tensor.shape, weights) for name, tensor in self.program.weights.items()],
        )
        opsets = [helper.make_opsetid("", OPSET)]
        if self.graph.functions:
            opsets.append(helper.make_opsetid(DOMAIN, 1))
        return helper.make_model(
            graph,
            opset_imports=opsets,
            functions=list(self.graph.functions.values()),
            ir_version=IR_VERSION,
            producer_name="dllmc",
        )

    def _custom(self, op: str, args: Sequence[Operand], results: int) -> list[str]:
        """A node of dllmc's own domain, and once a kind of call a function that says it in standard operators."""
        values = [arg for arg in args if isinstance(arg, Value)]
        formal = [replace(value, name=f"operand_{number}") for number, value in enumerate(values)]
        named = iter(formal)
        signature = [next(named) if isinstance(arg, Value) else arg for arg in args]
        known = self.graph.functions
        name = op.split(".")[1]
        alike = [each for each in known if each == name or each.startswith(f"{name}_")]
        body = Graph()
        found = EMIT[op](body, signature)
        function = helper.make_function(
            DOMAIN,
            name if not alike else f"{name}_{len(alike)}",
            [value.name for value in formal],
            found,
            body.nodes,
            [helper.make_opsetid("", OPSET)],
        )
        same = next((each for each in alike if _bodies_equal(known[each], function)), None)
        if same is None:
            known[function.name] = function
            same = function.name
        return self.graph.several(same, results, *(value.name for value in values), domain=DOMAIN)

    def _operand(self, operand: ProgramOperand) -> Operand:
        if isinstance(operand, View):
            dims = tuple(None if dim.terms else dim.constant for dim in operand.shape)
            return Value(self._read(operand), self.program.tensor(operand.base).dtype, dims)
        if isinstance(operand, Affine):
            if operand.terms:
                raise ExportError(f"program {self.program.name!r}: an operand {operand} depends on the step's sizes")
            return operand.constant
        if isinstance(operand, DType):
            return operand.name
        if isinstance(operand, tuple):
            return [self._operand(item) for item in operand]
        return operand

    def _read(self, view: View) -> str:
        """The value of a view, dense in its shape."""
        held = self.held[view.base]
        for written, value in held.written:
            if coincide(written, view):
                return self._shaped(value, written.shape, view.shape)
        if held.written and not all(apart(written, view) for written, _ in held.written):
            self._merge(view.base)
        if held.whole is None:
            raise ExportError(f"program {self.program.name!r}: {view.base!r} is read before all of it is written")
        shape = self.program.tensor(view.base).shape
        if not is_whole(shape, view):
            return self._sliced(held.whole, shape, view)
        order = in_memory(view)
        dense = self._shaped(held.whole, shape, tuple(view.shape[axis] for axis in order))
        return self._arranged(dense, order, view.shape)

    def _write(self, view: View, value: str) -> None:
        shape = self.program.tensor(view.base).shape
        held = self.held.setdefault(view.base, _Held(None, []))
        if is_whole(shape, view):
            ones = [axis for axis, dim in enumerate(view.shape) if dim == ONE]
            order = [*in_memory(view), *ones]
            if order != sorted(order):
                value = self.graph("Transpose", value, perm=order)
            held.whole, held.written = self._shaped(value, tuple(view.shape[axis] for axis in order), shape), []
            return
        held.written = [(old, its) for old, its in held.written if not coincide(old, view)]
        if not all(apart(old, view) for old, _ in held.written):
            self._merge(view.base)
        held.written.append((view, value))

    def _merge(self, base: str) -> None:
        """Make one dense value of what was written to a buffer: runs of columns, between those that stayed."""
        held, g = self.held[base], self.graph
        shape = self.program.tensor(base).shape
        for view, value in held.written:
            found = slices(shape, view)
            if held.whole is None or found is None:
                raise ExportError(
                    f"program {self.program.name!r}: {base!r} is written in parts that no slice describes"
                )
            digits, starts, lengths = found
            axes = [
                axis
                for axis, (start, length) in enumerate(zip(starts, lengths, strict=True))
                if (start, length) != (Affine(), digits[axis])
            ]
            if len(axes) != 1:
                raise ExportError(f"program {self.program.name!r}: {base!r} is written in parts along {len(axes)} axes")
            (axis,) = axes
            whole = self._reshaped(held.whole, tuple(digits))
            order = in_memory(view)
            part = value
            ones = [place for place, dim in enumerate(view.shape) if dim == ONE]
            if [*order, *ones] != list(range(len(view.shape))):
                part = g("Transpose", part, perm=[*order, *ones])
            part = self._reshaped(part, tuple(lengths))
            start, end = self._size(starts[axis]), self._size(starts[axis] + lengths[axis])
            before = g.slice(whole, axis, g.constant([0]), start)
            behind = g.slice(whole, axis, end, self._size(digits[axis]))
            held.whole = self._reshaped(g("Concat", before, part, behind, axis=axis), shape)
        held.written = []

    def _sliced(self, whole: str, shape: Shape, view: View) -> str:
        g = self.graph
        found = slices(shape, view)
        if found is None:
            return self._expanded(whole, shape, view)
        digits, starts, lengths = found
        value = self._reshaped(whole, tuple(digits)) if tuple(digits) != shape else whole
        for axis, (digit, start, length) in enumerate(zip(digits, starts, lengths, strict=True)):
            if (start, length) != (Affine(), digit):
                value = g.slice(value, axis, self._size(start), self._size(start + length))
        order = in_memory(view)
        value = self._shaped(value, tuple(lengths), tuple(view.shape[axis] for axis in order))
        return self._arranged(value, order, view.shape)

    def _expanded(self, whole: str, shape: Shape, view: View) -> str:
        """A view that shows elements several times along some axes, or by a stride that no slice has."""
        repeated = [axis for axis, stride in enumerate(view.strides) if stride == Affine() and view.shape[axis] != ONE]
        if not repeated:
            raise ExportError(
                f"program {self.program.name!r}: no ONNX operators show {view.base!r} by strides {view.strides}"
            )
        once = tuple(ONE if axis in repeated else dim for axis, dim in enumerate(view.shape))
        value = self._read(replace(view, shape=once))
        return self.graph("Expand", value, self._shape_of(view.shape))

    def _arranged(self, value: str, order: Sequence[int], shape: Shape) -> str:
        """A value whose axes are those of `order`, as one of that shape: permuted, with axes of one element."""
        ranks = [sorted(order).index(axis) for axis in order]
        if ranks != sorted(ranks):
            value = self.graph("Transpose", value, perm=[ranks.index(place) for place in range(len(ranks))])
        return self._shaped(value, tuple(shape[axis] for axis in sorted(order)), shape)

    def _shaped(self, value: str, old: Shape, new: Shape) -> str:
        return value if old == new else self._reshaped(value, new)

    def _reshaped(self, value: str, shape: Shape) -> str:
        symbolic = [axis for axis, dim in enumerate(shape) if dim.terms]
        if len(symbolic) == 1 and Affine() not in shape:
            return self.graph.reshape(value, *(-1 if dim.terms else dim.constant for dim in shape))
        return self.graph("Reshape", value, self._shape_of(shape))

    def _shape_of(self, shape: Shape) -> str:
        return self.graph.shape(*(self._size(dim) if dim.terms else dim.constant for dim in shape))

    def _size(self, size: Affine) -> str:
        """A size of the step, int64 [1]."""
        g = self.graph
        terms = []
        for symbol, factor in size.terms:
            value = self._sizes[symbol]()
            terms.append(value if factor == 1 else g("Mul", value, g.constant([factor])))
        if size.constant or not terms:
            terms.append(g.constant([size.constant]))
        total = terms[0]
        for term in terms[1:]:
            total = g("Add", total, term)
        return total

    def _symbols(self) -> dict[str, Callable[[], str]]:
        """How to find each size: an axis of an input or cache that is as long."""
        given = {**self.program.inputs, **self.program.caches}
        found: dict[str, Callable[[], str]] = {}
        for symbol in (*SYMBOLS, PAGES):
            places = [
                (name, axis)
                for name, tensor in given.items()
                for axis, dim in enumerate(tensor.shape)
                if dim == Affine(0, ((symbol, 1),))
            ]
            if places:
                found[symbol] = _once(self.graph, *places[0])
        return found


def _once(g: Graph, name: str, axis: int) -> Callable[[], str]:
    made: list[str] = []

    def size() -> str:
        if not made:
            made.append(g.dim(name, axis))
        return made[0]

    return size


def _bodies_equal(a: Any, b: Any) -> bool:
    return list(a.node) == list(b.node) and list(a.input) == list(b.input)


def _info(name: str, dtype: str, shape: Shape) -> Any:
    dims = [str(dim) if dim.terms else dim.constant for dim in shape]
    return helper.make_tensor_value_info(name, TYPES[dtype], dims)


def _external(name: str, dtype: str, shape: Shape, file: str) -> TensorProto:
    """A weight whose bytes lie in another file; where, `place_weights` says."""
    tensor = TensorProto(name=name, data_type=TYPES[dtype], dims=[dim.constant for dim in shape])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=file)
    return tensor
