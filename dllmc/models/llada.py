"""LLaDA (arXiv 2502.09992): a Llama-shaped transformer without a causal mask, in OLMo's parameter names.

Covers the configurations that are published: MHA or GQA, a tied or a separate head, an embedding larger
than the vocabulary, optional biases. Others are refused by name in `LLaDAConfig.from_dict`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dllmc.models.config import Fields
from dllmc.models.layers import RMSNorm, attend, positions_of, rotary_tables, rotate, split_heads


@dataclass(frozen=True)
class LLaDAConfig:
    """The fields of LLaDA's config.json that change what is computed. Sizes in elements."""

    d_model: int
    n_heads: int
    n_kv_heads: int
    n_layers: int
    mlp_hidden_size: int
    vocab_size: int
    embedding_size: int
    max_sequence_length: int
    rms_norm_eps: float
    rope_theta: float
    weight_tying: bool
    include_bias: bool
    include_qkv_bias: bool
    norm_affine: bool
    norm_bias: bool
    scale_logits: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str = "config.json") -> "LLaDAConfig":
        """Read config.json's fields. Raises `ConfigError` for a missing field or an unsupported value."""
        f = Fields(config, where)
        f.require_value("block_type", "llama", "Llama blocks (SwiGLU, pre-norm)")
        f.require_value("activation_type", "silu", "SwiGLU feed-forward layers")
        f.require_value("layer_norm_type", "rms", "RMS norms")
        f.require_value("rope", True, "rotary positions")
        for feature in ("alibi", "attention_layer_norm", "input_emb_norm"):
            f.require_value(feature, False, "this feature switched off")
        f.require_value("clip_qkv", None, "unclipped projections")
        width, heads = f.positive_int("d_model"), f.positive_int("n_heads")
        f.require_divides("n_heads", "d_model")
        default_kv_heads = 1 if config.get("multi_query_attention") else heads
        vocab_size = f.positive_int("vocab_size")
        built = cls(
            d_model=width,
            n_heads=heads,
            n_kv_heads=f.positive_int("n_kv_heads", default_kv_heads),
            n_layers=f.positive_int("n_layers"),
            mlp_hidden_size=f.positive_int("mlp_hidden_size", width * f.positive_int("mlp_ratio", 4)),
            vocab_size=vocab_size,
            embedding_size=f.positive_int("embedding_size", vocab_size),
            max_sequence_length=f.positive_int("max_sequence_length"),
            rms_norm_eps=f.number("rms_norm_eps", 1e-5),
            rope_theta=f.number("rope_theta", 10000.0),
            weight_tying=f.flag("weight_tying", True),
            include_bias=f.flag("include_bias", False),
            include_qkv_bias=f.flag("include_qkv_bias", False),
            norm_affine=f.flag("layer_norm_with_affine", True),
            norm_bias=f.flag("bias_for_layer_norm", f.flag("include_bias", False)),
            scale_logits=f.flag("scale_logits", False),
        )
        f.require(built.n_heads % built.n_kv_heads == 0, "n_kv_heads", f"a divisor of n_heads = {heads}")
        f.require(width // heads % 2 == 0, "n_heads", "an even head size d_model / n_heads")
        f.require(built.embedding_size >= vocab_size, "embedding_size", f"at least vocab_size = {vocab_size}")
        return built


class LLaDABlock(nn.Module):
    """Pre-norm attention and SwiGLU, each added to the residual stream: [B, T, d_model] -> the same."""

    def __init__(self, c: LLaDAConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = c.n_heads, c.n_kv_heads
        kv_width = c.d_model // c.n_heads * c.n_kv_heads
        qkv_bias = c.include_bias or c.include_qkv_bias
        self.attn_norm = RMSNorm(c.d_model, c.rms_norm_eps, c.norm_affine, c.norm_bias)
        self.q_proj = nn.Linear(c.d_model, c.d_model, bias=qkv_bias)
        self.k_proj = nn.Linear(c.d_model, kv_width, bias=qkv_bias)
        self.v_proj = nn.Linear(c.d_model, kv_width, bias=qkv_bias)
        self.attn_out = nn.Linear(c.d_model, c.d_model, bias=c.include_bias)
        self.ff_norm = RMSNorm(c.d_model, c.rms_norm_eps, c.norm_affine, c.norm_bias)
        self.ff_proj = nn.Linear(c.d_model, c.mlp_hidden_size, bias=c.include_bias)
        self.up_proj = nn.Linear(c.d_model, c.mlp_hidden_size, bias=c.include_bias)
        self.ff_out = nn.Linear(c.mlp_hidden_size, c.d_model, bias=c.include_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.attn_norm(x)
        q = rotate(split_heads(self.q_proj(h), self.heads), cos, sin)
        k = rotate(split_heads(self.k_proj(h), self.kv_heads), cos, sin)
        v = split_heads(self.v_proj(h), self.kv_heads)
        x = x + self.attn_out(attend(q, k, v))
        h = self.ff_norm(x)
        out: Tensor = x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))
        return out


class LLaDAModel(nn.Module):
    """input_ids [B, T] int64, position_ids [B, T] or None -> logits [B, T, embedding_size]."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        c = self.config = config
        transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(c.embedding_size, c.d_model),
                "blocks": nn.ModuleList(LLaDABlock(c) for _ in range(c.n_layers)),
                "ln_f": RMSNorm(c.d_model, c.rms_norm_eps, c.norm_affine, c.norm_bias),
            }
        )
        if not c.weight_tying:
            transformer["ff_out"] = nn.Linear(c.d_model, c.embedding_size, bias=c.include_bias)
        self.model = nn.ModuleDict({"transformer": transformer})

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        c = self.config
        layers: Any = self.model["transformer"]
        positions = positions_of(input_ids, position_ids)
        cos, sin = rotary_tables(positions, c.d_model // c.n_heads, c.rope_theta)
        x = layers["wte"](input_ids)
        for block in layers["blocks"]:
            x = block(x, cos, sin)
        x = layers["ln_f"](x)
        logits: Tensor = F.linear(x, layers["wte"].weight) if c.weight_tying else layers["ff_out"](x)
        return logits * (1 / math.sqrt(c.d_model)) if c.scale_logits else logits
