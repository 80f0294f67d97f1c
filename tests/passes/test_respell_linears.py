"""respell-linears: products with a weight become linear, however they are written."""

import pytest
import torch
from torch import nn

from tests.graphs import (
    VOCAB,
    WIDTH,
    Body,
    Tiny,
    captured,
    execute,
    execute_program,
    lines,
    run,
    run_all,
    step_inputs,
    step_of,
    text,
)

PASSES = "inline-regions,remove-noops,respell-linears"


class Squared(Tiny):
    """With a square weight, of which nothing but its use says which axis is the input's."""

    def __init__(self, body: Body) -> None:
        super().__init__(body)
        self.square = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.bias = nn.Parameter(torch.randn(WIDTH))


@pytest.mark.parametrize(
    "head",
    [
        lambda m, x: x @ m.head.weight.T,
        lambda m, x: x @ m.head.weight.t(),
        lambda m, x: x @ m.head.weight.mT,
        lambda m, x: x @ m.head.weight.transpose(-1, -2),
        lambda m, x: torch.matmul(x, m.head.weight.permute(1, 0)),
        lambda m, x: torch.mm(x[0], m.head.weight.T)[None],
        lambda m, x: torch.einsum("btd,vd->btv", x, m.head.weight),
        lambda m, x: torch.einsum("... d, v d -> ... v", x, m.head.weight),
    ],
)
def test_a_product_with_a_transposed_weight(head: Body) -> None:
    """Cases 1 and 3: linear of the weight itself, and the numbers stay."""
    step = step_of(lambda m, x: x, head)
    inputs = step_inputs(9)
    expected = execute(step, inputs)["logits"]
    entry = run(step, PASSES)
    assert entry.modified
    assert sum(entry.stats.values()) == 1
    shown = text(step)
    assert "head.weight)" in shown
    assert "linear(" in shown
    assert not any(name in shown for name in ("matmul", "mm(", "einsum", "numpy_T", "permute"))
    torch.testing.assert_close(execute(step, inputs)["logits"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "after"),
    [
        (lambda m, x: x @ m.square, "0 = transpose(self.square, 0, 1) \n 1 = linear(x, 0)"),
        (lambda m, x: torch.einsum("btd,dk->btk", x, m.square), "0 = transpose(self.square, 0, 1) \n 1 = linear(x, 0)"),
        (lambda m, x: torch.einsum("btd,kd->btk", x, m.square), "0 = linear(x, self.square)"),
        (
            lambda m, x: torch.addmm(m.bias, x[0], m.square)[None],
            "0 = select(x, 0, 0) \n 1 = transpose(self.square, 0, 1) \n 2 = linear(0, 1, self.bias)",
        ),
        (
            lambda m, x: torch.addmm(m.bias, x[0], m.square.T)[None],
            "0 = select(x, 0, 0) \n 1 = linear(0, self.square, self.bias)",
        ),
    ],
)
def test_a_weight_of_either_order(body: Body, after: str) -> None:
    """Cases 1 to 3: x @ W takes a transposed view of the weight; the bias of addmm goes inside."""
    step = captured(Squared(body))
    inputs = step_inputs(9)
    expected = execute(step, inputs)["logits"]
    assert run(step, PASSES).modified
    assert text(step).startswith(lines(after))
    torch.testing.assert_close(execute(step, inputs)["logits"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x @ x.transpose(1, 2) @ x,
        lambda m, x: x @ torch.ones(WIDTH, WIDTH),
        lambda m, x: x @ m.qkv.weight[:WIDTH],
        lambda m, x: x * (x @ m.bias)[..., None],
        lambda m, x: torch.einsum("btd,td->bt", x, x[0])[..., None] * x,
        lambda m, x: torch.einsum("btd,de->bte", x, m.square.exp()),
        lambda m, x: torch.einsum("btd,dd->btd", x, m.square),
        lambda m, x: torch.einsum("btd,dk->bkt", x, m.square).transpose(1, 2),
        lambda m, x: torch.addmm(m.bias, x[0], m.square, alpha=2.0)[None],
        lambda m, x: torch.addmm(x[0], x[0], m.square)[None],
    ],
)
def test_other_products_stay(body: Body) -> None:
    """What is no product of rows with a whole weight, a bias that is none, an equation that moves axes."""
    step = captured(Squared(body))
    run(step, "inline-regions,remove-noops")
    before = text(step)
    assert not run(step, PASSES).modified
    assert text(step) == before


def test_a_head_that_is_a_product_decodes() -> None:
    """A head of either order becomes `decode_head`, in the program too, with the same tokens."""
    for head in (lambda m, x: x @ m.head.weight.T, lambda m, x: x @ m.columns):
        module = Tiny(head=head)
        module.columns = nn.Parameter(torch.randn(WIDTH, VOCAB))
        step = run_all(captured(module))
        inputs = step_inputs(5, 7, rows=(4, 1, 6))
        found = execute_program(step, inputs)
        with torch.no_grad():
            logits = torch.cat([module(ids[None])[0] for ids in inputs["token_ids"].split((5, 7))])[inputs["rows"]]
        assert torch.equal(found["token"], logits.argmax(-1))
        torch.testing.assert_close(found["logprob"], logits.log_softmax(-1).amax(-1), rtol=0, atol=1e-5)
