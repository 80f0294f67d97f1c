"""cse: equal calls on equal inputs are made once."""

import pytest
import torch

from tests.graphs import Body, execute, lines, run, step_inputs, step_of, text

PASSES = "inline-regions,cse"


def test_equal_calls_are_made_once() -> None:
    """Duplicates go in one sweep, and with them the duplicates of their users."""
    step = step_of(lambda m, x: x.exp().sin() + x.exp().sin())
    inputs = step_inputs(5)
    expected = execute(step, inputs)["logits"]
    entry = run(step, PASSES)
    assert entry.modified
    assert entry.stats == {"removed": 2}
    assert text(step) == lines(
        """
        0 = exp(x)
        1 = sin(0)
        2 = add(1, 1)
        3 = linear(2, head.weight)
        4 = select(3, 0, 0)
        return logits=4
        """
    )
    assert torch.equal(execute(step, inputs)["logits"], expected)


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x.exp() + x.sin(),
        lambda m, x: x.transpose(1, 2).transpose(2, 1) + x.transpose(2, 1).transpose(1, 2),
        lambda m, x: torch.add(x, x, alpha=2) + torch.add(x, x, alpha=3),
        lambda m, x: (x / 2) + (x / 2.0).to(torch.float64).to(torch.float32),
    ],
    ids=("operators differ", "arguments differ", "options differ", "1 and 1.0 differ"),
)
def test_calls_that_differ_stay(body: Body) -> None:
    """Operator, arguments, their order, options and the type of constants all count."""
    step = step_of(body)
    before = text(step)
    entry = run(step, PASSES)
    assert not entry.modified
    assert entry.stats == {"removed": 0}
    assert text(step) == before
