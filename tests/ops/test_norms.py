"""Layer norm and RMS norm into given memory, against float64 formulas."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllmc.errors import ProgramError
from dllmc.ops.norms import (
    CHUNK_BUDGET,
    bind_layer_norm,
    bind_rms_norm,
    layer_norm_workspace,
    rms_norm_workspace,
)
from tests.ops.storages import bytes_outside

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of shape [1, 7, 24], with rows of very different scale; weight and bias [24]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 7, 24, generator=generator) * torch.logspace(-2, 2, 7)[:, None] + 0.5
    return x.to(dtype), *torch.randn(2, 24, generator=generator).to(dtype)


def run(
    bind: Callable[..., Callable[[], object]], x: Tensor, *args: object, planned_for: Tensor | None = None
) -> Tensor:
    """Bind over an output and a workspace full of garbage, planned for a larger x if one is given, and call."""
    out = torch.full(x.shape, torch.nan, dtype=x.dtype)
    needed = layer_norm_workspace if bind is bind_layer_norm else rms_norm_workspace
    workspace = torch.full((needed([x if planned_for is None else planned_for]),), 255, dtype=torch.uint8)
    bind([x, *args], [out], workspace)()
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm(dtype: torch.dtype, affine: bool) -> None:
    """(x - mean) / sqrt(variance + eps) * weight + bias, row by row."""
    x, weight, bias = inputs(dtype)
    wide = x.double()
    expected = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    if affine:
        expected = expected * weight.double() + bias.double()
    found = run(bind_layer_norm, x, [24], *((weight, bias, 1e-5) if affine else ()))
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("eps", [1e-6, None])
@pytest.mark.parametrize("affine", [True, False])
def test_rms_norm(dtype: torch.dtype, eps: float | None, affine: bool) -> None:
    """Gives x / sqrt(mean(x^2) + eps) * weight, row by row; without eps, the dtype's own."""
    x, weight, _ = inputs(dtype)
    wide = x.double()
    least = torch.finfo(torch.float32).eps if eps is None else eps
    expected = wide / (wide.square().mean(-1, keepdim=True) + least).sqrt()
    if affine:
        expected = expected * weight.double()
    found = run(bind_rms_norm, x, [24], weight if affine else None, eps)
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_only_the_last_dimension() -> None:
    """A norm over several dimensions is refused when it is bound."""
    x, *_ = inputs(torch.float32)
    with pytest.raises(ProgramError, match=r"last dimension \[24\]"):
        run(bind_layer_norm, x, [7, 24])


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.permutations([1, st.integers(0, 40), st.integers(1, 5)]),
    st.sampled_from([3000, 7000]),
    st.booleans(),
    st.data(),
)
def test_rms_norm_of_half_precision_rounds_once(dtype, dims, width, window, data):
    """Whatever axis is long, in chunks of any length, on views, and in a workspace planned for longer axes."""
    shape = [dim if isinstance(dim, int) else data.draw(dim) for dim in dims]
    longest = [dim if isinstance(dim, int) else 40 for dim in dims]
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(*shape, width + 8, generator=generator).to(dtype)[..., 8:]
    x = x if window else x.contiguous()
    weight = torch.randn(width, generator=generator).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    planned_for = torch.empty(*longest, width, dtype=dtype, device="meta")
    found = run(bind_rms_norm, x, [width], weight, 1e-6, planned_for=planned_for)
    torch.testing.assert_close(found.double(), expected, rtol=(0.5 + 1e-3) * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rms_norm_allocates_nothing(dtype: torch.dtype) -> None:
    """Everything is in the output and the planned workspace."""
    x, weight, _ = inputs(dtype)
    out, workspace = torch.empty_like(x), torch.empty(rms_norm_workspace([x]), dtype=torch.uint8)
    call = bind_rms_norm([x, [24], weight, 1e-6], [out], workspace)
    assert bytes_outside([x, weight, out, workspace], call) == 0


def test_the_workspace_of_half_precision_is_a_chunk() -> None:
    """Few rows or many, one long row too: what is widened is at most a chunk, or a row."""
    for shape, elements in (((1, 3, 64), 192), ((1, 10**6, 64), CHUNK_BUDGET), ((2, 10**6), 10**6)):
        x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        assert 2 * 4 * elements <= rms_norm_workspace([x]) <= 2 * 4 * elements + 4 * (elements // 64 + shape[-1])
        assert layer_norm_workspace([x]) == 0
