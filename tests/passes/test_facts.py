"""The facts that passes require and ensure: each holds, or names the node that breaks it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dllmc.passes.facts import FACTS, mixing_call
from dllmc.passes.pipeline import DEFAULT_PIPELINE, lookup
from tests.graphs import Body, Tiny, heads_of, step_of

ORDER = DEFAULT_PIPELINE.split(",")


def attend(module: Tiny, x: Tensor) -> Tensor:
    """Every fact has something to say about this: a region, a table, masked attention, a shared value, a head."""
    with torch.no_grad():
        y = x * module.table[: x.shape[1]]
    q, mask = heads_of(y), torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    return x + F.scaled_dot_product_attention(q, q, q, attn_mask=mask).transpose(1, 2).flatten(2)


@pytest.fixture(scope="module")
def history() -> list[dict[str, str | None]]:
    """What each fact says before the first pass, and after each."""
    step = step_of(attend, table=torch.randn(32, 8))
    said = [{name: fact(step) for name, fact in FACTS.items()}]
    for name in ORDER:
        lookup(name)().run(step)
        step.graph.eliminate_dead_code()
        step.propagate()
        said.append({fact: check(step) for fact, check in FACTS.items()})
    return said


@pytest.mark.parametrize(
    ("fact", "by", "problem"),
    [
        ("flat", "inline-regions", "is not a call of an operator"),
        ("masks-classified", "classify-masks", "has a mask"),
        ("positions-lifted", "lift-positions", "its value depends on the length of the sequence"),
        ("packed", "pack-tokens", "is not packed"),
        ("rows-selected", "select-logit-rows", "is computed for every token"),
        ("head-fused", "fuse-head", "not the results of one dllmc::decode_head"),
        ("lowered", "lower", "the step has no program"),
        ("planned", "plan-memory", "has no memory plan"),
    ],
)
def test_a_fact_holds_from_its_pass_on(history: list[dict[str, str | None]], fact: str, by: str, problem: str) -> None:
    """Before the pass that ensures it the fact says why it does not hold; from then on, that it does."""
    assert lookup(by).ensures == (fact,)
    index = ORDER.index(by)
    message = history[index][fact]
    assert message is not None
    assert problem in message
    assert [said[fact] for said in history[index + 1 :]] == [None] * (len(ORDER) - index)


def test_every_fact_is_ensured_by_a_pass_and_known() -> None:
    """No pass requires or ensures a fact without a checker, and each fact has a pass that ensures it."""
    passes = [lookup(name) for name in ORDER]
    assert {fact for p in passes for fact in p.ensures} == set(FACTS)
    assert {fact for p in passes for fact in p.requires} <= set(FACTS)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (lambda m, x: x.exp() + m.head.weight[:8, 0].sum(), None),
        (lambda m, x: x + x.sum(-1, keepdim=True), None),
        (lambda m, x: x + x.sum(), "sum_1 (aten.sum.default)"),
        (lambda m, x: x + x.amax(), "amax (aten.amax.default)"),
        (lambda m, x: x + x.amax(1, keepdim=True), "amax (aten.amax.default)"),
        (lambda m, x: x.flip(1), "flip (aten.flip.default)"),
        (lambda m, x: x.softmax(1), "softmax (aten.softmax.int)"),
        (lambda m, x: x.transpose(1, 2).softmax(-1).transpose(1, 2), "softmax (aten.softmax.int)"),
        (lambda m, x: x + torch.cat((x, x), 1)[:, 1:2], "cat (aten.cat.default)"),
        (lambda m, x: x + (x @ x.transpose(1, 2)).sum(-1, keepdim=True), "matmul (aten.matmul.default)"),
        (lambda m, x: x + x[:, 0], "select (aten.select.int)"),
    ],
)
def test_the_first_call_that_mixes_tokens_is_found(body: Body, found: str | None) -> None:
    """Reductions, moves and products along the sequence; not those along other axes."""
    problem = mixing_call(step_of(body))
    assert (problem is None) == (found is None)
    assert problem is None or problem.startswith(f"{found} at ")
