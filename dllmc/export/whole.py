"""A program without loops: each `ForRows` runs once, over all of its rows.

The numbers are the same, since the rows of a loop are independent; the memory is that of the whole extent.
"""

from dataclasses import replace

from dllmc.ir.program import CHUNK, START, Affine, ForRows, Instruction, Operand, Program, Shape, View, product


def without_loops(program: Program) -> Program:
    """The program with every loop's body in its place. Its buffers have no offsets: the plan is that of the loops."""
    extents: dict[str, Affine] = {}  # of what belongs to a loop
    instructions: list[Instruction] = []
    for item in program.instructions:
        if isinstance(item, Instruction):
            instructions.append(item)
            continue
        for call in item.body:
            instructions.append(_at_once(call, item))
            names = {view.base for view in (*call.reads(), *call.outputs)}
            extents |= {name: item.extent for name in names if program.is_chunk(name)}
    buffers = {
        name: replace(tensor, shape=_shape(tensor.shape, extents.get(name, Affine())), offset=None)
        for name, tensor in program.buffers.items()
    }
    maxima = {size: most for size, most in program.maxima.items() if size != CHUNK}
    return replace(program, instructions=tuple(instructions), buffers=buffers, maxima=maxima, arena_bytes=None)


def _at_once(call: Instruction, loop: ForRows) -> Instruction:
    inputs = tuple(_operand(operand, loop.extent) for operand in call.inputs)
    return replace(call, inputs=inputs, outputs=tuple(_view(view, loop.extent) for view in call.outputs))


def _operand(operand: Operand, extent: Affine) -> Operand:
    if isinstance(operand, View):
        return _view(operand, extent)
    if isinstance(operand, Affine):
        return _size(operand, extent)
    if isinstance(operand, tuple):
        return tuple(_operand(item, extent) for item in operand)
    return operand


def _view(view: View, extent: Affine) -> View:
    shape, strides = _shape(view.shape, extent), _shape(view.strides, extent)
    return View(view.base, shape, strides, _size(view.offset, extent))


def _shape(sizes: Shape, extent: Affine) -> Shape:
    return tuple(_size(size, extent) for size in sizes)


def _size(size: Affine, extent: Affine) -> Affine:
    """`chunk` is the extent, and `start` 0."""
    others = Affine(size.constant, tuple((s, c) for s, c in size.terms if s not in (CHUNK, START)))
    return others + product(Affine(size.of(CHUNK)), extent)
