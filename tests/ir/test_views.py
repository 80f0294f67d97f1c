"""What is said of views, against the elements that they hold, enumerated with numpy."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dllmc.ir.program import Affine, View, dense_strides, element_count
from dllmc.ir.views import Move, apart, coincide
from tests.programs import TOKENS, shape

SIZES = [{"tokens": n, "rows": 1, "guided": 0, "segments": 1} for n in (1, 2, 5)]
random_views = settings(
    deadline=None,
    derandomize=True,
    max_examples=500,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

Places = NDArray[np.int64]


def places(view: View, tokens: int) -> Places:
    """The element of the tensor that each element of a view is, in the view's shape."""
    sizes = {"tokens": tokens, "start": 0, "chunk": 1}
    found = np.full((), view.offset.at(sizes))
    for dim, stride in zip(view.shape, view.strides, strict=True):
        found = found[..., None] + np.arange(dim.at(sizes)) * stride.at(sizes)
    return found


def sliced(draw: st.DrawFn, view: View, axis: int) -> View:
    """Neighbouring indices of an axis of constant length."""
    length = view.shape[axis].constant
    first = draw(st.integers(0, length - 1))
    count = draw(st.integers(1, length - first))
    dims = (*view.shape[:axis], Affine(count), *view.shape[axis + 1 :])
    stride = view.strides[axis]
    return replace(view, shape=dims, offset=view.offset + Affine(first * stride.constant, _times(stride, first)))


def _times(size: Affine, factor: int) -> tuple[tuple[str, int], ...]:
    return tuple((symbol, c * factor) for symbol, c in size.terms if factor)


@st.composite
def windows(draw: st.DrawFn, whole: View) -> View:
    """Slices of a dense tensor, two axes maybe merged before, one split then, its axes in any order."""
    view = whole
    inner = len(whole.shape) - 1
    if inner and not whole.shape[inner].terms and not whole.shape[inner - 1].terms and draw(st.booleans()):
        merged = Affine(whole.shape[inner - 1].constant * whole.shape[inner].constant)
        view = replace(
            view, shape=(*whole.shape[: inner - 1], merged), strides=(*whole.strides[: inner - 1], Affine(1))
        )
    for axis, dim in enumerate(view.shape):
        if not dim.terms and draw(st.booleans()):
            view = sliced(draw, view, axis)
    if draw(st.booleans()):
        axis = draw(st.integers(0, len(view.shape) - 1))
        length = view.shape[axis].constant
        if not view.shape[axis].terms and length % 2 == 0:
            stride = view.strides[axis]
            strides = (Affine(stride.constant * length // 2, _times(stride, length // 2)), stride)
            view = replace(
                view,
                shape=(*view.shape[:axis], Affine(2), Affine(length // 2), *view.shape[axis + 1 :]),
                strides=(*view.strides[:axis], *strides, *view.strides[axis + 1 :]),
            )
    order = draw(st.permutations(range(len(view.shape))))
    return replace(
        view, shape=tuple(view.shape[axis] for axis in order), strides=tuple(view.strides[axis] for axis in order)
    )


@st.composite
def wholes(draw: st.DrawFn) -> View:
    """A dense tensor, the tokens at any of its axes."""
    dims: list[int | Affine] = [*draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))]
    dims.insert(draw(st.sampled_from((0, 0, 0, len(dims), 1))), TOKENS)
    return View("x", shape(*dims), dense_strides(shape(*dims)))


@random_views
@given(st.data())
def test_views_that_coincide_hold_the_same_elements_in_the_same_places(data: st.DataObject) -> None:
    """Exactly so, but for sizes at which axes happen to have one element."""
    whole = data.draw(wholes())
    a = data.draw(windows(whole))
    b = a if data.draw(st.booleans()) else data.draw(windows(whole))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(b.shape)))
        b = replace(
            b, shape=(*b.shape[:at], Affine(1), *b.shape[at:]), strides=(*b.strides[:at], Affine(17), *b.strides[at:])
        )
    same = all(
        np.array_equal(places(a, n["tokens"]).squeeze(), places(b, n["tokens"]).squeeze())
        and [d for d in a.shape if d != Affine(1)] == [d for d in b.shape if d != Affine(1)]
        for n in SIZES
    )
    assert coincide(a, b) == same
    assert not coincide(a, replace(a, base="y"))


@random_views
@given(st.data())
def test_views_apart_share_no_element(data: st.DataObject) -> None:
    """At no size of a step; whole rows of a chunk may begin anywhere."""
    whole = data.draw(wholes())
    a, b = data.draw(windows(whole)), data.draw(windows(whole))
    if data.draw(st.booleans()):
        row = whole.strides[0]
        b = replace(b, offset=b.offset + (row if not row.terms else Affine(1)))
    if apart(a, b):
        for n in SIZES:
            assert not np.intersect1d(places(a, n["tokens"]), places(b, n["tokens"])).size
        assert apart(b, a)


COLUMNS = View("x", shape(TOKENS, 12), shape(12, 1))


def columns(first: int, count: int) -> View:
    return replace(COLUMNS, shape=shape(TOKENS, count), offset=Affine(first))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (columns(0, 4), columns(4, 8), True),
        (columns(0, 5), columns(4, 8), False),
        (columns(0, 4), COLUMNS, False),
        # heads of a joint projection, each some of its columns; the rows of an iteration
        (View("x", shape(TOKENS, 2, 2), shape(12, 2, 1), Affine(4)), columns(8, 4), True),
        (View("x", shape(TOKENS, 2, 2), shape(12, 2, 1), Affine(5)), columns(8, 4), False),
        (View("x", shape(3, 4), shape(12, 1), Affine(4, (("start", 12),))), columns(0, 4), True),
        (View("x", shape(3, 4), shape(12, 1), Affine(4, (("start", 5),))), columns(0, 4), False),
        # from row to row: nothing is known
        (View("x", shape(TOKENS, 4), shape(12, 1), Affine(10)), columns(4, 2), False),
        (View("x", shape(TOKENS, 4), (TOKENS, Affine(1))), columns(8, 4), False),
    ],
)
def test_columns_are_apart(a: View, b: View, expected: bool) -> None:
    """What it is for is seen, what it cannot know is denied."""
    assert (apart(a, b), apart(b, a)) == (expected, expected)


@random_views
@given(st.data())
def test_a_moved_view_holds_what_it_held(data: st.DataObject) -> None:
    """The element at each place of a view is the one that stands for it in the new tensor; or the move says None."""
    dims = data.draw(st.lists(st.integers(1, 6).map(Affine), min_size=1, max_size=3))
    dims.insert(data.draw(st.sampled_from((0, 0, 1))), TOKENS)
    old_whole = View("old", tuple(dims), dense_strides(dims))
    order = data.draw(st.permutations(range(len(dims))) | st.just(list(range(len(dims)))))
    old = replace(
        old_whole,
        shape=tuple(dims[axis] for axis in order),
        strides=tuple(old_whole.strides[axis] for axis in order),
    )
    new = data.draw(targets(old))
    view = data.draw(windows(old_whole))
    moved = Move(old, new)(view)
    if moved is None:
        return
    assert (moved.base, moved.shape) == ("new", view.shape)
    for n in SIZES:
        stands_for = dict(zip(places(old, n["tokens"]).flat, places(new, n["tokens"]).flat, strict=True))
        expected = [stands_for[place] for place in places(view, n["tokens"]).flat]
        assert places(moved, n["tokens"]).reshape(-1).tolist() == expected


@st.composite
def targets(draw: st.DrawFn, old: View) -> View:
    """A view of the same shape: dense in any order, or columns of something wider."""
    order = draw(st.permutations(range(len(old.shape))) | st.just(list(range(len(old.shape)))))
    dims = [old.shape[axis] for axis in order]
    wider, first = draw(st.sampled_from(((0, 0), (3, 2), (5, 0)))), 0
    last = Affine(dims[-1].constant + wider[0], dims[-1].terms)
    assume(not (last.terms and wider[0]))
    strides = dense_strides([*dims[:-1], last])
    offset = Affine(first + wider[1] + (draw(st.integers(0, 20)) if draw(st.booleans()) else 0))
    by_axis = dict(zip(order, strides, strict=True))
    return View("new", old.shape, tuple(by_axis[axis] for axis in range(len(order))), offset)


QKV = View("qkv", shape(TOKENS, 2, 4), shape(24, 4, 1), Affine(8))
KEYS = View("k", shape(TOKENS, 2, 4), shape(8, 4, 1))


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (KEYS, QKV),
        # heads first, one head, half of a head, flat: a linear's operand
        (View("k", shape(2, TOKENS, 4), shape(4, 8, 1)), View("qkv", shape(2, TOKENS, 4), shape(4, 24, 1), Affine(8))),
        (View("k", shape(TOKENS, 4), shape(8, 1), Affine(4)), View("qkv", shape(TOKENS, 4), shape(24, 1), Affine(12))),
        (
            View("k", shape(TOKENS, 2, 2), shape(8, 4, 1), Affine(2)),
            View("qkv", shape(TOKENS, 2, 2), shape(24, 4, 1), Affine(10)),
        ),
        (View("k", shape(TOKENS, 8), shape(8, 1)), View("qkv", shape(TOKENS, 8), shape(24, 1), Affine(8))),
        # rows from one on
        (
            View("k", shape(3, 8), shape(8, 1), Affine(0, (("start", 8),))),
            View("qkv", shape(3, 8), shape(24, 1), Affine(8, (("start", 24),))),
        ),
        # all elements in one row: no strides say where they are
        (View("k", (Affine(0, (("tokens", 8),)),), shape(1)), None),
        (View("k", shape(TOKENS, 8), shape(8, 1), Affine(4)), None),
    ],
)
def test_views_of_keys_in_a_joint_projection(view: View, expected: View | None) -> None:
    assert Move(KEYS, QKV)(view) == expected
    assert element_count(KEYS.shape) == element_count(QKV.shape)


APART = View("qkv", shape(TOKENS, 2, 4), shape(24, 12, 1), Affine(4))


@pytest.mark.parametrize(
    ("first", "count", "within"),
    [(0, 4, True), (4, 4, True), (1, 3, True), (2, 3, False), (0, 8, False), (0, 5, False)],
)
def test_views_across_heads_that_come_apart(first: int, count: int, within: bool) -> None:
    """Heads of one projection of several weights: no strides name columns of two."""
    moved = Move(KEYS, APART)(View("k", shape(TOKENS, count), shape(8, 1), Affine(first)))
    offset = Affine(4 + first // 4 * 12 + first % 4)
    assert moved == (View("qkv", shape(TOKENS, count), shape(24, 1), offset) if within else None)
