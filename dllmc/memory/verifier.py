"""Proof that a planned program never reads bytes that something else has overwritten.

Independent of the planner and of its lifetimes: the program is replayed on an arena that knows which buffers
are intact in it. Runs after planning and again whenever an artifact is loaded.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from dllmc.errors import ProgramError
from dllmc.ir.program import (
    ALIGNMENT_BYTES,
    CHUNK,
    LEAST,
    PAGES,
    START,
    SYMBOLS,
    Affine,
    ForRows,
    Instruction,
    Operand,
    Program,
    Tensor,
    View,
    dense_strides,
    element_count,
    product,
)
from dllmc.ir.views import apart, coincide
from dllmc.ops.registry import OPERATORS

# A step makes no more calls, and these look at no more elements for each byte of the program's memory: what does could
# take forever, though it takes no memory. Every round of a loop looks at the weights of its body, so that steps in the
# smallest chunks come nearest to the second.
MAX_CALLS = 1 << 22
MAX_PASSES = 1 << 12

_CHUNK, _START = (Affine(0, ((symbol, 1),)) for symbol in (CHUNK, START))


def verify(program: Program) -> None:
    """Check shapes, bounds, offsets, ownership and lifetimes.

    Bounds are proved for every size of a step; ownership is replayed at the largest sizes alone, since at smaller ones
    each buffer takes fewer of the same bytes. Of a `ForRows` two iterations are replayed: all others are like the
    second, since each reads and writes its own rows of what it writes. Raises `ProgramError` naming instruction,
    buffers and byte ranges.
    """
    if program.arena_bytes is None:
        raise ProgramError(f"program {program.name!r} has no memory plan; run plan-memory")
    for name, tensor in (program.inputs | program.weights | program.buffers | program.caches).items():
        _check_shape(name, tensor, program)
    _check_lifetimes(program)
    ranges = {name: _bytes_of(name, buffer, program) for name, buffer in program.buffers.items()}
    arena = _Arena(ranges)
    index = 0
    for item in program.instructions:
        body = (item,) if isinstance(item, Instruction) else item.body
        places = [f"instruction {index + i} ({instruction.op})" for i, instruction in enumerate(body)]
        loop = item if isinstance(item, ForRows) else None
        for instruction, where in zip(body, places, strict=True):
            _check_views(program, instruction, loop, where)
        if loop is None:
            _replay(program, body[0], places[0], arena)
        else:
            _replay_loop(program, loop, places, arena)
        index += len(body)
    _check_work(program)
    for name, view in program.outputs.items():
        _check_bounds(program, view, f"output {name!r}")
        if view.base in ranges:
            arena.check(view.base, f"output {name!r}")


def _check_lifetimes(program: Program) -> None:
    """A buffer's lifetime, where the program states it, covers its uses."""
    uses: dict[str, list[int]] = {}
    count = 0
    for instruction, _ in program.calls():
        workspace = () if instruction.workspace is None else (instruction.workspace,)
        for name in (*(view.base for view in (*instruction.reads(), *instruction.outputs)), *workspace):
            uses.setdefault(name, []).append(count)
        count += 1
    for name, buffer in program.buffers.items():
        if buffer.lifetime is not None and name in uses:
            first, end = buffer.lifetime
            if not first <= uses[name][0] <= uses[name][-1] < end <= count:
                used = f"used by the instructions {uses[name][0]} to {uses[name][-1]} of {count}"
                raise ProgramError(f"buffer {name!r} is alive [{first}, {end}), but {used}")


def _check_work(program: Program) -> None:
    """The largest step ends: it makes a bearable number of calls, which look at a bearable number of elements."""
    calls, shown = 0, 0
    for item in program.instructions:
        body, rounds = (item,) if isinstance(item, Instruction) else item.body, 1
        if isinstance(item, ForRows):
            rounds = -(-item.extent.at(program.maxima) // program.maxima[CHUNK])
        views = [view for call in body for view in (*call.reads(), *call.outputs)]
        calls += rounds * len(body)
        shown += rounds * sum(math.prod(dim.at(program.maxima) for dim in view.shape) for view in views)
    most = MAX_PASSES * _bytes_in_all(program)
    if calls > MAX_CALLS or shown > most:
        raise ProgramError(
            f"the largest step makes {calls} calls that look at {shown} elements; expected at most {MAX_CALLS}, and "
            f"{most}, {MAX_PASSES} for each byte of the program's memory; compile with larger chunks"
        )


def _check_views(program: Program, instruction: Instruction, loop: ForRows | None, where: str) -> None:
    for view in (*instruction.reads(), *instruction.outputs):
        _check_bounds(program, view, where, loop)
    for view in instruction.outputs:
        stretched = (
            dim != Affine(1) and stride == Affine() for dim, stride in zip(view.shape, view.strides, strict=True)
        )
        if Affine() not in view.shape and any(stretched):
            raise ProgramError(f"{where} writes elements of {view.base!r} several times: strides {_text(view.strides)}")
    known = SYMBOLS if loop is None else (*SYMBOLS, CHUNK)
    for operand in instruction.inputs:
        moves = loop is not None and isinstance(operand, Affine)  # those in lists are the same in all iterations
        _check_symbols(_numbers(operand), (*known, START) if moves else known, where)


def _replay(program: Program, instruction: Instruction, where: str, arena: "_Arena") -> None:
    own = instruction.outputs[0].base if _in_place(instruction) else None
    read = list(dict.fromkeys(v.base for v in instruction.reads() if v.base in program.buffers and v.base != own))
    workspace = () if instruction.workspace is None else (instruction.workspace,)
    outputs = instruction.outputs[1:] if _updates_cache(program, instruction, where) else instruction.outputs
    written = [*(view.base for view in outputs), *workspace]
    used = [*read, *written]
    for name in written:
        if name not in program.buffers:
            raise ProgramError(f"{where} writes {name!r}, which is no buffer")
        if used.count(name) > 1:
            raise ProgramError(f"{where} writes {name!r}, which it uses for something else too")
    if own is not None:
        arena.check(own, where)
    for view in outputs:
        if not _fills(view, program.buffers[view.base]):  # then the rest of the buffer must be its own already
            arena.check(view.base, f"{where} writes a part")
    for name in written:
        arena.write(name)
    for name in used:  # nothing that an instruction uses may lie on what it writes
        arena.check(name, where)


def _updates_cache(program: Program, instruction: Instruction, where: str) -> bool:
    """Whether an instruction updates a cache: all of it, operand and first output in one."""
    index = OPERATORS[instruction.op].updates if instruction.op in OPERATORS else None
    if index is None:
        return False
    operand = instruction.inputs[index] if index < len(instruction.inputs) else None
    if not isinstance(operand, View) or operand.base not in program.caches or instruction.outputs[:1] != (operand,):
        raise ProgramError(f"{where}: expected operand {index} and the first output to be one cache, found {operand}")
    if [view.base for view in instruction.reads()].count(operand.base) > 1:
        raise ProgramError(f"{where} updates {operand.base!r}, which it uses for something else too")
    return True


def _in_place(instruction: Instruction) -> bool:
    """Whether an instruction's first output is an operand for which that is allowed, and it reads no more of it."""
    if instruction.op not in OPERATORS or not instruction.outputs:
        return False
    out = instruction.outputs[0]
    allowed = [i for i in OPERATORS[instruction.op].in_place if i < len(instruction.inputs)]
    same = [view for view in instruction.reads() if view.base == out.base]
    others = [view for view in same if not coincide(view, out)]
    operands = [instruction.inputs[index] for index in allowed]
    return (
        len(same) == len(others) + 1
        and any(isinstance(operand, View) and coincide(operand, out) for operand in operands)
        and all(apart(out, view) for view in others)
    )


def _replay_loop(program: Program, loop: ForRows, places: Sequence[str], arena: "_Arena") -> None:
    calls = list(zip(loop.body, places, strict=True))
    chunks = {name for name in program.buffers if program.is_chunk(name)}
    whole: dict[str, View] = {}
    for view in (view for call in loop.body for view in call.outputs if view.base not in chunks):
        whole.setdefault(view.base, view)
    for instruction, where in calls:
        for view in (*instruction.reads(), *instruction.outputs):
            if view.base in whole and not _own_rows(view, program.tensor(view.base), loop):
                raise ProgramError(
                    f"{where}: expected rows of {view.base!r} that are the iteration's own, since it is written there, "
                    f"found a view (shape {_text(view.shape)}, strides {_text(view.strides)}, offset {view.offset})"
                )
    unwritten = {name for name in whole if name in program.buffers and name not in arena.intact}
    for name in unwritten:
        if not _fills(_unrolled(whole[name], loop), program.buffers[name]):
            raise ProgramError(
                f"{places[0]}: the loop that begins here writes a part of {name!r}, and nothing else does"
            )
        arena.write(name)
    for _ in range(2):
        arena.intact -= chunks
        missing = set(unwritten)
        for instruction, where in calls:
            for view in instruction.reads():
                if view.base in missing:
                    raise ProgramError(f"{where}: rows of {view.base!r} are used before they are written")
            missing -= {view.base for view in instruction.outputs}
            _replay(program, instruction, where, arena)
    arena.intact -= chunks


def _own_rows(view: View, tensor: Tensor, loop: ForRows) -> bool:
    """Whether a view holds only rows `[start, start + chunk)` of the tensor's axis that is as long as the loop."""
    axis = next((i for i, dim in enumerate(tensor.shape) if dim == loop.extent), None)
    if axis is None:
        return False
    row = dense_strides(tensor.shape)[axis]
    apart = product(row, loop.extent)  # elements from one index of the axes outside to the next
    within = _remainder(view.offset - product(row, _START), apart)
    chunks = 0
    for dim, stride in zip(view.shape, view.strides, strict=True):
        if dim == _CHUNK and stride == row:
            chunks += 1
        elif dim != Affine(1) and (step := _remainder(stride, apart)) != Affine():
            within += product(dim + Affine(-1), step)
    return chunks == 1 and not within.terms and 0 <= within.constant < row.constant


def _remainder(size: Affine, divisor: Affine) -> Affine:
    symbol = divisor.terms[0][0]
    return size - product(Affine(size.of(symbol) // divisor.of(symbol)), divisor)


def _unrolled(view: View, loop: ForRows) -> View:
    """What all iterations of a view of own rows are together."""
    shape = tuple(loop.extent if dim == _CHUNK else dim for dim in view.shape)
    return View(view.base, shape, view.strides, Affine())


def _check_shape(name: str, tensor: Tensor, program: Program) -> None:
    """Dimensions are never negative, and never shrink when a size of the step grows."""
    loops = CHUNK in program.maxima and name in program.buffers
    known = (PAGES,) if name in program.caches else (*SYMBOLS, CHUNK) if loops else SYMBOLS
    _check_symbols(tensor.shape, known, repr(name))
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


def _numbers(operand: Operand) -> Iterator[Affine]:
    """Every size among operands, those inside lists too."""
    if isinstance(operand, Affine):
        yield operand
    elif isinstance(operand, tuple):
        for item in operand:
            yield from _numbers(item)


def _check_symbols(affines: Iterable[Affine], known: Sequence[str], where: str) -> None:
    unknown = {symbol for affine in affines for symbol, _ in affine.terms} - set(known)
    if unknown:
        raise ProgramError(f"{where}: expected the sizes {', '.join(known)}, found {', '.join(sorted(unknown))}")


def _check_bounds(program: Program, view: View, where: str, loop: ForRows | None = None) -> None:
    """A view's elements lie in its tensor, for every size of a step and every iteration of the loop it is in."""
    tensor, sizes = program.tensor(view.base), program.maxima
    if loop is not None:
        sizes = {**sizes, START: loop.extent.at(sizes)}
    described = f"{where}: a view of {view.base!r} (shape {_text(view.shape)}, strides {_text(view.strides)})"
    known = (*SYMBOLS, *(() if loop is None else (CHUNK,)), *((PAGES,) if view.base in program.caches else ()))
    _check_symbols((view.offset,), known if loop is None else (*known, START), described)
    _check_symbols((*view.shape, *view.strides), known, described)  # the same in iterations of as many rows
    if loop is None and program.is_chunk(view.base):
        raise ProgramError(f"{described} is used outside of the loop whose iterations write it")
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
    room = count - last
    if loop is not None and room.of(START) < 0:  # at most, `start` is what is left of the extent behind the chunk
        room += product(Affine(room.of(START)), loop.extent - _CHUNK - _START)
    if room.least(sizes) < 1:
        raise ProgramError(f"{described} starts at element {view.offset} and reaches {last} of {count}")


def _fills(view: View, tensor: Tensor) -> bool:
    """Whether a view within bounds is the whole tensor, its dimensions in any order."""
    count, dense = element_count(tensor.shape), Affine(1)
    large = dict.fromkeys(LEAST, 1 << 31)  # sizes that put the axes of a dense tensor in order
    for stride, dim in sorted(zip(view.strides, view.shape, strict=True), key=lambda axis: axis[0].at(large)):
        if dim != Affine(1):
            if stride != dense:
                return count == Affine()
            dense = product(dense, dim)
    return dense == count


def _bytes_in_all(program: Program) -> int:
    return (program.arena_bytes or 0) + program.weight_bytes + program.state_bytes + program.cache_bytes


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
