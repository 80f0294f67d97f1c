"""Caches keep what steps write: only an operator that updates one may, and all of it in place."""

from dataclasses import replace

import pytest

from dllmc.ir.program import PAGES, Affine, Instruction, Operand, Program, View, dense_strides
from dllmc.memory.verifier import verify
from tests.programs import MAXIMA, program, refuse, shape, tensor, whole

PAGE = Affine(0, ((PAGES, 1),))
CACHE = tensor(2, 3, PAGE, 4, 8)
X = tensor(5, offset=0)


def keeping(cache: Operand, output: View, op: str = "dllmc.keep.default") -> Program:
    """A program whose one call updates a cache."""
    made = program({"x": X}, [((), ["x"])], arena_bytes=64)
    call = Instruction(op, (cache, whole("x", X)), (output,))
    return replace(
        made,
        maxima={**MAXIMA, PAGES: 6},
        caches={"kv": CACHE},
        instructions=(*made.instructions, call),
        outputs={"kv": whole("kv", CACHE)},
    )


def test_a_cache_is_read_and_updated_in_place() -> None:
    verify(keeping(whole("kv", CACHE), whole("kv", CACHE)))


@pytest.mark.parametrize(
    ("cache", "output", "message"),
    [
        (whole("x", X), whole("x", X), "expected operand 0 and the first output to be one cache"),
        (whole("kv", CACHE), whole("x", X), "expected operand 0 and the first output to be one cache"),
        (7, whole("kv", CACHE), "expected operand 0 and the first output to be one cache, found 7"),
        (
            View("kv", shape(2, 3, 1, 4, 8), dense_strides(CACHE.shape)),
            whole("kv", CACHE),
            "expected operand 0 and the first output to be one cache",
        ),
    ],
)
def test_an_update_of_something_else_is_refused(cache: Operand, output: View, message: str) -> None:
    refuse(keeping(cache, output), rf"instruction 1 \(dllmc.keep.default\): {message}")


def test_what_is_updated_is_used_for_nothing_else() -> None:
    made = keeping(whole("kv", CACHE), whole("kv", CACHE))
    *before, call = made.instructions
    assert isinstance(call, Instruction)
    twice = replace(call, inputs=(*call.inputs, whole("kv", CACHE)))
    refuse(replace(made, instructions=(*before, twice)), "updates 'kv', which it uses for something else too")


def test_no_other_operator_writes_a_cache() -> None:
    refuse(keeping(whole("x", X), whole("kv", CACHE), "copy"), "writes 'kv', which is no buffer")


def test_only_caches_are_as_large_as_the_pool() -> None:
    """A step's buffers know nothing of an engine's pages, and a cache nothing of a step's tokens."""
    made = keeping(whole("kv", CACHE), whole("kv", CACHE))
    refuse(replace(made, buffers={"x": replace(X, shape=(PAGE,))}), "'x': expected the sizes tokens, .*, found pages")
    wrong = tensor(2, 3, Affine(0, (("tokens", 1),)), 4, 8)
    refuse(replace(made, caches={"kv": wrong}), "'kv': expected the sizes pages, found tokens")


def test_a_view_beyond_a_cache_is_refused_for_any_number_of_pages() -> None:
    made = keeping(whole("kv", CACHE), whole("kv", CACHE))
    beyond = View("kv", shape(8), shape(1), Affine(192 - 7 - 1 + 8))
    refuse(replace(made, outputs={"kv": beyond}), r"reaches 199 of 192\*pages")
