"""Proof that a planned program never reads bytes that something else has overwritten.

Independent of the planner and of its lifetimes: the program is replayed on an arena whose every byte remembers
which buffer wrote it last. Runs after planning and again whenever an artifact is loaded.
"""

from bisect import bisect_left, bisect_right

from dllmc.errors import ProgramError
from dllmc.ir.program import ALIGNMENT_BYTES, Program, View


def verify(program: Program) -> None:
    """Check offsets, bounds and ownership at the largest sizes. Raises `ProgramError` naming step and byte ranges.

    Smaller sizes need no check of their own: every buffer only shrinks, in place.
    """
    if program.arena_bytes is None:
        raise ProgramError(f"program {program.name!r} has no memory plan; run plan-memory")
    ranges = {}
    for name, buffer in program.buffers.items():
        if buffer.offset is None or buffer.offset % ALIGNMENT_BYTES:
            raise ProgramError(f"buffer {name!r}: expected an offset divisible by {ALIGNMENT_BYTES}: {buffer.offset}")
        ranges[name] = (buffer.offset, buffer.offset + buffer.size_bytes(program.maxima))
        if ranges[name][1] > program.arena_bytes:
            raise ProgramError(f"buffer {name!r} ends at byte {ranges[name][1]} of an arena of {program.arena_bytes}")
    arena = _Arena()
    for index, instruction in enumerate(program.instructions):
        where = f"instruction {index} ({instruction.op})"
        for view in (*instruction.reads(), *instruction.outputs):
            _check_bounds(program, view, where)
        read = [view.base for view in instruction.reads() if view.base in ranges]
        for name in read:
            arena.check(name, ranges[name], where)
        written = [view.base for view in instruction.outputs]
        if instruction.workspace is not None:
            written.append(instruction.workspace)
        for name in written:
            if name not in ranges:
                raise ProgramError(f"{where} writes {name!r}, which is no buffer")
            arena.write(name, ranges[name])
        for name in (*read, *written):  # nothing that an instruction uses may lie on what it writes
            arena.check(name, ranges[name], where)
    for name, view in program.outputs.items():
        _check_bounds(program, view, f"output {name!r}")
        if view.base in ranges:
            arena.check(view.base, ranges[view.base], f"output {name!r}")


def _check_bounds(program: Program, view: View, where: str) -> None:
    """A view's first and last element lie in its tensor, at the largest sizes and, as sizes shrink, at the smallest."""
    tensor = program.tensor(view.base)
    for sizes in (program.maxima, dict.fromkeys(program.maxima, 1)):
        shape, strides = ([a.at(sizes) for a in axes] for axes in (view.shape, view.strides))
        offset = view.offset.at(sizes)
        count = 1
        for dim in tensor.shape:
            count *= dim.at(sizes)
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if min(*shape, *strides, offset, 0) < 0 or (0 not in shape and not 0 <= offset <= last < count):
            raise ProgramError(
                f"{where}: a view of {view.base!r} reaches element {last} of {count} "
                f"(shape {shape}, strides {strides}, offset {offset})"
            )


class _Arena:
    """Disjoint byte ranges and the buffer that wrote each last, ordered by start."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ranges: list[tuple[int, int, str]] = []

    def write(self, name: str, span: tuple[int, int]) -> None:
        start, end = span
        if start == end:
            return
        first, last = self._overlapping(start, end)
        kept = []
        for a, b, owner in self.ranges[first:last]:
            kept += [(a, start, owner)] if a < start else []
            kept += [(end, b, owner)] if b > end else []
        self.ranges[first:last] = sorted([*kept, (start, end, name)])
        self.starts[first:last] = [a for a, _, _ in sorted([*kept, (start, end, name)])]

    def check(self, name: str, span: tuple[int, int], where: str) -> None:
        start, end = span
        covered = start
        for a, b, owner in self.ranges[slice(*self._overlapping(start, end))]:
            if owner != name or a > covered:
                found = f"[{a}, {b}) of {owner!r}" if owner != name else "bytes that were never written"
                raise ProgramError(f"{where}: {name!r} at [{start}, {end}) conflicts with {found}")
            covered = b
        if covered < end:
            raise ProgramError(f"{where}: {name!r} at [{start}, {end}) is used before it is written")

    def _overlapping(self, start: int, end: int) -> tuple[int, int]:
        first = bisect_right(self.starts, start) - 1
        if first < 0 or self.ranges[first][1] <= start:
            first += 1
        return first, bisect_left(self.starts, end)
