"""fuse-head: linear, softmax and the choice of a token become one operator."""

import pytest
import torch
from torch import Tensor

from dllmc.errors import CaptureError
from tests.graphs import (
    GUIDANCE,
    VOCAB,
    Body,
    Tiny,
    captured,
    execute,
    execute_alone,
    lines,
    run,
    step_inputs,
    step_of,
    text,
)

BEFORE = "inline-regions,remove-noops,classify-masks,lift-positions,pack-tokens,select-logit-rows"
PASSES = f"{BEFORE},fuse-head"
BIAS = torch.linspace(-2, 2, VOCAB)


@pytest.mark.parametrize(
    ("head", "scale"),
    [
        (lambda m, x: m.head(x), 1.0),
        (lambda m, x: m.head(x) * 0.25, 0.25),
        (lambda m, x: m.head(x) / 4 * 8.0, 2.0),
        (lambda m, x: m.head(x).double(), 1.0),
        (lambda m, x: torch.nn.functional.linear(x, m.embed.weight, m.bias) * 3, 3.0),
    ],
    ids=("linear", "a product", "a quotient and a product", "a conversion", "tied, with bias"),
)
def test_the_head_is_one_operator(head: Body, scale: float) -> None:
    """The chosen token is the argmax of the logits, its confidence their softmax; no logits remain in the graph."""
    step = step_of(lambda m, x: x.exp(), head, bias=BIAS)
    inputs = step_inputs(5, 7, rows=(4, 1, 6, 5))
    logits = execute_alone(step, inputs)[inputs["rows"]].double()
    entry = run(step, PASSES)
    assert entry.modified
    assert entry.stats == {"vocab": VOCAB}
    (call,) = (node for node in step.calls() if "decode_head" in str(node.target))
    assert call.args[3] == scale
    assert not any(VOCAB in getattr(node.meta["val"], "shape", ()) for node in step.calls())
    outputs = execute(step, inputs)
    assert torch.equal(outputs["token"], logits.argmax(1))
    torch.testing.assert_close(outputs["confidence"], logits.softmax(1).amax(1).float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs["logprob"], logits.log_softmax(1).amax(1).float(), rtol=0, atol=1e-5)


def test_what_the_graph_becomes() -> None:
    """Hidden rows without the batch axis, guided, then decoded with what the head reads of each request."""
    step = step_of(lambda m, x: x.exp())
    run(step, PASSES)
    tables = "row_segment, row_position, row_target, temperature, top_k, top_p, confidence_rule, seed, step, suppressed"
    assert text(step) == lines(
        f"""
        0 = index_select(token_ids, 0, rows)
        1 = unsqueeze(0, 0)
        2 = embedding(embed.weight, 1)
        3 = exp(2)
        4 = select(3, 0, 0)
        5 = guide_rows(4, guided, guidance)
        6 = decode_head(5, head.weight, None, 1, {tables})
        7 = getitem(6, 0)
        8 = getitem(6, 1)
        9 = getitem(6, 2)
        return token=7, confidence=8, logprob=9
        """
    )


def test_guided_rows_combine_with_their_twins() -> None:
    """A guided row decodes u + (s + 1)(c - u) of its logits c and its twin's u; the others decode their own."""
    step = step_of(lambda m, x: x.exp())
    inputs = step_inputs(5, 7, rows=(4, 1, 6), twins={0: 8, 2: 11})
    logits = execute_alone(step, inputs).double()
    expected = logits[[4, 1, 6]]
    for row, twin in ((0, 8), (2, 11)):
        expected[row] = logits[twin] + (GUIDANCE + 1) * (expected[row] - logits[twin])
    run(step, PASSES)
    outputs = execute(step, inputs)
    assert torch.equal(outputs["token"], expected.argmax(1))
    torch.testing.assert_close(outputs["confidence"], expected.softmax(1).amax(1).float(), rtol=0, atol=1e-6)


class SoftCap(Tiny):
    def forward(self, token_ids: Tensor) -> Tensor:
        z = self.head(self.embed(token_ids))
        return torch.tanh(z / 30) * 30


class ScaledByTensor(Tiny):
    def forward(self, token_ids: Tensor) -> Tensor:
        z = self.head(self.embed(token_ids))
        return z * self.bias


class NoHead(Tiny):
    def forward(self, token_ids: Tensor) -> Tensor:
        return self.table(token_ids).exp()

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(VOCAB, VOCAB)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (SoftCap(), "return torch.tanh(z / 30) * 30"),
        (ScaledByTensor(bias=BIAS), "return z * self.bias"),
        (NoHead(), "return self.table(token_ids).exp()"),
    ],
    ids=("a soft cap", "a factor for each token", "no linear at all"),
)
def test_a_head_that_is_not_linear_is_refused(model: Tiny, line: str) -> None:
    """Guidance on hidden rows needs a linear head; the message names what lies between."""
    with pytest.raises(CaptureError, match="expected logits that are a linear of the hidden state") as error:
        run(captured(model), PASSES)
    assert line in str(error.value)


def test_a_head_on_a_batch_is_refused() -> None:
    """The logits of one of several hidden states: which one is no constant factor between linear and logits."""
    step = step_of(lambda m, x: torch.cat((x[None], x[None].exp())), lambda m, x: m.head(x)[1])
    with pytest.raises(CaptureError, match=r"expected hidden states \[1, tokens, D\], found \['2', '1', "):
        run(step, PASSES)
