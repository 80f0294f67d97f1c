"""A program as an ONNX model, operator by operator: a buffer's contents at each time are a value of the graph."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from onnx import ModelProto, TensorProto, helper

from dllmc.errors import ExportError
from dllmc.export.onnx import elementwise, packed
from dllmc.export.onnx.buffers import Buffers
from dllmc.export.onnx.graph import DOMAIN, OPSET, TYPES, Graph, Operand, Value
from dllmc.export.onnx.head import all_logits, decode_head
from dllmc.export.whole import without_loops
from dllmc.ir.program import Affine, DType, Instruction, Program, Shape, View
from dllmc.ir.program import Operand as ProgramOperand

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


class _Step:
    """The state of one emission."""

    def __init__(self, program: Program, keep_custom_ops: bool, logits: bool) -> None:
        self.program = program
        self.graph = Graph()
        self.keep_custom_ops = keep_custom_ops
        self.with_logits = logits
        self.logits: str | None = None
        self.buffers = Buffers(self.graph, program)

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
            self.buffers.write(view, result)

    def model(self, weights: str) -> ModelProto:
        """The whole model, checked in no way yet."""
        outputs = {
            name: (self.buffers.read(view), self.program.tensor(view.base).dtype, view.shape)
            for name, view in self.program.outputs.items()
        }
        for name, tensor in self.program.caches.items():
            if (value := self.buffers.whole(name)) not in (None, name):
                outputs[f"{name}.updated"] = (str(value), tensor.dtype, tensor.shape)
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
            return Value(self.buffers.read(operand), self.program.tensor(operand.base).dtype, dims)
        if isinstance(operand, Affine):
            if operand.terms:
                raise ExportError(f"program {self.program.name!r}: an operand {operand} depends on the step's sizes")
            return operand.constant
        if isinstance(operand, DType):
            return operand.name
        if isinstance(operand, tuple):
            return [self._operand(item) for item in operand]
        return operand


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
