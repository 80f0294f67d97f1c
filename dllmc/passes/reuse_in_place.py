"""Results take the place of operands that nothing reads any more."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dllmc.errors import PassError
from dllmc.ir.program import (
    CHUNK,
    START,
    Affine,
    ForRows,
    Instruction,
    Operand,
    Program,
    View,
    dense_strides,
    element_count,
    product,
)
from dllmc.ir.step_graph import StepGraph
from dllmc.ir.views import Move, apart, coincide
from dllmc.ops.registry import OPERATORS
from dllmc.passes.base import Pass, PassResult

_START = Affine(0, ((START, 1),))


@dataclass(frozen=True)
class ReuseInPlace(Pass):
    """Let a call write over what it is the last to read, where its operator allows it.

    Case 1: an operand of the result's shape and dtype, a slice too: the gate's half of a joint projection takes the
            gated product, and keys in a joint projection are turned where they are.
    Case 2: a loop's result takes the place of what only its earlier calls read row by row: the residual stream.
    """

    name = "reuse-in-place"
    requires = ("lowered",)

    def run(self, step: StepGraph) -> PassResult:
        if step.program is None:
            raise PassError("pass 'reuse-in-place': the step has no program; run lower before it")
        reuse = _Reuse(step.program)
        step.program = reuse.run()
        return PassResult(False, {"in_place": reuse.operands, "loops": reuse.loops})


class _Reuse:
    """`uses`: the views of each buffer, with the number of the call that uses them; `moves`: what lies elsewhere."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.uses: dict[str, list[tuple[int, View]]] = defaultdict(list)
        for index, (call, _) in enumerate(program.calls()):
            for view in (*call.reads(), *call.outputs):
                self.uses[view.base].append((index, view))
        for view in program.outputs.values():
            self.uses[view.base].append((len(list(program.calls())), view))
        self.moves: dict[str, Move] = {}
        self.operands = self.loops = 0

    def run(self) -> Program:
        index = 0
        items: list[Instruction | ForRows] = []
        for item in self.program.instructions:
            body = (item,) if isinstance(item, Instruction) else item.body
            around = range(index, index + len(body)) if isinstance(item, ForRows) else range(0)
            if isinstance(item, ForRows):
                self._in_loop(body, index)
            calls = []
            for call in body:
                self._in_call(call, index, item if isinstance(item, ForRows) else None, around)
                calls.append(self._placed(call))
                index += 1
            items += calls if isinstance(item, Instruction) else [replace(item, body=tuple(calls))]
        outputs = {name: self._view(view) for name, view in self.program.outputs.items()}
        buffers = {name: buffer for name, buffer in self.program.buffers.items() if name not in self.moves}
        placed = replace(self.program, instructions=tuple(items), outputs=outputs, buffers=buffers)
        return replace(placed, arena_bytes=None, lower_bound_bytes=None)

    def _in_call(self, call: Instruction, index: int, loop: ForRows | None, around: range) -> None:
        """Case 1; `around` are the numbers of the loop's calls."""
        for position in OPERATORS[call.op].in_place:
            operand = call.inputs[position] if position < len(call.inputs) else None
            if isinstance(operand, View) and self._move(call, index, self._view(operand), loop, around):
                self.operands += 1
                return

    def _move(self, call: Instruction, index: int, place: View, loop: ForRows | None, around: range) -> bool:
        out, buffers = call.outputs[0], self.program.buffers
        old, new = buffers.get(out.base), buffers.get(place.base)
        if old is None or new is None or out.base in self.moves or self.uses[out.base][0][0] < index:
            return False
        alike = old.dtype == new.dtype and out.shape == place.shape
        axes = zip(place.shape, place.strides, strict=True)
        stretched = any(stride == Affine() and dim != Affine(1) for dim, stride in axes)
        in_chunk = self.program.is_chunk(place.base)
        if not alike or stretched or self.program.is_chunk(out.base) != in_chunk:
            return False
        if not in_chunk and not all(view.offset.of(START) for at, view in self.uses[place.base] if at in around):
            return False  # another iteration reads what this one would write
        reads = [self._view(view) for view in call.reads()]
        same = [view for view in reads if coincide(view, place)]
        others = [view for view in reads if view.base == place.base and view not in same]
        later = [view for at, view in self.uses[place.base] if at > index]
        if len(same) > 1 or not all(apart(view, place) for view in (*others, *later)):
            return False
        everything, replaced = (self._unrolled(view, loop) for view in (out, place))
        if everything.offset != Affine() or element_count(everything.shape) != element_count(old.shape):
            return False
        return self._carry_out(out.base, Move(everything, replaced))

    def _unrolled(self, view: View, loop: ForRows | None) -> View:
        """What all iterations of a loop use, where a view is on rows of one."""
        if loop is None or self.program.is_chunk(view.base):
            return view
        shape = tuple(loop.extent if dim.of(CHUNK) else dim for dim in view.shape)
        before = product(Affine(view.offset.of(START)), _START)
        return replace(view, shape=shape, offset=view.offset - before)

    def _in_loop(self, body: Sequence[Instruction], begin: int) -> None:
        """Case 2."""
        written: dict[str, int] = {}
        for index, call in enumerate(body, begin):
            for view in call.outputs:
                written.setdefault(view.base, index)
        for name, at in written.items():
            buffer = self.program.buffers[name]
            if self.program.is_chunk(name) or self.uses[name][0][0] < begin or name in self.moves:
                continue
            for view in (self._view(view) for call in body for view in call.reads()):
                other = self.program.buffers.get(view.base)
                if other == buffer and view.base not in written and self._done(view.base, begin, at):
                    whole = View(name, buffer.shape, dense_strides(buffer.shape))
                    self.loops += self._carry_out(name, Move(whole, replace(whole, base=view.base)))
                    break

    def _done(self, name: str, begin: int, end: int) -> bool:
        """Whether all uses of a buffer from a loop's begin on are before a call, and on rows of their own."""
        later = [(at, view) for at, view in self.uses[name] if at >= begin]
        return all(at < end and view.offset.of(START) for at, view in later)

    def _carry_out(self, name: str, move: Move) -> bool:
        moved = [(at, move(view)) for at, view in self.uses[name]]
        if any(view is None for _, view in moved):
            return False
        self.uses[move.new.base] += [(at, view) for at, view in moved if view is not None]
        self.moves[name] = move
        return True

    def _placed(self, call: Instruction) -> Instruction:
        inputs = tuple(self._operand(operand) for operand in call.inputs)
        return replace(call, inputs=inputs, outputs=tuple(map(self._view, call.outputs)))

    def _operand(self, operand: Operand) -> Operand:
        if isinstance(operand, View):
            return self._view(operand)
        return tuple(map(self._operand, operand)) if isinstance(operand, tuple) else operand

    def _view(self, view: View) -> View:
        while view.base in self.moves:
            moved = self.moves[view.base](view)
            assert moved is not None
            view = moved
        return view
