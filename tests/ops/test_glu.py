"""`dllmc::glu` against the activations' formulas in float64."""

import math
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllmc.errors import ProgramError
from dllmc.ops import chunks
from dllmc.ops.glu import ACTIVATIONS, reference
from dllmc.ops.registry import operator
from tests.ops.calls import DTYPES, HALF, LAYOUTS, WAYS, as_instruction, assert_rounded_once, call, laid_out, random
from tests.ops.storages import blocks_taken, bytes_outside

# Exponentials of the largest gates overflow to infinity on purpose: its reciprocal is the sigmoid's zero.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

SHAPES = ((1,), (300,), (0, 8), (1, 7), (3, 64), (1, 4, 24), (2, 2, 3, 33))

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: x.clamp(min=0),
}


def expected(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return FORMULAS[activation](gate.double()) * up.double()


def operands(shape: Sequence[int], layout: str, dtype: torch.dtype, activation: str) -> list[Any]:
    """Gate and up: halves of one projection, or two tensors of different layouts."""
    if layout == "one projection":
        both = random(*shape[:-1], 2 * shape[-1], seed=1, dtype=dtype) * 3
        return [*both.chunk(2, dim=-1), activation]
    gate, up = (random(*shape, seed=seed, dtype=dtype) * 3 for seed in (1, 2))
    return [laid_out(gate, layout), up, activation]


def launch(args: Sequence[Any], outs: Sequence[Tensor]) -> None:
    from dllmc.ops.kernels.glu import glu

    glu(*args, outs[0])


def check(args: Sequence[Any], way: str, device: str) -> None:
    """Half precision on the CPU, but for the kernel, rounds the activation and the product."""
    (found,) = call(way, "glu", args, launch, device)
    gate, up, activation = args
    twice = device == "cpu" and way != "kernel" and activation != "relu"
    # Far below zero 1 + erf(x) keeps no digit, and float16 few of an activation.
    scale = (gate.double().abs() + 1) * up.double().abs()
    assert_rounded_once(found, expected(*args), way, device, roundings=2 if twice else 1, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("way", "device"), WAYS)
def test_a_gate_times_a_factor(way: str, device: str, activation: str, dtype: torch.dtype) -> None:
    """Any number of rows and axes, in any layout, in every way to call it."""
    for shape in SHAPES:
        for layout in ("one projection", *LAYOUTS):
            check(operands(shape, layout, dtype, activation), way, device)


@pytest.mark.parametrize(("way", "device"), WAYS)
def test_any_rows_and_any_width(way: str, device: str) -> None:
    """Widths that are no power of two, among them wider ones than a program takes."""

    @settings(deadline=None, derandomize=True, max_examples=25)
    @given(
        st.integers(1, 4),
        st.one_of(st.integers(1, 300), st.integers(1020, 2060)),
        st.sampled_from(("one projection", *LAYOUTS)),
        st.sampled_from(DTYPES),
        st.sampled_from(ACTIVATIONS),
    )
    def any_size(rows: int, width: int, layout: str, dtype: torch.dtype, activation: str) -> None:
        check(operands((rows, width), layout, dtype, activation), way, device)

    any_size()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("way", "device"), WAYS)
def test_large_gates(way: str, device: str, activation: str) -> None:
    """Far from zero an activation is its argument, or zero: never infinite, nor no number."""
    gate = torch.tensor([[-3e4, -200.0, -30.0, 0.0, 30.0, 200.0, 3e4]])
    for dtype in DTYPES:
        check([gate.to(dtype), torch.ones_like(gate, dtype=dtype), activation], way, device)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.integers(1, 800),
    st.sampled_from(("one projection", *LAYOUTS)),
    st.sampled_from(ACTIVATIONS),
)
def test_rows_go_through_chunks(leading, chunk, layout, activation):
    """In chunks of a few rows, or of one, the results are the same."""
    args = operands((*leading, 10), layout, torch.float32, activation)
    with patch.object(chunks, "CHUNK_BYTES", chunk):
        (found,) = as_instruction("glu", args, planned_for=args)
    assert_rounded_once(found, expected(*args), "instruction", "cpu", scale=10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_definition(activation: str, dtype: torch.dtype) -> None:
    """The reference is the formula, rounded once."""
    args = operands((5, 24), "one projection", dtype, activation)
    assert_rounded_once(reference(*args), expected(*args), "reference", "cpu")


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_on_the_cpu_is_what_it_replaces(dtype: torch.dtype) -> None:
    """Bit for bit what torch's activation and product give, one after the other."""
    gate, up, _ = operands((7, 100), "one projection", dtype, "silu")
    assert torch.equal(torch.ops.dllmc.glu(gate, up, "silu"), torch.nn.functional.silu(gate) * up)


def test_what_is_refused() -> None:
    """Activations that are not listed, and factors that would be broadcast or converted."""
    x = torch.ones(2, 3)
    with pytest.raises(ProgramError, match="silu, gelu, gelu_tanh, relu, found 'tanh'"):
        torch.ops.dllmc.glu(x, x, "tanh")
    for up in (torch.ones(1, 3), x.double()):
        with pytest.raises(ProgramError, match="one shape and dtype"):
            torch.ops.dllmc.glu(x, up, "silu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_glu_takes_no_memory(activation: str, dtype: torch.dtype) -> None:
    """It works in its output alone."""
    gate, up, _ = operands((50, 24), "one projection", dtype, activation)
    op, out = operator("dllmc.glu.default"), torch.empty(50, 24, dtype=dtype)
    assert op.workspace_bytes([gate, up], "cpu") == 0
    run = op.bind([gate, up, activation], [out], None)
    assert bytes_outside([gate, up, out], run) == 0
    assert blocks_taken(run) == []
