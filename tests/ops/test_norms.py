"""Layer norm and RMS norm, of a tensor or of a residual sum, against float64 formulas."""

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
from dllmc.ops.norms import layer_norm_reference, rms_norm_reference
from dllmc.ops.registry import operator
from tests.ops.calls import DTYPES, HALF, LAYOUTS, WAYS, as_instruction, assert_rounded_once, call, laid_out, random
from tests.ops.storages import blocks_taken, bytes_outside

EPS = 1e-5
NAMES = ("rms_norm", "add_rms_norm", "add_layer_norm")
SHAPES = ((1,), (300,), (0, 8), (1, 7), (5, 64), (1, 9, 24), (1, 3, 5, 33), (2, 4, 3, 16))


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, centred: bool, eps: float = EPS) -> Tensor:
    """In float64: x, less its mean if centred, over the root of its mean square; weight and bias."""
    x = x.double()
    if centred:
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    x = x if weight is None else x * weight.double()
    return x if bias is None else x + bias.double()


def operands(name: str, shape: Sequence[int], layout: str, dtype: torch.dtype, affine: str, seed: int = 0) -> list[Any]:
    """x, a residual of another layout where there is one, weight and bias if `affine` names them, and eps."""
    addends = [laid_out(random(*shape, seed=seed, dtype=dtype), layout)]
    if name.startswith("add"):
        addends.append(random(*shape, seed=seed + 1, dtype=dtype))
    weight = random(shape[-1], seed=seed + 2, dtype=dtype) if "weight" in affine else None
    bias = random(shape[-1], seed=seed + 3, dtype=dtype) if "bias" in affine else None
    return [*addends, weight, bias, EPS]


def launch(args: Sequence[Any], outs: Sequence[Tensor], centred: bool) -> None:
    from dllmc.ops.kernels.norm import norm as kernel

    *addends, weight, bias, eps = args
    x, residual = addends if len(addends) > 1 else (addends[0], None)
    kernel(x, residual, weight, bias, eps, outs[0], outs[1] if len(outs) > 1 else None, centred=centred)


def check(name: str, args: Sequence[Any], way: str, device: str) -> None:
    """The norm, and the sum that it is of."""
    *addends, weight, bias, _ = args
    centred = name == "add_layer_norm"
    found, *sums = call(way, name, args, lambda args, outs: launch(args, outs, centred), device)
    normed = addends[0]
    if sums:
        normed = sums[0]
        assert_rounded_once(normed, addends[0].double() + addends[1].double(), way, device)
    assert_rounded_once(found, norm(normed, weight, bias, centred), way, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("way", "device"), WAYS)
def test_a_norm_is_its_formula(way: str, device: str, name: str, dtype: torch.dtype) -> None:
    """Row by row, rounded once: any number of rows and axes, in any layout, in every way to call it."""
    for shape in SHAPES:
        for layout in LAYOUTS:
            check(name, operands(name, shape, layout, dtype, "weight bias"), way, device)


@pytest.mark.parametrize("affine", ["", "weight", "bias"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("way", "device"), WAYS)
def test_weight_and_bias_may_be_absent(way: str, device: str, name: str, affine: str) -> None:
    """Either, or both."""
    for dtype in (torch.float32, torch.float16):
        check(name, operands(name, (3, 20), "dense", dtype, affine), way, device)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("way", "device"), WAYS)
def test_any_rows_and_any_width(way: str, device: str, name: str) -> None:
    """Widths that are no power of two, rows that are no multiple of what a program or a chunk takes."""

    @settings(deadline=None, derandomize=True, max_examples=15)
    @given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 300), st.sampled_from(LAYOUTS), st.sampled_from(DTYPES))
    def any_size(first: int, second: int, width: int, layout: str, dtype: torch.dtype) -> None:
        check(name, operands(name, (first, second, width), layout, dtype, "weight bias", seed=width), way, device)

    any_size()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_go_through_chunks(name: str, dtype: torch.dtype) -> None:
    """In chunks of a few rows, or of one, the results are the same; and in a workspace planned for more rows."""

    @settings(deadline=None, derandomize=True, max_examples=40)
    @given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(1, 800), st.sampled_from(LAYOUTS))
    def in_chunks(leading: list[int], chunk: int, layout: str) -> None:
        args = operands(name, (*leading, 10), layout, dtype, "weight bias")
        planned_for = operands(name, (*(6 for _ in leading), 10), "dense", dtype, "weight bias")
        with patch.object(chunks, "CHUNK_BYTES", chunk):
            found, *sums = as_instruction(name, args, planned_for)
        normed = sums[0] if sums else args[0]
        assert_rounded_once(found, norm(normed, *args[-3:-1], name == "add_layer_norm"), "instruction", "cpu")

    in_chunks()


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm"])
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_another_dtype(name: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """They are taken as float32, or as float64 where x is; the result is of x's dtype."""
    args = operands(name, (3, 24), "dense", dtype, "weight bias")
    args[-3:-1] = [parameter.to(weight_dtype) for parameter in args[-3:-1]]
    check(name, args, "instruction", "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_very_different_scale(dtype: torch.dtype) -> None:
    """Statistics are each row's own, whatever its scale, and eps keeps a row of zeros what it is."""
    scales = torch.tensor([0, 1e-3, 1, 1e3], dtype=dtype)[:, None]
    args = [random(4, 40, seed=0, dtype=dtype) * scales, None, None, EPS]
    check("rms_norm", args, "instruction", "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reference", [rms_norm_reference, layer_norm_reference])
def test_the_definition(reference: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """The reference is the formula, rounded once."""
    x, weight, bias, _ = operands("rms_norm", (3, 24), "swapped", dtype, "weight bias")
    for parameters in ((weight, bias), (weight, None), (None, None)):
        expected = norm(x, *parameters, centred=reference is layer_norm_reference)
        assert_rounded_once(reference(x, *parameters, EPS), expected, "reference", "cpu")


def torch_norm(name: str, x: Tensor, *args: object) -> Tensor:
    """`aten.<name>` bound over an output and a workspace full of garbage."""
    op, out = operator(f"aten.{name}.default"), torch.full(x.shape, torch.nan, dtype=x.dtype)
    workspace = torch.full((op.workspace_bytes([x, *(a for a in args if isinstance(a, Tensor))], "cpu"),), 255).byte()
    op.bind([x, *args], [out], workspace)()
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_norms(dtype: torch.dtype) -> None:
    """aten.layer_norm and aten.rms_norm with and without their optional operands, whose defaults are torch's own."""
    x, weight, bias, _ = operands("rms_norm", (1, 7, 24), "dense", dtype, "weight bias")
    least = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for found, expected in (
        (torch_norm("layer_norm", x, [24]), norm(x, None, None, True, 1e-5)),
        (torch_norm("layer_norm", x, [24], weight, bias, 1e-3), norm(x, weight, bias, True, 1e-3)),
        (torch_norm("rms_norm", x, [24]), norm(x, None, None, False, least)),
        (torch_norm("rms_norm", x, [24], weight, None), norm(x, weight, None, False, least)),
        (torch_norm("rms_norm", x, [24], weight, 1e-3), norm(x, weight, None, False, 1e-3)),
    ):
        assert_rounded_once(found, expected, "instruction", "cpu")


def test_only_the_last_dimension() -> None:
    """A norm over several dimensions is refused when it is bound."""
    with pytest.raises(ProgramError, match=r"last dimension \[24\]"):
        torch_norm("layer_norm", torch.ones(1, 7, 24), [7, 24])


@pytest.mark.parametrize("residual", [torch.ones(1, 4), torch.ones(3, 4).bfloat16()], ids=["shape", "dtype"])
def test_addends_are_alike(residual: Tensor) -> None:
    """A residual that would be broadcast or converted is refused."""
    for name in NAMES[1:]:
        with pytest.raises(ProgramError, match="one shape and dtype"):
            getattr(torch.ops.dllmc, name)(torch.ones(3, 4), residual, None, None, EPS)


def bound(name: str, args: Sequence[Any]) -> tuple[Callable[[], object], list[Tensor]]:
    """The call, over dense memory; and all memory that it may touch."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    op = operator(f"dllmc.{name}.default")
    outs = [torch.empty_like(tensors[0]) for _ in range(2 if name.startswith("add") else 1)]
    workspace = torch.empty(op.workspace_bytes(tensors, "cpu"), dtype=torch.uint8)
    return op.bind(args, outs, workspace), [*tensors, *outs, workspace]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm"])
def test_rms_norm_takes_no_memory(name: str, dtype: torch.dtype) -> None:
    """Everything is in the outputs and the planned workspace."""
    run, memory = bound(name, operands(name, (1, 50, 24), "columns", dtype, "weight bias"))
    assert bytes_outside(memory, run) == 0
    assert blocks_taken(run) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_norm_takes_a_chunk(dtype: torch.dtype) -> None:
    """However many rows there are, torch's kernel is given a chunk of them, and takes no more than its result."""
    with patch.object(chunks, "CHUNK_BYTES", 8 * 1024):
        run, _ = bound("add_layer_norm", operands("add_layer_norm", (256, 1024), "dense", dtype, "weight"))
        assert max(blocks_taken(run)) == 8 * 1024


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_workspace_of_half_precision_is_a_chunk(dtype: torch.dtype) -> None:
    """Few rows or many, one long row too: what is widened is at most a chunk, or a row, and the weights."""
    for shape, elements in (((1, 3, 64), 192), ((1, 10**6, 64), chunks.CHUNK_BYTES // 2), ((2, 10**6), 10**6)):
        x, weight = (torch.empty(s, dtype=dtype, device="meta") for s in (shape, shape[-1:]))
        size = operator("dllmc.rms_norm.default").workspace_bytes([x, weight], "cpu")
        rows = elements // shape[-1]
        assert 4 * (elements + rows + shape[-1]) <= size <= 4 * (elements + rows + shape[-1]) + 4 * 8
