"""fuse-projections: linears of one value share one GEMM."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.graphs import Body, Tiny, execute, execute_alone, heads_of, lines, rewritten, run, step_inputs, step_of, text

FLAT = "inline-regions,remove-noops"
PACKED = "classify-masks,lift-positions,pack-tokens"
PASSES = f"{FLAT},fuse-projections"
INPUTS = step_inputs(5, 7, rows=(1, 4, 6))
DTYPES = (torch.float32, torch.bfloat16)


def parts() -> dict[str, Tensor]:
    """Weights a, c and d [8, 8], b [4, 8], and biases of a, b and c."""
    drawn = torch.Generator().manual_seed(0)
    shapes = {"a": (8, 8), "b": (4, 8), "c": (8, 8), "d": (8, 8), "a0": (8,), "b0": (4,), "c0": (8,)}
    return {name: torch.randn(shape, generator=drawn) / 3 for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linears_of_one_value_are_one(dtype: torch.dtype) -> None:
    """Case 1: one product with the weights one after the other; each reader reads its columns."""
    step, entry = rewritten(lambda m, x: F.linear(x, m.a).sin() + F.linear(x, m.c).exp(), PASSES, dtype, **parts())
    assert entry.modified
    assert entry.stats == {"linears": 2, "gemms": 1}
    assert text(step) == lines(
        """
        0 = linear(x, self.a+self.c, None)
        1 = slice(0, -1, 0, 8)
        2 = slice(0, -1, 8, 16)
        3 = sin(1)
        4 = exp(2)
        5 = add(3, 4)
        6 = linear(5, head.weight)
        7 = select(6, 0, 0)
        return logits=7
        """
    )
    joined = torch.cat([step.tensors["self.a"], step.tensors["self.c"]])
    assert torch.equal(step.tensors["self.a+self.c"], joined)


def test_biases_are_joined_too() -> None:
    """Case 1: widths may differ; those with a bias and those without go apart."""

    def body(module: Tiny, x: Tensor) -> Tensor:
        a = F.linear(x, module.a, module.a0)
        b = F.linear(x, module.b, module.b0)
        return a + b.sum(-1, keepdim=True) + F.linear(x, module.c) + F.linear(x, module.qkv.weight)[..., 16:]

    for dtype in DTYPES:
        step, entry = rewritten(body, PASSES, dtype, **parts())
        assert entry.stats == {"linears": 4, "gemms": 2}
        shown = text(step)
        assert "0 = linear(x, self.a+self.b, self.a0+self.b0)\n1 = slice(0, -1, 0, 8)\n2 = slice(0, -1, 8, 12)" in shown
        assert "linear(x, self.c+qkv.weight, None)" in shown


def test_views_of_a_result_may_be_copies() -> None:
    """Case 2: a view that a slice cannot have becomes a reshape."""

    def body(module: Tiny, x: Tensor) -> Tensor:
        q, k = F.linear(x, module.a).view(1, -1, 2, 4).transpose(1, 2), heads_of(F.linear(x, module.c))
        merged = F.linear(x, module.b).view(-1, 1, 4)
        y = F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)
        return y + merged.transpose(0, 1).repeat(1, 1, 2)

    for dtype in DTYPES:
        step, entry = rewritten(body, PASSES, dtype, **parts())
        assert entry.stats == {"linears": 3, "gemms": 1}
        shown = text(step)
        assert "view(" not in shown
        assert "reshape(1, [1, -1, 2, 4])" in shown
        assert "reshape(3, [-1, 1, 4])" in shown


def test_a_gate_and_its_other_half() -> None:
    """Two groups of different inputs are two products."""

    def body(module: Tiny, x: Tensor) -> Tensor:
        y = F.silu(F.linear(x, module.a)) * F.linear(x, module.c)
        return F.linear(y, module.qkv.weight)[..., :8] + F.linear(y, module.d)

    step, entry = rewritten(body, PASSES, **parts())
    assert entry.stats == {"linears": 4, "gemms": 2}
    assert "linear(x, self.a+self.c, None)" in text(step)
    assert ", qkv.weight+self.d, None)" in text(step)


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: F.linear(x, m.a) + F.linear(x.sin(), m.c),
        lambda m, x: F.linear(x, m.a) + F.linear(x, m.c, m.c0),
        lambda m, x: F.linear(x, m.a) + F.linear(x, m.a).sin(),
        lambda m, x: F.linear(x, m.a) + F.linear(x, m.c) * m.c.sum(),
        lambda m, x: F.linear(x, m.a, m.a0) + F.linear(x, m.c, m.a0),
        lambda m, x: F.linear(x, m.a) + F.linear(x, m.c * 2),
        lambda m, x: F.linear(x, m.embed.weight)[..., :8] + F.linear(x, m.a),
    ],
    ids=(
        "two inputs",
        "one with a bias",
        "one weight for both",
        "a weight that is read elsewhere",
        "one bias for both",
        "a weight that is computed",
        "the weight of the embedding",
    ),
)
def test_what_cannot_share_stays(body: Body) -> None:
    """Not modified: another input, a bias on one side, a parameter that serves elsewhere or is computed."""
    step, entry = rewritten(body, PASSES, **parts())
    assert not entry.modified
    assert entry.stats == {"linears": 0, "gemms": 0}
    assert "+" not in text(step)


def attention(module: Tiny, x: Tensor) -> Tensor:
    q, k, v = (heads_of(F.linear(x, weight)) for weight in (module.a, module.c, module.d))
    return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_the_last_layers_queries_are_of_rows() -> None:
    """Behind select-logit-rows they have an input of their own: keys and values alone share a product."""
    step = step_of(attention, **parts())
    expected = execute_alone(step, INPUTS)[INPUTS["rows"]]
    entry = run(step, f"{FLAT},{PACKED},select-logit-rows,fuse-projections")
    assert entry.stats == {"linears": 2, "gemms": 1}
    assert "linear(x, self.c+self.d, None)" in text(step)
    assert ", self.a)" in text(step)
    torch.testing.assert_close(execute(step, INPUTS)["logits"], expected, rtol=0, atol=1e-5)


def test_before_rows_are_selected_all_three_share() -> None:
    """The rows are then gathered of the queries that the one product made for every token."""
    step = step_of(attention, **parts())
    expected = execute_alone(step, INPUTS)[INPUTS["rows"]]
    run(step, f"{PASSES},{PACKED},select-logit-rows")
    shown = text(step)
    assert "linear(x, self.a+self.c+self.d, None)" in shown
    assert ", 1, rows)" in shown
    torch.testing.assert_close(execute(step, INPUTS)["logits"], expected, rtol=0, atol=1e-5)


def test_parts_are_no_weights_of_the_program() -> None:
    """What was joined is read nowhere else: the program has the joined weight, and not its parts."""
    step = step_of(attention, **parts())
    run(step, f"{FLAT},{PACKED},select-logit-rows,fuse-head,fuse-projections,lower")
    assert step.program is not None
    assert set(step.program.weights) == {"embed.weight", "head.weight", "self.a", "self.c+self.d"}
