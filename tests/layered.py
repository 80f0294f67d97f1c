"""The two model families layer by layer in float64, written out so that a test can stand inside attention.

What is computed comes from the papers (LLaDA, arXiv 2502.09992; Dream, arXiv 2508.15487), the weights from a module's
`state_dict`. Any tokens at any positions can be computed: the caller says what their queries attend to.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dllmc.models.dream import DreamModel
from dllmc.models.llada import LLaDAModel

Array = NDArray[np.float64]
Attend = Callable[[int, Array, Array, Array], Array]
"""(layer, q [q_heads, n, head_dim], k [kv_heads, n, head_dim], v as k; q and k after RoPE) -> as q."""


class LayeredModel(Protocol):
    """Tokens `ids [n]` at `positions [n]` -> logits [n, V]; `attend` is called once a layer, in order."""

    def __call__(self, ids: Sequence[int], positions: Sequence[int], attend: Attend) -> Array: ...


@dataclass(frozen=True)
class Names:
    """Where a family's `state_dict` has its weights; those of a layer below `layer`."""

    embedding: str
    layer: str
    attention_norm: str
    q: str
    k: str
    v: str
    attention_out: str
    mlp_norm: str
    gate: str
    up: str
    down: str
    final_norm: str
    head: str


LLADA = Names(
    embedding="model.transformer.wte",
    layer="model.transformer.blocks.{}",
    attention_norm="attn_norm",
    q="q_proj",
    k="k_proj",
    v="v_proj",
    attention_out="attn_out",
    mlp_norm="ff_norm",
    gate="ff_proj",
    up="up_proj",
    down="ff_out",
    final_norm="model.transformer.ln_f",
    head="model.transformer.ff_out",
)
DREAM = Names(
    embedding="model.embed_tokens",
    layer="model.layers.{}",
    attention_norm="input_layernorm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    attention_out="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    final_norm="model.norm",
    head="lm_head",
)


def layered(module: nn.Module) -> LayeredModel:
    """A reference model's twin. Raises TypeError for a module of another family."""
    if isinstance(module, LLaDAModel):
        c = module.config
        scale = 1 / math.sqrt(c.d_model) if c.scale_logits else 1.0
        return Transformer(module, LLADA, c.n_layers, c.n_heads, c.n_kv_heads, c.rms_norm_eps, c.rope_theta, scale)
    if isinstance(module, DreamModel):
        d = module.config
        heads = d.num_attention_heads, d.num_key_value_heads
        return Transformer(module, DREAM, d.num_hidden_layers, *heads, d.rms_norm_eps, d.rope_theta, 1.0)
    raise TypeError(f"expected a LLaDAModel or a DreamModel, found {type(module).__name__}")


class Transformer:
    """Pre-norm blocks of attention and SwiGLU with RoPE: a `LayeredModel`."""

    def __init__(
        self,
        module: nn.Module,
        names: Names,
        layers: int,
        q_heads: int,
        kv_heads: int,
        eps: float,
        theta: float,
        logit_scale: float,
    ) -> None:
        self.weights: dict[str, Array] = {
            name: tensor.detach().double().numpy() for name, tensor in module.state_dict().items()
        }
        self.names, self.layers, self.q_heads, self.kv_heads = names, layers, q_heads, kv_heads
        self.eps, self.theta, self.logit_scale = eps, theta, logit_scale

    def __call__(self, ids: Sequence[int], positions: Sequence[int], attend: Attend) -> Array:
        n = self.names
        embedding = self.weights[f"{n.embedding}.weight"]
        x = embedding[list(ids)]
        for index in range(self.layers):
            layer = n.layer.format(index)
            h = self.norm(x, f"{layer}.{n.attention_norm}")
            q = self.rotate(self.heads(h, f"{layer}.{n.q}", self.q_heads), positions)
            k = self.rotate(self.heads(h, f"{layer}.{n.k}", self.kv_heads), positions)
            v = self.heads(h, f"{layer}.{n.v}", self.kv_heads)
            attended = attend(index, q, k, v).swapaxes(0, 1).reshape(len(ids), -1)
            x = x + self.linear(attended, f"{layer}.{n.attention_out}")
            h = self.norm(x, f"{layer}.{n.mlp_norm}")
            gate, up = self.linear(h, f"{layer}.{n.gate}"), self.linear(h, f"{layer}.{n.up}")
            x = x + self.linear(gate / (1 + np.exp(-gate)) * up, f"{layer}.{n.down}")
        x = self.norm(x, n.final_norm)
        tied = f"{n.head}.weight" not in self.weights
        return self.logit_scale * (x @ embedding.T if tied else self.linear(x, n.head))

    def linear(self, x: Array, name: str) -> Array:
        """Multiply by W.T and add the bias if there is one: [n, in] -> [n, out]."""
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def norm(self, x: Array, name: str) -> Array:
        """RMSNorm over the last axis, with whatever of weight and bias there is."""
        y: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.eps)
        y = y * self.weights.get(f"{name}.weight", 1.0)
        return y + self.weights.get(f"{name}.bias", 0.0)

    def heads(self, x: Array, name: str, heads: int) -> Array:
        """A projection split into its heads: [n, width] -> [heads, n, head_dim]."""
        return self.linear(x, name).reshape(len(x), heads, -1).swapaxes(0, 1)

    def rotate(self, x: Array, positions: Sequence[int]) -> Array:
        """RoPE: element j of a head's first half and j of its second turn by position * theta^(-j / half)."""
        half = x.shape[-1] // 2
        angle = np.array(positions)[:, None] * self.theta ** (-np.arange(half) / half)
        first, second = x[..., :half], x[..., half:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


def attention(q: Array, k: Array, v: Array) -> Array:
    """Softmax attention of q [q_heads, n, head_dim] to k, v [kv_heads, m, head_dim], m >= 1: -> as q.

    Query heads come in equal groups, one a KV head.
    """
    group = len(q) // len(k)
    out = np.empty_like(q)
    for g in range(len(q)):
        scores = q[g] @ k[g // group].T / math.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[g] = weights / weights.sum(-1, keepdims=True) @ v[g // group]
    return out


def shaken(model: LayeredModel, seed: int) -> LayeredModel:
    """The model with random errors of float32's size: 1e-6 of each element of q, k and v, and 5e-6 in the logits."""
    generator = np.random.default_rng(seed)

    def noise(x: Array) -> Array:
        return generator.uniform(-1, 1, x.shape)

    def run(ids: Sequence[int], positions: Sequence[int], attend: Attend) -> Array:
        def attend_shaken(layer: int, *qkv: Array) -> Array:
            return attend(layer, *(x * (1 + 1e-6 * noise(x)) for x in qkv))

        logits = model(ids, positions, attend_shaken)
        return logits + 5e-6 * noise(logits)

    return run
