"""Random programs with loops over chunks of rows, and a replay of all their iterations byte by byte."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from dllmc.ir.program import (
    DTYPE_BYTES,
    Affine,
    ForRows,
    Instruction,
    Operand,
    Program,
    Sizes,
    Tensor,
    View,
    dense_strides,
)
from dllmc.ops.registry import OPERATORS
from tests.programs import GUIDED, MAXIMA, ROWS, TOKENS, shape, tensor, whole

CHUNK, START = (Affine(0, ((symbol, 1),)) for symbol in ("chunk", "start"))
EXTENTS = (TOKENS, GUIDED + ROWS)
STEPS = [
    {"tokens": t, "rows": r, "guided": g, "segments": s, "active": 4}
    for t, r, g, s in ((9, 5, 3, 2), (1, 1, 0, 1), (4, 3, 0, 2), (7, 1, 1, 1))
]

Stamps = NDArray[np.int64]


def times(size: Affine, count: Affine) -> Affine:
    """A constant number of sizes."""
    return Affine(size.constant * count.constant, tuple((s, c * size.constant) for s, c in count.terms))


def rows_of(name: str, described: Tensor, extent: Affine) -> View:
    """The rows of an iteration, of a whole tensor with one axis as long as the extent."""
    axis = described.shape.index(extent)
    strides = dense_strides(described.shape)
    return View(
        name, (*described.shape[:axis], CHUNK, *described.shape[axis + 1 :]), strides, times(strides[axis], START)
    )


@st.composite
def of_rows(draw: st.DrawFn, rows: Affine, alike: bool) -> Tensor:
    """Rows of some width, maybe with heads outside of them; of few widths, where tensors are to be alike."""
    if alike:
        return tensor(rows, draw(st.sampled_from((4, 4, 8))))
    dims: list[int | Affine] = [rows, draw(st.integers(1, 6))]
    if draw(st.integers(0, 3)) == 0:
        dims.insert(0, draw(st.integers(1, 3)))
    return tensor(*dims, dtype=draw(st.sampled_from(("float32", "bfloat16", "int64"))))


@st.composite
def parts(draw: st.DrawFn, view: View) -> View:
    """The view, maybe some columns of it, its axes in any order."""
    width = view.shape[-1].constant
    if width > 1 and draw(st.booleans()):
        first = draw(st.integers(0, width - 1))
        count = draw(st.integers(1, width - first))
        view = replace(view, shape=(*view.shape[:-1], Affine(count)), offset=view.offset + Affine(first))
    return draw(orders(view))


@st.composite
def orders(draw: st.DrawFn, view: View) -> View:
    """The view, its axes in any order."""
    order = draw(st.permutations(range(len(view.shape))))
    return replace(view, shape=tuple(view.shape[i] for i in order), strides=tuple(view.strides[i] for i in order))


class _Writer:
    """The state of a program that is being drawn."""

    def __init__(self, draw: st.DrawFn, alike: bool) -> None:
        self.draw, self.alike = draw, alike
        self.inputs = {f"in{i}": tensor(extent, 3) for i, extent in enumerate(EXTENTS)}
        self.buffers: dict[str, Tensor] = {}
        self.chunks: set[str] = set()
        self.written = 0

    def single(self) -> Instruction:
        """A call outside of loops."""
        extent = self.draw(st.sampled_from((*EXTENTS, Affine(4))))
        reads = self._some(sorted(self._whole()))
        operands = [self._part(whole(name, self._whole()[name])) for name in reads]
        name = self._new(self.draw(of_rows(extent, self.alike)))
        return self._call(operands, [self._ordered(whole(name, self.buffers[name]))])

    def loop(self) -> ForRows:
        extent = self.draw(st.sampled_from(EXTENTS))
        old = [name for name, t in self._whole().items() if name in self.buffers and extent in t.shape]
        changed = set(self._some(old, most=1))
        fresh: set[str] = set()
        local: list[str] = []
        body = []
        for _ in range(self.draw(st.integers(1, 4))):
            by_rows = [name for name, t in self._whole().items() if extent in t.shape]
            read = self._some(by_rows)
            operands = [self._part(rows_of(name, self._whole()[name], extent)) for name in read]
            unchanged = [name for name in self._whole() if name not in changed | fresh]
            operands += [self._part(whole(name, self._whole()[name])) for name in self._some(unchanged, most=1)]
            here = self._some(local)
            operands += [self._part(whole(name, self.buffers[name])) for name in here]
            outputs = []
            if again := self._some(sorted((changed | fresh | set(local)) - {v.base for v in operands}), most=1):
                outputs.append(self._rows_written(again[0], extent))
            if not outputs or self.draw(st.booleans()):
                inside = self.draw(st.booleans())
                name = self._new(self.draw(of_rows(CHUNK if inside else extent, self.alike)))
                (local.append if inside else fresh.add)(name)
                outputs.append(self._rows_written(name, extent))
            body.append(self._call(operands, outputs))
        self.chunks.update(local)
        return ForRows(extent, tuple(body))

    def _rows_written(self, name: str, extent: Affine) -> View:
        described = self.buffers[name]
        rows = whole(name, described) if CHUNK in described.shape else rows_of(name, described, extent)
        return self._ordered(rows)

    def _part(self, view: View) -> View:
        return view if self.alike and self.draw(st.integers(0, 2)) else self.draw(parts(view))

    def _ordered(self, view: View) -> View:
        return view if self.alike else self.draw(orders(view))

    def _whole(self) -> dict[str, Tensor]:
        local = {name for name, t in self.buffers.items() if CHUNK in t.shape or "work" in name}
        return {n: t for n, t in (self.inputs | self.buffers).items() if n not in local}

    def _some(self, names: Sequence[str], most: int = 2) -> list[str]:
        return self.draw(st.lists(st.sampled_from(names), max_size=most, unique=True)) if names else []

    def _new(self, described: Tensor) -> str:
        name = f"%{len(self.buffers)}"
        self.buffers[name] = described
        return name

    def _call(self, operands: Sequence[View], outputs: Sequence[View]) -> Instruction:
        workspace = None
        if self.draw(st.integers(0, 3)) == 0:
            workspace = f"%{len(self.buffers)}.work"
            self.buffers[workspace] = Tensor("uint8", shape(self.draw(st.integers(0, 200))))
        inside: Operand = tuple(operands[1:])
        return Instruction("op", (*operands[:1], inside), tuple(outputs), workspace)


@st.composite
def looping(draw: st.DrawFn, alike: bool = False) -> Program:
    """Up to five items, loops and calls, in which loops write rows of their own and keep chunks to themselves."""
    writer = _Writer(draw, alike)
    items = [draw(st.sampled_from((writer.loop, writer.loop, writer.single)))() for _ in range(draw(st.integers(1, 5)))]
    kept = sorted(n for n, t in writer.buffers.items() if CHUNK not in t.shape and "work" not in n)
    returned = draw(st.lists(st.sampled_from(kept), max_size=2, unique=True)) if kept else []
    outputs = {name: whole(name, writer.buffers[name]) for name in returned}
    maxima = {**MAXIMA, "chunk": draw(st.sampled_from((1, 2, 3, 4, 9, 12)))}
    return Program("dense", maxima, writer.inputs, {}, writer.buffers, tuple(items), outputs)


def executed(program: Program, sizes: Sizes) -> Iterator[tuple[Instruction, Sizes, tuple[int, int] | None]]:
    """Every call of a step in order, the sizes that hold there, and its loop and iteration."""
    for number, item in enumerate(program.instructions):
        if isinstance(item, Instruction):
            yield item, sizes, None
            continue
        extent, most = item.extent.at(sizes), program.maxima["chunk"]
        for start in range(0, extent, most):
            here = {**sizes, "start": start, "chunk": min(most, extent - start)}
            yield from ((instruction, here, (number, start)) for instruction in item.body)


def places(view: View, sizes: Sizes) -> Stamps:
    """The element of its tensor that each element of a view is, in the view's shape."""
    found = np.full((), view.offset.at(sizes))
    for dim, stride in zip(view.shape, view.strides, strict=True):
        found = found[..., None] + np.arange(dim.at(sizes)) * stride.at(sizes)
    return found


class Replay:
    """A plan on stamps: a call fills what it writes with a number of its own, byte by byte.

    Buffers lie in the arena, and each in memory of its own besides, where chunks are empty at an iteration's begin.
    """

    def __init__(self, program: Program, sizes: Sizes) -> None:
        self.program, self.sizes = program, sizes
        self.arena = np.zeros((program.arena_bytes or 0) + 64, np.int64)
        largest = {**program.maxima}
        self.own = {n: np.zeros(b.size_bytes(largest), np.int64) for n, b in program.buffers.items()}
        self.made_in: list[tuple[int, int] | None] = [None]

    def fault(self) -> str | None:
        """What goes wrong in this step, if anything: an element that is lost, missing, or another iteration's."""
        before: tuple[int, int] | None = None
        for call, here, iteration in executed(self.program, self.sizes):
            if iteration != before:
                self._forget_chunks()
            before = iteration
            if (found := self._call(call, here, iteration)) is not None:
                return found
        self._forget_chunks()
        for view in self.program.outputs.values():
            if (found := self._lost(view, self.sizes, (-1, 0))) is not None:
                return found
        return None

    def _call(self, call: Instruction, here: Mapping[str, int], iteration: tuple[int, int] | None) -> str | None:
        if iteration is None:
            here = self.sizes
        for view in call.reads():
            if (found := self._lost(view, here, iteration)) is not None:
                return found
        taken: set[int] = set()
        for view in call.outputs:
            at = self._bytes(view, here)
            if at is None or view.base not in self.own:
                return f"{view} is written beyond its tensor"
            addresses = set((at + (self.program.buffers[view.base].offset or 0)).tolist())
            if taken & addresses:
                return "two outputs in one place"
            taken |= addresses
            of_others = {self.made_in[stamp] for stamp in set(self.own[view.base][at].tolist())} - {iteration}
            if iteration is not None and any(made is not None and made[0] == iteration[0] for made in of_others):
                return f"{view} is written by two iterations"
        if call.workspace is not None:
            start = self.program.buffers[call.workspace].offset or 0
            scratch = set(range(start, start + self.program.buffers[call.workspace].size_bytes(here)))
            if taken & scratch:
                return "an output in the workspace"
            taken |= scratch
            self.arena[sorted(scratch)] = -1
        for view in call.reads():
            at = self._bytes(view, here)
            assert at is not None
            if view.base not in self.own or self._in_place(call, view, here):
                continue
            if taken & set((at + (self.program.buffers[view.base].offset or 0)).tolist()):
                return f"{view} is read where it is written"
        self.made_in.append(iteration)
        for view in call.outputs:
            at = self._bytes(view, here)
            assert at is not None
            stamp = len(self.made_in) - 1
            self.arena[at + (self.program.buffers[view.base].offset or 0)] = self.own[view.base][at] = stamp
        return None

    def _in_place(self, call: Instruction, view: View, here: Sizes) -> bool:
        """Whether the view is an operand for which that is allowed, and where the first output is."""
        allowed = OPERATORS[call.op].in_place if call.op in OPERATORS else ()
        operands = [call.inputs[i] for i in allowed if i < len(call.inputs)]
        out = call.outputs[0]
        same = out.base == view.base and np.array_equal(places(out, here).squeeze(), places(view, here).squeeze())
        return view in operands and same

    def _lost(self, view: View, here: Sizes, iteration: tuple[int, int] | None) -> str | None:
        at = self._bytes(view, here)
        if at is None:
            return f"{view} is beyond its tensor"
        if view.base not in self.own:
            return None
        own = self.own[view.base][at]
        if not np.all(own):
            return f"{view} is used before it is written"
        if not np.array_equal(own, self.arena[at + (self.program.buffers[view.base].offset or 0)]):
            return f"{view} is overwritten"
        made = {self.made_in[stamp] for stamp in set(own.tolist())} - {iteration, None}
        if iteration is not None and any(other is not None and other[0] == iteration[0] for other in made):
            return f"{view} is another iteration's"
        return None

    def _bytes(self, view: View, here: Sizes) -> Stamps | None:
        """The bytes of the tensor that a view holds; None where one is outside."""
        described = self.program.tensor(view.base)
        sizes = (*described.shape, *view.shape, *view.strides, view.offset)
        if any(symbol not in here for size in sizes for symbol, _ in size.terms):  # of an iteration, outside of loops
            return None
        at = places(view, here).reshape(-1)
        size = DTYPE_BYTES[described.dtype]
        if at.size and (at.min() < 0 or at.max() >= described.size_bytes(here) // size):
            return None
        return (at[:, None] * size + np.arange(size)).reshape(-1)

    def _forget_chunks(self) -> None:
        for name in self.own:
            if self.program.is_chunk(name):
                self.own[name][:] = 0
