"""A program as a plain torch module, and that as an `ExportedProgram`: what AOTInductor and Torch-TensorRT take.

Each instruction becomes torch calls. Row-wise dllmc operators are written out as the arithmetic that defines them, for
a backend to fuse; `KEPT` stay dllmc's own, since their work follows the tables of a step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dllmc.errors import ExportError
from dllmc.export.parts import in_parts
from dllmc.export.views import window, written
from dllmc.export.whole import without_loops
from dllmc.ir.program import LEAST, PAGES, SYMBOLS, Affine, DType, Instruction, Operand, Program, View
from dllmc.ops import glu, norms, rope
from dllmc.ops.elementwise import OPTIONS
from dllmc.ops.registry import OPERATORS

Tensors = Mapping[str, Tensor]

KEPT = ("dllmc.attention.default", "dllmc.decode_head.default", "dllmc.guide_rows.default", "dllmc.keep.default")
"""Operators that stay calls of `torch.ops.dllmc`."""

LEAST_SIZES = {**LEAST, "rows": 2, PAGES: 2}
"""The smallest sizes that an exported step takes: to `torch.export` one row, or page, is another program."""


def exported(program: Program, weights: Tensors) -> ExportedProgram:
    """`TorchStep` for steps of all sizes from `LEAST_SIZES` to the program's maxima, and any number of pages.

    Raises `ExportError` where a step of the program has one row at most.
    """
    if program.maxima["rows"] < LEAST_SIZES["rows"]:
        raise ExportError(
            f"program {program.name!r} is for steps of 1 row of the head; an export takes "
            f"{LEAST_SIZES['rows']} or more: compile with max_logit_rows=8, say"
        )
    # The largest step, for which Inductor then orders its calls; no two sizes alike, lest export takes them for one.
    sizes = {symbol: max(min(most, 2), most - index) for index, (symbol, most) in enumerate(program.maxima.items())}
    sizes[PAGES] = max(sizes.get(PAGES, 0), LEAST_SIZES[PAGES])
    device = next(iter(weights.values())).device
    dims: dict[Affine, Any] = {}
    groups = {"inputs": program.inputs, "caches": program.caches}
    example = {
        group: {
            name: torch.zeros([d.at(sizes) for d in tensor.shape], dtype=getattr(torch, tensor.dtype), device=device)
            for name, tensor in tensors.items()
        }
        for group, tensors in groups.items()
    }
    shapes = {
        group: {name: tuple(_dim(dim, program, dims) for dim in tensor.shape) for name, tensor in tensors.items()}
        for group, tensors in groups.items()
    }
    return torch.export.export(
        TorchStep(program, weights),
        (),
        example,
        dynamic_shapes=shapes,
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )


def _dim(size: Affine, program: Program, dims: dict[Affine, Any]) -> Any:
    """How an axis varies: with a size of the step, freely where with several of them, or not at all."""
    if not size.terms or size.least(program.maxima) == size.at({PAGES: 0, **program.maxima}):
        return Dim.STATIC
    if len(size.terms) > 1:
        return Dim.DYNAMIC
    symbol = size.terms[0][0]
    most = None if symbol == PAGES else program.maxima[symbol]
    return dims.setdefault(size, Dim(symbol, min=LEAST_SIZES[symbol], max=most))


class TorchStep(nn.Module):
    """A program's step over its weights, each a buffer of the module, named as in `weight_names`.

    `forward(inputs, caches) -> outputs`: tensors by their names in the program; caches are written in place. A
    `ForRows` runs once, over all of its rows: the same numbers, but the memory of the whole extent.
    """

    def __init__(self, program: Program, weights: Tensors) -> None:
        super().__init__()
        self.program = in_parts(without_loops(program))
        self.weight_names = weight_names(program)
        for attribute, name in self.weight_names.items():
            self.register_buffer(attribute, weights[name])

    def forward(self, inputs: Tensors, caches: Tensors) -> dict[str, Tensor]:
        """One step."""
        weights = {name: getattr(self, attribute) for attribute, name in self.weight_names.items()}
        step = _Step(self.program, {**weights, **inputs, **caches})
        for instruction, _ in self.program.calls():
            step.call(instruction)
        return {name: step.read(view) for name, view in self.program.outputs.items()}


def weight_names(program: Program) -> dict[str, str]:
    """What the module calls a weight -> the weight's name."""
    return {f"weight_{index}": name for index, name in enumerate(program.weights)}


class _Step:
    """The values of tensors while a step is traced; each dense, in its shape in the program."""

    def __init__(self, program: Program, given: Tensors) -> None:
        self.program = program
        self.values = dict(given)
        self.sizes = _sizes(program, given)

    def call(self, instruction: Instruction) -> None:
        args = [self._resolve(operand) for operand in instruction.inputs]
        if OPERATORS[instruction.op].updates is not None:
            _operator(instruction.op, in_place=True)(*args)
            return
        results = _function(instruction.op)(args)
        results = results if isinstance(results, tuple) else (results,)
        for view, result in zip(instruction.outputs, results, strict=True):
            held = self.program.tensor(view.base)
            result = result.to(getattr(torch, held.dtype))
            self.values[view.base] = written(self.values.get(view.base), held.shape, view, result, self.sizes)

    def read(self, view: View) -> Tensor:
        return window(self.values[view.base], self.program.tensor(view.base).shape, view, self.sizes)

    def _resolve(self, operand: Operand) -> Any:
        if isinstance(operand, View):
            return self.read(operand)
        if isinstance(operand, Affine):
            return operand.at(self.sizes)
        if isinstance(operand, DType):
            return getattr(torch, operand.name)
        if isinstance(operand, tuple):
            return [self._resolve(item) for item in operand]
        return operand


def _sizes(program: Program, given: Tensors) -> dict[str, int]:
    """The sizes of the step, read off the shapes of its inputs and caches; the others agree with them."""
    dims = {
        dim: given[name].shape[axis]
        for name, tensor in {**program.inputs, **program.caches}.items()
        for axis, dim in enumerate(tensor.shape)
    }
    symbols = ((symbol, Affine(0, ((symbol, 1),))) for symbol in (*SYMBOLS, PAGES))
    sizes = {symbol: dims[dim] for symbol, dim in symbols if dim in dims}
    for dim, found in dims.items():
        torch._check(found == dim.at(sizes))
    return sizes


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """One GEMM over all leading dimensions; torch would make a batch of those of a slice."""
    product: Tensor = F.linear(x.flatten(0, -2), weight, bias)
    return product.unflatten(0, x.shape[:-1])  # type: ignore[no-any-return]


def _of_sum(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def normed(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        total = x + residual
        return norm(total, *rest), total

    return normed


_DEFINITIONS: Mapping[str, Callable[..., Any]] = {
    "aten.linear.default": _linear,
    "copy": torch.clone,
    "dllmc.add_layer_norm.default": _of_sum(norms.layer_norm_reference),
    "dllmc.add_rms_norm.default": _of_sum(norms.rms_norm_reference),
    "dllmc.glu.default": glu.reference,
    "dllmc.rms_norm.default": norms.rms_norm_reference,
    "dllmc.rope.default": rope.reference,
}


def _function(name: str) -> Callable[[Sequence[Any]], Any]:
    """A call of an instruction's operands, of which keyword options stand behind the positional ones."""
    if name in _DEFINITIONS:
        return lambda args: _DEFINITIONS[name](*args)
    operator = _operator(name)
    count = sum(not argument.kwarg_only for argument in operator._schema.arguments)
    return lambda args: operator(*args[:count], **dict(zip(OPTIONS.get(name, ()), args[count:], strict=False)))


def _operator(name: str, in_place: bool = False) -> Any:
    namespace, packet, overload = name.split(".")
    if namespace == "dllmc" and name not in KEPT:
        raise ExportError(f"operator {name!r} has no definition in torch calls; an export has {sorted(_DEFINITIONS)}")
    return getattr(getattr(getattr(torch.ops, namespace), packet + "_" * in_place), overload)
