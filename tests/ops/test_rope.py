"""`dllmc::rope` against a rotation by complex numbers in float64."""

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllmc.errors import ProgramError
from dllmc.ops import chunks
from dllmc.ops.registry import operator
from dllmc.ops.rope import reference
from tests.ops.calls import DTYPES, WAYS, as_instruction, assert_rounded_once, call, random
from tests.ops.storages import blocks_taken, bytes_outside

MOST_POSITIONS = 13
LAYOUTS = ("dense", "one projection", "heads first")
TABLES = ("of tokens", "of half width", "gathered", "half width gathered")


def rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> Tensor:
    """x1 + i x2 times cos + i sin, where both halves have the same angles; else half by half, as the formula has it."""
    x, cos, sin = (t.double() if positions is None or t is x else t.double()[positions] for t in (x, cos, sin))
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    if cos.shape[-1] == half:
        turned = torch.complex(first, second) * torch.complex(cos, sin)[:, None]
        return torch.cat((turned.real, turned.imag), dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    left = first * cos[..., :half] - second * sin[..., :half]
    return torch.cat((left, second * cos[..., half:] + first * sin[..., half:]), dim=-1)


def heads(tokens: int, count: int, head_dim: int, layout: str, dtype: torch.dtype) -> Tensor:
    """[tokens, count, head_dim]: dense, a slice of a projection of several, or with heads before tokens in memory."""
    if layout == "one projection":
        return random(tokens, count + 3, head_dim, seed=1, dtype=dtype)[:, 2 : count + 2]
    if layout == "heads first":
        return random(count, tokens, head_dim, seed=1, dtype=dtype).transpose(0, 1)
    return random(tokens, count, head_dim, seed=1, dtype=dtype)


def operands(
    tokens: int, count: int, head_dim: int, layout: str, table: str, dtype: torch.dtype, table_dtype: torch.dtype
) -> list[Any]:
    """x, cos, sin, positions; cos and sin are any numbers, and differ between the halves where they have both."""
    positions = (torch.arange(tokens) * 7 + 3) % MOST_POSITIONS if "gathered" in table else None
    rows = tokens if positions is None else MOST_POSITIONS
    width = head_dim // 2 if "half" in table else head_dim
    cos, sin = (random(rows, width, seed=seed, dtype=table_dtype) for seed in (2, 3))
    return [heads(tokens, count, head_dim, layout, dtype), cos, sin, positions]


def launch(args: Sequence[Any], outs: Sequence[Tensor]) -> None:
    from dllmc.ops.kernels.rope import rope

    rope(*args, outs[0])


def check(args: Sequence[Any], way: str, device: str) -> None:
    (found,) = call(way, "rope", args, launch, device)
    assert found.is_contiguous()
    assert_rounded_once(found, rotated(*args), way, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(("way", "device"), WAYS)
def test_heads_are_rotated(way: str, device: str, table: str, dtype: torch.dtype) -> None:
    """Each by its token's angles, from any layout into a dense one, rounded once."""
    for layout in LAYOUTS:
        for tokens, count, head_dim in ((0, 2, 4), (1, 1, 2), (5, 3, 6), (9, 2, 64), (3, 17, 96)):
            check(operands(tokens, count, head_dim, layout, table, dtype, torch.float32), way, device)


@pytest.mark.parametrize("table_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("way", "device"), WAYS)
def test_tables_of_any_dtype(way: str, device: str, dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    """Everything is float32 inside, or float64 where x is, whatever the tables are."""
    for table in TABLES:
        args = operands(5, 2, 10, "dense", table, dtype, table_dtype)
        if dtype != torch.float64 and table_dtype == torch.float64:
            args[1:3] = [part.float().double() for part in args[1:3]]  # what float32 can hold
        check(args, way, device)


@pytest.mark.parametrize(("way", "device"), [each for each in WAYS if each.values[0] == "kernel"])
def test_the_kernel_reads_no_position_beyond_its_tables(way: str, device: str) -> None:
    """It takes their nearest row; nothing else guards a GPU's memory."""
    x, cos, sin, _ = operands(4, 2, 6, "dense", "gathered", torch.float32, torch.float32)
    beyond = torch.tensor([-1, MOST_POSITIONS, 1 << 40, -(1 << 40)])
    (found,) = call(way, "rope", [x, cos, sin, beyond], launch, device)
    nearest = beyond.clamp(0, MOST_POSITIONS - 1)
    assert_rounded_once(found, rotated(x, cos, sin, nearest), way, device)


@pytest.mark.parametrize(("way", "device"), WAYS)
def test_any_sizes(way: str, device: str) -> None:
    """Widths that are no power of two, and heads that are no multiple of what a program takes."""

    @settings(deadline=None, derandomize=True, max_examples=20)
    @given(
        st.integers(1, 5),
        st.integers(1, 40),
        st.integers(1, 150).map(lambda half: 2 * half),
        st.sampled_from(LAYOUTS),
        st.sampled_from(TABLES),
        st.sampled_from(DTYPES),
    )
    def any_size(tokens: int, count: int, head_dim: int, layout: str, table: str, dtype: torch.dtype) -> None:
        check(operands(tokens, count, head_dim, layout, table, dtype, torch.float32), way, device)

    any_size()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.integers(1, 12),
    st.integers(1, 1000),
    st.sampled_from(LAYOUTS),
    st.sampled_from(TABLES),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
)
def test_tokens_go_through_chunks(tokens, chunk, layout, table, dtype, table_dtype):
    """In chunks of a few tokens, or of one, the results are the same; and in a workspace planned for more tokens."""
    args = operands(tokens, 3, 8, layout, table, dtype, table_dtype)
    if dtype != torch.float64:
        args[1:3] = [part.float().to(table_dtype) for part in args[1:3]]
    planned_for = operands(12, 3, 8, "dense", table, dtype, table_dtype)
    with patch.object(chunks, "CHUNK_BYTES", chunk):
        (found,) = as_instruction("rope", args, planned_for)
    assert_rounded_once(found, rotated(*args), "instruction", "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table", TABLES)
def test_the_definition(table: str, dtype: torch.dtype) -> None:
    """The reference is the rotation, rounded once."""
    args = operands(5, 3, 6, "one projection", table, dtype, torch.float32)
    assert_rounded_once(reference(*args), rotated(*args), "reference", "cpu")


def test_a_rotation_keeps_lengths_and_the_angle_between_positions() -> None:
    """With real angles: the product of a query and a key depends on the distance of their positions alone."""
    angles = torch.arange(50, dtype=torch.float64)[:, None] * 10000.0 ** -torch.linspace(0, 1, 8, dtype=torch.float64)
    q, k = (random(1, 1, 16, seed=seed, dtype=torch.float64) for seed in (1, 2))

    def at(x: Tensor, position: int) -> Tensor:
        turned: Tensor = torch.ops.dllmc.rope(x, angles.cos(), angles.sin(), torch.tensor([position]))
        return turned.flatten()

    torch.testing.assert_close(at(q, 41).norm(), q.norm())
    torch.testing.assert_close(at(q, 12) @ at(k, 5), at(q, 43) @ at(k, 36))


@pytest.mark.parametrize("shapes", [((3, 2, 7), (3, 7)), ((3, 2, 8), (3, 6)), ((3, 2, 8), (3, 16))])
def test_tables_must_fit_the_heads(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Heads of odd width, and tables of another width than the head or its half, are refused."""
    x, table = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ProgramError, match="rope of heads"):
        torch.ops.dllmc.rope(x, table, table, None)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("table", TABLES)
def test_rope_takes_no_memory(table: str, dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    """Everything is in the output and the planned workspace, which holds heads that are turned where they are."""
    args = operands(50, 3, 32, "one projection", table, dtype, table_dtype)
    tensors = [arg for arg in args if arg is not None]
    op = operator("dllmc.rope.default")
    workspace = torch.empty(op.workspace_bytes(tensors, "cpu"), dtype=torch.uint8)
    for out in (torch.empty(50, 3, 32, dtype=dtype), args[0]):
        run = op.bind(args, [out], workspace)
        assert bytes_outside([*tensors, out, workspace], run) == 0
        assert blocks_taken(run) == []
