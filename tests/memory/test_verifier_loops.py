"""The verifier on loops over chunks of rows: it refuses what goes wrong in any iteration, judged byte by byte."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dllmc.ir.program import Affine, ForRows, Instruction, Program, Tensor, View, aligned
from dllmc.memory.verifier import verify
from tests.loops import CHUNK, START, STEPS, Replay, executed, looping, rows_of, times
from tests.programs import MAXIMA, TOKENS, planned, refusal, refuse, shape, tensor, whole

random_programs = settings(
    deadline=None,
    derandomize=True,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@random_programs
@given(looping())
def test_what_the_planner_plans_is_accepted_and_loses_nothing(random: Program) -> None:
    """At the largest sizes and at smaller ones, whose last chunks are shorter."""
    plan = planned(random)
    verify(plan)
    for sizes in STEPS:
        assert Replay(plan, sizes).fault() is None


def loses_buffers(plan: Program) -> bool:
    """All iterations of the largest step, a buffer at a time: what a loop writes is its own from the loop's begin."""
    spans = {name: slice(b.offset, (b.offset or 0) + b.size_bytes(plan.maxima)) for name, b in plan.buffers.items()}
    arena = np.zeros(plan.arena_bytes or 0, np.int64)
    own = {name: np.zeros(span.stop - (span.start or 0), np.int64) for name, span in spans.items()}
    stamp = 0

    def write(name: str) -> None:
        nonlocal stamp
        stamp += 1
        arena[spans[name]] = own[name][:] = stamp

    def lost(name: str) -> bool:
        return name in own and not (np.all(own[name]) and np.array_equal(arena[spans[name]], own[name]))

    before = None
    for call, _, iteration in executed(plan, MAXIMA):
        if iteration != before:
            for name in filter(plan.is_chunk, own):
                own[name][:] = 0
        if iteration is not None and (before is None or before[0] != iteration[0]):
            loop = plan.instructions[iteration[0]]
            assert isinstance(loop, ForRows)
            for name in {view.base for inner in loop.body for view in inner.outputs}:
                if not plan.is_chunk(name) and not np.all(own[name]):
                    write(name)
        before = iteration
        read = [view.base for view in call.reads()]
        written = [view.base for view in call.outputs] + ([] if call.workspace is None else [call.workspace])
        parts = [
            name for name in written if iteration is not None and name != call.workspace and not plan.is_chunk(name)
        ]
        if any(map(lost, (*read, *parts))):  # a row is written where the others are
            return True
        for name in written:
            write(name)
        if any(map(lost, (*read, *written))):
            return True
    return any(lost(view.base) for view in plan.outputs.values())


@random_programs
@given(looping(), st.data())
def test_moved_buffers_are_refused_exactly_when_bytes_are_lost(random: Program, data: st.DataObject) -> None:
    """One buffer, or all of them, anywhere in an arena of the plan's size or of twice it."""
    plan = planned(random)
    room = (plan.arena_bytes or 0) * data.draw(st.sampled_from((1, 2)))
    sizes = {name: aligned(b.size_bytes(plan.maxima)) for name, b in plan.buffers.items()}
    names = sorted(name for name, size in sizes.items() if 0 < size < room)
    assume(names)
    chosen = names if data.draw(st.booleans()) else [data.draw(st.sampled_from(names))]
    moved = {
        name: replace(plan.buffers[name], offset=64 * data.draw(st.integers(0, (room - sizes[name]) // 64)))
        for name in chosen
    }
    anywhere = replace(plan, buffers={**plan.buffers, **moved}, arena_bytes=room)
    assert (refusal(anywhere) is not None) == loses_buffers(anywhere)


def flat(program: Program) -> list[tuple[int, int]]:
    """The place of every call: its item, and its number in it."""
    bodies = [item.body if isinstance(item, ForRows) else (item,) for item in program.instructions]
    return [(at, inner) for at, body in enumerate(bodies) for inner in range(len(body))]


def edited(program: Program, place: tuple[int, int], edit: Callable[[Instruction], list[Instruction]]) -> Program:
    """The program with some calls in the place of one."""
    at, inner = place
    item = program.instructions[at]
    items: list[Any] = list(program.instructions)
    if isinstance(item, ForRows):
        body = [*item.body[:inner], *edit(item.body[inner]), *item.body[inner + 1 :]]
        items[at : at + 1] = [ForRows(item.extent, tuple(body))] if body else []
    else:
        items[at : at + 1] = edit(item)
    return replace(program, instructions=tuple(items))


@st.composite
def slips(draw: st.DrawFn, plan: Program) -> Program:
    """The plan with one mistake, which may be none."""
    place = draw(st.sampled_from(flat(plan)))
    item = plan.instructions[place[0]]
    call = item.body[place[1]] if isinstance(item, ForRows) else item
    kind = draw(
        st.sampled_from(("shift", "shift", "widen", "drop", "swap", "base", "place", "split", "leave", "in place"))
    )
    views = [*call.reads(), *call.outputs]
    view = draw(st.sampled_from(views))
    if kind == "shift":
        by = draw(st.sampled_from((Affine(1), Affine(-1), START, CHUNK, times(Affine(-1), START), Affine(3), TOKENS)))
        return edited(plan, place, lambda call: [_with(call, view, replace(view, offset=view.offset + by))])
    if kind == "widen":
        dims = tuple(TOKENS if dim == CHUNK else dim for dim in view.shape)
        return edited(plan, place, lambda call: [_with(call, view, replace(view, shape=dims, offset=Affine()))])
    if kind == "drop":
        return edited(plan, place, lambda call: [])
    if kind == "swap" and isinstance(item, ForRows) and len(item.body) > 1:
        order = draw(st.permutations(item.body))
        items = [*plan.instructions]
        items[place[0]] = ForRows(item.extent, tuple(order))
        return replace(plan, instructions=tuple(items))
    if kind == "base":
        alike = [n for n, b in plan.buffers.items() if b.shape == plan.tensor(view.base).shape]
        if alike:
            other = replace(view, base=draw(st.sampled_from(alike)))
            return edited(plan, place, lambda call: [_with(call, view, other)])
    if kind == "place":
        name = draw(st.sampled_from(sorted(plan.buffers)))
        room = (plan.arena_bytes or 0) - plan.buffers[name].size_bytes(plan.maxima)
        moved = replace(plan.buffers[name], offset=64 * draw(st.integers(0, room // 64)))
        return replace(plan, buffers={**plan.buffers, name: moved})
    if kind == "split" and isinstance(item, ForRows):
        items = [*plan.instructions]
        cut = (ForRows(item.extent, body) for body in (item.body[: place[1]], item.body[place[1] :]) if body)
        items[place[0] : place[0] + 1] = cut
        return replace(plan, instructions=tuple(items))
    if kind == "leave" and isinstance(item, ForRows):
        items = [*plan.instructions]
        items[place[0] : place[0] + 1] = item.body
        return replace(plan, instructions=tuple(items))
    if kind == "in place" and views != list(call.outputs):
        read = draw(st.sampled_from([*call.reads()]))
        others = tuple(v for v in call.reads() if v != read) if draw(st.booleans()) else ()
        out = draw(st.sampled_from((read, replace(read, offset=read.offset + Affine(1)))))
        return edited(
            plan, place, lambda call: [replace(call, op="aten.add.Tensor", inputs=(read, *others), outputs=(out,))]
        )
    return plan


def _with(call: Instruction, old: View, new: View) -> Instruction:
    """The call with one view for another."""

    def operand(given: Any) -> Any:
        return tuple(map(operand, given)) if isinstance(given, tuple) else new if given is old else given

    return replace(call, inputs=operand(call.inputs), outputs=operand(call.outputs))


def test_what_is_accepted_goes_wrong_in_no_iteration() -> None:
    """A program with a slip is either refused, or right at all sizes and in every order of its iterations."""
    seen: Counter[str] = Counter()

    @settings(random_programs, max_examples=600)
    @given(st.data())
    def judge(data: st.DataObject) -> None:
        slip = data.draw(planned_programs.flatmap(slips))
        faults = [fault for sizes in STEPS if (fault := Replay(slip, sizes).fault()) is not None]
        said = refusal(slip)
        if said is None:
            assert not faults
        seen.update(["wrong" if faults else "accepted" if said is None else "refused to be sure"])

    judge()
    assert min(seen["wrong"], seen["accepted"]) > 100
    assert seen["refused to be sure"] < 0.3 * seen.total()


planned_programs = looping().map(planned)


Body = list[tuple[list[View], list[View]]]


def at(offset: int, *dims: int | Affine) -> Tensor:
    return tensor(*dims, offset=offset)


BUFFERS = {"x": at(0, TOKENS, 4), "y": at(192, TOKENS, 4), "c": at(384, CHUNK, 4), "d": at(448, CHUNK, 4)}
X, Y = (rows_of(name, BUFFERS[name], TOKENS) for name in ("x", "y"))
C, D = (whole(name, BUFFERS[name]) for name in ("c", "d"))
ALL_X, ALL_Y = (whole(name, BUFFERS[name]) for name in ("x", "y"))
MAKE_X = ([], [ALL_X])


def looped(*items: tuple[list[View], list[View]] | Body, op: str = "copy", **buffers: Tensor) -> Program:
    """A program of calls and, as lists of calls, loops over 3 tokens at a time."""
    made: list[Instruction | ForRows] = []
    for item in items:
        if isinstance(item, list):
            made.append(ForRows(TOKENS, tuple(Instruction(op, (*reads,), (*writes,)) for reads, writes in item)))
        else:
            made.append(Instruction(op, (*item[0],), (*item[1],)))
    return Program("dense", {**MAXIMA, "chunk": 3}, {}, {}, {**BUFFERS, **buffers}, tuple(made), {}, 512)


def test_a_loop_of_rows_is_accepted() -> None:
    """Rows are read and written, chunks go from call to call, another loop reads what the first wrote."""
    verify(
        looped(MAKE_X, [([X], [C]), ([C], [D]), ([C, D], [Y])], [([Y], [C]), ([C, ALL_Y], [X])], ([ALL_X, ALL_Y], []))
    )


OTHER_ROWS = replace(X, offset=X.offset + Affine(4))
MIXED = View("x", (CHUNK, Affine(5)), shape(4, 1), Affine(0, (("start", 4),)))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        # chunks belong to an iteration
        (looped(MAKE_X, [([X], [C])], ([C], [])), r"instruction 2 .*'c' .*: expected the sizes tokens, .*found chunk"),
        (
            looped(MAKE_X, [([X], [C])], ([View("c", shape(1, 4), shape(4, 1))], [])),
            r"instruction 2 .*'c' .* is used outside of the loop whose iterations write it",
        ),
        (looped(MAKE_X, [([X], [C])], [([C], [Y])]), r"instruction 2 \(copy\): 'c' at .* is used before it is written"),
        (looped(MAKE_X, [([C], [D]), ([X], [C])]), r"instruction 1 \(copy\): 'c' at .* is used before it is written"),
        (looped([([], [replace(C, offset=Affine(0, (("start", 4),)))])]), "instruction 0 .*'c' .* reaches"),
        # rows of what the loop writes are the iteration's own
        (looped([([], [X]), ([ALL_X], [C])]), "instruction 1 .*rows of 'x' that are the iteration's own"),
        (looped([([], [ALL_X])]), "instruction 0 .*rows of 'x' that are the iteration's own"),
        (looped(MAKE_X, [([], [replace(X, offset=Affine())])]), "instruction 1 .*x.* reaches|rows of 'x' that are"),
        (looped(MAKE_X, [([OTHER_ROWS], [C]), ([C], [X])]), "instruction 1 .*'x' .* reaches 4.chunk . 4.start . 3 of"),
        (looped(MAKE_X, [([MIXED], [C]), ([C], [X])]), "instruction 1 .*'x' .* reaches"),
        # written before they are used, in every iteration
        (looped([([X], [C]), ([C], [X])]), "instruction 0 .*rows of 'x' are used before they are written"),
        (
            looped([([], [replace(X, shape=(CHUNK, Affine(2)))])], ([ALL_X], [])),
            "instruction 0 .*begins here writes a part of 'x'",
        ),
        # bytes: a chunk on rows that later iterations read, or that are returned by earlier ones
        (looped(MAKE_X, [([X], [C]), ([C], [Y])], c=at(64, CHUNK, 4)), "'x' at .* is overwritten by 'c' at"),
        (looped([([], [C]), ([C], [X])], c=at(64, CHUNK, 4)), "'x' at .* is overwritten by 'c' at"),
        (
            looped(MAKE_X, [([X], [D]), ([], [C]), ([D, C], [Y])], c=at(448, CHUNK, 4)),
            "'d' at .* is overwritten by 'c'",
        ),
        # sizes of an iteration mean nothing outside
        (
            looped(([X], [])),
            r"instruction 0 .*: expected the sizes tokens, .*segments, active, found start",
        ),
        # iterations of as many rows differ in where their views begin, not in shapes
        (
            looped(MAKE_X, [([replace(C, shape=(START + Affine(1), Affine(4)))], [])]),
            r"instruction 1 .*'c' .*: expected the sizes .*chunk, found start",
        ),
        (
            looped(MAKE_X, [([replace(C, strides=(START, Affine(1)))], [])]),
            r"instruction 1 .*'c' .*: expected the sizes .*chunk, found start",
        ),
        (looped(MAKE_X, x=at(0, Affine(0, (("start", 1),)), 4)), "'x': expected the sizes .*chunk, found start"),
    ],
)
def test_what_goes_wrong_in_a_loop_is_refused(bad: Program, message: str) -> None:
    """With the call, the buffer, and what was expected; the replay agrees."""
    refuse(bad, message)
    if "start" not in message:
        assert any(Replay(bad, sizes).fault() for sizes in STEPS)


def test_sizes_in_lists_are_those_that_are_known() -> None:
    """Of the step outside of loops; within, those that are the same in iterations of as many rows."""
    call = Instruction("copy", ((Affine(1), START),), (C,))
    refuse(replace(looped(), instructions=(ForRows(TOKENS, (call,)),)), "instruction 0 .*chunk, found start")
    outside = replace(call, inputs=((Affine(1), CHUNK),), outputs=(ALL_X,))
    refuse(replace(looped(), instructions=(outside,)), "instruction 0 .*active, found chunk")


def test_rows_of_the_last_short_chunk_are_within_bounds() -> None:
    """A view is bounded by the rows that are left, not by full chunks; one row more is beyond them."""
    verify(looped(MAKE_X, [([X], [C])]))
    longer = replace(X, shape=(CHUNK + Affine(1), Affine(4)))
    refuse(looped(MAKE_X, [([longer], [])]), r"reaches 4.chunk . 4.start . 3 of 4.tokens")
    twice = replace(X, offset=times(Affine(2), X.offset))
    refuse(looped(MAKE_X, [([twice], [])]), "reaches 4.chunk . 8.start - 1 of 4.tokens")
    back = replace(X, offset=times(Affine(-1), START))
    refuse(looped(MAKE_X, [([back], [])]), "has a negative size, stride or offset -1.start")


ADD = "aten.add.Tensor"


def test_results_in_the_place_of_operands() -> None:
    """Where the operator allows it: of what is whole, of rows of an iteration, of chunks. Axes of one are none."""
    ones = replace(ALL_X, shape=shape(1, TOKENS, 4), strides=shape(77, 4, 1))
    verify(looped(MAKE_X, ([ones], [ALL_X]), op=ADD))
    verify(looped(MAKE_X, [([X], [C]), ([C], [C]), ([X, C], [X])], ([ALL_X], []), op=ADD))
    left, right = (replace(ALL_X, shape=shape(TOKENS, 2), offset=Affine(first)) for first in (0, 2))
    verify(looped(MAKE_X, ([left, right], [left]), op=ADD))


LEFT = replace(ALL_X, shape=shape(TOKENS, 2))


@pytest.mark.parametrize(
    "bad",
    [
        looped(MAKE_X, ([ALL_X], [ALL_X])),  # copy allows none
        looped(MAKE_X, ([LEFT, replace(LEFT, offset=Affine(1))], [LEFT]), op=ADD),  # another operand overlaps
        looped(MAKE_X, ([replace(LEFT, offset=Affine(1))], [LEFT]), op=ADD),  # next to the operand
        looped(MAKE_X, ([ALL_X, LEFT], [ALL_X]), op=ADD),
        looped(MAKE_X, ([ALL_X], [replace(ALL_X, shape=shape(4, TOKENS), strides=shape(1, 4))]), op=ADD),
        looped(MAKE_X, ([ALL_Y, ALL_Y, ALL_Y, ALL_X], [ALL_X]), op=ADD),  # no operand of that number
        looped(MAKE_X, ([ALL_X], [ALL_Y, ALL_X]), op=ADD),  # the second output
    ],
)
def test_other_results_in_the_place_of_operands_are_refused(bad: Program) -> None:
    bad = replace(bad, instructions=(Instruction("copy", (), (ALL_Y,)), *bad.instructions))
    refuse(bad, "instruction 2 .* writes 'x', which it uses for something else too")


def test_a_result_in_the_place_of_what_is_not_there_is_refused() -> None:
    refuse(looped(([ALL_X], [ALL_X]), op=ADD), r"instruction 0 .*'x' at \[0, 144\) is used before it is written")
