"""Dream (arXiv 2508.15487): Qwen2's transformer without a causal mask; row i - 1 predicts position i.

The shift is the decoder's business (`ModelSpec.shifted`): the module returns logits as they come.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dllmc.models.config import Fields
from dllmc.models.layers import RMSNorm, attend, positions_of, rotary_tables, rotate, split_heads


@dataclass(frozen=True)
class DreamConfig:
    """The fields of Dream's config.json that change what is computed. Sizes in elements."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str = "config.json") -> "DreamConfig":
        """Read config.json's fields. Raises `ConfigError` for a missing field or an unsupported value."""
        f = Fields(config, where)
        f.require_value("hidden_act", "silu", "SwiGLU feed-forward layers")
        f.require_value("rope_scaling", None, "unscaled rotary positions")
        f.require_value("use_sliding_window", False, "attention over the whole sequence")
        width, heads = f.positive_int("hidden_size"), f.positive_int("num_attention_heads")
        f.require_divides("num_attention_heads", "hidden_size")
        built = cls(
            hidden_size=width,
            intermediate_size=f.positive_int("intermediate_size"),
            num_hidden_layers=f.positive_int("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=f.positive_int("num_key_value_heads", heads),
            vocab_size=f.positive_int("vocab_size"),
            max_position_embeddings=f.positive_int("max_position_embeddings"),
            rms_norm_eps=f.number("rms_norm_eps", 1e-6),
            rope_theta=f.number("rope_theta", 10000.0),
            tie_word_embeddings=f.flag("tie_word_embeddings", False),
        )
        kv_heads = built.num_key_value_heads
        f.require(heads % kv_heads == 0, "num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
        f.require(width // heads % 2 == 0, "num_attention_heads", "an even head size")
        return built


class DreamAttention(nn.Module):
    """Grouped-query attention with biases on q, k, v: [B, T, hidden_size] -> the same."""

    def __init__(self, c: DreamConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = c.num_attention_heads, c.num_key_value_heads
        kv_width = c.hidden_size // self.heads * self.kv_heads
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=True)
        self.k_proj = nn.Linear(c.hidden_size, kv_width, bias=True)
        self.v_proj = nn.Linear(c.hidden_size, kv_width, bias=True)
        self.o_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = rotate(split_heads(self.q_proj(x), self.heads), cos, sin)
        k = rotate(split_heads(self.k_proj(x), self.kv_heads), cos, sin)
        v = split_heads(self.v_proj(x), self.kv_heads)
        out: Tensor = self.o_proj(attend(q, k, v))
        return out


class DreamMLP(nn.Module):
    """SwiGLU: [B, T, hidden_size] -> the same."""

    def __init__(self, c: DreamConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DreamLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream: [B, T, hidden_size] -> the same."""

    def __init__(self, c: DreamConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = DreamAttention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = DreamMLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class DreamModel(nn.Module):
    """input_ids [B, T] int64, position_ids [B, T] or None -> logits [B, T, vocab_size], not shifted."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        c = self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size),
                "layers": nn.ModuleList(DreamLayer(c) for _ in range(c.num_hidden_layers)),
                "norm": RMSNorm(c.hidden_size, c.rms_norm_eps),
            }
        )
        self.lm_head = None if c.tie_word_embeddings else nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        c = self.config
        positions = positions_of(input_ids, position_ids)
        cos, sin = rotary_tables(positions, c.hidden_size // c.num_attention_heads, c.rope_theta)
        layers: Any = self.model
        x = layers["embed_tokens"](input_ids)
        for layer in layers["layers"]:
            x = layer(x, cos, sin)
        x = layers["norm"](x)
        logits: Tensor = F.linear(x, layers["embed_tokens"].weight) if self.lm_head is None else self.lm_head(x)
        return logits
