"""Passes that leave an invalid graph, or break a fact, are caught without running it, by name and node."""

from collections.abc import Callable

import pytest
import torch

from dllmc.errors import PassError
from dllmc.ir.step_graph import StepGraph
from dllmc.passes import pipeline
from tests.graphs import captured
from tests.passes.two_layers import SPEC, WIDTH, Broken, Model, calls, until

aten = torch.ops.aten


def use_before_definition(step: StepGraph) -> None:
    """A call moved to where its input is not there yet."""
    (turned,) = calls(step, aten.cat.default, 1)
    next(n for n in step.calls() if n.name == "embedding").append(turned)


def forget_to_transpose(step: StepGraph) -> None:
    """Heads are merged while tokens stand behind them."""
    (merged,) = calls(step, aten.flatten.using_ints, 1)
    transposed = merged.args[0]
    step.replace(transposed, transposed.args[0])


def average_over_tokens(step: StepGraph) -> None:
    """A norm's statistics of the sequence."""
    mean = calls(step, aten.mean.dim, 1)[0]
    mean.args = (mean.args[0], [1], True)


def hide_a_weight(step: StepGraph) -> None:
    """An attribute of the graph's module, which no one loads."""
    step.module.register_buffer("hidden", torch.ones(WIDTH))
    norm = calls(step, aten.mul.Tensor, 1)[0]
    with step.graph.inserting_before(norm):
        norm.args = (norm.args[0], step.graph.get_attr("hidden"))


def count_tokens(step: StepGraph) -> None:
    """A value that is one of the length."""
    silu = calls(step, aten.silu.default, 0)[0]
    with step.graph.inserting_before(silu):
        tokens = step.call(aten.sym_size.int, silu.args[0], 1, origin=silu)
        silu.args = (step.call(aten.mul.Tensor, silu.args[0], tokens, origin=silu),)


def return_all_rows(step: StepGraph) -> None:
    """The gathers are undone."""
    for gather in [n for n in step.calls(aten.index_select.default) if n.args[2] is step.input("rows")]:
        step.replace(gather, gather.args[0])
    for attention in step.calls(torch.ops.dllmc.attention.default):
        attention.update_arg(3, step.input("segments"))


@pytest.mark.parametrize(
    ("rewrite", "after", "said", "code"),
    [
        (
            use_before_definition,
            "cse",
            "left a graph that does not run: Argument 'neg_1' of Node 'cat_1' was used before it has been defined",
            None,
        ),
        (forget_to_transpose, "cse", "left a graph that does not run: a and b must have", "x = x + self.o(mixed)"),
        (
            average_over_tokens,
            "pack-tokens",
            "broke 'packed': mean_1 (aten.mean.dim) at ",
            "variance = wide.pow(2).mean(-1, keepdim=True) + 1e-6: it may mix the tokens of a sequence",
        ),
        (hide_a_weight, "cse", "broke 'flat': hidden (hidden) is not a call of an operator", None),
        (
            count_tokens,
            "lift-positions",
            "broke 'positions-lifted': mul_12 (aten.mul.Tensor) at ",
            "return x + self.down(F.silu(self.gate(x)) * self.up(x)): its value depends on the length of the sequence",
        ),
        (
            return_all_rows,
            "select-logit-rows",
            "broke 'rows-selected': select (aten.select.int) is computed for every token",
            None,
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_wrong_without_running_it(
    rewrite: Callable[[StepGraph], None], after: str, said: str, code: str | None
) -> None:
    """Lint, fake tensors and facts name the pass and the node, and the line of its own where the node has one."""
    with pytest.raises(PassError) as error:
        pipeline.run(captured(Model(), SPEC), (*until(after), Broken(rewrite)))
    assert str(error.value).startswith(f"pass 'broken' {said}")
    if code is not None:
        assert "two_layers.py" in str(error.value)
        assert code in str(error.value)
