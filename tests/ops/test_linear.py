"""`aten.linear` in each dtype, by torch's own GEMM and widened to float32, against products in float64."""

import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllmc.errors import ProgramError
from dllmc.ops import linear
from dllmc.ops.linear import HALF, Tiling, has_native_gemm, widened, workspace_bytes, workspace_of
from dllmc.ops.registry import operator
from tests.ops.launches import replayed
from tests.ops.storages import bytes_outside

UNTOUCHED = 77.0
SINGLE = 2**-24  # half a unit in the last place of float32


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def native(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    linear.native(x, weight, bias, out)()


def in_float32(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """In exactly the workspace that is planned, full of garbage."""
    workspace = torch.full((workspace_of([x, weight]),), 255, dtype=torch.uint8)
    widened(x, weight, bias, out, workspace)


def assert_rounded_once(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """What one rounding to the dtype explains, after sums in float32."""
    wide, of = x.double(), weight.double().T
    exact, size = wide @ of, wide.abs() @ of.abs()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    sums = 16 * SINGLE * size
    rounding = torch.finfo(found.dtype).eps / 2 * (exact.abs() + sums)
    assert ((found.double() - exact).abs() <= sums + rounding + 2**-25).all()  # 2**-25: float16's smallest numbers


@pytest.mark.parametrize("run", [native, in_float32])
@pytest.mark.parametrize("dtype", HALF)
@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.sampled_from([0, 1, 2, 31, 64, 65, 130]),
    st.sampled_from([(1, 1), (7, 300), (64, 33), (300, 5000), (70_001, 40), ((1 << 20) + 3, 3)]),
    st.booleans(),
    st.booleans(),
)
def test_half_precision_is_rounded_once(
    run: Callable[[Tensor, Tensor, Tensor | None, Tensor], None],
    dtype: torch.dtype,
    rows: int,
    matrix: tuple[int, int],
    biased: bool,
    windows: bool,
) -> None:
    """Rows, widths and columns that no tile divides; x, weight and out dense, or windows on wider memory."""
    width, columns = matrix
    rows = min(rows, 4) if width > 1 << 20 else rows
    apart = 3 if windows else 0
    x = random(rows, width + apart, dtype=dtype, seed=1)[:, apart:]
    weight = random(columns, width + apart, dtype=dtype, seed=2)[:, apart:] / width**0.5
    bias = random(columns, dtype=dtype, seed=3) if biased else None
    memory = torch.full((rows, columns + apart), UNTOUCHED, dtype=dtype)
    run(x, weight, bias, memory[:, apart:])
    assert_rounded_once(memory[:, apart:], x, weight, bias)
    assert (memory[:, :apart] == UNTOUCHED).all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat((x, x), dim=-1)[..., 6:],
        lambda x: x[:, ::2],
    ],
    ids=("row-major", "rows in another order", "a window on wider rows", "every second row"),
)
@pytest.mark.parametrize("biased", [False, True], ids=("plain", "bias"))
def test_an_instruction_is_one_product_over_all_rows(
    make: Callable[[Tensor], Tensor], biased: bool, dtype: torch.dtype
) -> None:
    """[..., in] by [out, in]: leading axes merge wherever their strides allow it; calls repeat."""
    x, weight = make(random(1, 5, 6, dtype=dtype, seed=0)), random(7, 6, dtype=dtype, seed=2)
    bias = random(7, dtype=dtype, seed=3) if biased else None
    out = torch.full((1, x.shape[1], 7), UNTOUCHED, dtype=dtype)
    found = operator("aten.linear.default")
    workspace = torch.full((found.workspace_bytes([x, weight], "cpu"),), 255, dtype=torch.uint8)
    call = found.bind([x, weight, *([] if bias is None else [bias])], [out], workspace)
    for _ in range(2):
        out.fill_(UNTOUCHED)
        call()
        assert_rounded_once(out[0], x[0], weight, bias)


def test_rows_that_do_not_merge_are_refused() -> None:
    """Lowering copies them first; nothing is copied in secret."""
    heads_first = torch.ones(5, 2, 4).transpose(0, 1)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        operator("aten.linear.default").bind([heads_first, torch.ones(3, 4)], [torch.empty(2, 5, 3)], None)


sizes = st.integers(1, 5000)


@given(st.integers(0, 5000), sizes, st.integers(1, 3_000_000), st.integers(1, 50_000))
@settings(deadline=None, derandomize=True, max_examples=300)
def test_workspace_suffices_for_fewer_rows_and_is_bounded(rows: int, more: int, width: int, columns: int) -> None:
    """What is planned for the most rows fits any call with as many or fewer, and stays below 14 MiB and a few rows."""
    tiling = Tiling.of(rows, width, columns)
    used = tiling.rows * width + tiling.columns * width + tiling.rows * tiling.columns + columns
    planned = workspace_bytes(rows + more, width, columns)
    assert 4 * used <= planned <= (14 << 20) + 4 * (2 * width + columns)
    assert 0 < tiling.columns <= columns


@pytest.mark.parametrize("rows", [1, 5, 31, 32, 33, 60])
@pytest.mark.parametrize("with_bias", [False, True])
def test_few_rows_of_float32(rows: int, with_bias: bool) -> None:
    """The product is made in the workspace and turned; out may be columns of something wider. Nothing is allocated."""
    x, weight = random(rows, 300, dtype=torch.float32, seed=1), random(77, 300, dtype=torch.float32, seed=2)
    bias = random(77, dtype=torch.float32, seed=3) if with_bias else None
    around = torch.full((rows, 90), UNTOUCHED)
    out = around[:, 5:82]
    workspace = torch.full((workspace_of([x, weight]),), 255, dtype=torch.uint8)
    call = operator("aten.linear.default").bind([x, weight, bias], [out], workspace)
    operands = [t for t in (x, weight, bias, around, workspace) if t is not None]
    assert bytes_outside(operands, call) == 0
    assert_rounded_once(out, x, weight, bias)
    assert (around[:, :5] == UNTOUCHED).all()
    assert (around[:, 82:] == UNTOUCHED).all()


def test_workspace_by_dtype() -> None:
    """In float32 the product of few rows; what every CPU multiplies as it is, float64, needs none."""
    x, weight = torch.ones(1, 4, 8), torch.ones(3, 8)
    assert [workspace_of([x.to(d), weight.to(d)]) for d in (torch.float32, torch.float64)] == [4 * 4 * 3, 0]
    assert workspace_of([torch.ones(1, 50, 8), weight]) == 4 * 32 * 3
    assert [workspace_of([x.to(d), weight.to(d)]) for d in HALF] == [4 * (4 * 8 + 3 * 8 + 4 * 3 + 3)] * 2


@pytest.mark.parametrize("rows", [5, 70, 1500])
def test_widening_allocates_nothing(rows: int) -> None:
    """Everything is in the operands and the planned workspace."""
    x, weight, bias, out = (random(*s, dtype=torch.bfloat16, seed=0) for s in ((rows, 64), (70, 64), (70,), (rows, 70)))
    workspace = torch.empty(workspace_of([x, weight]), dtype=torch.uint8)
    operands = [x, weight, bias, out, workspace]
    assert bytes_outside(operands, lambda: widened(*operands)) == 0
    assert bytes_outside(operands, lambda: x + x) == x.nbytes


def test_too_small_a_workspace_is_an_error() -> None:
    """The message says how much is needed and how much there is."""
    x, weight, out = (torch.ones(shape, dtype=torch.bfloat16) for shape in ((4, 8), (3, 8), (4, 3)))
    with pytest.raises(ProgramError, match="4 rows of 8 by 3 need a workspace of 284 bytes, found 283"):
        widened(x, weight, None, out, torch.empty(283, dtype=torch.uint8))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other CPUs have other names for what they can do")
def test_the_cpu_is_asked_for_its_instructions() -> None:
    """As the kernel lists them; float32 and float64 need none."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert has_native_gemm(torch.bfloat16) == ("avx512_bf16" in flags)
    assert has_native_gemm(torch.float16) == ("avx512_fp16" in flags)
    assert has_native_gemm(torch.float32)
    assert has_native_gemm(torch.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_gpu_multiplies_every_dtype_itself(dtype: torch.dtype, biased: bool) -> None:
    """Few rows and many, into a window; it never waits for the GPU, and leaves the workspace alone."""
    for rows in (1, 32, 200):
        x, other = (random(rows, 300, dtype=dtype, seed=seed) for seed in (1, 2))
        weight, bias = random(70, 300, dtype=dtype, seed=3), random(70, dtype=dtype, seed=4) if biased else None
        placed = [None if t is None else t.cuda() for t in (x, weight, bias)]
        out = torch.full((rows, 90), UNTOUCHED, dtype=dtype, device="cuda")
        workspace = torch.full((1 << 20,), 255, dtype=torch.uint8, device="cuda")
        run = linear.bind(placed, [out[:, 10:80]], workspace)
        replayed(run, lambda placed=placed, other=other: placed[0].copy_(other))
        wide = other.double(), weight.double().T
        exact = wide[0] @ wide[1] + (0 if bias is None else bias.double())
        allowed = torch.finfo(dtype).eps * (wide[0].abs() @ wide[1].abs() + 1)
        assert ((out[:, 10:80].cpu().double() - exact).abs() <= allowed).all()
        assert torch.cat((out[:, :10], out[:, 80:]), dim=1).eq(UNTOUCHED).all()
        assert workspace.eq(255).all()
