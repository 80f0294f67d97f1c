"""Affine sizes, the layout of tensors, and what a program says of itself."""

from dataclasses import replace
from itertools import product as combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmc.errors import ProgramError
from dllmc.ir.program import (
    LEAST,
    SYMBOLS,
    Affine,
    Instruction,
    Tensor,
    View,
    aligned,
    dense_strides,
    element_count,
    product,
)
from tests.programs import MAXIMA, ROWS, TOKENS, program, shape, tensor, whole

exhaustive = settings(deadline=None, derandomize=True)
sizes = st.fixed_dictionaries({symbol: st.integers(LEAST[symbol], 50) for symbol in SYMBOLS})


@st.composite
def affines(draw: st.DrawFn) -> Affine:
    coefficients = draw(st.dictionaries(st.sampled_from(SYMBOLS), st.integers(-5, 5).filter(bool)))
    return Affine(draw(st.integers(-9, 9)), tuple(sorted(coefficients.items())))


@exhaustive
@given(affines(), sizes)
def test_the_value_is_the_constant_and_each_size_times_its_coefficient(affine: Affine, at: dict[str, int]) -> None:
    expected = affine.constant
    for symbol, coefficient in affine.terms:
        for _ in range(at[symbol]):
            expected += coefficient
    assert affine.at(at) == expected


@exhaustive
@given(affines(), affines(), sizes)
def test_sums_and_products_are_those_of_the_values(a: Affine, b: Affine, at: dict[str, int]) -> None:
    assert (a + b).at(at) == a.at(at) + b.at(at)
    assert product(a, Affine(b.constant)).at(at) == a.at(at) * b.constant
    assert product(Affine(b.constant), a) == product(a, Affine(b.constant))


@exhaustive
@given(affines(), affines())
def test_results_are_canonical(a: Affine, b: Affine) -> None:
    """Equal values are equal objects: no zero coefficient, terms in order; so an affine and its negative give 0."""
    for result in (a + b, product(a, Affine(b.constant))):
        assert all(coefficient for _, coefficient in result.terms)
        assert list(result.terms) == sorted(result.terms)
    assert a + b == b + a
    assert a + product(Affine(-1), a) == Affine()


@exhaustive
@given(affines())
def test_least_is_the_smallest_value_of_all_steps(affine: Affine) -> None:
    """By trying every size from the least to the maximum."""
    steps = combinations(*(range(LEAST[symbol], MAXIMA[symbol] + 1) for symbol in SYMBOLS))
    assert affine.least(MAXIMA) == min(affine.at(dict(zip(SYMBOLS, step, strict=True))) for step in steps)


@pytest.mark.parametrize(
    ("affine", "text"),
    [
        (Affine(), "0"),
        (Affine(-3), "-3"),
        (TOKENS, "tokens"),
        (Affine(2, (("guided", 1), ("rows", 64))), "guided + 64*rows + 2"),
        (Affine(-1, (("tokens", 1),)), "tokens - 1"),
        (Affine(0, (("rows", -2), ("tokens", 1))), "-2*rows + tokens"),
    ],
)
def test_text(affine: Affine, text: str) -> None:
    assert str(affine) == text


def test_two_sizes_do_not_multiply() -> None:
    """A product of two sizes is refused with both factors, even of one size with itself; with 0 it is 0."""
    with pytest.raises(ProgramError, match=r"\(tokens\) \* \(rows\) grows with the product of two sizes"):
        product(TOKENS, ROWS)
    with pytest.raises(ProgramError, match=r"\(4\*tokens\) \* \(tokens\)"):
        element_count(shape(TOKENS, 4, TOKENS))
    assert product(TOKENS, Affine()) == Affine()


def test_dense_strides_are_row_major() -> None:
    assert dense_strides(()) == ()
    assert dense_strides(shape(7)) == shape(1)
    assert dense_strides(shape(2, 3, 4)) == shape(12, 4, 1)
    assert dense_strides(shape(2, TOKENS, 4)) == (Affine(0, (("tokens", 4),)), Affine(4), Affine(1))
    # What stands first multiplies nothing, so it may grow too.
    assert dense_strides(shape(ROWS, TOKENS)) == (TOKENS, Affine(1))


def test_dense_strides_of_two_sizes_are_refused() -> None:
    with pytest.raises(ProgramError, match="product of two sizes"):
        dense_strides(shape(2, TOKENS, ROWS))


@exhaustive
@given(st.lists(st.integers(0, 5), max_size=4))
def test_dense_strides_number_the_elements_in_order(dims: list[int]) -> None:
    """Element after element in row-major order has the offsets 0, 1, 2, ..., as many as `element_count` says."""
    strides = [stride.constant for stride in dense_strides(shape(*dims))]
    offsets = [sum(i * s for i, s in zip(index, strides, strict=True)) for index in combinations(*map(range, dims))]
    assert offsets == list(range(len(offsets)))
    assert element_count(shape(*dims)) == Affine(len(offsets))


def test_bytes() -> None:
    """Of a tensor at given sizes, of all inputs (each aligned to 64) and of all weights (dense) at the largest."""
    assert tensor(TOKENS, 3, dtype="bfloat16").size_bytes({"tokens": 5}) == 5 * 3 * 2
    assert tensor(dtype="int64").size_bytes({}) == 8
    small = program(
        {},
        [],
        inputs={"ids": tensor(TOKENS, dtype="int64"), "flag": tensor(dtype="bool")},
        weights={"w": tensor(3, 5), "b": tensor(3, dtype="uint8")},
    )
    assert small.state_bytes == 128 + 64  # 9 tokens of 8 bytes, and 1 byte
    assert small.weight_bytes == 3 * 5 * 4 + 3
    assert [aligned(n) for n in (0, 1, 64, 65)] == [0, 64, 64, 128]


def test_a_tensor_is_found_in_any_group_and_an_unknown_name_is_refused() -> None:
    tensors = {"in": tensor(1), "w": tensor(2), "%b": tensor(3), "cache": tensor(4)}
    small = program({"%b": tensors["%b"]}, [], inputs={"in": tensors["in"]}, weights={"w": tensors["w"]})
    small = replace(small, caches={"cache": tensors["cache"]})
    assert {name: small.tensor(name) for name in tensors} == tensors
    with pytest.raises(ProgramError, match="program 'dense': no input, weight, buffer or cache is named '%c'"):
        small.tensor("%c")


def test_an_instruction_reads_the_views_inside_lists() -> None:
    """In order; constants are not views, and outputs are not read."""
    a, b, c = (whole(name, Tensor("float32", shape(2))) for name in "abc")
    assert list(Instruction("cat", (a, (b, 1, (c,)), None, 0.5), (c,)).reads()) == [a, b, c]
    assert list(Instruction("fill", (), (View("a", (), ()),)).reads()) == []
