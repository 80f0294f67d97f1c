"""What one would write without dllmc: the published decoders, in plain eager torch over the reference models.

`dense` is LLaDA's own (arXiv 2502.09992): every step computes every position. `dual_cache` is Fast-dLLM's (arXiv
2505.22618): a block's first step computes every position and keeps all K/V, the others compute the block alone.
Both are greedy with low-confidence remasking and stop at no end token (semantics.md, "Commit"). Requests of one
length are one batch.

What makes them slow is published: a pass has the logits of all positions that it computes, and a softmax over all of
these logits in float64 (`softmax_dtype` says so; float32 is the milder choice). What was merely careless there is not
repeated: no noise at temperature 0, no logits kept from one step to the next, no K/V concatenated.

Dream's layers compute what LLaDA's do, under other names (`Body`), but that a row predicts the next position.
Both decoders run where the model and the prompts are, and as `Parts`: eager functions, or the same under
`torch.compile`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllmc.models.dream import DreamModel
from dllmc.models.layers import attend, rotary_tables, rotate, split_heads
from dllmc.models.llada import LLaDAModel

Model = LLaDAModel | DreamModel

# (tokens [B, T], block, whether this is the block's first step) -> (the span computed, its logits [B, span, V])
Forward = Callable[[Tensor, slice, bool], tuple[slice, Tensor]]
# (a layer, x [B, n, d_model], cos, sin) -> queries, keys, values [B, heads, n, head_dim], queries and keys rotated
Project = Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
# (a layer, x [B, n, d_model], q [B, q_heads, n, head_dim], k and v [B, kv_heads, T, head_dim]) -> the layer's output
Finish = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], Tensor]
# (logits [B, n, V], dtype of the softmax) -> the best token of each position and its probability, both [B, n]
Predict = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]


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


def _project(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h = layer.attn_norm(x)
    q = rotate(split_heads(layer.q_proj(h), layer.heads), cos, sin)
    k = rotate(split_heads(layer.k_proj(h), layer.kv_heads), cos, sin)
    return q, k, split_heads(layer.v_proj(h), layer.kv_heads)


def _finish(layer: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = x + layer.attn_out(attend(q, k, v))
    h = layer.ff_norm(x)
    out: Tensor = x + layer.ff_out(F.silu(layer.ff_proj(h)) * layer.up_proj(h))
    return out


def _predict(logits: Tensor, softmax_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    choice = logits.argmax(-1, keepdim=True)
    probability = torch.softmax(logits, -1, dtype=softmax_dtype)
    return choice[..., 0], probability.gather(-1, choice)[..., 0]


class Parts(NamedTuple):
    """What a pass is made of: a layer before and behind its cache, and the choice of tokens."""

    project: Project = _project
    finish: Finish = _finish
    predict: Predict = _predict


EAGER = Parts()


def compiled() -> Parts:
    """The parts under `torch.compile`, once for all layers and for each shape that they meet.

    What is between them is eager: the embedding, the last norm, the head's product, and writes to the cache.
    """
    return Parts(*(torch.compile(part, dynamic=False) for part in EAGER))


@dataclass(frozen=True)
class Body:
    """What both decoders compute of a model. scale: of the logits. shift: rows from a position back to its own."""

    embed: nn.Module
    layers: list[Any]
    norm: nn.Module
    head: Tensor
    head_dim: int
    kv_heads: int
    theta: float
    bias: Tensor | None = None
    scale: float = 1.0
    shift: int = 0

    @classmethod
    def of(cls, model: Model) -> "Body":
        c: Any = model.config
        if isinstance(model, DreamModel):
            parts: Any = model.model
            weight = parts["embed_tokens"].weight if model.lm_head is None else model.lm_head.weight
            layers = [_DreamLayer(layer) for layer in parts["layers"]]
            head_dim = c.hidden_size // c.num_attention_heads
            sizes = head_dim, c.num_key_value_heads, c.rope_theta
            return cls(parts["embed_tokens"], layers, parts["norm"], weight, *sizes, shift=1)
        parts = model.model["transformer"]
        head = parts["wte" if c.weight_tying else "ff_out"]
        scale = 1 / math.sqrt(c.d_model) if c.scale_logits else 1.0
        sizes = c.d_model // c.n_heads, c.n_kv_heads, c.rope_theta
        bias = getattr(head, "bias", None)
        return cls(parts["wte"], list(parts["blocks"]), parts["ln_f"], head.weight, *sizes, bias, scale)


class _DreamLayer(nn.Module):
    """A layer of Dream's, its parts under the names of LLaDA's."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.attn_norm, self.ff_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.q_proj, self.k_proj, self.v_proj = layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj
        self.attn_out = layer.self_attn.o_proj
        self.ff_proj, self.up_proj, self.ff_out = layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj
        self.heads, self.kv_heads = layer.self_attn.heads, layer.self_attn.kv_heads


@torch.inference_mode()
def dense(
    model: Model,
    prompts: Tensor,
    mask_id: int,
    pace: Pace,
    softmax_dtype: torch.dtype = torch.float64,
    parts: Parts = EAGER,
) -> Decoded:
    """Decode prompts [B, P] int64 with a forward pass over all P + gen_length positions at every step."""
    body = Body.of(model)

    def forward(x: Tensor, block: slice, first: bool) -> tuple[slice, Tensor]:
        span = slice(0, x.shape[1])
        return span, _forward_span(body, x, span, None, parts)

    return _decode(forward, prompts, mask_id, pace, softmax_dtype, parts.predict, body.shift)


@torch.inference_mode()
def dual_cache(
    model: Model,
    prompts: Tensor,
    mask_id: int,
    pace: Pace,
    softmax_dtype: torch.dtype = torch.float64,
    parts: Parts = EAGER,
) -> Decoded:
    """As `dense`, but a block's steps after its first compute the block alone, against cached K/V of all else."""
    body = Body.of(model)
    batch, length = prompts.shape[0], prompts.shape[1] + pace.gen_length
    kv = body.head.new_empty(len(body.layers), 2, batch, body.kv_heads, length, body.head_dim)

    def forward(x: Tensor, block: slice, first: bool) -> tuple[slice, Tensor]:
        span = slice(0, length) if first else slice(block.start - body.shift, block.stop)
        return span, _forward_span(body, x[:, span], span, kv, parts)

    return _decode(forward, prompts, mask_id, pace, softmax_dtype, parts.predict, body.shift)


def _forward_span(body: Body, ids: Tensor, span: slice, kv: Tensor | None, parts: Parts) -> Tensor:
    """The model over ids [B, n] at the positions of `span`, attending to all of `kv`: logits [B, n, V].

    kv: [layers, 2, B, kv_heads, T, head_dim], keys after RoPE; the span's own are replaced in place. None: there is
    nothing else to attend to.
    """
    positions = torch.arange(span.start, span.stop, device=ids.device)[None]
    cos, sin = rotary_tables(positions, body.head_dim, body.theta)
    x = body.embed(ids)
    for index, layer in enumerate(body.layers):
        q, keys, values = parts.project(layer, x, cos, sin)
        if kv is not None:
            kv[index, 0, :, :, span], kv[index, 1, :, :, span] = keys, values
            keys, values = kv[index]
        x = parts.finish(layer, x, q, keys, values)
    logits = F.linear(body.norm(x), body.head, body.bias)
    return logits * body.scale if body.scale != 1 else logits


def _decode(
    forward: Forward,
    prompts: Tensor,
    mask_id: int,
    pace: Pace,
    softmax_dtype: torch.dtype,
    predict: Predict,
    shift: int,
) -> Decoded:
    """The loop over blocks and steps that both decoders share. Prompts are of one token at least."""
    start, end = prompts.shape[1], prompts.shape[1] + pace.gen_length
    x = F.pad(prompts, (0, pace.gen_length), value=mask_id)
    masked = torch.ones_like(x, dtype=torch.bool)  # by position, so a committed mask_id stays; read inside blocks
    passes = 0
    for block_start in range(start, end, pace.block_length):
        block = slice(block_start, min(block_start + pace.block_length, end))
        step = 0
        while masked[:, block].any():
            span, logits = forward(x, block, step == 0)
            choice, confidence = predict(logits, softmax_dtype)
            del logits  # not kept while the next pass computes its own
            inside = slice(block.start - shift - span.start, block.stop - shift - span.start)
            least = pace.least(block.stop - block.start, step)
            _commit(x[:, block], masked[:, block], choice[:, inside], confidence[:, inside], least, pace.threshold)
            passes, step = passes + 1, step + 1
    return Decoded(x[:, start:], passes)


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
