"""Layer norm and RMS norm into given memory, against float64 formulas."""

import pytest
import torch
from torch import Tensor

from dllmc.errors import ProgramError
from dllmc.ops.norms import bind_layer_norm, bind_rms_norm, workspace_of

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of shape [1, 7, 24], with rows of very different scale; weight and bias [24]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 7, 24, generator=generator) * torch.logspace(-2, 2, 7)[:, None] + 0.5
    return x.to(dtype), *torch.randn(2, 24, generator=generator).to(dtype)


def run(bind: object, *args: object) -> Tensor:
    """Bind over an output and a workspace full of garbage, and call."""
    x = args[0]
    assert isinstance(x, Tensor)
    out = torch.full_like(x, torch.nan)
    workspace = torch.full((workspace_of([tuple(x.shape)]),), 255, dtype=torch.uint8)
    bind(args, [out], workspace)()  # type: ignore[operator]
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
