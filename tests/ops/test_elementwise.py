"""Torch's operators as programs call them: into memory that they are given, in any dense layout."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dllmc.ops import elementwise
from dllmc.ops.registry import operator

aten = torch.ops.aten


def values(*shape: int, seed: int = 0) -> Tensor:
    """Positive and negative float32 values, none near 0."""
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 0.25
    return x * (1 - 2 * (torch.arange(x.numel()).view(shape) % 3 == 0))


def strided(x: Tensor) -> Tensor:
    """The same values in other memory: axes in another order, and every second element of the last."""
    wide = torch.zeros(*reversed(x.shape), 2)
    view = wide[..., 1].permute([*reversed(range(x.dim()))])
    return view.copy_(x)


def output_like(x: Tensor, layout: str) -> Tensor:
    """Dense memory for a result: row-major, or axes in reverse, or from the middle of an arena."""
    if layout == "reversed":
        return torch.full(tuple(reversed(x.shape)), 77, dtype=x.dtype).permute([*reversed(range(x.dim()))])
    arena = torch.full((x.numel() + 16,), 77, dtype=x.dtype)
    return arena[8 : 8 + x.numel()].view(x.shape)


X, Y = values(2, 5, 6), values(2, 5, 6, seed=1)
ROWS = torch.tensor([3, 0, 0, 2])
CALLS: dict[str, list[list[Any]]] = {
    **{f"aten.{name}.default": [[X]] for name in ("abs", "cos", "erf", "exp", "neg", "reciprocal", "relu", "sigmoid")},
    **{f"aten.{name}.default": [[X]] for name in ("silu", "sin", "square", "tanh", "gelu")},
    **{f"aten.{name}.default": [[X.abs()]] for name in ("log", "rsqrt", "sqrt")},
    **{f"aten.{name}.Tensor": [[X, Y], [X, 2.5], [X, Y[:, :1]], [X[0], Y]] for name in ("add", "sub", "mul", "div")},
    **{f"aten.{name}.Scalar": [[X, 2.5], [X, 3]] for name in ("add", "sub", "mul", "div")},
    "aten.rsub.Scalar": [[X, 2.5], [X, 3], [X, 0.5, 3], [X.half(), 0.1], [ROWS, 5], [X.double(), 0.1]],
    **{f"aten.{name}.default": [[X, Y], [X, Y[:1]]] for name in ("maximum", "minimum")},
    "aten.clamp.default": [[X, -0.5, 0.5], [X, None, 0.5], [X, -0.5]],
    "aten.clamp_max.default": [[X, 0.5], [ROWS, 1]],
    "aten.clamp_min.default": [[X, 0.5]],
    "aten.pow.Scalar": [[2.0, X]],
    "aten.pow.Tensor_Scalar": [[X, 2], [X.abs(), 0.5], [ROWS, 2]],
    "aten.pow.Tensor_Tensor": [[X.abs(), Y]],
    "aten.amax.default": [[X, [-1], True], [X, [0, 1]]],
    "aten.mean.dim": [[X, [-1], True], [X, [1]]],
    "aten.sum.dim_IntList": [[X, [-1], True], [X, [0, 2]], [X, None]],
    "aten.softmax.int": [[X, -1], [X.double(), 1], [X.bfloat16(), -1, torch.float32]],
    "aten.log_softmax.int": [[X, -1]],
    "aten.matmul.default": [[X, Y.transpose(1, 2)], [X, Y[0, 0]], [Y[0, 0][:, None], Y[0, 1][None]], [X, Y[0].T]],
    **{f"aten.{name}.Tensor": [[X, Y], [X[0], Y]] for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{f"aten.{name}.Scalar": [[X, 0.5], [ROWS, 2]] for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "aten.__and__.Tensor": [[X > 0, Y > 0], [ROWS, ROWS + 1]],
    "aten.bitwise_and.Tensor": [[X > 0, Y > 0], [ROWS, ROWS + 1]],
    "aten.bitwise_not.default": [[X > 0], [ROWS]],
    "aten.masked_fill.Scalar": [
        [X, Y > 0, 0.5],
        [X, Y[:1] > 0, -torch.inf],
        [X[0], Y > 0, 1],
        [X > 0, Y.abs() > 1, True],
    ],
    "aten.where.self": [[X > 0, X, Y], [X[0] > 0, X, Y[:, :1]], [X > 0, Y.abs() > 1, X.abs() > 1]],
    "aten.stack.default": [[[X, Y], 0], [[X, Y, X], -1]],
    "aten.cat.default": [[[X, Y, X], -1], [[X, Y], 0]],
    "aten.index_select.default": [[X, 1, ROWS], [ROWS, 0, ROWS]],
}


@pytest.mark.parametrize("layout", ["row-major", "reversed"])
@pytest.mark.parametrize("name", sorted(elementwise.BINDERS))
def test_an_operator_writes_what_torch_returns(name: str, layout: str) -> None:
    """Into the given memory and no other, from strided inputs, again and again: what is bound once is called often."""
    for args in CALLS[name]:
        expected = torch_function(name)(*args)
        out = output_like(expected, layout)
        place = out.data_ptr(), out.stride()
        inputs = [strided(a) if isinstance(a, Tensor) and a.dtype == torch.float32 else a for a in args]
        call = operator(name).bind(inputs, [out], None)
        for _ in range(2):
            out.fill_(77)
            call()
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        assert (out.data_ptr(), out.stride()) == place
        if layout == "row-major":
            arena = out.as_strided((out.numel() + 16,), (1,), 0)
            assert torch.equal(torch.cat((arena[:8], arena[-8:])), torch.full((16,), 77, dtype=out.dtype))


@pytest.mark.parametrize("name", sorted(elementwise.BINDERS))
def test_no_memory_is_taken_beside_the_result(name: str) -> None:
    """But a few bytes for a number; and softmax that converts, which on the CPU converts first."""
    for args in CALLS[name]:
        if torch.float32 in args:
            continue
        out = torch.empty_like(torch_function(name)(*args))
        call = operator(name).bind(args, [out], None)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            call()
        assert sum(max(0, event.self_cpu_memory_usage) for event in recorded.events()) <= 16


OPTIONS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "aten.add.Tensor": ([X, Y], {"alpha": 3}),
    "aten.gelu.default": ([X], {"approximate": "tanh"}),
    "aten.mean.dim": ([X, [-1], True], {"dtype": torch.float64}),
    "aten.sub.Tensor": ([X, 2.5], {"alpha": 3}),
    "aten.sum.dim_IntList": ([X, [0, 2], False], {"dtype": torch.float64}),
}


@pytest.mark.parametrize("name", sorted(elementwise.OPTIONS))
def test_keyword_options_follow_the_positional_operands(name: str) -> None:
    """In the order of the schema; an option that is left out has its default."""
    args, options = OPTIONS[name]
    expected = torch_function(name)(*args, **options)
    out = torch.empty_like(expected)
    assert tuple(options) == operator(name).options
    operator(name).bind([*args, *options.values()], [out], None)()
    torch.testing.assert_close(out, expected)
    assert not torch.allclose(expected.double(), torch_function(name)(*args).double(), rtol=0, atol=1e-8)


def test_a_call_reads_its_inputs_when_it_runs() -> None:
    """A binding holds memory, not values."""
    x, out = torch.ones(3), torch.empty(3)
    call = operator("aten.exp.default").bind([x], [out], None)
    x.zero_()
    call()
    assert out.tolist() == [1, 1, 1]


@pytest.mark.parametrize("ids", [torch.tensor([[4, 0, 4]]), torch.tensor([2]), torch.tensor([1, 0, 3, 2])[::2]])
def test_embedding_copies_rows_of_its_table(ids: Tensor) -> None:
    """Ids of any shape; the row of each, in their order."""
    table, out = values(5, 6), torch.empty(*ids.shape, 6)
    operator("aten.embedding.default").bind([table, ids], [out], None)()
    assert torch.equal(out, table[ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_copy_moves_and_converts(dtype: torch.dtype) -> None:
    """The same elements in the output's layout and dtype."""
    x = values(2, 5, 6).transpose(0, 2) * 3
    out = torch.empty(6, 5, 2, dtype=dtype)
    operator("copy").bind([x], [out], None)()
    assert torch.equal(out, x.to(dtype))


def torch_function(name: str) -> Callable[..., Tensor]:
    """The functional overload that a program's operator is named after: `aten.add.Tensor`."""
    _, packet, overload = name.split(".")
    found: Callable[..., Tensor] = getattr(getattr(aten, packet), overload)
    return found
