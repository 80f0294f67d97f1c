"""select-logit-rows: only the wanted rows reach the head, and what serves the head alone."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.graphs import SPEC, Body, Tiny, execute, execute_alone, heads_of, lines, run, step_inputs, step_of, text

BEFORE = "inline-regions,remove-noops,classify-masks,lift-positions,pack-tokens"
PASSES = f"{BEFORE},select-logit-rows"
INPUTS = step_inputs(5, 7, rows=(4, 1, 6, 5), twins={2: 11})


def attend(module: Tiny, x: Tensor) -> Tensor:
    q = heads_of(x)
    return x + F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


def feed_forward(module: Tiny, x: Tensor) -> Tensor:
    first, second, third = module.qkv(attend(module, x)).chunk(3, dim=-1)
    return x + F.silu(first) * second + third


def part_of_several(module: Tiny, x: Tensor) -> Tensor:
    first, second, third = module.qkv(x).chunk(3, dim=-1)
    return attend(module, first) + second + third


def shared(module: Tiny, x: Tensor) -> Tensor:
    y = x.exp()
    return attend(module, y) * y.sin()


def learned_positions(module: Tiny, x: Tensor) -> Tensor:
    return attend(module, x) + module.table[: x.shape[1]]


@pytest.mark.parametrize(
    ("body", "calls"),
    [
        (lambda m, x: x.exp().sin(), 6),
        (attend, 10),
        (feed_forward, 19),
        (part_of_several, 12),
        (shared, 12),
        (learned_positions, 12),
    ],
    ids=("row-wise calls alone", "attention", "feed-forward", "one of several results", "shared", "a table"),
)
def test_the_rows_are_those_of_all_logits(body: Body, calls: int) -> None:
    """The step returns the logits of the wanted rows, whatever the gather has moved above."""
    step = step_of(body, table=torch.randn(32, 8))
    all_logits = execute_alone(step, INPUTS)
    entry = run(step, PASSES)
    assert entry.modified
    assert entry.stats["calls_on_rows"] == calls
    torch.testing.assert_close(execute(step, INPUTS)["logits"], all_logits[INPUTS["rows"]], rtol=0, atol=1e-6)


def test_the_gather_moves_above_calls_of_the_logits_alone() -> None:
    """Keys and values are made of every token; the queries, what follows and the residual stream of the rows."""
    step = step_of(attend)
    run(step, PASSES)
    shown = text(step)
    assert "0 = index_select(x, 1, rows)" in shown
    assert (
        lines(
            """
        3 = index_select(2, 2, rows)
        4 = select(3, 0, 0)
        5 = transpose(4, 0, 1)
        6 = select(2, 0, 0)
        7 = transpose(6, 0, 1)
        8 = select(2, 0, 0)
        9 = transpose(8, 0, 1)
        10 = attention(5, 7, 9, row_spans, segments, 0.5)
        """
        )
        in shown
    )
    assert shown.endswith(
        lines(
            """
            15 = add(0, 14)
            16 = linear(15, head.weight)
            17 = select(16, 0, 0)
            return logits=17
            """
        )
    )


def test_projections_of_queries_work_on_rows() -> None:
    """What makes the last layer's queries does so for the rows; the layer below, and all keys, for every token."""

    def projected(module: Tiny, x: Tensor) -> Tensor:
        q, k = (heads_of(F.linear(x, module.qkv.weight[i : i + 8])) for i in (0, 8))
        return F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)

    step = step_of(lambda module, x: projected(module, x + projected(module, x)))
    all_logits = execute_alone(step, INPUTS)
    run(step, PASSES)
    linears = [n for n in step.calls() if "linear" in str(n.target)]
    assert [step.axis_of(n) is None for n in linears] == [False, False, True, False, True]
    first, last = (n for n in step.calls() if "attention" in str(n.target))
    assert [str(n.args[3]) for n in (first, last)] == ["segments", "row_spans"]
    torch.testing.assert_close(execute(step, INPUTS)["logits"], all_logits[INPUTS["rows"]], rtol=0, atol=1e-6)


def test_attention_with_a_window_keeps_all_queries() -> None:
    """The window is counted from each query's own token, which rows do not have: the gather stays below."""

    def near(module: Tiny, x: Tensor) -> Tensor:
        q, positions = heads_of(x), torch.arange(x.shape[1])
        mask = (positions - positions[:, None]).abs() <= 1
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask).transpose(1, 2).flatten(2)

    step = step_of(near)
    all_logits = execute_alone(step, INPUTS)
    run(step, PASSES)
    (attention,) = (n for n in step.calls() if "attention" in str(n.target))
    assert step.axis_of(attention) == 0
    assert [str(node) for node in attention.args[3:5]] == ["segments", "segments"]
    torch.testing.assert_close(execute(step, INPUTS)["logits"], all_logits[INPUTS["rows"]], rtol=0, atol=1e-6)


def test_all_results_of_a_call_move_with_it() -> None:
    """A chunk whose parts all serve the logits works on rows; one whose parts do not is gathered part by part."""
    step = step_of(feed_forward)
    run(step, PASSES)
    (call,) = (node for node in step.calls() if "chunk" in str(node.target))
    assert step.axis_of(call.args[0]) is None
    step = step_of(part_of_several)
    run(step, PASSES)
    (call,) = (node for node in step.calls() if "chunk" in str(node.target))
    assert step.axis_of(call.args[0]) == 1


def test_a_shifted_model_predicts_from_the_row_before() -> None:
    """Position i from row i - 1; position 0 from row 0, whichever segment it begins."""
    step = step_of(attend, spec=replace(SPEC, shifted=True))
    all_logits = execute_alone(step, INPUTS)
    assert run(step, PASSES).modified
    # Rows 4, 1, 6 and 11 are not the first of their segments; row 5 is.
    assert INPUTS["rows"].tolist() == [4, 1, 6, 5, 11]
    torch.testing.assert_close(execute(step, INPUTS)["logits"], all_logits[[3, 0, 5, 5, 10]], rtol=0, atol=1e-6)
