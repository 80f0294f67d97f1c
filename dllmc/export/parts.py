"""Projections in parts: what a program computes with one GEMM and reads in columns, as a GEMM for each of those.

A program turns queries and keys, and gates, where they are, in the columns of one joint buffer. Compilers behind
`torch.export` write in place only over whole tensors. So each range of columns becomes a tensor of its own, from its
rows of the weight, which stays one.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from dllmc.export.views import divided
from dllmc.ir.program import Affine, Instruction, Operand, Program, Tensor, View, dense_strides, product
from dllmc.ir.views import columns

LINEAR = "aten.linear.default"


@dataclass(frozen=True)
class Part:
    """Columns `[start, stop)` of rows of `pitch` elements, as a dense buffer `name`."""

    name: str
    pitch: int
    start: int
    stop: int

    def __call__(self, view: View) -> View:
        """A view of these columns of the joint buffer, as a view of the part."""
        row, column = divided(view.offset, self.pitch)
        offset = self._rows(row) + column - Affine(self.start)
        strides = []
        for stride in view.strides:
            row, column = divided(stride, self.pitch)
            strides.append(stride if row == Affine() else self._rows(row) + column)
        return replace(view, base=self.name, strides=tuple(strides), offset=offset)

    def _rows(self, count: Affine) -> Affine:
        return product(Affine(self.stop - self.start), count)


def in_parts(program: Program) -> Program:
    """The program, without loops, with such projections in parts. Buffers are without offsets from then on."""
    views: dict[str, list[View]] = defaultdict(list)
    for call in _calls(program):
        for view in call.reads() if call.op == LINEAR else (*call.reads(), *call.outputs):
            views[view.base].append(view)
    for view in program.outputs.values():
        views[view.base].append(view)
    parts = {
        call.outputs[0].base: found
        for call in _calls(program)
        if call.op == LINEAR and (found := _parts(program, call.outputs[0], views))
    }
    instructions = tuple(new for call in _calls(program) for new in _rewritten(call, parts))
    buffers = {name: buffer for name, buffer in program.buffers.items() if name not in parts}
    for name, of_it in parts.items():
        *rows, _ = program.buffers[name].shape
        buffers |= {p.name: Tensor(program.buffers[name].dtype, (*rows, Affine(p.stop - p.start))) for p in of_it}
    return replace(program, instructions=instructions, buffers=buffers)


def _calls(program: Program) -> Iterator[Instruction]:
    return (call for call, _ in program.calls())


def _parts(program: Program, result: View, views: Mapping[str, list[View]]) -> list[Part]:
    """The ranges of columns that nothing reads or writes across; none where that is one range, or not known."""
    held = program.buffers[result.base]
    pitch = held.shape[-1].constant
    if result.shape != held.shape or result.strides != dense_strides(held.shape) or held.shape[-1].terms:
        return []
    ranges: list[tuple[int, int]] = []
    for view in views[result.base]:
        if (found := columns(view, pitch)) is None:
            return []
        ranges.append(found)
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start < joined[-1][1]:
            start, last = joined.pop()
            stop = max(stop, last)
        joined.append((start, stop))
    if len(joined) < 2:
        return []
    return [Part(f"{result.base}[{start}:{stop}]", pitch, start, stop) for start, stop in joined]


def _rewritten(call: Instruction, parts: Mapping[str, list[Part]]) -> Iterator[Instruction]:
    inputs = tuple(_moved(operand, parts) for operand in call.inputs)
    if call.op != LINEAR or call.outputs[0].base not in parts:
        outputs = tuple(_moved_view(view, parts) for view in call.outputs)
        yield replace(call, inputs=inputs, outputs=outputs)
        return
    x, *of_columns = inputs
    for part in parts[call.outputs[0].base]:
        rows = tuple(_rows(operand, part) if isinstance(operand, View) else operand for operand in of_columns)
        shape = (*call.outputs[0].shape[:-1], Affine(part.stop - part.start))
        yield replace(call, inputs=(x, *rows), outputs=(View(part.name, shape, dense_strides(shape)),))


def _rows(weight: View, part: Part) -> View:
    """The rows of a weight, or elements of a bias, that make the part's columns."""
    shape = (Affine(part.stop - part.start), *weight.shape[1:])
    return replace(weight, shape=shape, offset=weight.offset + product(Affine(part.start), weight.strides[0]))


def _moved(operand: Operand, parts: Mapping[str, list[Part]]) -> Operand:
    if isinstance(operand, tuple):
        return tuple(_moved(item, parts) for item in operand)
    return _moved_view(operand, parts) if isinstance(operand, View) else operand


def _moved_view(view: View, parts: Mapping[str, list[Part]]) -> View:
    for part in parts.get(view.base, ()):
        found = columns(view, part.pitch)
        if found is not None and part.start <= found[0] and found[1] <= part.stop:
            return part(view)
    return view
