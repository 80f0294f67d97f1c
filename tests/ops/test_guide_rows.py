"""`dllmc::guide_rows` against its formula: u + (s + 1)(c - u) for the guided rows, the others as they are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllmc.ops.registry import operator
from tests.ops.calls import DTYPES, LAYOUTS, WAYS, call, laid_out, on_device
from tests.ops.launches import replayed


def case(rows: int, guided: list[int], scales: list[float], width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(rows + len(guided), width, generator=torch.Generator().manual_seed(rows))
    return hidden, torch.tensor(guided, dtype=torch.int64), torch.tensor(scales, dtype=torch.float32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    rows = draw(st.integers(1, 12))
    guided = draw(st.lists(st.integers(0, rows - 1), max_size=rows, unique=True))
    scales = draw(st.lists(st.floats(0, 8), min_size=len(guided), max_size=len(guided)))
    return case(rows, guided, scales, width=draw(st.integers(1, 9)))


def result(args: tuple[Tensor, ...], way: str, device: str) -> Tensor:
    def launch(args, outs):
        from dllmc.ops.kernels.guide_rows import guide_rows

        guide_rows(*args, *outs)

    (out,) = call(way, "guide_rows", args, launch, device)
    return out


def expected(hidden: Tensor, guided: Tensor, guidance: Tensor) -> Tensor:
    """The formula in float64, row by row."""
    rows = hidden[: len(hidden) - len(guided)].double()
    for row, twin, scale in zip(guided.tolist(), hidden[len(rows) :].double(), guidance.tolist(), strict=True):
        rows[row] = twin + (scale + 1) * (rows[row] - twin)
    return rows


@pytest.mark.parametrize(("way", "device"), WAYS)
def test_guided_rows_move_away_from_their_twins(way: str, device: str) -> None:
    """The formula row by row; rows that are not guided come out bit for bit; the input is left as it is."""

    @settings(deadline=None, derandomize=True, max_examples=40)
    @given(cases())
    def any_case(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, guided, _ = drawn
        before = hidden.clone()
        out = result(drawn, way, device)
        assert torch.equal(hidden, before)
        torch.testing.assert_close(out.double(), expected(*drawn), rtol=1e-5, atol=1e-5)
        others = [row for row in range(len(out)) if row not in guided.tolist()]
        assert torch.equal(out[others], hidden[others])

    any_case()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("way", "device"), WAYS)
def test_dtypes_layouts_and_wide_rows(way: str, device: str, dtype: torch.dtype) -> None:
    """In the dtype of the hidden rows, of strided ones too, wider than a program takes."""
    hidden, guided, guidance = case(6, [5, 0], [0.5, 2.0], width=1500)
    for layout in LAYOUTS:
        args = laid_out(hidden.to(dtype), layout), guided, guidance
        tolerance = 4 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        out = result(args, way, device)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected(*args), rtol=tolerance, atol=8 * tolerance)


@pytest.mark.parametrize(("way", "device"), WAYS)
def test_twins_that_share_a_padding_row(way: str, device: str) -> None:
    """Padding names one row several times: it is guided by one of its twins, and no other row is touched."""
    hidden, guided, guidance = case(7, [3, 6, 6, 6, 1], [1.0, 2.0, 0.5, 0.0, 4.0])
    out = result((hidden, guided, guidance), way, device)
    alone = [expected(torch.cat((hidden[:7], hidden[7 + twin, None])), guided[twin, None], guidance[twin, None])[6]
             for twin in (1, 2, 3)]  # fmt: skip
    assert any(torch.allclose(out[6].double(), row, rtol=1e-5, atol=1e-5) for row in alone)
    rest = [0, 4]  # of the twins
    others = expected(torch.cat((hidden[:7], hidden[7:][rest])), guided[rest], guidance[rest])
    torch.testing.assert_close(out[:6].double(), others[:6], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("way", "device"), [way for way in WAYS if "kernel" in way.id])
def test_rows_that_do_not_exist_are_not_written(way: str, device: str) -> None:
    """A GPU checks no index: twins of rows behind the last, or before the first, guide none."""
    hidden, guided, guidance = case(4, [4, -1, 2**40, 2], [1.0, 1.0, 1.0, 3.0])
    out = result((hidden, guided, guidance), way, device)
    twin = torch.cat((hidden[:4], hidden[7:]))
    torch.testing.assert_close(out.double(), expected(twin, guided[3:], guidance[3:]), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_recorded_call_reads_its_twins_anew() -> None:
    """It never waits for the GPU; replayed with other rows, twins and guidance."""
    args, others = case(9, [3, 1, 7], [1.0, 0.5, 2.0]), case(9, [0, 8, 7], [4.0, 0.25, 1.0])
    placed = [on_device(x, "cuda") for x in args]
    out = torch.empty(9, 5, device="cuda")
    run = operator("dllmc.guide_rows.default").bind(placed, [out], None)
    replayed(run, lambda: [x.copy_(other) for x, other in zip(placed, others, strict=True)])
    torch.testing.assert_close(out.cpu().double(), expected(*others), rtol=1e-5, atol=1e-5)


def test_the_fake_announces_the_result() -> None:
    """The shape and dtype of the rows without their twins."""
    args = case(6, [1, 4], [1.0, 3.0])
    found, meta = torch.ops.dllmc.guide_rows(*args), torch.ops.dllmc.guide_rows(*(x.to("meta") for x in args))
    assert (meta.shape, meta.dtype) == (found.shape, found.dtype)
