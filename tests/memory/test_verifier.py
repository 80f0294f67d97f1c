"""The verifier refuses a plan exactly when some byte that is needed is lost, judged by running it byte by byte."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dllmc.ir.program import LEAST, Affine, Program, Tensor, View, aligned
from dllmc.memory.verifier import verify
from tests.programs import MAXIMA, TOKENS, planned, program, programs, refusal, refuse, shape, tensor

random_programs = settings(
    deadline=None, derandomize=True, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)


def loses_bytes(random: Program, sizes: Mapping[str, int]) -> bool:
    """Run the plan on stamps: each writing fills its buffer with a number of its own, byte by byte.

    Buffers lie in the arena, and each in memory of its own besides. A byte is lost if, where a buffer is used or
    returned, the two differ.
    """
    spans = {name: (b.offset or 0, b.size_bytes(sizes)) for name, b in random.buffers.items()}
    arena = np.zeros(random.arena_bytes or 0, np.int64)
    own = {name: np.zeros(size, np.int64) for name, (_, size) in spans.items()}

    def intact(name: str) -> bool:
        offset, size = spans[name]
        return bool(np.all(own[name]) and np.array_equal(arena[offset : offset + size], own[name]))

    stamp = 0
    for instruction in random.instructions:
        read = [view.base for view in instruction.reads() if view.base in spans]
        written = [view.base for view in instruction.outputs] + [n for n in (instruction.workspace,) if n]
        if not all(map(intact, read)):
            return True
        for name in written:
            stamp += 1
            offset, size = spans[name]
            arena[offset : offset + size] = own[name][:] = stamp
        if not all(map(intact, (*read, *written))):
            return True
    return not all(intact(view.base) for view in random.outputs.values() if view.base in spans)


@random_programs
@given(programs(), st.data())
def test_what_the_planner_plans_is_accepted_and_loses_nothing(random: Program, data: st.DataObject) -> None:
    """At the largest sizes and at any smaller ones, in the same offsets."""
    plan = planned(random)
    verify(plan)
    sizes = {symbol: data.draw(st.integers(LEAST[symbol], most)) for symbol, most in MAXIMA.items()}
    assert not loses_bytes(plan, MAXIMA)
    assert not loses_bytes(plan, sizes)


@random_programs
@given(programs(), st.data())
def test_a_moved_buffer_is_refused_exactly_when_bytes_are_lost(random: Program, data: st.DataObject) -> None:
    plan = planned(random)
    sizes = {name: aligned(b.size_bytes(MAXIMA)) for name, b in plan.buffers.items()}
    movable = sorted(name for name, size in sizes.items() if 0 < size < (plan.arena_bytes or 0))
    assume(movable)
    name = data.draw(st.sampled_from(movable))
    slots = ((plan.arena_bytes or 0) - sizes[name]) // 64
    moved = replace(plan.buffers[name], offset=64 * data.draw(st.integers(0, slots)))
    moved_plan = replace(plan, buffers={**plan.buffers, name: moved})
    assert (refusal(moved_plan) is not None) == loses_bytes(moved_plan, MAXIMA)


@random_programs
@given(programs(), st.data())
def test_random_offsets_are_refused_exactly_when_bytes_are_lost(random: Program, data: st.DataObject) -> None:
    """Every buffer anywhere in an arena of twice the size of the plan's."""
    plan = planned(random)
    arena_bytes = 2 * (plan.arena_bytes or 0)
    buffers = {
        name: replace(b, offset=64 * data.draw(st.integers(0, (arena_bytes - aligned(b.size_bytes(MAXIMA))) // 64)))
        for name, b in plan.buffers.items()
    }
    anywhere = replace(plan, buffers=buffers, arena_bytes=arena_bytes)
    assert (refusal(anywhere) is not None) == loses_bytes(anywhere, MAXIMA)


def at(offset: int, *dims: int | Affine) -> Tensor:
    return tensor(*dims, offset=offset)


def test_a_value_overwritten_before_its_last_reading_is_refused() -> None:
    """The error names the instruction that reads, its buffer, the buffer that lies there now, and the bytes of both."""
    bad = program(
        {"a": at(0, 32), "b": at(64, 8), "c": at(256, 4)},
        [((), ["a"]), ((), ["b"]), (["a"], ["c"])],
        arena_bytes=512,
    )
    refuse(bad, r"^instruction 2 \(copy\): 'a' at \[0, 128\) is overwritten by 'b' at \[64, 96\)$")
    apart = {**bad.buffers, "b": at(128, 8)}
    verify(replace(bad, buffers=apart))


def test_an_output_on_an_operand_is_refused() -> None:
    bad = program({"a": at(0, 32), "b": at(64, 32)}, [((), ["a"]), (["a"], ["b"])], arena_bytes=256)
    refuse(bad, r"^instruction 1 \(copy\): 'a' at \[0, 128\) is overwritten by 'b' at \[64, 192\)$")


def test_two_outputs_on_each_other_are_refused() -> None:
    bad = program({"a": at(0, 32), "b": at(64, 32)}, [((), ["a", "b"])], arena_bytes=256)
    refuse(bad, r"^instruction 0 \(copy\): 'a' at \[0, 128\) is overwritten by 'b' at \[64, 192\)$")


@pytest.mark.parametrize(("offset", "name"), [(64, "a"), (192, "b")])
def test_a_workspace_on_an_operand_or_an_output_is_refused(offset: int, name: str) -> None:
    good = program({"a": at(0, 32), "b": at(128, 32), "w": at(256, 32)}, [((), ["a"]), (["a"], ["b"])], arena_bytes=384)
    good = replace(good, instructions=(good.instructions[0], replace(good.instructions[1], workspace="w")))
    verify(good)
    bad = replace(good, buffers={**good.buffers, "w": at(offset, 32)})
    refuse(bad, rf"^instruction 1 \(copy\): '{name}' at \[\d+, \d+\) is overwritten by 'w' at \[\d+, \d+\)$")


def test_an_output_of_the_program_overwritten_after_its_production_is_refused() -> None:
    bad = program({"a": at(0, 4), "b": at(0, 2)}, [((), ["a"]), ((), ["b"])], returns=["a"], arena_bytes=64)
    refuse(bad, r"^output 'a': 'a' at \[0, 16\) is overwritten by 'b' at \[0, 8\)$")
    verify(replace(bad, outputs={}))


def test_a_reading_before_any_writing_is_refused() -> None:
    refuse(
        program({"a": at(0, 4), "b": at(64, 4)}, [(["a"], ["b"])], arena_bytes=128),
        r"^instruction 0 \(copy\): 'a' at \[0, 16\) is used before it is written$",
    )
    never = program({"a": at(0, 4)}, [], returns=["a"], arena_bytes=64)
    refuse(never, r"^output 'a': 'a' at \[0, 16\) is used before it is written$")


def test_what_an_instruction_writes_it_uses_for_nothing_else() -> None:
    """An operand, another output or the workspace in the same buffer would be overwritten while it is read."""
    buffers = {"a": at(0, 4), "b": at(64, 4)}
    in_place = program(buffers, [((), ["a"]), (["a"], ["a"])], arena_bytes=128)
    refuse(in_place, r"^instruction 1 \(copy\) writes 'a', which it uses for something else too$")
    twice = program(buffers, [((), ["a", "b", "a"])], arena_bytes=128)
    refuse(twice, r"^instruction 0 \(copy\) writes 'a', which it uses for something else too$")
    written = program(buffers, [((), ["a"])], arena_bytes=128)
    scratch = replace(written, instructions=(replace(written.instructions[0], workspace="a"),))
    refuse(scratch, r"^instruction 0 \(copy\) writes 'a', which it uses for something else too$")


def test_writing_a_part_of_a_buffer_does_not_make_the_rest_its_own() -> None:
    """A part may be written where the buffer is whole already; `b` half written would show bytes of `a`."""
    half = View("b", shape(4), shape(1))
    columns = View("b", shape(2, 2), shape(4, 1), Affine(2))
    buffers = {"a": at(0, 8), "b": at(0, 8)}
    for part in (half, columns):
        bad = program(buffers, [((), ["a"]), ((), [part]), (["b"], [])], arena_bytes=64)
        refuse(bad, r"^instruction 1 \(copy\) writes a part: 'b' at \[0, 32\) is used before it is written$")
        verify(program(buffers, [((), ["a"]), ((), ["b"]), ((), [part]), (["b"], [])], arena_bytes=64))


@pytest.mark.parametrize(
    "view",
    [
        View("b", shape(TOKENS, 2, 3), shape(6, 3, 1)),
        View("b", shape(3, TOKENS, 1, 2), shape(1, 6, 17, 3)),
        View("b", (Affine(0, (("tokens", 6),)),), shape(1)),
    ],
)
def test_a_whole_buffer_in_any_order_of_dimensions_is_no_part(view: View) -> None:
    verify(program({"b": at(0, TOKENS, 2, 3)}, [((), [view]), (["b"], [])], arena_bytes=256))


def test_an_element_is_written_once() -> None:
    """A stretched view would be written by several elements; along an axis of one there is nothing to stretch."""
    stretched = View("a", shape(4, 3), shape(1, 0))
    bad = program({"a": at(0, 4)}, [((), [stretched])], arena_bytes=64)
    refuse(bad, r"^instruction 0 \(copy\) writes elements of 'a' several times: strides \[1, 0\]$")
    verify(program({"a": at(0, 4)}, [((), [View("a", shape(4, 1), shape(1, 0))])], arena_bytes=64))


@pytest.mark.parametrize("group", ["inputs", "weights"])
def test_inputs_and_weights_are_not_written(group: str) -> None:
    bad = program({}, [((), ["a"])], arena_bytes=0, **{group: {"a": tensor(4)}})
    refuse(bad, r"^instruction 0 \(copy\) writes 'a', which is no buffer$")


@pytest.mark.parametrize("offset", [None, 1, 63, 100, -64])
def test_an_offset_that_is_missing_misaligned_or_negative_is_refused(offset: int | None) -> None:
    bad = program({"a": tensor(4, offset=offset)}, [((), ["a"])], arena_bytes=1024)
    refuse(bad, rf"^buffer 'a': expected an offset divisible by 64, found {offset}$")


def test_a_buffer_past_the_end_of_the_arena_is_refused() -> None:
    """At the largest sizes: 9 tokens of 16 bytes from byte 64 on."""
    buffers = {"a": at(64, TOKENS, 4)}
    verify(program(buffers, [], arena_bytes=208))
    refuse(program(buffers, [], arena_bytes=207), r"^buffer 'a' at \[64, 208\) ends behind the arena's 207 bytes$")


def test_a_program_without_a_plan_is_refused() -> None:
    refuse(program({}, []), "^program 'dense' has no memory plan; run plan-memory$")


def test_an_empty_buffer_needs_no_bytes() -> None:
    """Wherever it lies, even inside another, it conflicts with nothing and is whole."""
    empty = at(64, 0, TOKENS)
    verify(program({"a": at(0, 64), "e": empty}, [((), ["a"]), ((), ["e"]), (["a", "e"], [])], ["e"], arena_bytes=256))
