"""The graph becomes a program: out-variants over buffers, with every view an operand."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import fx

from dllmc.errors import PassError
from dllmc.ir.program import (
    CHUNK,
    DEVICES,
    START,
    Affine,
    DType,
    ForRows,
    Instruction,
    Operand,
    Program,
    Shape,
    Tensor,
    View,
    dense_strides,
    product,
)
from dllmc.ir.provenance import describe, source_line
from dllmc.ir.step_graph import Loop, StepGraph, loop_of
from dllmc.ops.facts import WHOLE_OPERANDS
from dllmc.ops.registry import OPERATORS
from dllmc.ops.signatures import workspace_bytes
from dllmc.passes.base import Pass, PassResult

aten = torch.ops.aten

_CHUNK, _START = (Affine(0, ((symbol, 1),)) for symbol in (CHUNK, START))

# Calls that, where they are not views, only move or convert elements.
_COPIES = (
    aten.to.dtype,
    aten.clone.default,
    aten.contiguous.default,
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
# Operands whose leading dimensions must merge into one: the binder sees a matrix.
_NEED_ROWS = {"aten.linear.default": 0, "aten.embedding.default": 1}
_NO_VALUE = ("device", "layout", "pin_memory", "memory_format")


@dataclass(frozen=True)
class Lower(Pass):
    """One instruction a call, in the graph's order.

    Case 1: a call whose result shares its input's storage is a view: an operand with strides, no instruction.
    Case 2: a reshape that cannot be a view, or a conversion, is a `copy`.
    Case 3: any other call writes new buffers, dense in the layout that the call gives its result in eager mode.
    Neighbouring calls of one loop become a `ForRows`: what they alone use has the rows of an iteration, and of all
    else that they do not read whole they take the iteration's rows. What a call updates is its result.

    `device`: what operators' workspaces are planned for, one of `dllmc.ir.program.DEVICES`.
    """

    name = "lower"
    requires = ("head-fused",)
    ensures = ("lowered",)
    device: str = DEVICES[0]

    def run(self, step: StepGraph) -> PassResult:
        if self.device not in DEVICES:
            raise PassError(f"pass 'lower': device: expected one of {', '.join(DEVICES)}, found {self.device!r}")
        lowering = _Lowering(step, self.device)
        for node in step.calls():
            lowering.call(node)
        step.program = lowering.program()
        counts = {"instructions": len(list(step.program.calls())), "buffers": len(lowering.buffers)}
        return PassResult(False, counts)


class _Lowering:
    """The state of one lowering. `home` maps a storage of the fake values to the tensor that holds it.

    `loop` is that of the call at hand; `chunks` are the storages that one loop alone uses.
    """

    def __init__(self, step: StepGraph, device: str) -> None:
        self.step = step
        self.device = device
        self.home: dict[int, str] = {}
        self.inputs: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self.caches: dict[str, Tensor] = {}
        self.instructions: list[tuple[Loop | None, Instruction]] = []
        self.loop: Loop | None = None
        self.chunks = _used_by_one_loop(step)
        for node, role in step.placeholders():
            if node.users:
                groups = {"input": self.inputs, "cache": self.caches}
                groups.get(role.kind, self.weights)[role.name] = self._tensor(node.meta["val"], describe(node))
                self.home[_storage(node.meta["val"])] = role.name

    def call(self, node: fx.Node) -> None:
        self.loop = loop_of(node)
        results = _tensors(node)
        if all(_storage(v) in self.home for v in results):
            return
        updated = OPERATORS[str(node.target)].updates if str(node.target) in OPERATORS else None
        if updated is not None:
            (result,) = results
            self.home[_storage(result)] = self.home[_storage(node.args[updated].meta["val"])]  # type: ignore[union-attr]
            outputs: tuple[View, ...] = (self._view(result),)
        else:
            outputs = tuple(
                self._new_buffer(f"%{node.name}" + (f".{i}" if i else ""), v) for i, v in enumerate(results)
            )
        if node.target in _COPIES:
            source = self._view(node.args[0].meta["val"])  # type: ignore[union-attr]
            if source.shape != outputs[0].shape:  # a reshape: the elements in the source's row-major order
                outputs = (replace(outputs[0], shape=source.shape, strides=dense_strides(source.shape)),)
            self._emit("copy", (source,), outputs, node)
            return
        name = str(node.target)
        if name not in OPERATORS:
            raise PassError(
                f"pass 'lower': {describe(node)}: no operator of a program computes this; "
                f"programs have {', '.join(sorted(OPERATORS))}"
            )
        operands = self._operands(node, name)
        self._emit(name, operands, outputs, node)

    def program(self) -> Program:
        self.loop = None
        returned = dict(zip(self.step.outputs, self.step.output_nodes(), strict=True))
        return Program(
            name="mixed" if self.caches else "dense",
            maxima=self.step.maxima,
            inputs=self.inputs,
            weights=self.weights,
            buffers=self.buffers,
            caches=self.caches,
            instructions=tuple(_in_loops(self.instructions)),
            outputs={name: self._view(node.meta["val"]) for name, node in returned.items()},
            device=self.device,
        )

    def _emit(self, op: str, inputs: tuple[Operand, ...], outputs: tuple[View, ...], node: fx.Node) -> None:
        call = Instruction(op, inputs, outputs, source=source_line(node))
        tensors = self.buffers | self.weights | self.inputs | self.caches
        if needed := workspace_bytes(call, tensors.__getitem__, self.step.maxima, self.device):
            call = replace(call, workspace=f"%{node.name}.workspace")
            self.buffers[f"%{node.name}.workspace"] = Tensor("uint8", (Affine(needed),))
        self.instructions.append((self.loop, call))

    def _operands(self, node: fx.Node, name: str) -> tuple[Operand, ...]:
        """The call's arguments in the order of its schema; trailing ones at their defaults are left out.

        Of keyword options those that the operator says it takes.
        """
        operands: list[Operand] = []
        needed = 0
        for index, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
            default = parameter.default_value if parameter.has_default_value() else None
            given: Any = node.args[index] if index < len(node.args) else node.kwargs.get(parameter.name, default)
            if parameter.name in _NO_VALUE:
                continue
            taken = not parameter.kwarg_only or parameter.name in OPERATORS[name].options
            if given != default or not parameter.has_default_value():
                if not taken:
                    raise PassError(
                        f"pass 'lower': {describe(node)}: option {parameter.name}={given!r} is not supported"
                    )
                needed = len(operands) + 1
            if _NEED_ROWS.get(name) == index:
                given = self._row_viewable(given, node)
            if self.loop is not None and OPERATORS[name].first_row == index:
                given, needed = _START, len(operands) + 1
            if taken:
                operands.append(self._operand(given, node, index in WHOLE_OPERANDS.get(node.target, ())))
        return tuple(operands[:needed])

    def _operand(self, value: Any, node: fx.Node, whole: bool = False) -> Operand:
        if isinstance(value, View | Affine):
            return value
        if isinstance(value, fx.Node) and isinstance(value.meta["val"], torch.Tensor):
            return self._view(value.meta["val"], whole)
        if isinstance(value, list | tuple):
            return tuple(self._operand(item, node) for item in value)
        if isinstance(value, torch.dtype):
            return DType(str(value).removeprefix("torch."))
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise PassError(f"pass 'lower': {describe(node)}: the argument {value} is not known before a step runs")

    def _row_viewable(self, operand: fx.Node, node: fx.Node) -> fx.Node | View:
        """The operand, or a dense copy of it where its leading dimensions do not merge into one."""
        value = operand.meta["val"]
        try:
            value.view(-1, value.shape[-1])
            return operand
        except (RuntimeError, ValueError):
            source = self._view(value)
            base = f"%{node.name}.rows"
            self.buffers[base] = Tensor(_dtype(value), source.shape)
            dense = View(base, source.shape, dense_strides(source.shape))
            self._emit("copy", (source,), (dense,), node)
            return dense

    def _new_buffer(self, name: str, value: torch.Tensor) -> View:
        self.buffers[name] = self._tensor(value, name)
        self.home[_storage(value)] = name
        return self._view(value)

    def _tensor(self, value: torch.Tensor, where: str) -> Tensor:
        """The dense, row-major tensor that holds a value, its dimensions ordered by the value's strides."""
        shape, strides = (self._affine(axes, where) for axes in (value.shape, value.stride()))
        hints = [int(s) if isinstance(s, int) else s.node.hint for s in value.stride()]
        order = sorted(range(len(shape)), key=lambda axis: (-hints[axis], axis))
        dense = tuple(shape[axis] for axis in order)
        wanted = dict(zip(order, dense_strides(dense), strict=True))
        if any(strides[axis] != wanted[axis] and shape[axis] != Affine(1) for axis in order):
            raise PassError(f"pass 'lower': {where}: its layout {strides} is not dense")
        return Tensor(_dtype(value), self._of_chunk(dense) if _storage(value) in self.chunks else dense)

    def _view(self, value: torch.Tensor, whole: bool = False) -> View:
        base = self.home[_storage(value)]
        shape, strides = (self._affine(axes, base) for axes in (value.shape, value.stride()))
        view = View(base, shape, strides, self.step.affine(value.storage_offset(), base))
        if self.loop is None or whole:
            return view
        if _storage(value) in self.chunks:
            (offset,) = self._of_chunk((view.offset,))
            return View(base, self._of_chunk(shape), self._of_chunk(strides), offset)
        rows = [axis for axis, dim in enumerate(shape) if dim == self.loop.extent]
        for axis in rows:  # one, or none
            shape = (*shape[:axis], _CHUNK, *shape[axis + 1 :])
            view = replace(view, shape=shape, offset=view.offset + product(strides[axis], _START))
        return view

    def _of_chunk(self, sizes: Shape) -> Shape:
        """Sizes in which the chunk stands for the extent of the loop."""
        assert self.loop is not None
        (symbol, unit), *_ = self.loop.extent.terms
        times = [Affine(size.of(symbol) // unit) for size in sizes]
        return tuple(
            size + product(n, _CHUNK) - product(n, self.loop.extent) for size, n in zip(sizes, times, strict=True)
        )

    def _affine(self, sizes: Sequence[Any], where: str) -> Shape:
        return tuple(self.step.affine(size, where) for size in sizes)


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    results = value if isinstance(value, list | tuple) else [value]
    return [v for v in results if isinstance(v, torch.Tensor)]


def _used_by_one_loop(step: StepGraph) -> set[int]:
    """The storages of the fake values that no call outside of one loop makes or reads, nor the step returns."""
    users: dict[int, set[Loop | None]] = defaultdict(set)
    for node in step.calls():
        for value in (value for n in (node, *node.all_input_nodes) for value in _tensors(n)):
            users[_storage(value)].add(loop_of(node))
    for node in step.output_nodes():
        users[_storage(node.meta["val"])].add(None)
    return {storage for storage, loops in users.items() if len(loops) == 1 and None not in loops} - {
        _storage(node.meta["val"]) for node, _ in step.placeholders()
    }


def _in_loops(instructions: Sequence[tuple[Loop | None, Instruction]]) -> Iterator[Instruction | ForRows]:
    for loop, run in groupby(instructions, key=itemgetter(0)):
        body = tuple(instruction for _, instruction in run)
        if loop is None:
            yield from body
        else:
            yield ForRows(loop.extent, body)


def _storage(value: torch.Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
