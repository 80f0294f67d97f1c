"""Proof that a planned program never reads bytes that something else has overwritten.

Independent of the planner and of its lifetimes: the program is replayed on an arena that knows which buffers
are intact in it. Runs after planning and again whenever an artifact is loaded.
"""

from collections.abc import Mapping

from dllmc.errors import ProgramError
from dllmc.ir.program import (
    ALIGNMENT_BYTES,
    SYMBOLS,
    Affine,
    Instruction,
    Program,
    Tensor,
    View,
    element_count,
    product,
)


def verify(program: Program) -> None:
    """Check shapes, bounds, offsets and ownership. Raises `ProgramError` naming instruction, buffers and byte ranges.

    Bounds are proved for every size of a step; ownership is replayed at the largest sizes alone, since at smaller
    ones each buffer takes fewer of the same bytes.
    """
    if program.arena_bytes is None:
        raise ProgramError(f"program {program.name!r} has no memory plan; run plan-memory")
    for name, tensor in (program.inputs | program.weights | program.buffers).items():
        _check_shape(name, tensor, program)
    ranges = {name: _bytes_of(name, buffer, program) for name, buffer in program.buffers.items()}
    arena = _Arena(ranges)
    for index, instruction in enumerate(program.instructions):
        _replay(program, instruction, f"instruction {index} ({instruction.op})", arena)
    for name, view in program.outputs.items():
        _check_bounds(program, view, f"output {name!r}")
        if view.base in ranges:
            arena.check(view.base, f"output {name!r}")


def _replay(program: Program, instruction: Instruction, where: str, arena: "_Arena") -> None:
    for view in (*instruction.reads(), *instruction.outputs):
        _check_bounds(program, view, where)
    read = list(dict.fromkeys(view.base for view in instruction.reads() if view.base in program.buffers))
    workspace = () if instruction.workspace is None else (instruction.workspace,)
    written = [*(view.base for view in instruction.outputs), *workspace]
    used = [*read, *written]
    for name in written:
        if name not in program.buffers:
            raise ProgramError(f"{where} writes {name!r}, which is no buffer")
        if used.count(name) > 1:
            raise ProgramError(f"{where} writes {name!r}, which it uses for something else too")
    for view in instruction.outputs:
        if not _fills(view, program.buffers[view.base]):  # then the rest of the buffer must be its own already
            arena.check(view.base, f"{where} writes a part")
    for name in written:
        arena.write(name)
    for name in used:  # nothing that an instruction uses may lie on what it writes
        arena.check(name, where)


def _check_shape(name: str, tensor: Tensor, program: Program) -> None:
    """Dimensions are never negative, and never shrink when a size of the step grows."""
    for dim in tensor.shape:
        if dim.least(program.maxima) < 0 or any(coefficient < 0 for _, coefficient in dim.terms):
            raise ProgramError(f"{name!r}: a dimension of ({dim}) shrinks as a step grows, or is negative")


def _bytes_of(name: str, buffer: Tensor, program: Program) -> tuple[int, int]:
    """The buffer's bytes at the largest sizes, which lie in the arena."""
    start, end_of_arena = buffer.offset, program.arena_bytes or 0
    if start is None or start < 0 or start % ALIGNMENT_BYTES:
        raise ProgramError(f"buffer {name!r}: expected an offset divisible by {ALIGNMENT_BYTES}, found {start}")
    end = start + buffer.size_bytes(program.maxima)
    if end > end_of_arena:
        raise ProgramError(f"buffer {name!r} at [{start}, {end}) ends behind the arena's {end_of_arena} bytes")
    return start, end


def _check_bounds(program: Program, view: View, where: str) -> None:
    """A view's elements lie in its tensor, for every size of a step."""
    tensor, sizes = program.tensor(view.base), program.maxima
    described = f"{where}: a view of {view.base!r} (shape {_text(view.shape)}, strides {_text(view.strides)})"
    if min(part.least(sizes) for part in (*view.shape, *view.strides, view.offset)) < 0:
        raise ProgramError(f"{described} has a negative size, stride or offset {view.offset}")
    if Affine() in view.shape:
        return
    last = view.offset
    try:
        count = element_count(tensor.shape)
        for dim, stride in zip(view.shape, view.strides, strict=True):
            last += product(dim + Affine(-1), stride)
    except ProgramError as error:
        raise ProgramError(f"{described}: {error}") from None
    room = count + product(Affine(-1), last)
    if room.least(sizes) < 1:
        raise ProgramError(f"{described} starts at element {view.offset} and reaches {last} of {count}")


def _fills(view: View, tensor: Tensor) -> bool:
    """Whether a view within bounds is the whole tensor, its dimensions in any order."""
    count, dense = element_count(tensor.shape), Affine(1)
    large = dict.fromkeys(SYMBOLS, 1 << 31)  # sizes that put the axes of a dense tensor in order
    for stride, dim in sorted(zip(view.strides, view.shape, strict=True), key=lambda axis: axis[0].at(large)):
        if dim != Affine(1):
            if stride != dense:
                return count == Affine()
            dense = product(dense, dim)
    return dense == count


def _text(affines: tuple[Affine, ...]) -> str:
    return f"[{', '.join(map(str, affines))}]"


class _Arena:
    """Which buffers lie in the arena as they were written, and by which the others were overwritten."""

    def __init__(self, ranges: Mapping[str, tuple[int, int]]) -> None:
        self.ranges = ranges
        self.intact: set[str] = set()
        self.overwritten_by: dict[str, str] = {}

    def write(self, name: str) -> None:
        start, end = self.ranges[name]
        lost = {n for n in self.intact if max(start, self.ranges[n][0]) < min(end, self.ranges[n][1])}
        self.overwritten_by |= dict.fromkeys(lost, name)
        self.intact = self.intact - lost | {name}

    def check(self, name: str, where: str) -> None:
        if name in self.intact:
            return
        if (other := self.overwritten_by.get(name)) is None:
            raise ProgramError(f"{where}: {name!r} at {self._place(name)} is used before it is written")
        lost = f"{name!r} at {self._place(name)} is overwritten by {other!r} at {self._place(other)}"
        raise ProgramError(f"{where}: {lost}")

    def _place(self, name: str) -> str:
        start, end = self.ranges[name]
        return f"[{start}, {end})"
