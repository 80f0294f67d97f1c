"""lower: the graph becomes a program that computes the same."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dllmc.errors import PassError
from dllmc.ir.program import Affine, View, dense_strides
from dllmc.ops.registry import OPERATORS
from dllmc.passes.pipeline import DEFAULT_PIPELINE
from tests.graphs import (
    HEAD_DIM,
    WIDTH,
    Body,
    Tiny,
    captured,
    execute,
    execute_program,
    heads_of,
    operators,
    run,
    run_all,
    step_inputs,
    step_of,
)

PASSES = DEFAULT_PIPELINE.partition(",reuse-in-place")[0]
INPUTS = step_inputs(5, 7, rows=(4, 1, 6), twins={2: 11})


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


def views(module: Tiny, x: Tensor) -> Tensor:
    """Chunks, slices, picks and moves of axes around one call."""
    first, second, third = module.qkv(x).chunk(3, dim=-1)
    last = third[..., 4:].unsqueeze(0).expand(2, 1, -1, HEAD_DIM)[1]
    return attend(heads_of(first), heads_of(second), heads_of(first)) + second * last.sum(-1, True)


def grouped(module: Tiny, x: Tensor) -> Tensor:
    """Queries, keys and values as strided windows on one projection."""
    q, k, v = module.qkv(x)[..., : 2 * WIDTH].split((WIDTH, HEAD_DIM, HEAD_DIM), dim=-1)
    return attend(heads_of(q, 4), heads_of(k), heads_of(v))


def converted_heads(module: Tiny, x: Tensor) -> Tensor:
    """Conversions keep the layout of what they convert, here heads before tokens."""
    wide = heads_of(x).double()
    return attend(wide, wide.exp(), wide.sin()).float()


def converted_and_flat(module: Tiny, x: Tensor) -> Tensor:
    """The same without attention: a conversion of a moved axis, an operator on it, a reshape that must copy."""
    return x.unflatten(-1, (2, 4)).transpose(2, 3).double().exp().flatten(2).float()


def copied_reshape(module: Tiny, x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 4)).transpose(2, 3).flatten(2)


def linear_on_moved_axes(module: Tiny, x: Tensor) -> Tensor:
    """The input's rows lie apart, the weight is a window on a larger one, and the bias is a part of one."""
    y = F.linear(heads_of(x), module.qkv.weight[:HEAD_DIM, :HEAD_DIM], module.qkv.bias[2:6])
    return y.transpose(1, 2).flatten(2)


def rotated(module: Tiny, x: Tensor) -> Tensor:
    """Half-split rotation with tables at the tokens' positions."""
    q = heads_of(x)
    cos, sin = (t[:, :, : x.shape[1]] for t in (module.cos, module.sin))
    first, second = q.view(1, 2, -1, 2, 2).unbind(-2)
    q = q * cos + torch.cat((-second, first), dim=-1) * sin
    return attend(q, q, q)


def normalised(module: Tiny, x: Tensor) -> Tensor:
    """Reductions that keep an axis and that drop it."""
    wide = x - x.mean(-1, keepdim=True)
    scale = wide.pow(2).sum(-1) / WIDTH
    return wide * torch.rsqrt(scale + 1e-5)[..., None] * x.amax(-1, keepdim=True).softmax(-1)


def with_options(module: Tiny, x: Tensor) -> Tensor:
    """Keyword options; a result of several stacked values."""
    y = torch.sub(torch.add(x, x.exp(), alpha=2), F.gelu(x, approximate="tanh"), alpha=0.5)
    return torch.stack((y, y * y.mean(-1, keepdim=True, dtype=torch.float32)), dim=-1).sum(-1)


CASES: list[Body] = [
    with_options,
    views,
    grouped,
    converted_heads,
    converted_and_flat,
    copied_reshape,
    linear_on_moved_axes,
    rotated,
    normalised,
    lambda m, x: m.embed(torch.arange(5))[:, None].mean(0) + x,
]


@pytest.mark.parametrize("body", CASES, ids=lambda body: body.__name__)
def test_the_program_computes_what_the_graph_does(body: Body) -> None:
    """Whatever is a view, a copy or a call of its own: tokens equal, confidences and log-probabilities too."""
    tables = {name: torch.randn(1, 1, 32, HEAD_DIM) for name in ("cos", "sin")}
    step = run_all(step_of(body, **tables))
    expected = execute(step, INPUTS)
    found = execute_program(step, INPUTS)
    assert torch.equal(found["token"], expected["token"])
    for name in ("confidence", "logprob"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_programs_in_half_precision(dtype: torch.dtype) -> None:
    """A model in another dtype runs in it, with the conversions that the model makes."""
    model = Tiny(lambda m, x: converted_heads(m, x).to(dtype) + grouped(m, x)).to(dtype)
    step = run_all(captured(model))
    expected, found = execute(step, INPUTS), execute_program(step, INPUTS)
    assert torch.equal(found["token"], expected["token"])
    torch.testing.assert_close(found["confidence"], expected["confidence"], rtol=0, atol=1e-2)


def test_views_are_operands() -> None:
    """Case 1: only calls that compute become instructions; the views between them are strides of operands."""
    step = step_of(grouped)
    assert not run(step, PASSES.replace("cache-kv,", "")).modified
    assert operators(step) == ["embedding", "linear", "index_select", "attention", "guide_rows", "decode_head"]
    assert step.program is not None
    select, attention = step.program.instructions[2:4]
    q, k, v = (view for view in (select.inputs[0], *attention.inputs[1:3]) if isinstance(view, View))
    assert {q.base, k.base, v.base} == {"%linear"}
    assert [view.offset for view in (q, k, v)] == [Affine(0), Affine(WIDTH), Affine(WIDTH + HEAD_DIM)]
    tokens = Affine(0, (("tokens", 1),))
    assert q.shape == (Affine(1), tokens, Affine(WIDTH))
    assert k.shape == v.shape == (tokens, Affine(2), Affine(2))
    assert k.strides == v.strides == (Affine(3 * WIDTH), Affine(2), Affine(1))


@pytest.mark.parametrize(
    ("body", "copies"),
    [(copied_reshape, 1), (converted_heads, 2), (converted_and_flat, 3), (linear_on_moved_axes, 2), (views, 0)],
)
def test_what_must_move_is_a_copy(body: Body, copies: int) -> None:
    """Case 2: a reshape that cannot be a view, a conversion; and rows that a linear could not see as a matrix."""
    step = step_of(body)
    run(step, PASSES)
    assert operators(step).count("copy") == copies


def test_buffers_are_dense_and_grow_with_the_step() -> None:
    """Case 3: each call writes buffers of its own; shapes are affine in the step's sizes; inputs are those used."""
    step = step_of(grouped)
    entry = run(step, PASSES.replace("cache-kv,", ""))
    program = step.program
    assert program is not None
    tokens, rows = Affine(0, (("tokens", 1),)), Affine(0, (("guided", 1), ("rows", 1)))
    assert program.buffers["%linear"].shape == (Affine(1), tokens, Affine(3 * WIDTH))
    assert program.buffers["%attention_default"].shape == (rows, Affine(4), Affine(HEAD_DIM // 2))
    written = [view.base for instruction in program.instructions for view in instruction.outputs]
    assert len(written) == len(set(written))
    for instruction in program.instructions:
        for view in instruction.outputs:
            assert view == View(view.base, program.buffers[view.base].shape, dense_strides(view.shape))
    assert entry.stats == {"instructions": len(program.instructions), "buffers": len(program.buffers)}
    assert "positions" not in program.inputs
    assert set(program.weights) == {"embed.weight", "qkv.weight", "qkv.bias", "head.weight"}
    assert list(program.outputs) == ["token", "confidence", "logprob"]


class Spread(Tiny):
    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids)
        x = x * x.var(-1, keepdim=True)
        return self.head(x)


@pytest.mark.parametrize(
    ("model", "message", "line"),
    [
        (
            Spread,
            "no operator of a program computes this; programs have aten.__and__.Tensor, ",
            "x.var(-1, keepdim=True)",
        ),
    ],
)
def test_what_no_program_can_say_is_refused(model: Callable[[], Tiny], message: str, line: str) -> None:
    """The error names the pass, the call and its line in the model."""
    with pytest.raises(PassError, match="pass 'lower'") as error:
        run(captured(model()), PASSES)
    assert message in str(error.value)
    assert line in str(error.value)


class Weighted(Tiny):
    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids)
        x = torch.add(x, x.exp(), alpha=2)
        return self.head(x)


def test_an_option_that_an_operator_does_not_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never left out: the error names the option, its value and the line."""
    plain = replace(OPERATORS["aten.add.Tensor"], options=())
    monkeypatch.setitem(OPERATORS, "aten.add.Tensor", plain)
    with pytest.raises(PassError, match=r"pass 'lower': .* option alpha=2 is not supported") as error:
        run(captured(Weighted()), PASSES)
    assert "x = torch.add(x, x.exp(), alpha=2)" in str(error.value)


def test_instructions_know_their_source() -> None:
    """Each instruction carries the line of the model that it came from."""
    step = step_of(lambda m, x: x.exp())
    run(step, PASSES)
    assert step.program is not None
    sources = {i.op: i.source for i in step.program.instructions}
    assert "graphs.py" in sources["aten.exp.default"]
    assert "in forward: return self.tail(" in sources["dllmc.decode_head.default"]
