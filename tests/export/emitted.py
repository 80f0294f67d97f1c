"""What an emitter writes, run by itself in onnxruntime."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import helper

from dllmc.export.onnx.graph import OPSET, TYPES, Graph, Operand, Value
from dllmc.export.onnx.step import IR_VERSION

Emit = Callable[[Graph, Sequence[Operand]], Sequence[str]]


def run(emit: Emit, args: Sequence[Any], static: Collection[int] = ()) -> list[torch.Tensor]:
    """The results of operands, tensors among them in lists too.

    How long leading axes are is known only when it runs, but for those of the operands numbered in `static`: weights.
    """
    given: dict[str, torch.Tensor] = {}
    g = Graph()

    def operand(value: Any, fixed: bool = False) -> Any:
        if isinstance(value, torch.Tensor):
            name = f"given_{len(given)}"
            given[name] = value
            sizes = tuple(None if axis == 0 and not fixed else n for axis, n in enumerate(value.shape))
            return Value(name, str(value.dtype).removeprefix("torch."), sizes)
        return [operand(item) for item in value] if isinstance(value, list) else value

    results = emit(g, [operand(arg, number in static) for number, arg in enumerate(args)])
    inputs = [
        helper.make_tensor_value_info(name, TYPES[str(x.dtype).removeprefix("torch.")], list(x.shape))
        for name, x in given.items()
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in results]
    graph = helper.make_graph(g.nodes, "emitted", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: np.ascontiguousarray(x.numpy()) for name, x in given.items()})
    return [torch.from_numpy(np.asarray(each)) for each in found]
