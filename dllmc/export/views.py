"""Views of a program on dense tensors, in functional torch calls that compilers see through.

A view's axes, by descending stride, are digits of an element's number in its tensor: reshaped to those digits, the
tensor has the view as a slice along each of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dllmc.ir.program import Affine, Shape, Sizes, View, element_count, product

ONE = Affine(1)


def window(tensor: Tensor, held: Shape, view: View, sizes: Sizes) -> Tensor:
    """A view of a dense tensor of shape `held`, for a step of given sizes: in reshapes, slices and permutations, or by
    strides where it is not made of those.
    """
    order = _order(view)
    if _is_whole(held, view):
        part = tensor.reshape(_at([view.shape[axis] for axis in order], sizes))
    elif (found := _slices(held, view)) is not None:
        digits, starts, lengths = found
        part = tensor.reshape(_at(digits, sizes))
        for axis, (digit, start, length) in enumerate(zip(digits, starts, lengths, strict=True)):
            if (start, length) != (Affine(), digit):
                part = part.narrow(axis, start.at(sizes), length.at(sizes))
        part = part.squeeze(-1)
    else:
        return tensor.as_strided(_at(view.shape, sizes), _at(view.strides, sizes), view.offset.at(sizes))
    part = part.permute([order.index(axis) for axis in sorted(order)])
    for axis, dim in enumerate(view.shape):
        if dim == ONE:
            part = part.unsqueeze(axis)
    return part


def written(tensor: Tensor | None, held: Shape, view: View, value: Tensor, sizes: Sizes) -> Tensor:
    """The dense tensor of shape `held` after `value` is written to a view of it; None: nothing was in it before."""
    if _is_whole(held, view):
        ones = [axis for axis, dim in enumerate(view.shape) if dim == ONE]
        return value.permute(*_order(view), *ones).reshape(_at(held, sizes)).contiguous()
    if tensor is None:
        tensor = value.new_zeros(_at(held, sizes))
    return torch.as_strided_scatter(
        tensor, value, _at(view.shape, sizes), _at(view.strides, sizes), view.offset.at(sizes)
    )


def _at(affine: Sequence[Affine], sizes: Sizes) -> list[int]:
    return [size.at(sizes) for size in affine]


def _order(view: View) -> list[int]:
    """The axes of more than one element, outermost in memory first."""
    axes = [axis for axis, dim in enumerate(view.shape) if dim != ONE]
    return sorted(axes, key=lambda axis: (not view.strides[axis].terms, -_largest(view.strides[axis])))


def _largest(size: Affine) -> int:
    return max((coefficient for _, coefficient in size.terms), default=size.constant)


def _is_whole(held: Shape, view: View) -> bool:
    """Whether the view has every element of the tensor once, in the order of memory but for a permutation."""
    count = ONE
    for axis in reversed(_order(view)):
        if view.strides[axis] != count:
            return False
        count = product(view.shape[axis], count)
    return view.offset == Affine() and count == element_count(held)


def _slices(held: Shape, view: View) -> tuple[list[Affine], list[Affine], list[Affine]] | None:
    """The tensor's shape as digits, one an axis of the view and one of what is left of the innermost stride; where the
    view starts in each, and how many it has. None where the view is no such slice.
    """
    order = _order(view)
    digits, starts = [], []
    room, rest = element_count(held), view.offset
    for axis in order:
        step = view.strides[axis]
        if step.terms or step.constant < 1:
            return None
        digit, over = divided(room, step.constant)
        start, rest = divided(rest, step.constant)
        if over != Affine():
            return None
        digits.append(digit)
        starts.append(start)
        room = step
    lengths = [view.shape[axis] for axis in order]
    inner = zip(digits[1:], starts[1:], lengths[1:], strict=True)
    if rest.terms or any((s + n).terms or (s + n).constant > digit.constant for digit, s, n in inner):
        return None
    return [*digits, room], [*starts, rest], [*lengths, ONE]


def divided(size: Affine, by: int) -> tuple[Affine, Affine]:
    """Quotient and remainder, term by term."""
    quotient = Affine(size.constant // by, tuple((s, c // by) for s, c in size.terms if c // by))
    return quotient, size - product(Affine(by), quotient)
