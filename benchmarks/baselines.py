"""What one would write without dllmc: the published decoders, in plain eager torch over the reference LLaDA model.

`dense` is LLaDA's own (arXiv 2502.09992): every step computes every position. `dual_cache` is Fast-dLLM's (arXiv
2505.22618): a block's first step computes every position and keeps all K/V, the others compute the block alone.
Both are greedy with low-confidence remasking and stop at no end token (semantics.md, "Commit"). Requests of one
length are one batch.

What makes them slow is published: a pass has the logits of all positions that it computes, and a softmax over all of
these logits in float64 (`softmax_dtype` says so; float32 is the milder choice). What was merely careless there is not
repeated: no noise at temperature 0, no logits kept from one step to the next, no K/V concatenated.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dllmc.models.layers import attend, rotary_tables, rotate, split_heads
from dllmc.models.llada import LLaDAModel

# (tokens [B, T], block, whether this is the block's first step) -> (the span computed, its logits [B, span, V])
Forward = Callable[[Tensor, slice, bool], tuple[slice, Tensor]]


@dataclass(frozen=True)
class Pace:
    """How long a completion is, and how many of its tokens a step commits.

    `steps`: over all blocks, a multiple of their number; or `threshold`: every token that is at least this confident,
    and always the best one; with neither, one token a step.
    """

    gen_length: int
    block_length: int
    steps: int | None = None
    threshold: float | None = None

    def least(self, size: int, step: int) -> int:
        """Tokens that a step must commit in a block of `size`: an even share, the first steps take the remainder."""
        if self.threshold is not None:
            return 1
        steps = self.block_length
        if self.steps is not None:
            steps, rest = divmod(self.steps, math.ceil(self.gen_length / self.block_length))
            if rest:
                raise ValueError(f"steps = {self.steps}: expected a multiple of the number of blocks")
        return size // steps + (step < size % steps)


class Decoded(NamedTuple):
    """tokens: [B, gen_length] int64, the completions. forward_passes: of the batch."""

    tokens: Tensor
    forward_passes: int


@torch.inference_mode()
def dense(
    model: LLaDAModel, prompts: Tensor, mask_id: int, pace: Pace, softmax_dtype: torch.dtype = torch.float64
) -> Decoded:
    """Decode prompts [B, P] int64 with a forward pass over all P + gen_length positions at every step."""

    def forward(x: Tensor, block: slice, first: bool) -> tuple[slice, Tensor]:
        return slice(0, x.shape[1]), model(x)

    return _decode(forward, prompts, mask_id, pace, softmax_dtype)


@torch.inference_mode()
def dual_cache(
    model: LLaDAModel, prompts: Tensor, mask_id: int, pace: Pace, softmax_dtype: torch.dtype = torch.float64
) -> Decoded:
    """As `dense`, but a block's steps after its first compute the block alone, against cached K/V of all else."""
    c = model.config
    batch, length = prompts.shape[0], prompts.shape[1] + pace.gen_length
    dtype = next(model.parameters()).dtype
    kv = torch.empty(c.n_layers, 2, batch, c.n_kv_heads, length, c.d_model // c.n_heads, dtype=dtype)

    def forward(x: Tensor, block: slice, first: bool) -> tuple[slice, Tensor]:
        span = slice(0, length) if first else block
        return span, _forward_span(model, x[:, span], span, kv)

    return _decode(forward, prompts, mask_id, pace, softmax_dtype)


def _forward_span(model: LLaDAModel, ids: Tensor, span: slice, kv: Tensor) -> Tensor:
    """The model over ids [B, n] at the positions of `span`, attending to all of `kv`: logits [B, n, V].

    kv: [layers, 2, B, kv_heads, T, head_dim], keys after RoPE; the span's own are replaced in place.
    """
    c = model.config
    layers: Any = model.model["transformer"]
    positions = torch.arange(span.start, span.stop, device=ids.device)[None]
    cos, sin = rotary_tables(positions, c.d_model // c.n_heads, c.rope_theta)
    x = layers["wte"](ids)
    for block, (keys, values) in zip(layers["blocks"], kv, strict=True):
        h = block.attn_norm(x)
        q = rotate(split_heads(block.q_proj(h), block.heads), cos, sin)
        keys[:, :, span] = rotate(split_heads(block.k_proj(h), block.kv_heads), cos, sin)
        values[:, :, span] = split_heads(block.v_proj(h), block.kv_heads)
        x += block.attn_out(attend(q, keys, values))
        h = block.ff_norm(x)
        x += block.ff_out(F.silu(block.ff_proj(h)) * block.up_proj(h))
    x = layers["ln_f"](x)
    logits: Tensor = F.linear(x, layers["wte"].weight) if c.weight_tying else layers["ff_out"](x)
    return logits * (1 / math.sqrt(c.d_model)) if c.scale_logits else logits


def _decode(forward: Forward, prompts: Tensor, mask_id: int, pace: Pace, softmax_dtype: torch.dtype) -> Decoded:
    """The loop over blocks and steps that both decoders share."""
    start, end = prompts.shape[1], prompts.shape[1] + pace.gen_length
    x = F.pad(prompts, (0, pace.gen_length), value=mask_id)
    masked = torch.ones_like(x, dtype=torch.bool)  # by position, so a committed mask_id stays; read inside blocks
    passes = 0
    for block_start in range(start, end, pace.block_length):
        block = slice(block_start, min(block_start + pace.block_length, end))
        step = 0
        while masked[:, block].any():
            span, logits = forward(x, block, step == 0)
            choice, confidence = _predict(logits, softmax_dtype)
            del logits  # not kept while the next pass computes its own
            inside = slice(block.start - span.start, block.stop - span.start)
            least = pace.least(block.stop - block.start, step)
            _commit(x[:, block], masked[:, block], choice[:, inside], confidence[:, inside], least, pace.threshold)
            passes, step = passes + 1, step + 1
    return Decoded(x[:, start:], passes)


def _predict(logits: Tensor, softmax_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits [B, n, V] -> the best token of each position and its probability, both [B, n]."""
    choice = logits.argmax(-1, keepdim=True)
    probability = torch.softmax(logits, -1, dtype=softmax_dtype)
    return choice[..., 0], probability.gather(-1, choice)[..., 0]


def _commit(
    tokens: Tensor, masked: Tensor, choice: Tensor, confidence: Tensor, least: int, threshold: float | None
) -> None:
    """Write into a block's `tokens` the `least` most confident choices and all that reach `threshold`; all [B, n].

    Only `masked` positions are candidates; what is committed is taken off it. Ties: the lowest position.
    """
    confidence = confidence.masked_fill(~masked, -math.inf)
    best = confidence.argsort(dim=-1, descending=True, stable=True)[:, :least]
    chosen = confidence >= (math.inf if threshold is None else threshold)
    chosen = chosen.scatter(1, best, True) & masked
    tokens[chosen] = choice[chosen]
    masked[chosen] = False
