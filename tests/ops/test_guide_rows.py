"""`dllmc::guide_rows` against its formula: u + (s + 1)(c - u) for the guided rows, the others as they are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllmc.ops.guide_rows import guide_rows_out
from dllmc.ops.registry import operator


def case(rows: int, guided: list[int], scales: list[float], width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(rows + len(guided), width, generator=torch.Generator().manual_seed(rows))
    return hidden, torch.tensor(guided, dtype=torch.int64), torch.tensor(scales, dtype=torch.float32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    rows = draw(st.integers(1, 12))
    guided = draw(st.lists(st.integers(0, rows - 1), max_size=rows, unique=True))
    scales = draw(st.lists(st.floats(0, 8), min_size=len(guided), max_size=len(guided)))
    return case(rows, guided, scales, width=draw(st.integers(1, 9)))


@settings(deadline=None, derandomize=True)
@given(cases())
def test_guided_rows_move_away_from_their_twins(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    """The formula in float64 row by row; rows that are not guided come out bit for bit."""
    hidden, guided, guidance = drawn
    rows = len(hidden) - len(guided)
    out = torch.empty(rows, hidden.shape[1])
    guide_rows_out(hidden, guided, guidance, out)
    twin_of = {row: (hidden[rows + i].double(), float(guidance[i])) for i, row in enumerate(guided.tolist())}
    for row in range(rows):
        if row not in twin_of:
            assert torch.equal(out[row], hidden[row])
            continue
        twin, scale = twin_of[row]
        expected = twin + (scale + 1) * (hidden[row].double() - twin)
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-5, atol=1e-5)


def test_without_guided_rows_all_are_copied() -> None:
    """No twins: the output is the hidden rows."""
    hidden, guided, guidance = case(4, [], [])
    out = torch.empty(4, 5)
    guide_rows_out(hidden, guided, guidance, out)
    assert torch.equal(out, hidden)


def test_the_input_is_left_as_it_is() -> None:
    """Hidden rows may be read again."""
    hidden, guided, guidance = case(4, [2], [1.5])
    before = hidden.clone()
    guide_rows_out(hidden, guided, guidance, torch.empty(4, 5))
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """In the dtype of the hidden rows."""
    hidden, guided, guidance = case(6, [5, 0], [0.5, 2.0])
    hidden = hidden.to(dtype)
    out = torch.empty(6, 5, dtype=dtype)
    guide_rows_out(hidden, guided, guidance, out)
    twins = hidden[6:].double()
    expected = hidden[:6].double()
    expected[[5, 0]] = twins + (guidance[:, None].double() + 1) * (expected[[5, 0]] - twins)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=4 * tolerance)


def test_as_a_torch_operator_and_as_an_instruction() -> None:
    """From strided rows, into strided rows; the graph's call returns the same."""
    hidden, guided, guidance = case(6, [1, 4], [1.0, 3.0])
    apart = torch.stack((hidden, hidden), dim=1).flatten(0, 1)[::2]
    written = torch.full((6, 10), 77.0)
    operator("dllmc.guide_rows.default").bind([apart, guided, guidance], [written[:, ::2]], None)()
    returned = torch.ops.dllmc.guide_rows(hidden, guided, guidance)
    assert torch.equal(written[:, ::2], returned)
    assert written[:, 1::2].eq(77).all()
    meta = torch.ops.dllmc.guide_rows(*(x.to("meta") for x in (hidden, guided, guidance)))
    assert (meta.shape, meta.dtype) == (returned.shape, returned.dtype)
