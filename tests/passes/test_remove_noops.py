"""remove-noops: calls that change no value go."""

import pytest
import torch
import torch.nn.functional as F

from tests.graphs import Body, execute, lines, run, step_inputs, step_of, text

PASSES = "inline-regions,remove-noops"


@pytest.mark.parametrize(
    ("body", "removed", "after"),
    [
        # Case 1 comes with case 3: export checks the metadata of what it converts.
        (lambda m, x: x.float().exp(), 2, "0 = exp(x)"),
        (lambda m, x: x.clone().exp().detach(), 2, "0 = exp(x)"),
        (lambda m, x: x.to("cpu").type_as(x).to(torch.float32).exp(), 5, "0 = exp(x)"),
        (lambda m, x: F.dropout(x, 0.5, training=False).exp(), 1, "0 = exp(x)"),
        (lambda m, x: F.dropout(x, 0.0, training=True).exp(), 1, "0 = exp(x)"),
        (
            lambda m, x: x.transpose(-2, -1).contiguous().transpose(-2, -1),
            1,
            "0 = transpose(x, -2, -1) \n 1 = transpose(0, -2, -1)",
        ),
        (lambda m, x: x[:, : x.shape[1]].exp(), 1, "0 = exp(x)"),
        (lambda m, x: x[:, :, :99].expand(1, x.shape[1], 8).exp(), 2, "0 = exp(x)"),
        (
            lambda m, x: x * (torch.arange(5) + 0).sum(),
            1,
            "0 = arange(5, device=cpu, pin_memory=False) \n 1 = sum(0) \n 2 = mul(x, 1)",
        ),
        (lambda m, x: torch.cat((torch.tensor([]), x.exp()), dim=-2), 3, "0 = exp(x)"),
    ],
    ids=(
        "case 1: checks",
        "case 2: alias, detach, clone",
        "case 3: conversions to the same dtype",
        "case 4: dropout outside training",
        "case 4: dropout with probability 0",
        "case 2: contiguous",
        "case 5: a slice of everything",
        "case 5: slice and expand to the same shape",
        "case 5: a sum with 0",
        "case 6: a fresh cache",
    ),
)
def test_what_changes_no_value_is_removed(body: Body, removed: int, after: str) -> None:
    """Cases 1 to 6: the call goes, its users take its input, and the step computes the same."""
    step = step_of(body)
    inputs = step_inputs(5)
    expected = execute(step, inputs)["logits"]
    entry = run(step, PASSES)
    assert entry.modified
    assert entry.stats == {"removed": removed, "respelled": 0}
    last = len(lines(after).splitlines())
    head = f"{last} = linear({last - 1}, head.weight) \n {last + 1} = select({last}, 0, 0) \n return logits={last + 1}"
    assert text(step) == lines(f"{after} \n {head}")
    torch.testing.assert_close(execute(step, inputs)["logits"], expected, rtol=0, atol=1e-6)  # layouts may differ


def test_a_view_of_a_copy_becomes_a_reshape() -> None:
    """Case 2: what made the layout that a view demands is gone; numbers stay."""
    step = step_of(lambda m, x: x.unflatten(-1, (2, 4)).transpose(2, 3).contiguous().view(1, x.shape[1], 8))
    inputs = step_inputs(5)
    expected = execute(step, inputs)["logits"]
    assert run(step, PASSES).stats == {"removed": 1, "respelled": 1}
    shown = text(step)
    assert "2 = reshape(1, [1, tokens, 8])" in shown
    assert "view" not in shown
    assert torch.equal(execute(step, inputs)["logits"], expected)


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x.to("cpu", torch.float64).type_as(x),
        lambda m, x: x.double().to(x),
    ],
    ids=("to.device and type_as", "to another's dtype"),
)
def test_conversions_have_one_spelling(body: Body) -> None:
    """Case 3: a conversion that changes the dtype is `to.dtype`, however the model spelled it."""
    step = step_of(body)
    inputs = step_inputs(5)
    expected = execute(step, inputs)["logits"]
    entry = run(step, PASSES)
    assert entry.modified
    assert entry.stats["respelled"] >= 1
    assert text(step).startswith("0 = to(x, float64)\n1 = to(0, float32)\n")
    assert torch.equal(execute(step, inputs)["logits"], expected)


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x[:, :, 1:].exp().sum(-1, keepdim=True) * x,
        lambda m, x: x[:, :, :1].expand(1, x.shape[1], 8),
        lambda m, x: F.dropout(x, 0.5, training=True),
        lambda m, x: x + 0,
        lambda m, x: x + torch.arange(8) + 1,
        lambda m, x: torch.cat((x[:, :0], x), dim=1)[:, :, :4].repeat(1, 1, 2),
    ],
    ids=("a slice that cuts", "an expand that repeats", "dropout in training", "+ 0 of floats", "+ 1", "cat of parts"),
)
def test_what_changes_values_stays(body: Body) -> None:
    """Nothing to remove: not modified."""
    step = step_of(body)
    before = text(step)
    assert not run(step, PASSES).modified
    assert text(step) == before
