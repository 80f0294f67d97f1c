"""What can be said of the elements that views hold, and of a view when its tensor moves into another."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dllmc.ir.program import Affine, View, product

ONE = Affine(1)


def coincide(a: View, b: View) -> bool:
    """Whether two views hold the same elements in the same places, but for axes of one element."""
    return (a.base, a.offset, list(_axes(a))) == (b.base, b.offset, list(_axes(b)))


def apart(a: View, b: View) -> bool:
    """Whether two views of one tensor are known to share no element: in each row they hold other columns.

    Their rows are as far apart as the largest constant stride of either.
    """
    pitch = max((s.constant for v in (a, b) for d, s in _axes(v) if not s.terms), default=0)
    bands = [columns(view, pitch) for view in (a, b)]
    if None in bands or not pitch:
        return False
    (first, behind), (start, end) = bands  # type: ignore[misc]
    return bool(behind <= start or end <= first)


def columns(view: View, pitch: int) -> tuple[int, int] | None:
    """The columns of rows of `pitch` elements that a view is within; None where it crosses from row to row."""
    first, rest = view.offset.constant % pitch if pitch else 0, 0
    for dim, stride in _axes(view):
        if _multiple(stride, pitch):
            continue
        if dim.terms or stride.terms:
            return None
        rest += (dim.constant - 1) * stride.constant
    terms = Affine(0, view.offset.terms)
    return (first, first + rest + 1) if _multiple(terms, pitch) and first + rest < pitch else None


def _multiple(size: Affine, of: int) -> bool:
    return bool(of) and all(part % of == 0 for part in (size.constant, *(c for _, c in size.terms)))


def _axes(view: View) -> Iterator[tuple[Affine, Affine]]:
    return ((d, s) for d, s in zip(view.shape, view.strides, strict=True) if d != ONE)


@dataclass(frozen=True)
class Move:
    """A dense tensor takes the place of a view: `old` is the whole tensor, `new` has the same shape elsewhere."""

    old: View
    new: View

    def __call__(self, view: View) -> View | None:
        """The view of the old tensor as one of the new place; None where strides cannot say that."""
        axes = self._merged()
        strides = []
        used = [0] * len(axes)
        alike = len(view.shape) == len(self.old.shape)
        for place, (dim, stride) in enumerate(zip(view.shape, view.strides, strict=True)):
            if dim == ONE:  # its stride is of no account, but torch wants to see that a call is in place
                strides.append(self.new.strides[place] if alike else stride)
                continue
            at = next((i for i, (_, old, _) in enumerate(axes) if not stride.terms and old <= stride.constant), None)
            if at is None or stride.constant % axes[at][1]:
                return None
            times = stride.constant // axes[at][1]
            used[at] += (dim.constant - 1) * times if not dim.terms else 0
            if dim.terms and at:  # only the outermost axis may be as long as the step
                return None
            strides.append(Affine(times * axes[at][2]))
        offset, rest = self.new.offset, view.offset
        for at, (count, old, new) in enumerate(axes):
            digit = Affine(rest.constant // old, tuple((s, c // old) for s, c in rest.terms))
            rest -= product(Affine(old), digit)
            if at and (digit.terms or digit.constant + used[at] >= count.constant):
                return None
            offset += product(Affine(new), digit)
        return replace(view, base=self.new.base, strides=tuple(strides), offset=offset) if rest == Affine() else None

    def _merged(self) -> list[tuple[Affine, int, int]]:
        """Length, old and new stride of each axis, outermost first, one for several that lie close together in both.

        Constant strides are all that there is, but for axes of one element.
        """
        axes: list[tuple[Affine, int, int]] = []
        for (dim, was), (_, now) in zip(_axes(self.old), _axes(self.new), strict=True):
            if was.terms or now.terms:
                return []
            axes.append((dim, was.constant, now.constant))
        axes.sort(key=lambda axis: -axis[1])
        merged: list[tuple[Affine, int, int]] = []
        for dim, old, new in axes:
            if merged and not dim.terms and merged[-1][1:] == (old * dim.constant, new * dim.constant):
                dim = product(merged.pop()[0], dim)
            merged.append((dim, old, new))
        return merged
