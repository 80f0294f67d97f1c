"""What a program's tensors hold while its model is written: values of the graph, and how views of them are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dllmc.errors import ExportError
from dllmc.export.onnx.graph import Graph
from dllmc.export.views import in_memory, is_whole, slices
from dllmc.ir.program import PAGES, SYMBOLS, Affine, Program, Shape, View
from dllmc.ir.views import apart, coincide

ONE = Affine(1)


@dataclass
class _Held:
    """What a buffer holds: a dense value of its shape, and on it values of views that were written since."""

    whole: str | None
    written: list[tuple[View, str]]


class Buffers:
    """Inputs, weights and caches as they are given, and buffers as they are written.

    Programs work in place; here a buffer has a new value behind each call that writes it. What is written to a part of
    it stays a value of its own until something reads across.
    """

    def __init__(self, graph: Graph, program: Program) -> None:
        self.graph, self.program = graph, program
        given = {**program.inputs, **program.weights, **program.caches}
        self._held = {name: _Held(name, []) for name in given}
        self._sizes = self._symbols()

    def whole(self, name: str) -> str | None:
        """The value of all of a tensor, where it has one."""
        return self._held[name].whole

    def read(self, view: View) -> str:
        """The value of a view, dense in its shape."""
        held = self._held[view.base]
        for written, value in held.written:
            if coincide(written, view):
                return self._shaped(value, written.shape, view.shape)
        if held.written and not all(apart(written, view) for written, _ in held.written):
            self._merge(view.base)
        if held.whole is None:
            raise self._refusal(f"{view.base!r} is read before all of it is written")
        shape = self.program.tensor(view.base).shape
        if not is_whole(shape, view):
            return self._sliced(held.whole, shape, view)
        order = in_memory(view)
        dense = self._shaped(held.whole, shape, tuple(view.shape[axis] for axis in order))
        return self._arranged(dense, order, view.shape)

    def write(self, view: View, value: str) -> None:
        """Let a view hold a value of its shape."""
        shape = self.program.tensor(view.base).shape
        held = self._held.setdefault(view.base, _Held(None, []))
        if is_whole(shape, view):
            held.whole, held.written = self._as_in_memory(value, view, shape), []
            return
        held.written = [(old, its) for old, its in held.written if not coincide(old, view)]
        if not all(apart(old, view) for old, _ in held.written):
            self._merge(view.base)
        held.written.append((view, value))

    def _merge(self, base: str) -> None:
        """Make one dense value of what was written to a buffer: each part between what is before and behind it."""
        held, g = self._held[base], self.graph
        shape = self.program.tensor(base).shape
        for view, value in held.written:
            found = slices(shape, view)
            if held.whole is None or found is None:
                raise self._refusal(f"{base!r} is written in parts that no slice describes")
            parts = enumerate(zip(*found, strict=True))
            axes = [axis for axis, (digit, start, length) in parts if (start, length) != (Affine(), digit)]
            if len(axes) != 1:
                raise self._refusal(f"{base!r} is written in parts along {len(axes)} axes")
            (axis,), (digits, starts, lengths) = axes, found
            whole = self._reshaped(held.whole, tuple(digits))
            part = self._as_in_memory(value, view, tuple(lengths))
            start, end = self._size(starts[axis]), self._size(starts[axis] + lengths[axis])
            before = g.slice(whole, axis, g.constant([0]), start)
            behind = g.slice(whole, axis, end, self._size(digits[axis]))
            held.whole = self._reshaped(g("Concat", before, part, behind, axis=axis), shape)
        held.written = []

    def _as_in_memory(self, value: str, view: View, shape: Shape) -> str:
        """The value of a view, its axes in the order of memory, in a shape of as many elements."""
        order = in_memory(view)
        if order == sorted(order):
            return self._shaped(value, view.shape, shape)
        ones = [axis for axis, dim in enumerate(view.shape) if dim == ONE]
        return self._reshaped(self.graph("Transpose", value, perm=[*order, *ones]), shape)

    def _sliced(self, whole: str, shape: Shape, view: View) -> str:
        g = self.graph
        found = slices(shape, view)
        if found is None:
            return self._expanded(whole, shape, view)
        digits, starts, lengths = found
        value = self._reshaped(whole, tuple(digits)) if tuple(digits) != shape else whole
        for axis, (digit, start, length) in enumerate(zip(digits, starts, lengths, strict=True)):
            if (start, length) != (Affine(), digit):
                value = g.slice(value, axis, self._size(start), self._size(start + length))
        order = in_memory(view)
        value = self._shaped(value, tuple(lengths), tuple(view.shape[axis] for axis in order))
        return self._arranged(value, order, view.shape)

    def _expanded(self, whole: str, shape: Shape, view: View) -> str:
        """A view that shows elements several times along some axes, or by a stride that no slice has."""
        repeated = [axis for axis, stride in enumerate(view.strides) if stride == Affine() and view.shape[axis] != ONE]
        if not repeated:
            raise self._refusal(f"no ONNX operators show {view.base!r} by strides {[*map(str, view.strides)]}")
        once = tuple(ONE if axis in repeated else dim for axis, dim in enumerate(view.shape))
        value = self.read(replace(view, shape=once))
        return self.graph("Expand", value, self._shape_of(view.shape))

    def _arranged(self, value: str, order: Sequence[int], shape: Shape) -> str:
        """A value whose axes are those of `order`, as one of that shape: permuted, with axes of one element."""
        ranks = [sorted(order).index(axis) for axis in order]
        if ranks != sorted(ranks):
            value = self.graph("Transpose", value, perm=[ranks.index(place) for place in range(len(ranks))])
        return self._shaped(value, tuple(shape[axis] for axis in sorted(order)), shape)

    def _refusal(self, what: str) -> ExportError:
        return ExportError(f"program {self.program.name!r}: {what}")

    def _shaped(self, value: str, old: Shape, new: Shape) -> str:
        return value if old == new else self._reshaped(value, new)

    def _reshaped(self, value: str, shape: Shape) -> str:
        symbolic = [axis for axis, dim in enumerate(shape) if dim.terms]
        if len(symbolic) == 1 and Affine() not in shape:
            return self.graph.reshape(value, *(-1 if dim.terms else dim.constant for dim in shape))
        return self.graph("Reshape", value, self._shape_of(shape))

    def _shape_of(self, shape: Shape) -> str:
        return self.graph.shape(*(self._size(dim) if dim.terms else dim.constant for dim in shape))

    def _size(self, size: Affine) -> str:
        """A size of the step, int64 [1]."""
        g = self.graph
        terms = []
        for symbol, factor in size.terms:
            value = self._sizes[symbol]()
            terms.append(value if factor == 1 else g("Mul", value, g.constant([factor])))
        if size.constant or not terms:
            terms.append(g.constant([size.constant]))
        total = terms[0]
        for term in terms[1:]:
            total = g("Add", total, term)
        return total

    def _symbols(self) -> dict[str, Callable[[], str]]:
        """How to find each size: an axis of an input or cache that is as long."""
        given = {**self.program.inputs, **self.program.caches}
        found: dict[str, Callable[[], str]] = {}
        for symbol in (*SYMBOLS, PAGES):
            places = [
                (name, axis)
                for name, tensor in given.items()
                for axis, dim in enumerate(tensor.shape)
                if dim == Affine(0, ((symbol, 1),))
            ]
            if places:
                found[symbol] = _once(self.graph, *places[0])
        return found


def _once(g: Graph, name: str, axis: int) -> Callable[[], str]:
    made: list[str] = []

    def size() -> str:
        if not made:
            made.append(g.dim(name, axis))
        return made[0]

    return size
