"""The verifier proves that shapes grow with a step and that views stay in their tensors, at every size of a step."""

import re
from dataclasses import replace
from itertools import product as combinations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dllmc.ir.program import Affine, Instruction, Program, Tensor, View
from dllmc.memory.verifier import verify
from tests.programs import GUIDED, MAXIMA, ROWS, TOKENS, program, programs, refusal, refuse, shape, tensor

DOWN = Affine(9, (("tokens", -1),))


@pytest.mark.parametrize("group", ["inputs", "weights", "buffers"])
@pytest.mark.parametrize("dim", [Affine(-1), Affine(-2, (("tokens", 1),)), DOWN], ids=str)
def test_a_dimension_that_shrinks_or_is_negative_is_refused(group: str, dim: Affine) -> None:
    """Smaller steps could not use the plan of the largest: at one token `9 - tokens` would be 8, not 0."""
    tensors = {"a": tensor(2, dim, offset=0) if group == "buffers" else tensor(2, dim)}
    groups = {"buffers": {}, group: tensors}
    bad = program(groups.pop("buffers"), [], arena_bytes=1024, **groups)
    refuse(bad, rf"^'a': a dimension of \({re.escape(str(dim))}\) shrinks as a step grows, or is negative$")


FOUR_BY_TOKENS = {"x": tensor(4, TOKENS)}


@pytest.mark.parametrize(
    "view",
    [
        View("x", shape(4, TOKENS), (TOKENS, Affine(1))),
        View("x", shape(TOKENS, 4), (Affine(1), TOKENS)),
        View("x", shape(TOKENS), shape(1), Affine(0, (("tokens", 3),))),  # the last row
        View("x", shape(4), (TOKENS,), Affine(-1, (("tokens", 1),))),  # the last column
        View("x", shape(7, 4, TOKENS), (Affine(0), TOKENS, Affine(1))),  # broadcast
        View("x", (), (), Affine(-1, (("tokens", 4),))),
        View("x", shape(100, 0), shape(100, 100), Affine(1000)),  # nothing
    ],
)
def test_views_within_their_tensor_are_accepted(view: View) -> None:
    verify(program({}, [([view], [])], inputs=FOUR_BY_TOKENS, arena_bytes=0))


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (View("x", shape(5, TOKENS), (TOKENS, Affine(1))), "reaches 5.tokens - 1 of 4.tokens"),
        (View("x", shape(TOKENS), shape(1), Affine(1, (("tokens", 3),))), "reaches 4.tokens of 4.tokens"),
        (View("x", shape(4, TOKENS), (TOKENS, Affine(2))), r"reaches 5.tokens - 2 of 4.tokens"),
        (View("x", (), (), Affine(0, (("tokens", 4),))), "reaches 4.tokens of 4.tokens"),
        # Right at the largest sizes, beyond the tensor at smaller ones.
        (View("x", shape(36), shape(1)), "starts at element 0 and reaches 35 of 4.tokens"),
        (View("x", (), (), Affine(4)), "reaches 4 of 4.tokens"),
        (View("x", shape(ROWS), shape(1)), "reaches rows - 1 of 4.tokens"),
        # Right at the largest and at the smallest sizes, negative or beyond it in between, one size being large.
        (View("x", shape(TOKENS), shape(1), Affine(-1, (("rows", 1),))), "reaches rows . tokens - 2 of 4.tokens"),
        (View("x", shape(2), shape(1), Affine(-1)), "negative size, stride or offset -1"),
        (View("x", shape(2), shape(-1), Affine(1)), "negative size, stride or offset 1"),
        (View("x", shape(Affine(-2, (("tokens", 1),))), shape(1)), "negative size, stride or offset 0"),
        (View("x", shape(2, TOKENS), (TOKENS, TOKENS)), "product of two sizes"),
    ],
)
def test_views_beyond_their_tensor_are_refused(view: View, message: str) -> None:
    """For every size of a step, not only the largest; an operand, one inside a list, or what is returned."""
    described = r"a view of 'x' \(shape \[.*\], strides \[.*\]\)"
    for operand in (view, (1, view)):
        reading = program({}, [([operand], [])], inputs=FOUR_BY_TOKENS, arena_bytes=0)
        refuse(reading, rf"^instruction 0 \(copy\): {described}.*{message}")
    returned = replace(program({}, [], inputs=FOUR_BY_TOKENS, arena_bytes=0), outputs={"y": view})
    refuse(returned, rf"^output 'y': {described}.*{message}")


def test_an_output_view_beyond_its_buffer_is_refused() -> None:
    view = View("a", shape(5), shape(1))
    refuse(
        program({"a": tensor(4, offset=0)}, [((), [view])], arena_bytes=64),
        r"^instruction 0 \(copy\): a view of 'a' .* starts at element 0 and reaches 4 of 4$",
    )


def test_guided_rows_may_be_none_and_tokens_may_not() -> None:
    """The least sizes differ: `guided - 1` can be negative, `tokens - 1` cannot."""
    inputs = {"g": tensor(GUIDED), "t": tensor(TOKENS)}
    but_one = {name: View(name, (inputs[name].shape[0] + Affine(-1),), shape(1), Affine(1)) for name in inputs}
    verify(program({}, [([but_one["t"]], [])], inputs=inputs, arena_bytes=0))
    refuse(program({}, [([but_one["g"]], [])], inputs=inputs, arena_bytes=0), "negative size, stride or offset 1$")


STEPS = [
    {"tokens": t, "rows": r, "guided": g, "segments": s, "active": a}
    for t, r, g, s, a in combinations((1, 2, 9), (1, 5), (0, 3), (1, 2), (0, 4))
]


@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(programs(), st.data())
def test_bounds_are_those_of_every_size(random: Program, data: st.DataObject) -> None:
    """A view shifted by some elements is refused exactly when, at some sizes, an element lies outside its tensor."""
    views = [view for i in random.instructions for view in i.reads()]
    assume(views)
    view = data.draw(st.sampled_from(views))
    assume(Affine() not in view.shape)
    shifted = replace(view, offset=view.offset + Affine(data.draw(st.integers(-4, 40))))
    described = random.tensor(view.base)
    outside = False
    for step in STEPS:
        places = np.full((), shifted.offset.at(step))
        for dim, stride in zip(shifted.shape, shifted.strides, strict=True):
            places = places[..., None] + np.arange(dim.at(step)) * stride.at(step)
        count = described.size_bytes(step) // Tensor(described.dtype, ()).size_bytes(step)
        outside |= bool(np.any((places < 0) | (places >= count)))
    reading = Program("p", MAXIMA, {view.base: described}, {}, {}, (Instruction("op", (shifted,), ()),), {}, 0)
    assert (refusal(reading) is not None) == outside
