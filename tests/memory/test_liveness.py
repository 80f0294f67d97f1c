"""Lifetimes: from the instruction that first touches a buffer to behind the last one that does."""

from dataclasses import replace

from hypothesis import given, settings

from dllmc.ir.program import ForRows, Program
from dllmc.memory.liveness import lifetimes
from tests.loops import looping
from tests.programs import program, programs, tensor

A, B, C = (tensor(size) for size in (4, 5, 6))


def test_a_buffer_lives_from_its_writing_to_its_last_reading() -> None:
    small = program({"a": A, "b": B, "c": C}, [((), ["a"]), (["a"], ["b"]), (["a", "b"], ["c"]), (["b"], ["c"])])
    assert lifetimes(small) == {"a": (0, 3), "b": (1, 4), "c": (2, 4)}


def test_what_is_returned_lives_to_the_end() -> None:
    """And what is only written lives for that instruction."""
    small = program({"a": A, "b": B}, [((), ["a"]), (["a"], ["b"]), (["a"], ["b"])], returns=["a"])
    assert lifetimes(small) == {"a": (0, 3), "b": (1, 3)}
    assert lifetimes(replace(small, outputs={})) == {"a": (0, 3), "b": (1, 3)}
    assert lifetimes(replace(small, instructions=small.instructions[:1])) == {"a": (0, 1)}


def test_views_inside_lists_keep_their_buffer_alive() -> None:
    small = program({"a": A, "b": B}, [((), ["a"]), ((), ["b"])])
    listed = program({"a": A, "b": B}, [([(small.instructions[0].outputs[0], 1)], ["b"])])
    both = replace(small, instructions=small.instructions + listed.instructions)
    assert lifetimes(both) == {"a": (0, 3), "b": (1, 3)}


def test_a_workspace_lives_for_one_instruction() -> None:
    small = program({"a": A, "b": B, "w": C}, [((), ["a"]), (["a"], ["b"]), (["b"], ["a"])])
    middle = replace(small.instructions[1], workspace="w")
    instructions = (small.instructions[0], middle, small.instructions[2])
    assert lifetimes(replace(small, instructions=instructions))["w"] == (1, 2)


def test_only_buffers_that_are_touched_have_lifetimes() -> None:
    """Inputs and weights have none, nor has a buffer that no instruction names."""
    small = program({"a": A, "b": B}, [(["in", "w"], ["a"])], ["in"], inputs={"in": A}, weights={"w": B})
    assert lifetimes(small) == {"a": (0, 1)}


@settings(deadline=None, derandomize=True)
@given(programs())
def test_a_lifetime_is_every_instruction_between_two_uses(random: Program) -> None:
    """Judged instruction by instruction: alive means touched by now, and touched from now on or returned."""
    returned = {view.base for view in random.outputs.values()}
    touched = [{view.base for view in (*i.reads(), *i.outputs)} | ({i.workspace} - {None}) for i in random.instructions]
    expected = {}
    for name in random.buffers:
        now = range(len(touched))
        by_now = [any(name in use for use in touched[: i + 1]) for i in now]
        later = [name in returned or any(name in use for use in touched[i:]) for i in now]
        if alive := [i for i in now if by_now[i] and later[i]]:
            expected[name] = alive
    assert {name: list(range(*span)) for name, span in lifetimes(random).items()} == expected


@settings(deadline=None, derandomize=True)
@given(looping())
def test_a_lifetime_in_a_loop_is_that_of_its_iterations(random: Program) -> None:
    """Judged by two iterations of each loop: from the first use of a buffer to its last, of a chunk in either."""
    calls: list[tuple[int, bool, set[str]]] = []  # number, whether it is a second iteration, what it uses
    index = 0
    for item in random.instructions:
        body = item.body if isinstance(item, ForRows) else (item,)
        used = [{v.base for v in (*i.reads(), *i.outputs)} | ({i.workspace} - {None}) for i in body]
        for again in (False, True) if isinstance(item, ForRows) else (False,):
            calls += [(index + i, again, names) for i, names in enumerate(used)]
        index += len(body)
    returned = {view.base for view in random.outputs.values()}
    expected = {}
    for name in random.buffers:
        once = random.is_chunk(name) or name.endswith("work")
        at = [i for i, (_, again, names) in enumerate(calls) if name in names and not (once and again)]
        if at:
            behind = len(calls) if name in returned else at[-1] + 1
            alive = {number for number, _, _ in calls[at[0] : behind]}
            expected[name] = (min(alive), max(alive) + 1)
    assert lifetimes(random) == expected
