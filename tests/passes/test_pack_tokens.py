"""pack-tokens: attention learns about segments, and whatever else mixes tokens is refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dllmc.errors import CaptureError
from tests.graphs import (
    HEAD_DIM,
    WIDTH,
    Body,
    Tiny,
    captured,
    execute,
    execute_alone,
    heads_of,
    lines,
    run,
    step_inputs,
    step_of,
    text,
)

BEFORE = "inline-regions,remove-noops,classify-masks,lift-positions"
PASSES = f"{BEFORE},pack-tokens"
LENGTHS = (5, 1, 9)


def projections(module: Tiny, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [1, 4, T, 2], keys and values [1, 2, T, 2]: two query heads a KV head."""
    q, k, v = module.qkv(x)[..., : 2 * WIDTH].split((WIDTH, HEAD_DIM, HEAD_DIM), dim=-1)
    return heads_of(q, 4), heads_of(k), heads_of(v)


def merged(y: Tensor) -> Tensor:
    """[1, heads, T, head_dim] -> [1, T, heads * head_dim]."""
    return y.transpose(1, 2).flatten(2)


def plain(module: Tiny, x: Tensor) -> Tensor:
    q = heads_of(x)
    return merged(F.scaled_dot_product_attention(q, q, q))


def scaled(module: Tiny, x: Tensor) -> Tensor:
    q = heads_of(x)
    return merged(F.scaled_dot_product_attention(q, q, q, scale=0.3))


def interleaved(module: Tiny, x: Tensor) -> Tensor:
    q, k, v = projections(module, x)
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=-3)
    return merged(F.scaled_dot_product_attention(q, k, v))


def expanded(module: Tiny, x: Tensor) -> Tensor:
    q, *kv = projections(module, x)
    k, v = (t[:, :, None].expand(1, 2, 2, t.shape[2], 2).reshape(1, 4, t.shape[2], 2) for t in kv)
    return merged(F.scaled_dot_product_attention(q, k, v))


def repeated_tokens_first(module: Tiny, x: Tensor) -> Tensor:
    """Keys [1, T, 2, 2] repeated before their axes are moved, values by another order of moves."""
    q, k, v = (t.transpose(1, 2) for t in projections(module, x))
    k = k.repeat_interleave(2, dim=2).transpose(1, 2)
    v = v.unsqueeze(3).expand(1, -1, 2, 2, 2).flatten(2, 3).permute(0, 2, 1, 3)
    return merged(F.scaled_dot_product_attention(q.transpose(1, 2), k, v))


def repeated_by_views(module: Tiny, x: Tensor) -> Tensor:
    """An axis of one added by a view, and a copy made of what is expanded."""
    q, *kv = projections(module, x)
    k, v = (t.reshape(1, 2, 1, -1, 2).expand(1, 2, 2, -1, 2).contiguous().view(1, 4, -1, 2) for t in kv)
    return merged(F.scaled_dot_product_attention(q, k, v))


def tiled(module: Tiny, x: Tensor) -> Tensor:
    """Copies of all heads one after the other: query head g does not read KV head g // 2."""
    q, *kv = projections(module, x)
    k, v = (t[:, None].expand(1, 2, 2, -1, 2).reshape(1, 4, -1, 2) for t in kv)
    return merged(F.scaled_dot_product_attention(q, k, v))


def windowed(module: Tiny, x: Tensor) -> Tensor:
    q, k, v = projections(module, x)
    positions = torch.arange(x.shape[1])
    near = (positions[:, None] - positions).abs() <= 2
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    return merged(F.scaled_dot_product_attention(q, k, v, attn_mask=near, scale=0.3))


def grouped(module: Tiny, x: Tensor) -> Tensor:
    return merged(F.scaled_dot_product_attention(*projections(module, x), enable_gqa=True))


def test_attention_reads_segments() -> None:
    """Case 1: the batch axis goes, tokens come first, and the default scale is written out."""
    step = step_of(plain)
    run(step, BEFORE)
    entry = run(step, PASSES)
    assert entry.modified
    assert entry.stats == {"attentions": 1, "ungrouped": 0}
    shown = text(step)
    assert shown.startswith(
        lines(
            """
            0 = unflatten(x, -1, [2, -1])
            1 = transpose(0, 1, 2)
            2 = select(1, 0, 0)
            3 = transpose(2, 0, 1)
            """
        )
    )
    assert (
        lines(
            f"""
        8 = attention(3, 5, 7, segments, segments, {1 / math.sqrt(HEAD_DIM)})
        9 = transpose(8, 0, 1)
        10 = unsqueeze(9, 0)
        11 = transpose(10, 1, 2)
        12 = flatten(11, 2)
        """
        )
        in shown
    )


@pytest.mark.parametrize(
    ("body", "groups"),
    [
        (plain, 1),
        (scaled, 1),
        (interleaved, 2),
        (expanded, 2),
        (repeated_tokens_first, 2),
        (repeated_by_views, 2),
        (tiled, 1),
        (windowed, 2),
        (grouped, 2),
    ],
)
def test_packed_segments_compute_what_each_computes_alone(body: Body, groups: int) -> None:
    """Cases 1 to 3: requests of different lengths in one step; repeated KV heads are read where they are."""
    step = step_of(body)
    inputs = step_inputs(*LENGTHS)
    expected = execute_alone(step, inputs)
    assert run(step, PASSES).modified
    torch.testing.assert_close(execute(step, inputs)["logits"], expected, rtol=0, atol=1e-6)
    (call,) = (node for node in step.calls() if "attention" in str(node.target))
    q, k, v = (node.meta["val"].shape[1] for node in call.args[:3])
    assert (q, q) == (k * groups, v * groups)
    assert not any(name in text(step) for name in ("repeat_interleave", "expand")) or groups == 1


def test_without_attention_there_is_nothing_to_pack() -> None:
    """A model of row-wise calls alone is packed as it is: not modified."""
    step = step_of(lambda m, x: x.exp())
    before = text(step)
    entry = run(step, PASSES)
    assert not entry.modified
    assert entry.stats == {"attentions": 0, "ungrouped": 0}
    assert text(step) == before


class Causal(Tiny):
    def forward(self, token_ids: Tensor) -> Tensor:
        q = heads_of(self.embed(token_ids))
        y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        return self.head(merged(y))


class Dropped(Tiny):
    def forward(self, token_ids: Tensor) -> Tensor:
        q = heads_of(self.embed(token_ids))
        y = F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
        return self.head(merged(y))


class Crossed(Tiny):
    def forward(self, token_ids: Tensor) -> Tensor:
        q, k = heads_of(self.embed(token_ids)), heads_of(self.memory)
        y = F.scaled_dot_product_attention(q, k, k)
        return self.head(merged(y))


class Narrow(Tiny):
    def forward(self, token_ids: Tensor) -> Tensor:
        q = heads_of(self.embed(token_ids))
        y = F.scaled_dot_product_attention(q, q, q[..., :2])
        return self.head(merged(y.repeat(1, 1, 1, 2)))


class Unbatched(Tiny):
    def forward(self, token_ids: Tensor) -> Tensor:
        q = heads_of(self.embed(token_ids))[0]
        y = F.scaled_dot_product_attention(q, q, q)
        return self.head(merged(y[None]))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Causal, "attention with a causal mask; expected bidirectional self-attention"),
        (Dropped, "attention with dropout; expected bidirectional self-attention"),
        (Crossed, "found an operand ['1', '2', '7', '4']"),
        (Narrow, "expected q, k and v of one head_dim, found [4, 4, 2]"),
        (Unbatched, "expected self-attention over [1, heads, tokens, head_dim], found an operand ['2',"),
    ],
)
def test_other_attention_is_refused(model: type[Tiny], message: str) -> None:
    """The message says what was found, at which line of the model."""
    step = captured(model(memory=torch.randn(1, 7, WIDTH)))
    with pytest.raises(CaptureError) as error:
        run(step, PASSES)
    assert message in str(error.value)
    assert "in forward: y = F.scaled_dot_product_attention(q, " in str(error.value)


class Mean(Tiny):
    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids)
        y = x.mean(1, keepdim=True)
        return self.head(x + y)


class LargestOfAll(Tiny):
    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids)
        y = x.amax()
        return self.head(x + y)


class RunningSum(Tiny):
    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids)
        y = x.cumsum(1)
        return self.head(y)


class Neighbours(Tiny):
    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids)
        y = x.roll(1, 1)
        return self.head(x + y)


class FirstToken(Tiny):
    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids)
        y = x[:, :1]
        return self.head(x + y)


class Concatenated(Tiny):
    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids)
        y = torch.cat((x, self.memory), dim=1)
        return self.head(y)[:, 1:]


class ByModule(Tiny):
    """The call is in a file of torch; the line that matters is here."""

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids)
        y = torch.nn.Softmax(1)(x)
        return self.head(y)


class Scores(Tiny):
    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids)
        y = torch.softmax(x @ x.transpose(1, 2), -1) @ x
        return self.head(y)


@pytest.mark.parametrize(
    "model", [Mean, LargestOfAll, RunningSum, Neighbours, FirstToken, Concatenated, ByModule, Scores]
)
def test_whatever_else_mixes_tokens_is_refused(model: type[Tiny]) -> None:
    """Only attention may mix the tokens of a sequence; the message names the line that does."""
    step = captured(model(memory=torch.randn(1, 1, WIDTH)))
    with pytest.raises(CaptureError, match="requests cannot be packed into one step") as error:
        run(step, PASSES)
    assert "test_pack_tokens.py" in str(error.value)
    assert "in forward: y = " in str(error.value)
