"""What the fused operators' fakes say of their results, which is the memory that a program plans for them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ops.calls import DTYPES, LAYOUTS, announced, laid_out, random

dllmc = torch.ops.dllmc


def calls(x: Tensor) -> dict[str, list[Any]]:
    """Operator -> operands of shape [1, 4, 6, 8], or [4, 6, 8] for heads, x among them."""
    y, weight = torch.ones_like(x), torch.ones(8, dtype=x.dtype)
    return {
        "rms_norm": [x, weight, None, 1e-6],
        "add_rms_norm": [x, y, weight, weight, 1e-6],
        "add_layer_norm": [x, y, None, None, 1e-6],
        "rope": [x[0], torch.ones(4, 8), torch.ones(4, 8), None],
        "glu": [x, y, "silu"],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", calls(torch.ones(1, 4, 6, 8)))
def test_a_result_is_as_announced(name: str, layout: str, dtype: torch.dtype) -> None:
    """Shape, dtype and strides, dense, from inputs of any layout; in memory of its own."""
    args = calls(laid_out(random(1, 4, 6, 8, seed=0, dtype=dtype), layout))[name]
    results = getattr(dllmc, name)(*args)
    results = results if isinstance(results, tuple) else (results,)
    for found, fake in zip(results, announced(name, args), strict=True):
        assert (found.shape, found.dtype, found.stride()) == (fake.shape, fake.dtype, fake.stride())
        last = sum((size - 1) * stride for size, stride in zip(found.shape, found.stride(), strict=True))
        assert last == found.numel() - 1
    memory = [t.untyped_storage().data_ptr() for t in (*results, *(a for a in args if isinstance(a, Tensor)))]
    assert len(set(memory[: len(results)])) == len(results)
    assert not set(memory[: len(results)]) & set(memory[len(results) :])


def test_norms_and_products_keep_the_order_of_axes_in_memory() -> None:
    """As the arithmetic does that they stand for, so that views of its results stay views; rope's heads are dense."""
    x = laid_out(random(1, 4, 6, 8, seed=0, dtype=torch.float32), "swapped")
    for name, args in calls(x).items():
        for fake in announced(name, args):
            assert fake.is_contiguous() if name == "rope" else fake.stride() == (x * 2).stride()


class Fused(nn.Module):
    """All fused operators, one after the other, over [1, tokens, 16]."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        normed, total = dllmc.add_rms_norm(x, x, None, None, 1e-6)
        heads = dllmc.rms_norm(normed.unflatten(-1, (2, 8)).transpose(1, 2), None, None, 1e-6)
        rotated = dllmc.rope(heads[0].transpose(0, 1), cos, sin, positions)
        normed, total = dllmc.add_layer_norm(rotated.flatten(1)[None], total, None, None, 1e-6)
        return dllmc.glu(normed, total, "gelu")


def test_the_number_of_tokens_stays_a_symbol() -> None:
    """No fake compares, or computes with, the one size that differs from step to step."""
    tokens = torch.export.Dim("tokens", min=2, max=1000)
    x, table, positions = torch.ones(1, 5, 16), torch.ones(12, 4), torch.arange(5)
    shapes = ({1: tokens}, None, None, {0: tokens})
    program = torch.export.export(Fused(), (x, table, table, positions), dynamic_shapes=shapes, strict=False)
    (result,) = (node.args[0] for node in program.graph.nodes if node.op == "output")
    assert isinstance(result[0].meta["val"].shape[1], torch.SymInt)
    assert program.module()(torch.ones(1, 9, 16), table, table, torch.arange(9)).shape == (1, 9, 16)
